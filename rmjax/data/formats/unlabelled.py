"""Rows without a label, as they are scored, and without a response, as they are sampled for; in training their format
has to be named.

Other rows that are scored have a format of labelled rows, whose labels are not read (`formats.detect`).
"""

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import (
    Reading,
    Row,
    answer,
    answered,
    common,
    messages,
    named_only,
    row_format,
    with_system,
)
from rmjax.data.formats.steps import OPTIONAL, joined_steps
from rmjax.data.records import Record, group


@row_format("unlabelled_pair", {"prompt": kinds.PROMPT, "response_a": kinds.TEXT, "response_b": kinds.TEXT}, named_only)
def _unlabelled_pair(row: Row, reading: Reading) -> Record:
    """Two responses to compare; no label."""
    return group(answered(row, row["prompt"], [row["response_a"], row["response_b"]]), **common(row, reading))


@row_format("unlabelled_steps", {"prompt": kinds.PROMPT, "completions": kinds.TEXTS}, named_only, optional=OPTIONAL)
def _unlabelled_steps(row: Row, reading: Reading) -> Record:
    """Steps, joined as those of `stepwise`; no label."""
    separator = kinds.TEXT.optional(row, "separator")
    texts = row["completions"]
    text, steps = joined_steps(texts, [None] * len(texts), "\n" if separator is None else separator)
    return group(answered(row, row["prompt"], [text]), steps=[steps], **common(row, reading))


@row_format("prompt_only", {"prompt": kinds.PROMPT}, named_only)
def _prompt_only(row: Row, reading: Reading) -> Record:
    """A prompt that is not answered yet."""
    return group(answered(row, row["prompt"], [""]), **common(row, reading))


@row_format("messages_only", {"messages": kinds.MESSAGES}, named_only)
def _messages_only(row: Row, reading: Reading) -> Record:
    """Messages that are not answered yet, or whose last one is the answer."""
    turns = with_system(row, messages(row["messages"]))
    return group([turns if turns[-1]["role"] == "assistant" else [*turns, answer("")]], **common(row, reading))
