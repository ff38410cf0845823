"""Statistics with 95 % intervals by the bootstrap over prompts: what else the same people could have asked.

Groups of one prompt are drawn together, since their scores go together (a cluster bootstrap: Field and Welsh 2007).
A statistic is a function of sums that every prompt adds to, so that a resample costs a matrix product, and all
statistics of a set share one draw. It is made in blocks of prompts: how many of a resample's prompts are of each block
is multinomial, and within a block all are equally likely, which is to draw from all at once, in time that grows with
the prompts and memory that does not. Percentile intervals (Efron 1979).
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from rmjax.statistics import TAIL

Estimate = dict[str, float | None]
Statistic = Callable[[np.ndarray], np.ndarray]  # totals [..., m] to a statistic [...]
RESAMPLES = 1001  # so that the quantiles of TAIL are draws
BLOCK = 3_996  # prompts: four million counts, one of each prompt in each resample, are in memory


def bootstrap(
    sums: np.ndarray,
    prompt: np.ndarray,
    statistics: Statistic,
    strata: np.ndarray | None = None,
    shares: Sequence[tuple[int, int]] = (),
) -> list[Estimate]:
    """Statistics of all rows, with the 2.5 % and 97.5 % quantiles of those of resampled prompts.

    Where all of a share are hits, or none is, every resample would say the same, however few there are. It is drawn
    from the beta distribution instead whose quantile is the end of Clopper and Pearson 1934 for as many prompts: a
    share of 1 of n has its lower end at 0.025^(1/n), and whatever is made of such shares has an interval as well.

    >>> hits = np.array([1.0, 0, 1, 1])
    >>> bootstrap(np.stack([hits, np.ones(4)], 1), np.arange(4), lambda t: (t[..., 0] / t[..., 1])[..., None])
    [{'value': 0.75, 'low': 0.25, 'high': 1.0}]

    Args:
        sums: float [n, m], what each row adds.
        prompt: [n] whose rows are drawn together.
        statistics: takes totals [..., m] and gives the statistics [..., q]; NaN where one is not defined.
        strata: [n], of each prompt: as many prompts are drawn of each as there are, so that no subset of a benchmark
            gets lost; None is one.
        shares: columns of numerator and denominator of means of what lies between 0 and 1.

    Returns:
        q times {"value", "low", "high"}; None for what is not finite, and for both ends where one prompt tells nothing
        of the others. An interval reaches to its value: that of a calibration error, whose resamples are biased
        upwards, may not.
    """
    prompts, first, inverse = np.unique(prompt, return_index=True, return_inverse=True)
    totals = np.zeros((len(prompts), sums.shape[1]))
    np.add.at(totals, inverse, sums)
    stratum = None if strata is None else np.unique(strata[first], return_inverse=True)[1]
    return _resampled([totals], statistics, stratum, shares)


def _resampled(
    columns: Sequence[np.ndarray],
    statistics: Statistic,
    stratum: np.ndarray | None = None,
    shares: Sequence[tuple[int, int]] = (),
) -> list[Estimate]:
    """`bootstrap` of what each prompt adds, in columns [prompts, m] side by side, that are put together block by block:
    all at once would take their memory again."""
    rng, prompts = np.random.default_rng(0), len(columns[0])
    strata = [np.arange(prompts)] if stratum is None else [np.flatnonzero(stratum == s) for s in np.unique(stratum)]
    drawn = np.zeros((RESAMPLES, sum(x.shape[1] for x in columns)))
    for members in strata:
        for block, counts in _draws(members, rng):
            drawn += counts @ np.concatenate([x[block] for x in columns], 1)
    whole, present = (np.concatenate(x) for x in ([x.sum(0) for x in columns], [(x > 0).sum(0) for x in columns]))
    for hits, cases in shares:
        if whole[cases] > 0 and whole[hits] in (0.0, whole[cases]):
            likely = rng.permutation(np.linspace(0, 1, RESAMPLES))  # so that quantiles are those of the distribution
            share = likely ** (1 / present[cases])
            drawn[:, hits] = whole[cases] * (share if whole[hits] else 1 - share)
            drawn[:, cases] = whole[cases]
    with np.errstate(divide="ignore", invalid="ignore"):
        values, resampled = np.atleast_1d(statistics(whole)), statistics(drawn)
    return [_estimate(*x, prompts) for x in zip(values, resampled.reshape(RESAMPLES, -1).T)]


def _draws(members: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of the members and how often each resample has them, [RESAMPLES, b]; as many as there are members
    in all."""
    blocks = [members[start : start + BLOCK] for start in range(0, len(members), BLOCK)]
    sizes = np.array([len(block) for block in blocks])
    taken = np.full((RESAMPLES, 1), len(members))
    if len(blocks) > 1:
        taken = rng.multinomial(len(members), sizes / len(members), RESAMPLES)
    for block, many in zip(blocks, taken.T):
        resample = np.repeat(np.arange(RESAMPLES), many)
        picks = rng.integers(0, len(block), len(resample)) + len(block) * resample
        yield block, np.bincount(picks, minlength=RESAMPLES * len(block)).reshape(RESAMPLES, -1)


