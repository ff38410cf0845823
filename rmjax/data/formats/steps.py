"""Solutions whose steps are labelled: a number from 0 (wrong) to 1 (right), or true and false.

A label that is null or -100 is missing: the step is scored but not learnt from.
"""

import math
import re
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, Row, answered, common, row_format
from rmjax.data.records import BadRow, Record, Step, group

SHEPHERD_MARK = "ки"
SHEPHERD_LABEL = {"+": 1.0, "-": 0.0}
OPTIONAL = {**kinds.COMMON, "separator": kinds.TEXT}


def step_label(cell: Any) -> float:
    """A step's label in [0, 1]; NaN where it is missing."""
    if kinds.is_null(cell) or cell == -100:
        return math.nan
    if not isinstance(cell, bool | int | float) or not 0 <= cell <= 1:
        raise BadRow("wrong_type", f"a step's label is {kinds.show(cell)}, expected true, false or a number in [0, 1]")
    return float(cell)


def joined_steps(steps: list[str], labels: list[Any], separator: str) -> tuple[str, list[Step]]:
    """The response, and its steps; BadRow for another number of labels, or a step without text.

    >>> joined_steps(["a", "b"], [True, False], "|")
    ('a|b', [Step(stop=1, label=1.0), Step(stop=3, label=0.0)])
    """
    if len(steps) != len(labels):
        raise BadRow("conflicting_label", f"{len(labels)} labels for {len(steps)} steps")
    joined, text = [], ""
    for i, (step, label) in enumerate(zip(steps, labels)):
        if not step.strip():
            raise BadRow("empty_response", f"step {i + 1} of {len(steps)} has no text")
        text += (separator if i else "") + step
        joined.append(Step(len(text), step_label(label)))
    return text, joined


def split_steps(text: str, separator: str) -> list[tuple[int, str]]:
    """The pieces of a text between separators that have words, each with where it ends."""
    pieces, at = [], 0
    for piece in text.split(separator):
        at += len(piece)
        if piece.strip():
            pieces.append((at, piece))
        at += len(separator)
    return pieces


@row_format("stepwise", {"prompt": kinds.PROMPT, "completions": kinds.TEXTS, "labels": kinds.LIST}, optional=OPTIONAL)
def _stepwise(row: Row, reading: Reading) -> Record:
    """Steps and as many labels, true or false or in [0, 1]; joined by `separator`, by default a newline."""
    separator = kinds.TEXT.optional(row, "separator")
    text, steps = joined_steps(row["completions"], row["labels"], "\n" if separator is None else separator)
    return group(answered(row, row["prompt"], [text]), steps=[steps], **common(row, reading))


@row_format("stepwise_text", {"prompt": kinds.PROMPT, "response": kinds.TEXT, "labels": kinds.LIST}, optional=OPTIONAL)
def _stepwise_text(row: Row, reading: Reading) -> Record:
    """`response` with `separator` (by default a blank line) after each step, which stays; `labels` as above.

    What is scored is the text as it was written.
    """
    separator = kinds.TEXT.optional(row, "separator") or "\n\n"
    pieces = split_steps(row["response"], separator)
    if len(pieces) != len(row["labels"]):
        what = f"{len(row['labels'])} labels for {len(pieces)} steps between {separator!r}"
        raise BadRow("conflicting_label" if pieces else "empty_response", what)
    steps = [Step(stop, step_label(label)) for (stop, _), label in zip(pieces, row["labels"])]
    return group(answered(row, row["prompt"], [row["response"]]), steps=[steps], **common(row, reading))


@row_format(
    "shepherd_text",
    {"input": kinds.TEXT, "label": kinds.TEXT},
    lambda row: SHEPHERD_MARK in row["input"] and "Step 1:" in row["input"],
)
def _shepherd_text(row: Row, reading: Reading) -> Record:
    """Math-Shepherd: a mark after each step of `input`, `label` has + or - in its place.

    The prompt ends where "Step 1:" begins; the marks and the white space before them are no part of a step.
    """
    start = row["input"].find("Step 1:")
    if start < 0:
        raise BadRow("wrong_type", f"input has no 'Step 1:', found {row['input'][:60]!r}")
    written, labelled = row["input"][start:], row["label"][row["label"].find("Step 1:") :]
    pieces = written.split(SHEPHERD_MARK)
    labels, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        label = labelled[at : at + 1]
        if labelled[at - len(piece) : at] != piece or label not in SHEPHERD_LABEL:
            raise BadRow("conflicting_label", f"label differs from input at {labelled[at : at + 20]!r}, not in + or -")
        labels.append(SHEPHERD_LABEL[label])
        at += 1
    steps = [re.sub(r"^\n", "", piece).rstrip() for piece in pieces[:-1]]
    if not steps or pieces[-1].strip():
        raise BadRow("wrong_type", f"input does not end with the mark {SHEPHERD_MARK!r}: {pieces[-1][-40:]!r}")
    text, joined = joined_steps(steps, labels, "\n")
    return group(answered(row, row["input"][:start].strip(), [text]), steps=[joined], **common(row, reading))
