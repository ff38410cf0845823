"""Correlations, deviations and calibration as functions of sums, and histograms: what measures of several kinds share.

A model is calibrated if what it says with probability p is so in a share p of the cases. Source: Guo et al. 2017,
arXiv:1706.04599: bins of equal width, and eq. 3 for the expected calibration error. With few cases in a bin the error
is biased upwards, as chance alone moves shares away from probabilities. Its resamples are biased once more, so that
the value of a well calibrated model may be the lower end of its interval.
"""

from typing import Any

import numpy as np

from rmjax.batches import measure
from rmjax.evaluate.estimates import Estimates
from rmjax.statistics import BINS, bins_of, ece, standardized

NOTHING = 1e-9  # a variance below this share of that of all numbers is rounding


def second(estimates: Estimates, at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float64 [prompts, 6]: sums of 1, x, y, x^2, y^2 and x y of numbers [n] twice, of the rows `at` [n]."""
    return np.concatenate([estimates.per_prompt(at, v) for v in (np.ones(len(at)), x, y, x * x, y * y, x * y)], 1)


def _variances(t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means of x and y, their variances and their covariance, from totals [..., 6] of `second`."""
    x, y, xx, yy, xy = (t[..., i] / t[..., 0] for i in range(1, 6))
    return x, y, xx - x**2, yy - y**2, xy - x * y


def correlation(t: np.ndarray) -> np.ndarray:
    """Pearson's [...] from totals of `second` of standardized numbers; NaN where one of them does not vary."""
    _, _, var_x, var_y, covariance = _variances(t)
    varies = (var_x > NOTHING) & (var_y > NOTHING)
    return np.where(varies, covariance / np.sqrt(np.where(varies, var_x * var_y, 1.0)), np.nan)


def kappa(t: np.ndarray) -> np.ndarray:
    """Cohen's kappa with quadratic weights (1968) from totals of `second` of ratings: 1 - E (x - y)^2 / E (x - y')^2,
    where y' are the ratings y in an order of their own."""
    x, y, var_x, var_y, covariance = _variances(t)
    by_chance = var_x + var_y + (x - y) ** 2
    varies = by_chance > NOTHING
    return np.where(varies, 2 * covariance / np.where(varies, by_chance, 1.0), np.nan)


def add_correlation(estimates: Estimates, key: str, at: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Adds Pearson's correlation of numbers [n] twice, of the rows `at` [n]."""
    estimates.add(key, correlation, second(estimates, at, standardized(x), standardized(y)))


def add_deviation(estimates: Estimates, key: str, at: np.ndarray, x: np.ndarray) -> None:
    centered = x - x.mean()  # keeps the digits of a small variance
    deviation = lambda t: np.sqrt(np.maximum(t[..., 2] / t[..., 0] - (t[..., 1] / t[..., 0]) ** 2, 0.0))
    estimates.add(key, deviation, *(estimates.per_prompt(at, centered**power) for power in range(3)))


def add_ece(
    estimates: Estimates,
    at: np.ndarray,
    confidence: np.ndarray,
    right: np.ndarray,
    weight: np.ndarray,
    least: float,
    key: str = "ece",
) -> None:
    """Adds the expected calibration error of cases [n] of the rows `at` [n]; see `reliability`."""
    bin = bins_of(confidence, least)
    gaps = estimates.per_prompt(at, weight * (confidence - right), bin, BINS)
    estimates.add(key, ece, gaps, estimates.per_prompt(at, weight, bin, BINS))


def reliability(confidence: np.ndarray, right: np.ndarray, weight: np.ndarray, least: float) -> dict[str, list[Any]]:
    """The reliability diagram: {"edges": [11], "counts": [10], "predicted": [10], "observed": [10]}.

    All are float [n]: confidence from `least`, the lower edge of the first bin, to 1; right 1 where what it is
    confident of is so, 0 where not, a half where neither; weight above 0. The means are None in empty bins.
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


def edges_of(*values: np.ndarray, whole: bool = False) -> np.ndarray:
    """Edges of a histogram of all these numbers; of whole ones around each, where these are not too many."""
    every = np.concatenate(values) if sum(map(len, values)) else np.zeros(1)
    low, high = every.min(), every.max()
    if whole and high - low < measure.BINS:
        return np.arange(np.floor(low + 0.5) - 0.5, np.floor(high + 0.5) + 1)
    return np.histogram_bin_edges(every, measure.BINS, (low, high))


def over(edges: np.ndarray, values: np.ndarray) -> dict[str, list[Any]]:
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
