"""What a model said of the responses of one group, beside what people said: all that benchmarks and metrics see.

A model that scores responses gives `scores`. A judge compares two of them at a time, in both orders, and gives
`orders`. Whoever only asks which response the model prefers asks `verdicts` or `preference`, and need not know.

Benchmarks' rules go through groups one by one (Scored); metrics take all groups with the same number of responses as
arrays (Stack), so that 100,000 of them are measured in a few operations.

Shape letters: N groups of a stack, K responses, C verdicts of a judge (A, B and perhaps tie).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from rmjax.objectives.pairwise import average_orders

CHUNK = 2_000_000  # pairs of responses in memory


@dataclasses.dataclass(frozen=True)
class Scored:
    """One group. K responses.

    Attributes:
        id: the row it came from, "test.jsonl:17"; with a benchmark's own name for it "test.jsonl:17 (tied:12)".
        prompt: hash of the prompt; intervals draw prompts, not groups.
        source: the data set it came from, or the subset of a benchmark.
        wins: float [K, K], what people said, as in Record: how much i is preferred to j.
        ties: float [K, K], symmetric: 1 where i and j were judged equal.
        margin: float [K, K], by how much i beats j, in the source's units; 0 where it is not known.
        tokens: int [K] of each response's conversation.
        scores: float [K]; None of a judge.
        orders: float [K, K, C]: orders[i, j] are the probabilities of the verdicts when i is shown as A and j as B; NaN
            where that was not asked. None of a model that scores.
        weight: of the group.
        log_odds: that times a difference of scores is the log-odds of a preference; not 1 where an export has scaled
            its rewards ("reward_scale" of its contract).
    """

    id: str
    prompt: int
    source: str
    wins: np.ndarray
    ties: np.ndarray
    margin: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray | None = None
    orders: np.ndarray | None = None
    weight: float = 1.0
    log_odds: float = 1.0

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.orders is None):
            raise ValueError(f"{self.id}: either scores or orders are known of a group")

    @property
    def own_id(self) -> str:
        """The benchmark's own name of the row: "tied:12" of "test.jsonl:17 (tied:12)"; "" without one."""
        before, _, inside = self.id.rpartition(" (")
        return inside[:-1] if before and inside.endswith(")") else ""

    @functools.cached_property
    def alone(self) -> "Stack":
        """The group as a stack of one."""
        return _stack([self], np.zeros(1, np.int64))

    @property
    def averaged(self) -> np.ndarray:
        """float64 [K, K, C], of a judge: probabilities of "i", "j" (and "tie"), both orders averaged."""
        return self.alone.averaged[0]

    @property
    def verdicts(self) -> np.ndarray:
        """float64 [K, K]: 1 where the model prefers i to j, 0 the other way round, 0.5 where it finds them equal; NaN
        where a judge was not asked."""
        return self.alone.verdicts[0]

    @property
    def first_verdicts(self) -> np.ndarray:
        """float64 [K, K], of a judge: as `verdicts`, by the order in which i is shown as A alone."""
        return self.alone.first_verdicts[0]

    @property
    def preference(self) -> np.ndarray:
        """float64 [K, K]: the model's probability that i is better than j; a tie counts half each way."""
        return self.alone.preference[0]


