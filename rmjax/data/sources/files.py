"""Rows of one file: Parquet, Arrow, JSON lines or JSON, gzipped or not. `READERS` has a line for each kind."""

import concurrent.futures
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 2**22
MOST_LINE = 2**28  # bytes of a line of JSON lines; what has longer ones is another kind of file

MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})

Row = dict[str, Any]
AsRow = Callable[[Any, str], Row]  # makes a row of what stands in a JSON file, from it and from where it stands


def kind(path: Path) -> str:
    """The suffix that says how a file is read, .gz aside; "" when none of READERS."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS else ""


def advice(name: str) -> str:
    """How to get the rows of a file that is not read."""
    if name.removesuffix(".gz").endswith((".csv", ".tsv")):
        return "; from Label Studio, export as JSON; any other table, write as Parquet (pandas: read_csv, to_parquet)"
    return ""


def as_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, expected an object")
    return value


def read(path: Path, as_row: AsRow = as_object) -> Iterator[Row]:
    """Yields the rows of a file; `as_row` makes them of the values of a JSON file.

    Raises:
        ValueError: contents that cannot be read, with the line where that is known.
    """
    try:
        yield from READERS[kind(path)][0](path, as_row)
    except (pa.ArrowException, UnicodeDecodeError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; those of Arrow and gzip have none
            raise
        raise ValueError(f"{path} cannot be read as {kind(path)}: {' '.join(str(error).split())}") from error


def count(path: Path) -> int | None:
    """The number of rows; None for a JSON file that was not read before, which must be loaded whole to tell."""
    return READERS[kind(path)][1](path)


def digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of every BLOCK bytes of the contents, as hex; threads share the work."""

    def block(start: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).digest()

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(block, range(0, path.stat().st_size, BLOCK)))).hexdigest()


def state(path: Path) -> tuple[int, ...]:
    """Changes whenever the file is written to or replaced, even by what it held before."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.endswith(".gz") else open(path, "rb")


def _rows_of(batch: pa.RecordBatch) -> Iterator[Row]:
    """Rows without the keys that a column's type filled in with null, in messages and in descriptions of tools: there
    every object has the keys of all others."""
    filled = [field.name for field in batch.schema if field.name == "tools" or _has_messages(field.type)]
    for row in batch.to_pylist():
        yield {**row, **{name: _without_nulls(row[name]) for name in filled}} if filled else row


def _has_messages(kind: pa.DataType) -> bool:
    """Whether messages, {role, content} or {from, value}, stand somewhere in a type."""
    if isinstance(kind, pa.StructType):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        names = {field.name for field in fields}
        return any(pair <= names for pair in MESSAGE_KEYS) or any(_has_messages(field.type) for field in fields)
    return hasattr(kind, "value_type") and _has_messages(kind.value_type)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _read_parquet(path: Path, as_row: AsRow) -> Iterator[Row]:
    with _open(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            yield from _rows_of(batch)


def _count_parquet(path: Path) -> int:
    with _open(path) as file:
        return pq.ParquetFile(file).metadata.num_rows


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Both of Arrow's layouts: the file with a footer, and the stream that `datasets` writes."""
    with _open(path) as file:
        has_footer = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if has_footer else pa.ipc.open_stream(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if has_footer else reader
        for batch in batches:
            batch.validate(full=True)  # reading a batch checks nothing: an offset could point anywhere in memory
            yield batch


def _read_arrow(path: Path, as_row: AsRow) -> Iterator[Row]:
    for batch in _arrow_batches(path):
        for start in range(0, batch.num_rows, 1024):
            yield from _rows_of(batch.slice(start, 1024))


def _count_arrow(path: Path) -> int:
    return sum(batch.num_rows for batch in _arrow_batches(path))


def _read_jsonl(path: Path, as_row: AsRow) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                yield as_row(_parse(text, f"{path}, line {number}"), f"{path}, line {number}")


def _count_jsonl(path: Path) -> int:
    with _open(path) as file:
        return sum(bool(line.strip()) for line in _lines(file, path))


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file; one that never ends is not read into memory whole."""
    for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), 1):
        if len(line) > MOST_LINE:
            raise ValueError(
                f"{path}, line {number} is longer than {MOST_LINE:,} bytes; expected JSON lines, a row on each; "
                f"it begins with {line[:40]!r}"
            )
        yield line


_json_counts: dict[tuple[int, ...], int] = {}  # rows by state of a file


def _read_json(path: Path, as_row: AsRow) -> Iterator[Row]:
    """A JSON array, one object of equally long columns, or (often so named) JSON lines."""
    key = state(path)
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        data = _parse(text, str(path))
    except ValueError as error:
        cause = error.__cause__
        if text.lstrip()[:1] == "{" and isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data":
            _json_counts[key] = _count_jsonl(path)
            yield from _read_jsonl(path, as_row)
            return
        raise
    if isinstance(data, dict):
        data = _columns_to_rows(data, str(path))
    if not isinstance(data, list):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected a list of objects or columns")
    _json_counts[key] = len(data)
    for i, value in enumerate(data):
        yield as_row(value, f"{path}, item {i}")


def _columns_to_rows(columns: dict[str, Any], where: str) -> list[Row]:
    """{"a": [1, 2], "b": [3, 4]} -> [{"a": 1, "b": 3}, {"a": 2, "b": 4}]."""
    lengths = {k: len(v) if isinstance(v, list) else type(v).__name__ for k, v in columns.items()}
    if not lengths or len(set(lengths.values())) > 1 or not all(isinstance(n, int) for n in lengths.values()):
        raise ValueError(f"{where} is one object, so its values must be equally long columns; found {lengths}")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        begins = text.splitlines()[error.lineno - 1][:80] if text else ""
        raise ValueError(f"{where}{line}: not JSON ({error.msg} at column {error.colno}): {begins!r}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
        raise ValueError(f"{where}: not JSON that can be read ({error}): {text[:80]!r}") from None


# suffix: how rows are read, and how they are counted without reading them all (None: they cannot be).
READERS: dict[str, tuple[Callable[[Path, AsRow], Iterator[Row]], Callable[[Path], int | None]]] = {
    ".parquet": (_read_parquet, _count_parquet),
    ".arrow": (_read_arrow, _count_arrow),
    ".jsonl": (_read_jsonl, _count_jsonl),
    ".json": (_read_json, lambda path: _json_counts.get(state(path))),
}
