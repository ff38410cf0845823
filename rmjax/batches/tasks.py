"""What an objective learns from: how a record becomes groups, which of their tokens are scored, and their labels.

An objective names one of these tasks and hands it to whatever reads data, so that data knows no objectives. Tasks
are plain values: they go to the processes that tokenize, and their fields are part of the cache's fingerprint. This
module imports no jax.

The label fields of a task are named here once, with their axes: "G" group, "K" response, "E" scored token, "T" token,
or a number. A batch has them with B in front, padded: [B, G, K, K], [B, E, 1], [B, T].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rmjax.data.records import BadRow, Conversation, Record

Axes = tuple[str | int, ...]  # ("G", "K", "K")


class Span(NamedTuple):
    """A part of a message's text, and what its tokens get."""

    message: int  # counted from the end of the conversation: -1 is the last
    start: int  # first character
    stop: int  # one after the last character
    value: float  # for each token that has one of these characters


@dataclasses.dataclass(frozen=True)
class Example:
    """One group to tokenize. K conversations."""

    conversations: tuple[Conversation, ...]  # what is rendered; each becomes one token sequence
    # float32 arrays by field, in the axes of the task's fields without G; those of "T" are not here
    labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    # For each conversation, the characters of its last turn up to and including each scored token's last one, in order;
    # None scores the rendering's last token alone.
    scored: tuple[tuple[int, ...], ...] | None = None
    # For each field of axis "T", for each conversation, the texts whose tokens get a value. The value stands at the
    # token *before* each of them, whose next-token target it is; a span that reaches the end of its message takes the
    # tokens that end the turn too, up to the first special one.
    spans: Mapping[str, tuple[tuple[Span, ...], ...]] = dataclasses.field(default_factory=dict)
    tools: Sequence[Any] | None = None  # tool descriptions for the chat template, or None
    name: str = ""  # distinguishes the groups of one record, "" where there is one
    answered: bool = True  # whether the conversations are whole; else each is a prompt, up to where an answer begins


class Task(Protocol):
    """See the module."""

    @property
    def fields(self) -> Mapping[str, Axes]: ...

    def examples(self, record: Record) -> Sequence[Example | BadRow]:
        """The groups of a record; a BadRow stands for a part that cannot be learnt from, and is raised where that is
        all of it."""
        ...


def no_label(record: Record, wanted: str) -> BadRow:
    """What is wrong with a record that lacks the label that is `wanted`; says what it has instead."""
    has = {
        "preferences": bool(record.wins.any() or record.ties.any()),
        "attributes " + ", ".join(record.attributes): bool(record.attributes),
        "steps": bool(record.steps),
    }
    found = " and ".join(name for name, there in has.items() if there) or "no label"
    return BadRow("no_label", f"expected {wanted}, the row has {found}")


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Who is preferred to whom, one group for each record: `wins`, `ties`, `margin` [G, K, K]."""

    ties: str = "skip"  # "skip" groups in which nobody is preferred, or "keep" them

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`wins`, `ties` and `margin`, as in Record."""
        return dict.fromkeys(("wins", "ties", "margin"), ("G", "K", "K"))

    def examples(self, record: Record) -> Sequence[Example]:
        if not record.wins.any() and not record.ties.any():
            raise no_label(record, "preferences")
        if self.ties == "skip" and not record.wins.any():
            raise BadRow("tie", "neither response is preferred")
        return [Example(record.conversations, {n: getattr(record, n) for n in self.fields}, tools=record.tools)]


@dataclasses.dataclass(frozen=True)
class Attributes:
    """Named scores of each response, one group for each record: `value`, `mask` [G, K, A]."""

    names: tuple[str, ...]  # the attributes that are learnt, A of them; others in the data are not read
    scales: tuple[tuple[float, float], ...] = ()  # lowest and highest score of each; () is without limits

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`value`, 0 where it is missing, and `mask`, 0 there and 1 elsewhere."""
        return dict.fromkeys(("value", "mask"), ("G", "K", len(self.names)))

    def examples(self, record: Record) -> Sequence[Example]:
        k = len(record.conversations)
        missing = (np.nan,) * k
        for name, (low, high) in zip(self.names, self.scales):
            for score in record.attributes.get(name, ()):
                if score < low or score > high:  # not of NaN
                    raise BadRow("out_of_scale", f"{name} is {score:g}, its scale goes from {low:g} to {high:g}")
        value = np.array([record.attributes.get(name, missing) for name in self.names], np.float32).T
        mask = ~np.isnan(value)
        if not mask.any():
            raise no_label(record, f"one of the attributes {', '.join(self.names)}")
        labels = {"value": np.where(mask, value, 0).astype(np.float32), "mask": mask.astype(np.float32)}
        return [Example(record.conversations, labels, tools=record.tools)]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Process rewards, one group for each record: `value`, `mask` [E, 1]; each step's last token is scored."""

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`value` from 0 (wrong) to 1 (right), and `mask`, 0 where a step was not judged."""
        return dict.fromkeys(("value", "mask"), ("E", 1))

    def examples(self, record: Record) -> Sequence[Example]:
        label = np.array([[step.label] for steps in record.steps for step in steps], np.float32).reshape(-1, 1)
        mask = ~np.isnan(label)
        if not mask.any() or not all(record.steps):
            raise no_label(record, "judged steps of every response")
        labels = {"value": np.where(mask, label, 0).astype(np.float32), "mask": mask.astype(np.float32)}
        scored = tuple(tuple(step.stop for step in steps) for steps in record.steps)
        return [Example(record.conversations, labels, scored, tools=record.tools)]
