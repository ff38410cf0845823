"""Writes the rows of parts, and joins them into one file; compares each part with its note while copying."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rmjax.jobs.notes import AGAIN, Note

ROW_GROUP = 65_536, 16 * 2**20  # rows and bytes of a row group of Parquet: whichever is reached first
Row = dict[str, Any]
T = TypeVar("T")
BLOCK = 2**20  # bytes that are copied at once


def check_schema(schema: pa.Schema) -> None:
    """Raises ValueError where Parquet lacks a type, or could not be read back."""
    try:
        written = io.BytesIO()
        pq.ParquetWriter(written, schema).close()
        pq.read_schema(pa.BufferReader(written.getvalue()))  # lists within lists within lists are written, not read
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"Parquet cannot hold these rows ({error}); write .jsonl instead") from None


def write_rows(path: Path, rows: Sequence[Row], schema: pa.Schema | None) -> None:
    """Writes a part: JSONL, or Parquet if there is a schema."""
    if schema is not None:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
        return
    with path.open("wb") as file:
        file.writelines(map(_line, rows))


def _line(row: Row) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair in some other column; JSON can escape it
        return (json.dumps(row, default=str) + "\n").encode()


def join_parts(parts: Sequence[tuple[Path, Note]], output: Path, schema: pa.Schema | None) -> None:
    """Writes the rows of the parts into one file, in order; RuntimeError where a part differs from its note."""
    if schema is None:
        with output.open("wb") as file:
            for part, note in parts:
                _copy(part, note, file)
    else:
        with pq.ParquetWriter(output, schema) as writer:
            tables = (_table(part, note, schema) for part, note in parts)
            # The footer has an entry for every row group, and would grow with the rows.
            for some in cut_by(tables, lambda table: (table.num_rows, table.nbytes), ROW_GROUP):
                if any(table.num_rows for table in some):
                    writer.write_table(pa.concat_tables(some))
                pa.default_memory_pool().release_unused()  # else the pool keeps ever more of what it was given back
    size = output.stat().st_size if schema is None else pq.read_metadata(output).num_rows
    if size != (expected := sum(note.bytes if schema is None else note.rows for _, note in parts)):
        unit = "bytes" if schema is None else "rows"
        raise RuntimeError(f"{output} has {size} {unit} after {expected} were written to it; {AGAIN}")


def _copy(part: Path, note: Note, file: BinaryIO) -> None:
    digest, lines = hashlib.sha256(), 0
    with part.open("rb") as source:
        while block := source.read(BLOCK):
            digest.update(block)
            lines += block.count(b"\n")
            file.write(block)
    _require_same(part, note, digest.hexdigest(), lines)


def _table(part: Path, note: Note, schema: pa.Schema) -> pa.Table:
    data = part.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    _require_same(part, note, digest, note.rows)  # before Arrow reads it, which trusts what it reads
    table = pq.read_table(pa.BufferReader(data), schema=schema)
    _require_same(part, note, digest, table.num_rows)
    return table


def _require_same(part: Path, note: Note, digest: str, rows: int) -> None:
    if (digest, rows) != (note.sha256, note.rows):
        raise RuntimeError(f"{part} is not what was written there; {AGAIN}")


def cut_by(items: Iterable[T], measure: Callable[[T], tuple[int, int]], limits: tuple[int, int]) -> Iterator[list[T]]:
    """Lists of neighbours that end where one of the two sums of their measures reaches its limit."""
    piece: list[T] = []
    first = second = 0
    for item in items:
        piece.append(item)
        more = measure(item)
        first, second = first + more[0], second + more[1]
        if first >= limits[0] or second >= limits[1]:
            yield piece
            piece, first, second = [], 0, 0
    if piece:
        yield piece