def _estimate(value: float, draws: np.ndarray, prompts: int) -> Estimate:
    known = draws[np.isfinite(draws) & np.isfinite(value)]
    if not len(known) or (prompts == 1 and not np.ptp(known)):
        return {"value": float(value) if np.isfinite(value) else None, "low": None, "high": None}
    low, high = np.quantile(known, [TAIL, 1 - TAIL])
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}


def ratio(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


@dataclasses.dataclass(frozen=True)
class _Entry:
    statistic: Statistic  # of the totals of all columns
    ratio_at: int | None = None  # the first column of a ratio
    shares: Sequence[tuple[int, int]] = ()  # see `bootstrap`


class Estimates:
    """Collects statistics of rows of prompts [n]; `all` draws prompts once and gives every one with its interval."""

    def __init__(self, prompt: np.ndarray):
        distinct, self._prompt = np.unique(prompt, return_inverse=True)
        self.prompts = len(distinct)
        self._columns: list[np.ndarray] = []
        self._entries: dict[Hashable, _Entry] = {}

    def per_prompt(self, at: np.ndarray, values: np.ndarray, bin: np.ndarray | None = None, bins: int = 1) -> Any:
        """float64 [prompts, bins]: sums of values [m] of the rows `at` [m], apart by the bin [m] that each is in."""
        where = self._prompt[at] * bins + (0 if bin is None else bin)
        return np.bincount(where, values, self.prompts * bins).reshape(self.prompts, bins)

    def add(self, key: Hashable, statistic: Statistic, *columns: np.ndarray, shares: int = 0) -> None:
        """Adds a statistic of the totals of columns [prompts, m] side by side, of which the first are hits and cases of
        so many shares (see `bootstrap`)."""
        start = sum(x.shape[1] for x in self._columns)
        self._columns += columns
        stop = sum(x.shape[1] for x in self._columns)
        of_columns = lambda totals: statistic(totals[..., start:stop])
        pairs = [(start + 2 * i, start + 2 * i + 1) for i in range(shares)]
        self._entries[key] = _Entry(of_columns, start if statistic is ratio else None, pairs)

    def combine(self, key: Hashable, keys: Sequence[Hashable], statistic: Statistic) -> None:
        parts = [self._entries[name].statistic for name in keys]
        self._entries[key] = _Entry(lambda totals: statistic(np.stack([part(totals) for part in parts], -1)))

    def mean(self, key: Hashable, at: np.ndarray, values: np.ndarray, weight: np.ndarray, shares: int = 0) -> None:
        """Adds the weighted mean of values [m] of the rows `at` [m]."""
        self.add(key, ratio, self.per_prompt(at, weight * values), self.per_prompt(at, weight), shares=shares)

    def share(self, key: Hashable, at: np.ndarray, hits: np.ndarray, weight: np.ndarray) -> None:
        """Adds a weighted share of hits [m], or another mean of values from 0 to 1."""
        self.mean(key, at, hits, weight, shares=1)

    @property
    def keys(self) -> list[Hashable]:
        return list(self._entries)

    def sums(self) -> dict[str, np.ndarray]:
        """Numerator and denominator, float64 [2], of every statistic that is a ratio; they add over sets of rows."""
        totals, entries = self._totals(), self._entries.items()
        return {str(key): totals[x.ratio_at : x.ratio_at + 2] for key, x in entries if x.ratio_at is not None}

    def others(self) -> dict[str, float]:
        """The statistics that are no ratios, without intervals; those that are not defined are left out."""
        with np.errstate(divide="ignore", invalid="ignore"):
            totals, entries = self._totals(), self._entries.items()
            values = {str(key): float(x.statistic(totals)) for key, x in entries if x.ratio_at is None}
        return {name: value for name, value in values.items() if not np.isnan(value)}

    def _totals(self) -> np.ndarray:
        return np.concatenate([x.sum(0) for x in self._columns])

    def all(self) -> dict[Hashable, Estimate]:
        """Every statistic by its key: {"value", "low", "high"}, None where it is not defined (see `bootstrap`)."""
        if not self._entries:
            return {}
        entries = self._entries.values()
        statistics = lambda totals: np.stack([x.statistic(totals) for x in entries], -1)
        shares = [pair for x in entries for pair in x.shares]
        return dict(zip(self._entries, _resampled(self._columns, statistics, shares=shares)))
