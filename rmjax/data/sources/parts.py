"""The parts of a source: files, files aligned by their rows, and rows that are in no file."""

import dataclasses
import datetime
import decimal
import functools
import hashlib
import itertools
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.sources import files, listing
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
    if unknown := [path for path in paths if not files.kind(path)]:
        raise ValueError(
            f"{unknown[0]}: unknown kind of file; known: {', '.join(files.READERS)}, each also with .gz"
            f"{files.advice(unknown[0].name)}"
        )
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


def aligned_part(item: str) -> Part:
    """The rows of `aligned://prompts.json+responses.json+rewards.json`: row i of each file is a part of row i.

    Raises:
        ValueError: a piece is several files, or there is only one piece.
    """
    paths: list[Path] = []
    for piece in listing.split_pieces(item.removeprefix("aligned://"), "+"):
        named = listing.remote_files(piece) if piece.startswith("hf://") else listing.local_files(piece)
        if len(named) != 1:
            raise ValueError(f"{item}: {piece} is {len(named)} files, expected one")
        paths += named
    if len(paths) < 2:
        raise ValueError(f"{item}: expected several files, joined by +")
    return Part(
        "+".join(short_names(paths)),
        lambda: _merged_rows(item, paths),
        lambda: files.count(paths[0]),
        lambda: hashlib.sha256("".join(map(files.digest, paths)).encode()).hexdigest(),
        lambda: [files.state(path) for path in paths],
    )


def _merged_rows(item: str, paths: Sequence[Path]) -> Iterator[Row]:
    for i, cells in enumerate(itertools.zip_longest(*(files.read(path, _columns_of) for path in paths))):
        if None in cells:
            counts = [f"{path.name} {sum(1 for _ in files.read(path, _columns_of))}" for path in paths]
            raise ValueError(f"{item}: aligned files must have equally many rows, found {', '.join(counts)}")
        row: Row = {}
        for path, more in zip(paths, cells):
            for column in row.keys() & more.keys():
                if row[column] != more[column]:
                    raise ValueError(f"{item}, row {i}: {path.name} and a file before it differ in {column!r}")
            row |= more
        yield row


def _columns_of(value: Any, where: str) -> Row:
    """An object is columns; what else stands in a file gets the name that formats have for it.

    >>> _columns_of("hi", ""), _columns_of(["yo", "oh"], ""), _columns_of([0.5, 2], "")
    ({'prompt': 'hi'}, {'response_1': 'yo', 'response_2': 'oh'}, {'rewards': [0.5, 2]})
    """
    if isinstance(value, dict):
        return value
    kinds = {type(x) for x in value} if isinstance(value, list) else set()
    if isinstance(value, str) or kinds == {dict}:
        return {"prompt": value}
    if kinds == {str}:
        return {f"response_{i}": text for i, text in enumerate(value, 1)}
    if kinds and kinds <= {int, float}:
        return {"rewards": value}
    expected = "an object, text or messages (the prompt), a list of texts (responses), or of numbers (rewards)"
    raise ValueError(f"{where} is {str(value)[:60]!r}, expected {expected}")


def part_of_rows(item: str, name: str, rows: Rows, count: Callable[[], int | None]) -> Part:
    """A part that is no file: all its rows are read for its digest, and hashed again on their way to a reader."""

    def digest() -> str:
        digests: set[str] = set()
        deque(_hashed(item, rows(), digests), maxlen=0)
        watched.get(item, set()).update(digests)
        return digests.pop()

    return Part(name, lambda: _hashed(item, rows(), watched[item]) if item in watched else rows(), count, digest)


def _hashed(item: str, rows: Iterable[Row], digests: set[str]) -> Iterator[Row]:
    """Passes rows through; adds the SHA-256 of all of them to `digests` once they were read."""
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
    """A value that JSON does not know, as one that is the same in every process; for `json.dumps(default=...)`."""
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    if isinstance(value, bytes | datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"a value is of type {type(value).__name__}")
