"""Calibration: whether what is said with probability p is so in a share p of the cases.

Source: Guo et al. 2017, arXiv:1706.04599: bins of equal width, and eq. 3 for the expected calibration error. With few
cases in a bin the error is biased upwards, as chance alone moves shares away from probabilities. Its resamples are
biased once more, so that the value of a well calibrated model may be the lower end of its interval.
"""

from typing import Any

import numpy as np

from rmjax.evaluate.estimates import Estimates
from rmjax.statistics import BINS, bins_of, ece


def add_ece(
    found: Estimates, at: np.ndarray, confidence: np.ndarray, right: np.ndarray, weight: np.ndarray, least: float
) -> None:
    """Adds "ece" of cases [n] of the rows `at` [n]."""
    bin = bins_of(confidence, least)
    apart = found.per_prompt(at, weight * (confidence - right), bin, BINS)
    found.add("ece", ece, apart, found.per_prompt(at, weight, bin, BINS))


def reliability(confidence: np.ndarray, right: np.ndarray, weight: np.ndarray, least: float) -> dict[str, list[Any]]:
    """The reliability diagram.

    Args:
        confidence: float [n], from `least` to 1.
        right: float [n], 1 where what it is confident of is so, 0 where not, a half where neither.
        weight: float [n], above 0.
        least: lower edge of the first bin.

    Returns:
        {"edges": [11], "counts": [10], "predicted": [10], "observed": [10]}; the means are None in empty bins.
    """
    bin = bins_of(confidence, least)
    counts, total = np.bincount(bin, minlength=BINS), np.bincount(bin, weight, BINS)
    mean = lambda x: [float(s / t) if n else None for s, t, n in zip(np.bincount(bin, weight * x, BINS), total, counts)]
    return {
        "edges": np.linspace(least, 1, BINS + 1).tolist(),
        "counts": counts.tolist(),
        "predicted": mean(confidence),
        "observed": mean(right),
    }
