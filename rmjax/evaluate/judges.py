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


def _orders(stack: Stack) -> np.ndarray:
    """[3, N]: pairs of responses that were asked in both orders; those that get the same verdict; and those that
    contradict themselves: A in both orders, or B in both."""
    first = stack.first_verdicts
    upper = np.triu_indices(first.shape[1], 1)
    one, other = first[:, *upper], 1 - first.swapaxes(1, 2)[:, *upper]
    asked = ~np.isnan(one) & ~np.isnan(other)
    return np.stack([asked.sum(-1), (asked & (one == other)).sum(-1), (asked & (np.abs(one - other) == 1)).sum(-1)])


def _cycles(stack: Stack) -> np.ndarray:
    """float64 [2, N]: triples that were asked, and those of them where i beats j, j beats k and k beats i.

    The traces of matrix cubes count every cycle 3 times, and every asked triple 6 times.
    """
    asked = (~np.isnan(stack.verdicts)).astype(np.float64)
    asked[:, *np.diag_indices(asked.shape[1])] = 0.0
    closed = lambda x: np.einsum("nij,nji->n", x @ x, x)
    return np.stack([closed(asked) / 6, closed((stack.verdicts == 1).astype(np.float64)) / 3])


def add_self_agreement(estimates: Estimates, stacks: Sequence[Stack]) -> None:
    """Adds consistency, conflict_rate (shares of the asked pairs), and cycle_rate (a share of the asked triples)."""
    add_orders(estimates, stacks, ("consistency", "conflict_rate"))
    triples, circular = np.concatenate([_cycles(s) for s in stacks], 1)
    if triples.any():
        _add_share(estimates, "cycle_rate", stacks, circular, triples)


def add_orders(estimates: Estimates, stacks: Sequence[Stack], names: Sequence[str]) -> None:
    """Adds consistency and conflict_rate, or one of them: shares of the pairs that were asked in both orders."""
    pairs, same, contradicting = np.concatenate([_orders(s) for s in stacks], 1)
    hits = {"consistency": same, "conflict_rate": contradicting}
    for name in names:
        _add_share(estimates, name, stacks, hits[name], pairs)


def _add_share(estimates: Estimates, name: str, stacks: Sequence[Stack], hits: np.ndarray, cases: np.ndarray) -> None:
    at, weight = (np.concatenate([getattr(s, field) for s in stacks]) for field in ("at", "weight"))
    estimates.add(name, ratio, *(estimates.per_prompt(at, weight * x) for x in (hits, cases)), shares=1)


def add_verdicts(estimates: Estimates, p: np.ndarray, verdict: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Adds accuracies of the verdicts themselves, ties among them; a pair counts with its weight.

    A label is the most probable verdict of a soft one; a pair without one (votes that are even, ties with 2 classes)
    counts in the predictions only. Equal predictions share a decision.

    They are accuracy, of single orders, accuracy_averaged, of both orders' averaged probabilities, and recall_X,
    accuracy of the orders labelled X. Probabilities and labels of A, B (and tie) are float [n, 2, C], in both orders.

    Returns:
        labels_X_count, predictions_X_count: orders that are labelled, or decided, X, as float [2]; a model that does
        not care for the order predicts A as often as B.
    """
    at, label, choice = np.arange(len(p)), _most(verdict), _most(p)
    decided = weight * (label.max(-1) == 1).all(-1)
    hits, both = (choice * label).sum(-1), np.repeat(at, 2)
    averaged = _most(average_orders(p[:, 0], p[:, 1]))
    estimates.share("accuracy", both, hits.ravel(), np.repeat(decided, 2))
    estimates.share("accuracy_averaged", at, (averaged * label[:, 0]).sum(-1), decided)
    counts = {}
    for c, name in enumerate(VERDICTS[: p.shape[-1]]):
        labelled = decided[:, None] * label[..., c]
        estimates.share(f"recall_{name}", both, hits.ravel(), labelled.ravel())
        counts[f"labels_{name}_count"] = np.array([(labelled > 0).sum(), 0.0])
        counts[f"predictions_{name}_count"] = np.array([choice[..., c].sum(), 0.0])
    return counts


def _most(values: np.ndarray) -> np.ndarray:
    """1 for the largest of [..., C], else 0; equal ones share it."""
    most = values == values.max(-1, keepdims=True)
    return most / most.sum(-1, keepdims=True)
