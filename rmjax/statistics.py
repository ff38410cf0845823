"""Statistics of predictions and labels, in numpy, that several measures and reports share.

Numbers come as arrays [n]; a statistic that is not defined is NaN: of fewer than two numbers, or without variance.
"""

import math

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


def softmax(x: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    powers = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def first_where(flags: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """int64 [groups]: the index of the first flag, bool [n], of each group [n]; n where it has none."""
    first = np.full(groups, len(flags))
    np.minimum.at(first, group[flags], np.flatnonzero(flags))
    return first


# ----------------------------------------------------------------------------------------------------
# Distributions and calibration
# ----------------------------------------------------------------------------------------------------

TAIL = 0.025  # beyond either end of a 95 % interval
NORMAL = 1.959964  # that many deviations are where the TAIL of a normal distribution begins
QUANTILES = (5, 25, 50, 75, 95)  # percent


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Quantiles of numbers [n], as "chosen_p05": how a distribution moves while a model is trained. {} of none."""
    if not len(values):
        return {}
    return {f"{name}_p{q:02}": float(x) for q, x in zip(QUANTILES, np.quantile(values, [q / 100 for q in QUANTILES]))}


def least_cases(share: float) -> int:
    """How many cases show that a share is at least this, if all of them are hits: Clopper and Pearson 1934."""
    return math.ceil(math.log(TAIL) / math.log(share)) if 0 < share < 1 else 1


def least_hits(share: float, cases: int) -> float:
    """Which share of the cases must be hits to show that it is at least this: the end of Wilson's interval (1927)."""
    wide = NORMAL**2 / cases
    return (share + wide / 2 + (wide * share * (1 - share) + wide**2 / 4) ** 0.5) / (1 + wide)


BINS = 10  # of a reliability diagram


def bins_of(confidence: np.ndarray, least: float) -> np.ndarray:
    """int64 [n]: the bin of each probability from `least` to 1; the last one has its upper edge, too."""
    return np.clip(((confidence - least) / (1 - least) * BINS).astype(np.int64), 0, BINS - 1)


def ece(totals: np.ndarray) -> np.ndarray:
    """The error [...] from totals [..., 2 BINS]: weight times (confidence - right) of each bin, then its weight."""
    return np.abs(totals[..., :BINS]).sum(-1) / totals[..., BINS:].sum(-1)
