"""Our own records (`store.py`), from Parquet or from JSON lines with the same columns."""

import json
import math
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, Row, common, messages, row_format, score
from rmjax.data.formats.kinds import Kind
from rmjax.data.formats.steps import step_label
from rmjax.data.records import Message, Record, Step, group, require_as_many

MATRICES = ("wins", "ties", "margin")
MATRIX = Kind("K lists of K numbers", lambda c: isinstance(c, list) and all(_is_numbers(x, len(c)) for x in c))
OPTIONAL = {
    **{**kinds.COMMON, **dict.fromkeys(MATRICES, MATRIX)},
    **{"attributes": kinds.LIST, "steps": kinds.LIST, "row": kinds.TEXT},
}


def _is_numbers(cell: Any, count: int) -> bool:
    return isinstance(cell, list) and len(cell) == count and all(map(kinds.NUMBER.test, cell))


@row_format("records", {"conversations": kinds.list_of(kinds.MESSAGES, "conversations")}, optional=OPTIONAL)
def _stored(row: Row, reading: Reading) -> Record:
    """What `convert` writes: whole groups with everything that is known of them (`rmjax/data/store.py`)."""
    conversations = [_conversation(c) for c in row["conversations"]]
    matrices = {name: MATRIX.optional(row, name) for name in MATRICES}
    for name, matrix in matrices.items():
        if matrix is not None:
            require_as_many(name, matrix, conversations)
    attributes = {}
    for named in row.get("attributes") or ():
        require_as_many(named["name"], named["values"], conversations)
        attributes[named["name"]] = [score(x, named["name"]) for x in named["values"]]
    steps = [[Step(step["stop"], step_label(step["label"])) for step in of_one] for of_one in row.get("steps") or ()]
    if steps:
        require_as_many("lists of steps", steps, conversations)
    agreement = kinds.NUMBER.optional(row, "agreement")
    said = {**common(row, reading), "row": kinds.TEXT.optional(row, "row") or reading.where}
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
