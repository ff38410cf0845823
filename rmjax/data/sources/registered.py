"""Rows that are made in Python: `python://NAME`."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rmjax.data.sources.files import Row
from rmjax.data.sources.parts import Part, part_of_rows

ONCE = (
    "the rows can be read only once, but are read several times; give a list, or a function that makes a new generator"
)
REGISTERED: dict[str, Part] = {}


def register(name: str, rows: Iterable[Row] | Callable[[], Iterable[Row]], version: str | None = None) -> None:
    """Gives rows that are made in Python a name, so that `config.data.train = "python://NAME"` reads them.

    Every process of a run registers them itself; the processes that tokenize get the rows from it. A name that is
    registered again stands for the new rows.

        rmjax.data.register("mine", [{"prompt": "hi", "chosen": "hello", "rejected": "no"}])

    Args:
        name: letters, digits, ".", "_" and "-".
        rows: dicts of any format, in anything that can be iterated twice, or a function that returns them.
        version: says whether the rows are those of an earlier run, so that what was tokenized then can be used;
            without it all rows are hashed, at the start of every run.

    Raises:
        ValueError: another kind of name, or an iterator, which could be read only once.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r} cannot be the name of a source; use letters, digits, '.', '_' and '-'")
    if not callable(rows) and iter(rows) is rows:
        raise ValueError(f"python://{name}: {ONCE}")
    last: Iterable[Row] | None = None

    def read() -> Iterator[Row]:
        nonlocal last
        current = rows() if callable(rows) else rows
        if iter(current) is current and current is last:
            raise ValueError(f"python://{name}: {ONCE}")
        last = current
        for i, row in enumerate(current):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {i} of python://{name} is a {type(row).__name__}, expected a dict")
            yield dict(row)

    count = lambda: len(rows) if isinstance(rows, Sequence) else None
    if version is None:
        REGISTERED[name] = part_of_rows(f"python://{name}", name, read, count)
    else:
        REGISTERED[name] = Part(name, read, count, hashlib.sha256(version.encode()).hexdigest)


def registered_part(item: str) -> Part:
    name = item.removeprefix("python://")
    if name not in REGISTERED:
        known = ", ".join(REGISTERED) or "none"
        raise ValueError(f"{item}: nothing has that name; call rmjax.data.register({name!r}, rows); known: {known}")
    return REGISTERED[name]
