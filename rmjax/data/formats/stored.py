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
MATRIX = Kind("K lists of K numbers", lambda c: _is_square(c) and all(all(map(kinds.NUMBER.test, x)) for x in c))
MARGIN = Kind("K lists of K numbers or nulls", lambda c: _is_square(c) and all(map(kinds.NUMBERS.test, c)))
OPTIONAL = {
    **{**kinds.COMMON, **dict.fromkeys(MATRICES, MATRIX), "margin": MARGIN},
    **{"attributes": kinds.LIST, "steps": kinds.LIST, "row": kinds.TEXT},
}


def _is_square(cell: Any) -> bool:
    return isinstance(cell, list) and all(isinstance(x, list) and len(x) == len(cell) for x in cell)


@row_format("records", {"conversations": kinds.list_of(kinds.MESSAGES, "conversations")}, optional=OPTIONAL)
def _stored(row: Row, reading: Reading) -> Record:
    """What `convert` writes: whole groups with everything that is known of them (`rmjax/data/store.py`)."""
    conversations = [_conversation(c) for c in row["conversations"]]
    matrices = {name: OPTIONAL[name].optional(row, name) for name in MATRICES}
    for name, matrix in matrices.items():
        if matrix is not None:
            require_as_many(name, matrix, conversations)
    if matrices["margin"] is not None:
        matrices["margin"] = [[math.nan if x is None else x for x in of_one] for of_one in matrices["margin"]]
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
