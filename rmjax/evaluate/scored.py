"""What a model said of the responses of a group, beside what people said: all that benchmarks and metrics see.

A model that scores responses gives `scores`. A judge compares two of them at a time, in both orders, and gives
`orders`. Benchmarks' rules go through groups one by one (Scored); metrics take all groups with the same number of
responses as arrays (Stack), so that 100,000 of them are measured in a few operations.

Shape letters: N groups of a stack, K responses, C verdicts of a judge (A, B and perhaps tie), M members of an
ensemble.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from rmjax.objectives.pairwise import average_orders

CHUNK = 2_000_000  # pairs of responses in memory


@dataclasses.dataclass(frozen=True)
class Scored:
    """One group; a model gives either scores or orders."""

    id: str  # the row it came from, "test.jsonl:17"; with a benchmark's own name for it "test.jsonl:17 (tied:12)"
    prompt: int  # hash of the prompt; intervals draw prompts, not groups
    source: str  # the data set it came from, or the subset of a benchmark
    wins: np.ndarray  # float [K, K], what people said, as in Record: how much i is preferred to j
    ties: np.ndarray  # float [K, K], symmetric: 1 where i and j were judged equal
    margin: np.ndarray  # float [K, K], by how much i beats j, in the source's units; NaN where it is not known
    tokens: np.ndarray  # int [K], of each response's conversation
    scores: np.ndarray | None = None  # float [K]
    orders: np.ndarray | None = None  # float [K, K, C]: verdicts' probabilities, i shown as A, j as B; NaN: not asked
    weight: float = 1.0
    # Times a difference of scores, the log-odds of a preference; not 1 where an export has scaled its rewards
    # ("reward_scale" of its contract).
    log_odds: float = 1.0
    members: np.ndarray | None = None  # float [K, M], of an ensemble: the rewards that the scores are combined from

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
        return _stack([self], np.zeros(1, np.int64))


@dataclasses.dataclass(frozen=True)
class Traced:
    """One solution whose steps a model scored."""

    id: str
    prompt: int
    source: str
    label: int  # the first step that is wrong; -1 where none is
    found: int  # the first that the model finds wrong: its score is not above a half; -1 where it finds none
    orders: None = None  # it is no judge of pairs


@dataclasses.dataclass(frozen=True)
class Stack:
    """N groups of K responses; the fields are those of Scored as float64, with an axis N before."""

    at: np.ndarray  # int64 [N], which of all groups they are
    wins: np.ndarray
    ties: np.ndarray
    margin: np.ndarray
    tokens: np.ndarray  # int64
    weight: np.ndarray
    scores: np.ndarray | None = None
    orders: np.ndarray | None = None
    log_odds: float = 1.0  # of all groups
    members: np.ndarray | None = None  # [N, K, M]

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
        return _likeliest(self.averaged) if self.scores is None else 0.5 + 0.5 * np.sign(self.difference)

    @functools.cached_property
    def first_verdicts(self) -> np.ndarray:
        """float64 [N, K, K], of a judge: as `verdicts`, by the order in which i is shown as A alone."""
        assert self.orders is not None
        return _likeliest(self.orders)

    @functools.cached_property
    def preference(self) -> np.ndarray:
        """float64 [N, K, K]: the model's probability that i is better than j; a tie counts half each way."""
        if self.scores is not None:
            return sigmoid(self.log_odds * self.difference)
        p = self.averaged
        return p[..., 0] + (p[..., 2] / 2 if p.shape[-1] == 3 else 0.0)

    @functools.cached_property
    def worth(self) -> np.ndarray:
        """float64 [N, K], by which the model picks a best response: its score, or the share of its comparisons that a
        judge lets it win (Copeland's rule)."""
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
        members, step = np.flatnonzero(sizes == k), max(1, CHUNK // k**2)
        for start in range(0, len(members), step):
            yield _stack(groups, members[start : start + step])


def _stack(groups: Sequence[Scored], at: np.ndarray) -> Stack:
    picked = [groups[n] for n in at.tolist()]
    joined = lambda name: np.array([getattr(g, name) for g in picked], np.float64)
    scores, orders = (None, joined("orders")) if picked[0].scores is None else (joined("scores"), None)
    if scores is not None and not np.isfinite(scores).all():
        bad = picked[int(np.flatnonzero(~np.isfinite(scores).all(1))[0])]
        raise ValueError(f"{bad.id}: its scores {bad.scores} are not all finite; the model cannot be measured")
    tokens = np.array([g.tokens for g in picked], np.int64)
    wins, ties, margin = (joined(name) for name in ("wins", "ties", "margin"))
    rewards = None if picked[0].members is None else joined("members")
    return Stack(at, wins, ties, margin, tokens, joined("weight"), scores, orders, picked[0].log_odds, rewards)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)  # never overflows


def _swap(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(1, 2)


def _likeliest(p: np.ndarray) -> np.ndarray:
    """1, 0.5 or 0 by the likeliest of A, B (and tie) [..., C]; A and B equally likely is a tie, too; NaN stays."""
    side = np.sign(p[..., 0] - p[..., 1])
    if p.shape[-1] == 3:
        side = np.where(p[..., 2] > np.maximum(p[..., 0], p[..., 1]), 0.0, side)
    return 0.5 + 0.5 * np.where(np.isnan(p).any(-1), np.nan, side)
