"""Statistics of two numbers as functions of sums, ranks, and histograms: what measures of several kinds share."""

from typing import Any

import numpy as np

from rmjax.batches import measure
from rmjax.evaluate.estimates import Estimates
from rmjax.statistics import standardized

NOTHING = 1e-9  # a variance below this share of that of all numbers is rounding


def second(found: Estimates, at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float64 [prompts, 6]: sums of 1, x, y, x^2, y^2 and x y of numbers [n] twice, of the rows `at` [n]."""
    return np.concatenate([found.per_prompt(at, v) for v in (np.ones(len(at)), x, y, x * x, y * y, x * y)], 1)


def _variances(t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means of x and y, their variances and their covariance, from totals [..., 6] of `second`."""
    x, y, xx, yy, xy = (t[..., i] / t[..., 0] for i in range(1, 6))
    return x, y, xx - x**2, yy - y**2, xy - x * y


def correlation(t: np.ndarray) -> np.ndarray:
    """Pearson's [...] from totals of `second` of standardized numbers; NaN where one of them does not vary."""
    _, _, of_x, of_y, both = _variances(t)
    varies = (of_x > NOTHING) & (of_y > NOTHING)
    return np.where(varies, both / np.sqrt(np.where(varies, of_x * of_y, 1.0)), np.nan)


def kappa(t: np.ndarray) -> np.ndarray:
    """Cohen's kappa with quadratic weights (1968) from totals of `second` of ratings: 1 - E (x - y)^2 / E (x - y')^2,
    where y' are the ratings y in an order of their own."""
    x, y, of_x, of_y, both = _variances(t)
    by_chance = of_x + of_y + (x - y) ** 2
    varies = by_chance > NOTHING
    return np.where(varies, 2 * both / np.where(varies, by_chance, 1.0), np.nan)


def add_correlation(found: Estimates, key: str, at: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Adds Pearson's correlation of numbers [n] twice, of the rows `at` [n]."""
    found.add(key, correlation, second(found, at, standardized(x), standardized(y)))


def add_deviation(found: Estimates, key: str, at: np.ndarray, x: np.ndarray) -> None:
    """Adds the standard deviation of numbers [n] of the rows `at` [n]."""
    apart = x - x.mean()  # keeps the digits of a small variance
    of = lambda t: np.sqrt(np.maximum(t[..., 2] / t[..., 0] - (t[..., 1] / t[..., 0]) ** 2, 0.0))
    found.add(key, of, *(found.per_prompt(at, apart**power) for power in range(3)))


def edges_of(*values: np.ndarray, whole: bool = False) -> np.ndarray:
    """Edges of a histogram of all these numbers; of whole ones around each, where these are not too many."""
    every = np.concatenate(values) if sum(map(len, values)) else np.zeros(1)
    low, high = every.min(), every.max()
    if whole and high - low < measure.BINS:
        return np.arange(np.floor(low + 0.5) - 0.5, np.floor(high + 0.5) + 1)
    return np.histogram_bin_edges(every, measure.BINS, (low, high))


def over(edges: np.ndarray, values: np.ndarray) -> dict[str, list[Any]]:
    """A histogram over given edges."""
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
