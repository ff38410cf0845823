"""Many statistics of one set from one bootstrap: each is a function of sums that every prompt adds to.

All share the resamples, so 100,000 prompts cost one draw of them, whatever the number of statistics.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from rmjax.evaluate import bootstrap

Estimate = dict[str, float | None]
Of = Callable[[np.ndarray], np.ndarray]  # totals [..., m] to a statistic [...]
TAIL = 0.025  # of the resamples, and of the exact interval, beyond either end


def ratio(totals: np.ndarray) -> np.ndarray:
    """First over second of [..., 2]."""
    return totals[..., 0] / totals[..., 1]


@dataclasses.dataclass(frozen=True)
class _Statistic:
    """What makes it of the totals of all columns; of a ratio its first column; of a share that of its denominator."""

    of: Of
    ratio_at: int | None = None
    denominator: int | None = None


class Estimates:
    """Collects statistics of rows that belong to prompts; `all` draws once and gives every one with its interval."""

    def __init__(self, prompt: np.ndarray):
        """Starts with none.

        Args:
            prompt: [n], that each row belongs to; rows of one prompt are drawn together.
        """
        distinct, self._prompt = np.unique(prompt, return_inverse=True)
        self.prompts = len(distinct)
        self._columns: list[np.ndarray] = []
        self._statistics: dict[Hashable, _Statistic] = {}

    def per_prompt(self, at: np.ndarray, values: np.ndarray, bin: np.ndarray | None = None, bins: int = 1) -> Any:
        """float64 [prompts, bins]: sums of values [m] of the rows `at` [m], apart by the bin [m] that each is in."""
        where = self._prompt[at] * bins + (0 if bin is None else bin)
        return np.bincount(where, values, self.prompts * bins).reshape(self.prompts, bins)

    def add(self, key: Hashable, of: Of, *columns: np.ndarray, share: bool = False) -> None:
        """Adds a statistic of the totals of columns [prompts, m] side by side; see `share` for the last argument."""
        start = sum(x.shape[1] for x in self._columns)
        self._columns += columns
        stop = sum(x.shape[1] for x in self._columns)
        self._statistics[key] = _Statistic(
            lambda totals: of(totals[..., start:stop]), start if of is ratio else None, stop - 1 if share else None
        )

    def combine(self, key: Hashable, keys: Sequence[Hashable], of: Of) -> None:
        """Adds a statistic of other statistics [..., q]."""
        parts = [self._statistics[name].of for name in keys]
        self._statistics[key] = _Statistic(lambda totals: of(np.stack([part(totals) for part in parts], -1)))

    def mean(self, key: Hashable, at: np.ndarray, values: np.ndarray, weight: np.ndarray, share: bool = False) -> None:
        """Adds the weighted mean of values [m] of the rows `at` [m]."""
        self.add(key, ratio, self.per_prompt(at, weight * values), self.per_prompt(at, weight), share=share)

    def share(self, key: Hashable, at: np.ndarray, hits: np.ndarray, weight: np.ndarray) -> None:
        """Adds a weighted share of hits [m], from 0 to 1.

        Where all are hits, or none is, every resample says the same, however few there are. The open end is then of
        Clopper and Pearson 1934 for as many prompts: a share of 1 of n has its lower end at 0.025^(1/n).
        """
        self.mean(key, at, hits, weight, share=True)

    @property
    def keys(self) -> list[Hashable]:
        """Of the statistics so far."""
        return list(self._statistics)

    def sums(self) -> dict[str, np.ndarray]:
        """Numerator and denominator, float64 [2], of every statistic that is a ratio; they add over sets of rows."""
        totals, kept = self._totals(), self._statistics.items()
        return {str(key): totals[s.ratio_at : s.ratio_at + 2] for key, s in kept if s.ratio_at is not None}

    def others(self) -> dict[str, float]:
        """The statistics that are no ratios, without intervals; those that are not defined are left out."""
        with np.errstate(divide="ignore", invalid="ignore"):
            totals, kept = self._totals(), self._statistics.items()
            values = {str(key): float(s.of(totals)) for key, s in kept if s.ratio_at is None}
        return {name: value for name, value in values.items() if not np.isnan(value)}

    def _totals(self) -> np.ndarray:
        return np.concatenate(self._columns, 1).sum(0)

    def all(self) -> dict[Hashable, Estimate]:
        """Every statistic by its key: {"value", "low", "high"}, None where it is not defined.

        An interval reaches to its value: that of a calibration error, whose resamples are biased upwards, may not.
        """
        if not self._statistics:
            return {}
        sums, wanted = np.concatenate(self._columns, 1), self._statistics.values()
        of = lambda totals: np.stack([s.of(totals) for s in wanted], -1)
        found = dict(zip(self._statistics, bootstrap.estimate(sums, np.arange(self.prompts), of)))
        for key, one in self._statistics.items():
            _reach(found[key])
            if one.denominator is not None:
                _open_end(found[key], int((sums[:, one.denominator] > 0).sum()))
        return found


def _reach(estimate: Estimate) -> None:
    """Widens an interval to its value in place."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is not None and low is not None and high is not None:
        estimate |= {"low": min(low, value), "high": max(high, value)}


def _open_end(estimate: Estimate, prompts: int) -> None:
    """Widens the interval of a share of 0 or 1 in place; see Estimates.share."""
    if estimate["value"] not in (0.0, 1.0) or estimate["low"] is None:
        return
    end = TAIL ** (1 / prompts)
    estimate |= {"low": end} if estimate["value"] else {"high": 1 - end}


def constant(value: float | None) -> Estimate:
    """An estimate of what is known without data: both ends are the value."""
    return {"value": value, "low": value, "high": value}
