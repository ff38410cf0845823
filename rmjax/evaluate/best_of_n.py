"""How good the response is that a model picks among several: the best-of-n curve, and whether its first is a best one.

Best of n as a use of rewards: Nakano et al. 2021, arXiv:2112.09332; the curve as a test of reward models Gao et al.
2022, arXiv:2210.10760. Expectations over all subsets of n responses are exact, from order statistics; none is drawn.

Shape letters: N groups, K responses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmjax.evaluate.estimates import Estimate, Estimates
from rmjax.evaluate.scored import Stack


def gold_ranks(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """How good each response is by its labels, as a rank within its group.

    It is the rank of how many others it is labelled better than, minus how many are labelled better than it. Where the
    labels come from a score of each response, that is the rank of the score, so that the score itself adds nothing.

    Returns:
        float64 [N, K]: 0 for one below all others, 1 for one above all, equal ones in the middle of their places, NaN
        for one that is in no comparison; and bool [N]: more than one rank is there.
    """
    known = stack.labelled
    gold = (stack.decided * 1.0 - stack.decided.swapaxes(1, 2)).sum(-1)
    others = known[:, None, :] & known[:, :, None]
    below = (others & (gold[:, None, :] < gold[:, :, None])).sum(-1)
    equal = (others & (gold[:, None, :] == gold[:, :, None])).sum(-1) - 1
    rank = (below + equal / 2) / np.maximum(known.sum(-1, keepdims=True) - 1, 1)
    return np.where(known, rank, np.nan), np.asarray(stack.decided.sum((1, 2)) > 0)


def picked(worth: np.ndarray, n: int) -> np.ndarray:
    """How likely each response is the first among n random ones of its group; equally good ones share.

    With b of k responses below it and e as good as it, itself among them: (C(b + e, n) - C(b, n)) / (e C(k, n)). Both
    are float64 [N, K], NaN and 0 where there is no response; n is at most the number of responses of each group.
    """
    k = (~np.isnan(worth)).sum(-1, keepdims=True)
    below = (worth[:, None, :] < worth[:, :, None]).sum(-1)
    equal = (worth[:, None, :] == worth[:, :, None]).sum(-1)
    return (_within(below + equal, k, n) - _within(below, k, n)) / np.maximum(equal, 1)


def _within(m: np.ndarray, k: np.ndarray, n: int) -> np.ndarray:
    """C(m, n) / C(k, n): how likely n random ones of k are all among m of them. As a product it cannot overflow."""
    product = np.ones(m.shape)
    for t in range(n):
        product *= np.maximum(m - t, 0) / (k - t)
    return product


def add_curve(
    estimates: Estimates, stacks: Sequence[Stack]
) -> Callable[[dict[Any, Estimate]], dict[str, list[Any]] | None]:
    """Adds the mean gold rank of what the model picks among n, under the keys ("best_of_n", n).

    n doubles from 1 to what the largest group has; a group with fewer is left out there, as are groups that are
    labelled equal throughout. With nothing but pairs there is no curve, since it is the accuracy.

    Returns:
        A function that makes the curve of all estimates, for JSON, beside what the best choice gives, the oracle, and a
        random one; None where there is no curve.
    """
    most = max((int(s.labelled.sum(-1).max()) for s in stacks), default=0)
    oracle = {}
    for n in (2**i for i in range(most.bit_length())) if most > 2 else ():
        if parts := [part for s in stacks if len((part := _at_n(s, n))[0])]:
            at, model, best, weight = (np.concatenate(x) for x in zip(*parts))
            estimates.share(("best_of_n", n), at, model, weight)
            oracle[n] = float((weight * best).sum() / weight.sum())

    def curve(measured: dict[Any, Estimate]) -> dict[str, list[Any]] | None:
        model = [measured["best_of_n", n] for n in oracle]
        values = {"n": [*oracle], "model": model, "oracle": [*oracle.values()], "random": [0.5] * len(oracle)}
        return values if oracle else None

    return curve


def _at_n(stack: Stack, n: int) -> tuple[np.ndarray, ...]:
    """Groups that have n responses, [M] each: where they are, gold rank of the model's and of the best pick, weight."""
    ranks, usable = gold_ranks(stack)
    use = usable & (stack.labelled.sum(-1) >= n)
    ranks, worth = ranks[use], np.where(stack.labelled, stack.worth, np.nan)[use]
    model, oracle = ((picked(x, n) * np.nan_to_num(ranks)).sum(-1) for x in (worth, ranks))
    return stack.at[use], model, oracle, stack.weight[use]


def add_top1(estimates: Estimates, stacks: Sequence[Stack]) -> None:
    at, weight = (np.concatenate([getattr(s, name) for s in stacks]) for name in ("at", "weight"))
    hit, counts = (np.concatenate(x) for x in zip(*map(top1, stacks)))
    estimates.share("top1_accuracy", at[counts], hit[counts], weight[counts])


def top1(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N], whether the response that the model puts first is a best one; bool [N], whether that can be asked.

    A best one is a labelled response to which none is preferred; where several are first, it is their share. Groups of
    more than two labelled responses count, of which one at least is not a best one.
    """
    known, worse = stack.labelled, stack.decided.any(1)
    best = known & ~worse
    worth = np.where(known, stack.worth, -np.inf)
    first = known & (worth == worth.max(-1, keepdims=True))
    counts = (known.sum(-1) > 2) & best.any(-1) & worse.any(-1)
    return (first & best).sum(-1) / np.maximum(first.sum(-1), 1), counts
