"""Records as Parquet: the file that `python -m rmjax.data convert` writes and the format `records` reads back.

One row is one record, complete: what is read is equal to what was written. K responses.

    conversations   list of K lists of messages {role, content, extra}; `extra` is a JSON object of what else a message
                    has (tool_calls, reasoning_content, ...), null where that is nothing
    wins, ties      list of K lists of K float32: how much i is preferred to j, and whether they are equal
    margin          the same, by how much; null where that is not known
    attributes      list of {name, values}: K float64 each, null where one is missing
    steps           list of K lists of {stop, label}: characters of the last turn up to the step's end, and a label in
                    [0, 1], null where it was not judged; empty where no steps were judged
    agreement       share of the annotators who gave the label, null where it is not known
    weight          float64
    tools           JSON list of tool descriptions, or null
    source, row     name of the source, and where the row stood in it

Any column but `conversations` may be missing in files of other making.
"""

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmjax.data.records import HALF_PAIR, Message, Record
from rmjax.runtime import files

ROW_GROUP = 512  # records; a group is in memory at once when written and when read

_MATRIX = pa.list_(pa.list_(pa.float32()))
SCHEMA = pa.schema(
    {
        "conversations": pa.list_(
            pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "extra": pa.string()}))
        ),
        **dict.fromkeys(("wins", "ties", "margin"), _MATRIX),
        "attributes": pa.list_(pa.struct({"name": pa.string(), "values": pa.list_(pa.float64())})),
        "steps": pa.list_(pa.list_(pa.struct({"stop": pa.int32(), "label": pa.float64()}))),
        **dict.fromkeys(("agreement", "weight"), pa.float64()),
        **dict.fromkeys(("tools", "source", "row"), pa.string()),
    },
    {"rmjax": "records 1"},
)


def write(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes records as they come, a row group at a time, and returns how many; none is a file too.

    The file appears whole and synced, or not at all.
    """
    path, count, records = Path(path), 0, iter(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as scratch, pq.ParquetWriter(scratch, SCHEMA, compression="zstd") as writer:
        while rows := [to_row(record) for record in itertools.islice(records, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
            count += len(rows)
    return count


def to_row(record: Record) -> dict[str, Any]:
    """A record as a row of SCHEMA; `formats.stored` reads it back."""
    return {
        "conversations": [[_message(m) for m in conversation] for conversation in record.conversations],
        **{name: getattr(record, name).tolist() for name in ("wins", "ties")},
        "margin": [list(map(_or_null, of_one)) for of_one in record.margin.tolist()],
        "attributes": [
            {"name": name, "values": list(map(_or_null, values))} for name, values in record.attributes.items()
        ],
        "steps": [[{"stop": step.stop, "label": _or_null(step.label)} for step in steps] for steps in record.steps],
        "agreement": _or_null(record.agreement),
        "weight": record.weight,
        "tools": None if record.tools is None else _json(record.tools),
        "source": record.source,
        "row": record.row,
    }


def _message(message: Message) -> Mapping[str, str | None]:
    extra = {name: value for name, value in message.items() if name not in ("role", "content")}
    if message.get("content", "") is None:  # as it was written: null is not the same as nothing to every template
        extra["content"] = None
    return {"role": message["role"], "content": message.get("content"), "extra": _json(extra) if extra else None}


def _json(value: Any) -> str:
    """Readable, but where half of a surrogate pair stands in it, which no file takes."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # dates, for example
    return json.dumps(value, default=str) if HALF_PAIR.search(text) else text


def _or_null(number: float) -> float | None:
    return None if math.isnan(number) else number
