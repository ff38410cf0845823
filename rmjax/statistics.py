"""Statistics of predictions and labels, in numpy; every metric that several objectives or reports share.

Numbers come as arrays [n]; a statistic that is not defined is NaN: of fewer than two numbers, or without variance.
"""

from collections.abc import Mapping

import numpy as np


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal numbers sharing theirs."""
    return pearson(ranks(x), ranks(y))


def ranks(x: np.ndarray) -> np.ndarray:
    """From 1 on; equal numbers share the middle of their places."""
    _, of, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[of]


def standardized(x: np.ndarray) -> np.ndarray:
    """With mean 0 and variance 1; all 0 where it does not vary."""
    x = np.asarray(x, np.float64)
    return (x - x.mean()) / x.std() if len(x) and np.ptp(x) > 0 else np.zeros(len(x))


def quadratic_kappa(x: np.ndarray, y: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968) of ratings that are whole numbers.

    Of ratings x and y it is 1 - E (x - y)^2 / E (x - y')^2, where y' are the ratings y in an order of their own: the
    second expectation is Var x + Var y + (E x - E y)^2.
    """
    if len(x) < 2:
        return float("nan")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    by_chance = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(1 - np.mean((x - y) ** 2) / by_chance) if by_chance else float("nan")


# ----------------------------------------------------------------------------------------------------
# Distributions and calibration
# ----------------------------------------------------------------------------------------------------

QUANTILES = (5, 25, 50, 75, 95)  # percent


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Quantiles of numbers [n], as "chosen_p05": how a distribution moves while a model is trained. {} of none."""
    if not len(values):
        return {}
    return {f"{name}_p{q:02}": float(x) for q, x in zip(QUANTILES, np.quantile(values, [q / 100 for q in QUANTILES]))}


BINS = 10  # of a reliability diagram


def bins_of(confidence: np.ndarray, least: float) -> np.ndarray:
    """int64 [n]: the bin of each probability from `least` to 1; the last one has its upper edge, too."""
    return np.clip(((confidence - least) / (1 - least) * BINS).astype(np.int64), 0, BINS - 1)


def ece(totals: np.ndarray) -> np.ndarray:
    """The error [...] from totals [..., 2 BINS]: weight times (confidence - right) of each bin, then its weight."""
    return np.abs(totals[..., :BINS]).sum(-1) / totals[..., BINS:].sum(-1)


def calibration_error(outcomes: Mapping[str, np.ndarray], least: float = 0.5) -> dict[str, float]:
    """Expected calibration error; Guo et al. 2017, arXiv:1706.04599, eq. 3.

    Args:
        outcomes: float [n] each: `confidence`, from `least` to 1; `right`, 1 where what it is confident of is so, 0
            where not; `weight`. NaN where there is nothing.
        least: lower end of the first bin.

    Returns:
        {"ece": ...}; {} of nothing.
    """
    here = ~np.isnan(outcomes["confidence"])
    confidence, right, weight = (outcomes[name][here].astype(np.float64) for name in ("confidence", "right", "weight"))
    if not weight.sum():
        return {}
    sums = [np.bincount(bins_of(confidence, least), x, BINS) for x in (weight * (confidence - right), weight)]
    return {"ece": float(ece(np.concatenate(sums)))}
