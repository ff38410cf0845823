"""The rows that are sampled for: the prompts that training's readers find in them, and the columns that they get."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from rmjax.data import reading
from rmjax.data.formats import Layout
from rmjax.data.records import BadRow, Conversation
from rmjax.data.sources import source_name, split_spec
from rmjax.jobs.inputs import Input
from rmjax.jobs.job import CHARACTERS
from rmjax.jobs.parts import Row

# Formats that are recognised by their columns alone, the first that fits. Of rows with responses the prompt is read.
FORMATS = ("ranked", "messages_completion", "scored_text", "unlabelled_pair", "messages_only", "prompt_only")
COLUMNS = {
    "responses": pa.list_(pa.string()),
    "finish": pa.list_(pa.string()),  # of each response: "stop", or "length" where it was cut off
    "response_tokens": pa.list_(pa.int64()),  # how many it has
}
LOG_PROBS = {"log_probs": pa.list_(pa.list_(pa.float32()))}  # of the tokens of each response


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row, and what is asked of it."""

    where: str  # "file.jsonl:17"
    row: Row
    number: int  # its place in the input
    conversation: Conversation  # up to the turn that the assistant is to answer
    tools: Sequence[Any] | None
    at_once: int  # rows of a part

    @property
    def characters(self) -> int:
        """Its share of a part, so that a part has `at_once` rows."""
        return -(-CHARACTERS // self.at_once)


def open_source(input: Input, at_once: int, unread: dict[str, str] | None = None) -> Iterator[Asked]:
    """Reads the prompts of a source. ValueError for one that cannot be read, with its name.

    What nobody reads is added to `unread`: its column or key, and an example.
    """
    unread = {} if unread is None else unread
    number = 0
    for item in split_spec(input.source):
        layout, named_rows = reading.open_rows(item, input.format, input.columns, FORMATS)
        for name, example in layout.unread:
            unread.setdefault(name, example)
        for where, row in named_rows:
            conversation, tools = _read(layout, source_name(item), where, row, unread)
            yield Asked(where, row, number, conversation, tools, at_once)
            number += 1


def _read(
    layout: Layout, source: str, where: str, row: Row, unread: dict[str, str]
) -> tuple[Conversation, Sequence[Any] | None]:
    try:
        records = layout.read(row, source=source, where=where, keep=True, defects=[], unread=unread)
    except BadRow as bad:
        raise ValueError(f"{where}: {bad.detail}") from None
    conversations = [conversation for record in records for conversation in record.conversations]
    before = conversations[0][:-1] if conversations else ()
    if not before or any(conversation[:-1] != before for conversation in conversations):
        found = "no turn to answer" if not before else "several histories, and one prompt is sampled for"
        raise ValueError(f"{where}: it has {found}; name the format of the rows with --format")
    return before, records[0].tools
