"""The parts of a source, and digests of rows that are in no file."""

import dataclasses
import datetime
import decimal
import functools
import hashlib
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.sources import files
from rmjax.data.sources.files import Row

Rows = Callable[[], Iterator[Row]]
watched: dict[str, set[str]] = {}  # by source of a Witness: digests of all rows, of each time they were read


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a source, one table, or one made-up set."""

    name: str  # short; rows are called "name:17"
    rows: Rows
    count: Callable[[], int | None]  # of its rows; None where only reading it all would tell
    digest: Callable[[], str]  # SHA-256 of its contents
    state: Callable[[], Any] = lambda: None  # of files, another one whenever they are written to


def file_parts(paths: Sequence[Path]) -> list[Part]:
    """A part for each file.

    Raises:
        ValueError: an unknown kind of file.
    """
    if unknown := [path for path in paths if not files.kind(path)]:
        raise ValueError(f"{unknown[0]}: unknown kind of file; known: {', '.join(files.READERS)}, each also with .gz")
    of = lambda function, path: functools.partial(function, path)
    return [
        Part(name, of(files.read, path), of(files.count, path), of(files.digest, path), of(files.state, path))
        for name, path in zip(short_names(paths), paths)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def part_of_rows(item: str, name: str, rows: Rows, count: Callable[[], int | None]) -> Part:
    """A part that is no file: all its rows are read for its digest, and hashed again on their way to a reader."""

    def digest() -> str:
        digests: set[str] = set()
        deque(_hashed(item, rows(), digests), maxlen=0)
        watched.get(item, set()).update(digests)
        return digests.pop()

    return Part(name, lambda: _hashed(item, rows(), watched[item]) if item in watched else rows(), count, digest)


def _hashed(item: str, rows: Iterable[Row], digests: set[str]) -> Iterator[Row]:
    """Passes rows through; adds the SHA-256 of all, in their order, to `digests` once they were read."""
    total = hashlib.sha256()
    for i, row in enumerate(rows):
        try:
            text = json.dumps(row, sort_keys=True, default=plain)
        except TypeError as error:
            advice = "give register() a version" if item.startswith("python://") else "leave its column out"
            raise ValueError(f"row {i} of {item} cannot be hashed ({error}); {advice}") from error
        total.update(text.encode("utf-8", "surrogatepass") + b"\n")
        yield row
    digests.add(total.hexdigest())


def plain(value: Any) -> Any:
    """A value that JSON does not know, as one that is the same in every process; for `json.dumps(default=...)`.

    Raises:
        TypeError: there is none.
    """
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    if isinstance(value, bytes | datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"a value is of type {type(value).__name__}")
