"""Conversations without a label: what supervised fine-tuning learns to write."""

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, Row, answered, common, messages, row_format, with_system
from rmjax.data.records import Message, Record, group

ANSWERS = ("completion", "response", "responses", "completions")
LABELS = ("label", "labels", "chosen", "rejected", "scores", "score")  # columns that would be lost without a word


def _unlabelled(row: Row) -> bool:
    return not any(name in row for name in LABELS)


def answers_apart(row: Row) -> bool:
    """Whether the answer to the messages stands in a column of its own, so that they are the prompt."""
    return any(name in row for name in ANSWERS)


def asks_apart(row: Row) -> bool:
    """The same, and they do end with a question."""
    return answers_apart(row) and messages(row["messages"])[-1]["role"] == "user"


def whole_turns(row: Row) -> list[Message]:
    return with_system(row, messages(row["messages"]))


def completed_turns(row: Row) -> list[Message]:
    return answered(row, row["prompt"], [row["completion"]])[0]


@row_format("messages", {"messages": kinds.MESSAGES}, lambda row: _unlabelled(row) and not answers_apart(row))
def _messages(row: Row, reading: Reading) -> Record:
    """Whole conversations; no label."""
    return group([whole_turns(row)], **common(row, reading))


@row_format("messages_completion", {"prompt": kinds.PROMPT, "completion": kinds.PROMPT}, _unlabelled)
def _completion(row: Row, reading: Reading) -> Record:
    """The same with the prompt apart."""
    return group([completed_turns(row)], **common(row, reading))
