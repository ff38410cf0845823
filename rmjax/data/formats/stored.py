"""Our own records (`store.py`), from Parquet or from JSON lines with the same columns."""

import json
import math
from typing import Any

from rmjax.data.formats.cells import (
    COMMON,
    LIST,
    MESSAGES,
    NUMBER,
    TEXT,
    Format,
    Kind,
    Reading,
    Row,
    common,
    is_null,
    list_of,
    messages,
    optional,
    score,
)
from rmjax.data.formats.ranked import as_many
from rmjax.data.formats.steps import step_label
from rmjax.data.records import Message, Record, Step, group

MATRICES = ("wins", "ties", "margin")
GROUPED = list_of(MESSAGES, "conversations")
MATRIX = Kind("K lists of K numbers", lambda c: isinstance(c, list) and all(_is_numbers(x, len(c)) for x in c))


def _is_numbers(cell: Any, count: int) -> bool:
    return isinstance(cell, list) and len(cell) == count and all(map(NUMBER.test, cell))


def _stored(row: Row, reading: Reading) -> Record:
    conversations = [_conversation(c) for c in row["conversations"]]
    matrices = {name: optional(row, name, MATRIX) for name in MATRICES}
    for name, matrix in matrices.items():
        if matrix is not None:
            as_many(name, matrix, conversations)
    attributes = {}
    for named in row.get("attributes") or ():
        as_many(named["name"], named["values"], conversations)
        attributes[named["name"]] = [score(x, named["name"]) for x in named["values"]]
    steps = [
        [Step(step["stop"], math.nan if is_null(step["label"]) else step_label(step["label"])) for step in of_one]
        for of_one in row.get("steps") or ()
    ]
    if steps:
        as_many("lists of steps", steps, conversations)
    agreement = optional(row, "agreement", NUMBER)
    said = {**common(row, reading), "row": optional(row, "row", TEXT) or reading.where}
    return group(
        conversations,
        **matrices,
        attributes=attributes,
        steps=steps,
        agreement=math.nan if agreement is None else agreement,
        **said,
    )


def _conversation(turns: Any) -> list[Message]:
    read: list[Message] = []
    for turn in turns:
        plain = {name: cell for name, cell in turn.items() if name != "extra"}
        read.append({**messages(plain)[0], **json.loads(turn.get("extra") or "{}")})
    return read


STORED = (
    Format(
        "records",
        {"conversations": GROUPED},
        _stored,
        optional={**COMMON, **dict.fromkeys(MATRICES, MATRIX), "attributes": LIST, "steps": LIST, "row": TEXT},
        means="what `convert` writes: whole groups with everything that is known of them (`rmjax/data/store.py`)",
    ),
)
