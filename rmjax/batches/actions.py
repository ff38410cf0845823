"""What was drawn becomes trees to learn from: what samples of a question begin with alike stands there once.

A token of a sample is an action. It is the next-token target of the token before it (batches/trees.py), where the sums
over all samples that draw it stand. The token that ends an answer is an action like any other; padding is told by
lengths, never by ids.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rmjax.batches.groups import Group
from rmjax.batches.trees import Tree, build_trees


class Sample(NamedTuple):
    """An answer to a prompt."""

    prompt: np.ndarray  # int32 [m]
    tokens: np.ndarray  # int32 [n], with the one that ended it
    log_probs: np.ndarray  # float32 [n] in nats, by the model that drew them; NaN where they are not known
    advantage: float


def groups(samples: Sequence[Sample], weight: float, drawn: float, most: int, id: str) -> list[Group]:
    """The samples of a question as groups of at most `most` tokens each, see `trees.build_trees`.

    Args:
        samples: of one question; prompts of its orders one after the other.
        weight: of the question.
        drawn: what the loss is divided by, of all these samples; the first group has it.
        most: tokens of a group.
        id: of the question.

    Returns:
        Groups with the fields of `objectives/grpo.py`.
    """
    sequences = [np.concatenate([sample.prompt, sample.tokens]) for sample in samples]
    found, start = [], 0
    for tree in build_trees(sequences, most):
        members = samples[start : start + len(tree.end)]
        first = np.array([drawn if not start else 0.0], np.float32)
        found.append(Group(tree, {**_fields(tree, members, weight), "drawn": first}, weight, id))
        start += len(members)
    return found


def _fields(tree: Tree, samples: Sequence[Sample], weight: float) -> dict[str, np.ndarray]:
    counts, up, down = (np.zeros(len(tree), np.float64) for _ in range(3))
    old = np.zeros(len(tree), np.float32)
    for sample, at in zip(samples, places(tree, samples)):
        counts[at] += 1
        (up if sample.advantage > 0 else down)[at] += weight * sample.advantage
        old[at] = sample.log_probs
    sums = {"loss_weight": counts, "up": up, "down": down}
    fields = {name: x.astype(np.float32) for name, x in sums.items()}
    return {**fields, "old": old, "reference": np.zeros_like(old)}  # that is not known here


def places(tree: Tree, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    """For each sample the index in the tree of the token before each of its own."""
    for sample, end in zip(samples, tree.end, strict=True):
        yield tree.path(int(end))[len(sample.prompt) - 1 : -1]
