"""What a model said of the responses of one group, beside what people said: all that benchmarks and metrics see.

A model that scores responses gives `scores`. A judge compares two of them at a time, in both orders, and gives
`orders`. Whoever only asks which response the model prefers asks `verdicts` or `preference`, and need not know.

Shape letters: K responses, C verdicts of a judge (A, B and perhaps tie).
"""

import dataclasses
import functools

import numpy as np


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
    def averaged(self) -> np.ndarray:
        """float [K, K, C], of a judge: probabilities of "i", "j" (and "tie"), both orders averaged."""
        assert self.orders is not None
        return of_both_orders(self.orders)

    @functools.cached_property
    def verdicts(self) -> np.ndarray:
        """float [K, K]: 1 where the model prefers i to j, 0 the other way round, 0.5 where it finds them equal; NaN
        where a judge was not asked."""
        if self.scores is not None:
            return 0.5 + 0.5 * np.sign(self.scores[:, None] - self.scores[None, :])
        return likeliest(self.averaged)

    @functools.cached_property
    def first_verdicts(self) -> np.ndarray:
        """float [K, K], of a judge: as `verdicts`, by the order in which i is shown as A alone."""
        assert self.orders is not None
        return likeliest(self.orders)

    @functools.cached_property
    def preference(self) -> np.ndarray:
        """float [K, K]: the model's probability that i is better than j; a tie counts half each way."""
        if self.scores is not None:
            return by_difference(self.scores[:, None] - self.scores[None, :], self.log_odds)
        return by_verdict(self.averaged)


def of_both_orders(orders: np.ndarray) -> np.ndarray:
    """[..., K, K, C]: the probabilities of "i", "j" (and "tie") of a judge, both orders averaged."""
    swapped = [1, 0, *range(2, orders.shape[-1])]
    return (orders + np.swapaxes(orders, -3, -2)[..., swapped]) / 2


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
