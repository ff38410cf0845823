"""Whether a judge agrees with itself: between the two orders of a pair, and among the pairs of a prompt.

Order consistency is of Zheng et al. 2023, arXiv:2306.05685, section 3.4; cycles are the circular triads of Kendall and
Babington Smith 1940. A model that scores has none of these troubles: its verdicts follow from numbers.
"""

import numpy as np

from rmjax.evaluate.estimates import Estimates, ratio
from rmjax.evaluate.scored import likeliest
from rmjax.evaluate.stacks import Stack


def orders(stack: Stack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the two orders of pairs go together.

    Args:
        stack: of a judge.

    Returns:
        [N] each: pairs of responses that were asked in both orders; those that get the same verdict; and those that
        contradict themselves: A in both orders, or B in both.
    """
    assert stack.orders is not None
    first = likeliest(stack.orders)
    upper = np.triu_indices(first.shape[1], 1)
    one, other = first[:, *upper], 1 - first.swapaxes(1, 2)[:, *upper]
    asked = ~np.isnan(one) & ~np.isnan(other)
    return asked.sum(-1), (asked & (one == other)).sum(-1), (asked & (np.abs(one - other) == 1)).sum(-1)


def cycles(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Triples that were asked, and those of them where i beats j, j beats k and k beats i.

    Returns:
        float64 [N] each: the traces of matrix cubes count every such triple 3 times, and every asked one 6 times.
    """
    asked = (~np.isnan(stack.verdicts)).astype(np.float64)
    asked[:, *np.diag_indices(asked.shape[1])] = 0.0
    closed = lambda x: np.einsum("nij,nji->n", x @ x, x)
    return closed(asked) / 6, closed((stack.verdicts == 1).astype(np.float64)) / 3


def add(found: Estimates, stacks: list[Stack]) -> None:
    """Adds consistency, conflict_rate (shares of the asked pairs), and cycle_rate (a share of the asked triples)."""
    at, weight = (np.concatenate([getattr(s, name) for s in stacks]) for name in ("at", "weight"))
    pairs, same, contradicting = np.concatenate([np.stack(orders(s)) for s in stacks], 1)
    for name, hits in (("consistency", same), ("conflict_rate", contradicting)):
        found.add(name, ratio, *(found.per_prompt(at, weight * x) for x in (hits, pairs)), share=True)
    triples, circular = np.concatenate([np.stack(cycles(s)) for s in stacks], 1)
    if triples.any():
        found.add("cycle_rate", ratio, *(found.per_prompt(at, weight * x) for x in (circular, triples)), share=True)
