"""95 % intervals by the bootstrap over prompts: what else the same people could have asked.

Groups of one prompt are drawn together, since their scores go together (a cluster bootstrap: Field and Welsh 2007).
A statistic is written as a function of sums, so that a resample costs a matrix product and no statistic is computed
anew from single rows. Percentile intervals (Efron 1979).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

RESAMPLES = 1000
CHUNK = 4_000_000  # drawn numbers in memory


def estimate(
    sums: np.ndarray,
    prompt: np.ndarray,
    of: Callable[[np.ndarray], np.ndarray],
    *,
    strata: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, float | None]]:
    """Statistics of all rows, with the 2.5 % and 97.5 % quantiles of those of resampled prompts.

    >>> hits = np.array([1.0, 0, 1, 1])
    >>> estimate(np.stack([hits, np.ones(4)], 1), np.arange(4), lambda t: (t[..., 0] / t[..., 1])[..., None])
    [{'value': 0.75, 'low': 0.25, 'high': 1.0}]

    Args:
        sums: float [n, m], what each row adds.
        prompt: [n] whose rows are drawn together.
        of: takes totals [..., m] and gives the statistics [..., q]; NaN where one is not defined.
        strata: [n], of each prompt: as many prompts are drawn of each as there are, so that no subset of a benchmark
            gets lost; None is one.
        resamples: how many.
        seed: of the draws.

    Returns:
        q times {"value", "low", "high"}; None for what is not finite, and for both ends with fewer than two prompts.
    """
    prompts, first, inverse = np.unique(prompt, return_index=True, return_inverse=True)
    totals = np.zeros((len(prompts), sums.shape[1]))
    np.add.at(totals, inverse, sums)
    stratum = np.zeros(len(prompts), np.int64) if strata is None else np.unique(strata[first], return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    drawn = np.zeros((resamples, sums.shape[1]))
    for s in np.unique(stratum):
        members = totals[stratum == s]
        step = max(1, CHUNK // len(members))
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            at = rng.integers(0, len(members), (rows, len(members))) + len(members) * np.arange(rows)[:, None]
            counts = np.bincount(at.ravel(), minlength=rows * len(members)).reshape(rows, -1)
            drawn[start : start + rows] += counts @ members
    with np.errstate(divide="ignore", invalid="ignore"):
        values, found = np.atleast_1d(of(totals.sum(0))), of(drawn)
    made: list[dict[str, float | None]] = []
    for value, those in zip(values, found.reshape(resamples, -1).T):
        known = those[np.isfinite(those)]
        known = known if len(prompts) > 1 and np.isfinite(value) else known[:0]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        made.append({"value": finite(value), "low": finite(low), "high": finite(high)})
    return made


def finite(x: Any) -> float | None:
    """A float for JSON; None where it is not finite."""
    return float(x) if np.isfinite(x) else None