@dataclasses.dataclass(frozen=True)
class Stack:
    """N groups of K responses.

    Attributes:
        at: int64 [N], which of all groups they are.
        wins: float64 [N, K, K]; see Scored, as for the following.
        ties: float64 [N, K, K].
        margin: float64 [N, K, K].
        tokens: int64 [N, K].
        weight: float64 [N].
        scores: float64 [N, K]; None of a judge.
        orders: float64 [N, K, K, C]; None of a model that scores.
        log_odds: see Scored; that of all.
    """

    at: np.ndarray
    wins: np.ndarray
    ties: np.ndarray
    margin: np.ndarray
    tokens: np.ndarray
    weight: np.ndarray
    scores: np.ndarray | None = None
    orders: np.ndarray | None = None
    log_odds: float = 1.0

    @property
    def decided(self) -> np.ndarray:
        """bool [N, K, K]: i is labelled better than j; a soft label counts once, for its likelier side."""
        return self.wins > _swap(self.wins)

    @property
    def labelled(self) -> np.ndarray:
        """bool [N, K]: a response that is compared with another one."""
        return (self.wins + _swap(self.wins) + self.ties > 0).any(-1)

    @property
    def difference(self) -> np.ndarray:
        """float64 [N, K, K], of a model that scores: s_i - s_j."""
        assert self.scores is not None
        return self.scores[:, :, None] - self.scores[:, None, :]

    @functools.cached_property
    def averaged(self) -> np.ndarray:
        """float64 [N, K, K, C], of a judge: probabilities of "i", "j" (and "tie"), both orders averaged."""
        assert self.orders is not None
        return average_orders(self.orders, _swap(self.orders))

    @functools.cached_property
    def verdicts(self) -> np.ndarray:
        """float64 [N, K, K]: 1 where the model prefers i to j, 0.5 where it finds them equal; NaN if not asked."""
        if self.scores is not None:
            return 0.5 + 0.5 * np.sign(self.difference)
        return likeliest(self.averaged)

    @functools.cached_property
    def first_verdicts(self) -> np.ndarray:
        """float64 [N, K, K], of a judge: as `verdicts`, by the order in which i is shown as A alone."""
        assert self.orders is not None
        return likeliest(self.orders)

    @functools.cached_property
    def preference(self) -> np.ndarray:
        """float64 [N, K, K]: the model's probability that i is better than j; a tie counts half each way."""
        if self.scores is not None:
            return by_difference(self.difference, self.log_odds)
        return by_verdict(self.averaged)

    @functools.cached_property
    def worth(self) -> np.ndarray:
        """float64 [N, K]: by what the model picks a best one: its score, or the share of its comparisons that a judge
        lets it win (Copeland's rule)."""
        if self.scores is not None:
            return self.scores
        asked = ~np.isnan(self.verdicts)
        return np.where(asked, self.verdicts, 0.0).sum(-1) / np.maximum(asked.sum(-1), 1)


def stacks(groups: Sequence[Scored]) -> Iterator[Stack]:
    """Yields the groups with a weight, by their number of responses, in parts of at most CHUNK pairs.

    Raises:
        ValueError: no group has a weight, models that score and judges are mixed, or a score is not finite.
    """
    judges = sum(g.scores is None for g in groups)
    if judges not in (0, len(groups)):
        raise ValueError(f"{judges} of {len(groups)} groups are a judge's, the others have scores: measure them apart")
    if not any(g.weight > 0 for g in groups):
        raise ValueError(f"there is nothing to measure: none of {len(groups)} groups has a weight above 0")
    sizes = np.array([len(g.tokens) if g.weight > 0 else 0 for g in groups], np.int64)
    for k in np.unique(sizes[sizes > 0]).tolist():
        at, step = np.flatnonzero(sizes == k), max(1, CHUNK // k**2)
        for start in range(0, len(at), step):
            yield _stack(groups, at[start : start + step])


def _stack(groups: Sequence[Scored], at: np.ndarray) -> Stack:
    members = [groups[n] for n in at.tolist()]
    of = lambda name: np.array([getattr(g, name) for g in members], np.float64)
    scores, orders = (None, of("orders")) if members[0].scores is None else (of("scores"), None)
    if scores is not None and not np.isfinite(scores).all():
        bad = members[int(np.flatnonzero(~np.isfinite(scores).all(1))[0])]
        raise ValueError(f"{bad.id}: its scores {bad.scores} are not all finite; the model cannot be measured")
    tokens = np.array([g.tokens for g in members], np.int64)
    return Stack(at, of("wins"), of("ties"), of("margin"), tokens, of("weight"), scores, orders, members[0].log_odds)


def _swap(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(1, 2)


def likeliest(p: np.ndarray) -> np.ndarray:
    """1, 0.5 or 0 by the likeliest of A, B (and tie) [..., C]; A and B equally likely is a tie, too; NaN stays."""
    side = np.sign(p[..., 0] - p[..., 1])
    if p.shape[-1] == 3:
        side = np.where(p[..., 2] > np.maximum(p[..., 0], p[..., 1]), 0.0, side)
    return 0.5 + 0.5 * np.where(np.isnan(p).any(-1), np.nan, side)


def by_difference(difference: np.ndarray, log_odds: float) -> np.ndarray:
    """sigmoid(log_odds difference), Bradley and Terry's probability of a preference; it never overflows."""
    return 0.5 + 0.5 * np.tanh(log_odds * difference / 2)


def by_verdict(p: np.ndarray) -> np.ndarray:
    """The probability of a preference, from those of A, B (and tie, half of it each way) [..., C]."""
    return p[..., 0] + (p[..., 2] / 2 if p.shape[-1] == 3 else 0.0)
