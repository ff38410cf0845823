"""Where rows come from: files, the Hugging Face hub, buckets, databases, Python itself, and made-up data.

A source is written as a path or as `scheme://...`; several are separated by commas. `SCHEMES` has a line for each
scheme, `files.READERS` one for each kind of file. Rows are plain dicts; what they mean is for `formats`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from rmjax.data import synthetic
from rmjax.data.sources import database, listing
from rmjax.data.sources.files import Row
from rmjax.data.sources.parts import Part, aligned_part, file_parts, plain, watched
from rmjax.data.sources.registered import register, registered_part

__all__ = ["Row", "plain", "register"]


def split_spec(spec: str) -> list[str]:
    """Splits "a.jsonl, hf://datasets/o/n/b.parquet" at its commas, but not inside a path that exists as it stands.

    SQL has commas too, so a source with `query=` reaches to the end of the text.

    Raises:
        ValueError: it names nothing.
    """
    if spec.strip() and os.path.exists(spec):
        return [spec]
    sql = re.search(r"[^,]*://[^,]*[?&]query=", spec)
    listed, rest = (spec[: sql.start()], [spec[sql.start() :]]) if sql else (spec, [])
    items = [item.strip() for item in [*listing.split_pieces(listed, ","), *rest] if item.strip()]
    if not items:
        raise ValueError("no data was named; give a file, a directory, a glob or hf://datasets/OWNER/NAME/...")
    return items


def source_name(item: str) -> str:
    """The name a source's rows carry: "owner/name" on the hub, a table, else the file's name without its suffixes.

    >>> source_name("hf://datasets/o/n@main/data/*.parquet"), source_name("dir/train.jsonl.gz")
    ('o/n', 'train')
    >>> source_name("helpful/*.jsonl")
    'helpful'
    """
    scheme, rest = _scheme(item), item.partition("://")[2]
    if not scheme:
        return listing.glob_name(item).split(".")[0] or item
    if scheme == "hf":
        return "/".join(rest.removeprefix("datasets/").split("/")[:2]).split("@")[0]
    if scheme == "aligned":
        return source_name(listing.split_pieces(rest, "+")[0])
    if scheme in listing.PACKAGES:
        return source_name(rest)
    if scheme in database.SCHEMES:
        return database.table_name(item)
    return rest.partition("?")[0]


def refuse_equal_names(spec: str, why: str) -> None:
    """Raises ValueError where two sources of `spec` have the same name; `why` says what needs the names."""
    items: dict[str, str] = {}
    for item in split_spec(spec):
        name = source_name(item)
        if name in items:
            raise ValueError(
                f"{items[name]} and {item} are both called {name!r}, and {why} could not tell them apart; rename a "
                "file, or give each its own directory and name it by a glob"
            )
        items[name] = item


def open_source(spec: str) -> Iterator[tuple[str, Row]]:
    """Yields (row id, row) of every source in `spec`, in order; ids are "file.jsonl:17", counting from 0.

    Raises:
        FileNotFoundError: a path or glob that matches nothing.
        ValueError: no rows, an unknown kind of file, or contents that cannot be read (with the line).
    """
    for item in split_spec(spec):
        empty = True
        for part in parts(item):
            for i, row in enumerate(part.rows()):
                empty = False
                yield f"{part.name}:{i}", row
        if empty:
            raise ValueError(f"{item} has no rows")


def count_rows(spec: str) -> int | None:
    """Number of rows of all sources; None where only reading them all would tell."""
    counts = [part.count() for item in split_spec(spec) for part in parts(item)]
    return None if None in counts else sum(cast(list[int], counts))


def fingerprint(spec: str) -> str:
    """SHA-256 over the names and contents of everything in `spec`, as hex."""
    contents = [(source_name(item), part.name, part.digest()) for item in split_spec(spec) for part in parts(item)]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


class Witness:
    """Takes the fingerprint of sources before they are read; `check`, afterwards, refuses what changed meanwhile.

    Files are compared by their digests before and after, and by inode, size and times of change, which tell of a file
    that was changed and changed back; a file that was only touched is refused with them. The rows of databases and of
    Python are hashed as open_source reads them. The cost is a second digest, of files about 1 GB/s on two cores (see
    token_files.py), and of rows one more reading.
    """

    def __init__(self, spec: str):
        self._spec, self._items = spec, split_spec(spec)
        for item in self._items:
            watched[item] = set()
        self._before = self._states()
        self.fingerprint = fingerprint(spec)

    def _states(self) -> dict[str, Any]:
        named = [(item, part) for item in self._items for part in parts(item)]
        return {item if item.endswith(part.name) else f"{part.name} of {item}": part.state() for item, part in named}

    def check(self) -> None:
        """Raises ValueError, which names what changed, or FileNotFoundError where a source is gone."""
        digests = {item: watched.pop(item, set()) for item in self._items}
        same = fingerprint(self._spec) == self.fingerprint
        after = self._states()
        changed = [name for name in {**self._before, **after} if self._before.get(name) != after.get(name)]
        changed += [item for item, several in digests.items() if len(several) > 1]
        if not same or changed:
            raise ValueError(
                f"{', '.join(changed[:3]) or self._spec} changed while it was read, so what was read is not what its "
                "fingerprint says; nothing was kept of it: start again when nobody writes to it"
            )


def local_files(item: str) -> list[Path]:
    """The files of a source that are on this machine; [] for one that is elsewhere."""
    scheme, rest = _scheme(item), item.partition("://")[2]
    if scheme == "aligned":
        return [file for piece in listing.split_pieces(rest, "+") for file in local_files(piece)]
    return [] if scheme else listing.local_files(item)


def parts(item: str) -> list[Part]:
    """The files (or tables, or made-up sets) of one source.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an unknown scheme.
    """
    scheme = _scheme(item)
    if not scheme:
        return file_parts(listing.local_files(item))
    if scheme not in SCHEMES:
        raise ValueError(f"{item}: unknown scheme {scheme}://; known: local paths, {'://, '.join(SCHEMES)}://")
    return SCHEMES[scheme](item)


def _scheme(item: str) -> str:
    """What stands before "://", less the driver of a database ("postgresql+psycopg2"); "" for a path."""
    scheme, separator, _ = item.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
        return ""
    name = scheme.partition("+")[0]
    return name if name in SCHEMES or not os.path.exists(item) else ""


def _synthetic_part(item: str) -> Part:
    """The rows of `synthetic://NAME?key=value&...`."""
    url = urlsplit(item)
    options = dict(parse_qsl(url.query))
    return Part(
        url.netloc,
        rows=lambda: synthetic.rows(url.netloc, **options),
        count=lambda: int(options.get("n", synthetic.OPTIONS["n"])),
        digest=lambda: hashlib.sha256(f"{item} {synthetic.VERSION}".encode()).hexdigest(),
    )


_remote_parts = lambda item: file_parts(listing.remote_files(item))
SCHEMES: dict[str, Callable[[str], list[Part]]] = {
    "hf": _remote_parts,
    **dict.fromkeys(listing.PACKAGES, _remote_parts),
    **dict.fromkeys(database.SCHEMES, lambda item: [database.database_part(item)]),
    "python": lambda item: [registered_part(item)],
    "aligned": lambda item: [aligned_part(item)],
    "synthetic": lambda item: [_synthetic_part(item)],
}
