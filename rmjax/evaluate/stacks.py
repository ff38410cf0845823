"""Groups with the same number of responses as arrays, so that 100,000 of them are measured in a few operations.

The properties of a Stack are those of Scored, with an axis of groups before; a test compares them.

Shape letters: N groups of a stack, K responses, C verdicts of a judge.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from rmjax.evaluate.scored import Scored, by_difference, by_verdict, likeliest, of_both_orders

CHUNK = 2_000_000  # pairs of responses in memory


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
    scores: np.ndarray | None
    orders: np.ndarray | None
    log_odds: float

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
        return of_both_orders(self.orders)

    @functools.cached_property
    def verdicts(self) -> np.ndarray:
        """float64 [N, K, K]: 1 where the model prefers i to j, 0.5 where it finds them equal; NaN if not asked."""
        if self.scores is not None:
            return 0.5 + 0.5 * np.sign(self.difference)
        return likeliest(self.averaged)

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
