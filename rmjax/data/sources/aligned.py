"""Files of which row i is a part of the same row: `aligned://prompts.json+responses.json+rewards.json`."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.sources import files, listing
from rmjax.data.sources.files import Row
from rmjax.data.sources.parts import Part, short_names


def aligned_part(item: str) -> Part:
    """One part of all files.

    Raises:
        FileNotFoundError: one is not there.
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
