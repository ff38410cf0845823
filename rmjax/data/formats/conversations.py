"""Conversations without a label: what supervised fine-tuning learns to write."""

from rmjax.data.formats.cells import MESSAGES, PROMPT, Format, Reading, Row, common, messages, prompt_turns, with_system
from rmjax.data.records import Record, group

LABELS = ("label", "labels", "chosen", "rejected", "scores", "score")  # columns that would be lost without a word


def _messages(row: Row, reading: Reading) -> Record:
    return group([with_system(row, messages(row["messages"]))], **common(row, reading))


def _completion(row: Row, reading: Reading) -> Record:
    conversation = [*prompt_turns(row, row["prompt"]), *messages(row["completion"])]
    return group([conversation], **common(row, reading))


def _unlabelled(row: Row) -> bool:
    return not any(name in row for name in LABELS)


UNLABELLED = (
    Format(
        "messages",
        {"messages": MESSAGES},
        _messages,
        _unlabelled,
        means="whole conversations; no label",
    ),
    Format(
        "messages_completion",
        {"prompt": PROMPT, "completion": PROMPT},
        _completion,
        _unlabelled,
        means="the same with the prompt apart",
    ),
)
