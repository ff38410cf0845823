"""Whether a judge agrees with itself: between the two orders of a pair, and among the pairs of a prompt.

Order consistency is of Zheng et al. 2023, arXiv:2306.05685, section 3.4; cycles are the circular triads of Kendall and
Babington Smith 1940. A model that scores has none of these troubles: its verdicts follow from numbers.
"""

from collections.abc import Sequence

import numpy as np

from rmjax.evaluate.estimates import Estimates, ratio
from rmjax.evaluate.scored import Stack
from rmjax.judging.verdicts import VERDICTS
from rmjax.objectives.pairwise import average_orders


def orders(stack: Stack) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the two orders of pairs go together.

    Args:
        stack: of a judge.

    Returns:
        [N] each: pairs of responses that were asked in both orders; those that get the same verdict; and those that
        contradict themselves: A in both orders, or B in both.
    """
    first = stack.first_verdicts
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
    add_orders(found, stacks, ("consistency", "conflict_rate"))
    at, weight = (np.concatenate([getattr(s, name) for s in stacks]) for name in ("at", "weight"))
    triples, circular = np.concatenate([np.stack(cycles(s)) for s in stacks], 1)
    if triples.any():
        found.add("cycle_rate", ratio, *(found.per_prompt(at, weight * x) for x in (circular, triples)), share=True)


def add_orders(found: Estimates, stacks: list[Stack], names: Sequence[str]) -> None:
    """Adds consistency and conflict_rate, or one of them: shares of the pairs that were asked in both orders."""
    at, weight = (np.concatenate([getattr(s, name) for s in stacks]) for name in ("at", "weight"))
    pairs, same, contradicting = np.concatenate([np.stack(orders(s)) for s in stacks], 1)
    hits = {"consistency": same, "conflict_rate": contradicting}
    for name in names:
        found.add(name, ratio, *(found.per_prompt(at, weight * x) for x in (hits[name], pairs)), share=True)


def add_verdicts(found: Estimates, p: np.ndarray, verdict: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Adds accuracies of the verdicts themselves, ties among them; a pair counts with its weight.

    A label is the most probable verdict of a soft one; a pair without one (votes that are even, ties with 2 classes)
    counts in the predictions only. Equal predictions share a decision.

    Args:
        found: of n pairs; gets accuracy, of single orders, accuracy_averaged, of both orders' averaged probabilities,
            and recall_X, accuracy of the orders labelled X.
        p: float [n, 2, C] probabilities of A, B (and tie) in both orders of each pair.
        verdict: float [n, 2, C], labels.
        weight: float [n], above 0.

    Returns:
        labels_X_count, predictions_X_count: orders that are labelled, or decided, X, as float [2]; a model that does
        not care for the order predicts A as often as B.
    """
    at, label, choice = np.arange(len(p)), _most(verdict), _most(p)
    decided = weight * (label.max(-1) == 1).all(-1)
    hits, both = (choice * label).sum(-1), np.repeat(at, 2)
    averaged = _most(average_orders(p[:, 0], p[:, 1]))
    found.share("accuracy", both, hits.ravel(), np.repeat(decided, 2))
    found.share("accuracy_averaged", at, (averaged * label[:, 0]).sum(-1), decided)
    counts = {}
    for c, name in enumerate(VERDICTS[: p.shape[-1]]):
        of = decided[:, None] * label[..., c]
        found.share(f"recall_{name}", both, hits.ravel(), of.ravel())
        counts[f"labels_{name}_count"] = np.array([(of > 0).sum(), 0.0])
        counts[f"predictions_{name}_count"] = np.array([choice[..., c].sum(), 0.0])
    return counts


def _most(values: np.ndarray) -> np.ndarray:
    """1 for the largest of [..., C], else 0; equal ones share it."""
    most = values == values.max(-1, keepdims=True)
    return most / most.sum(-1, keepdims=True)
