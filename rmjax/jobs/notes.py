"""Notes of a job about its files, so that a name alone makes no file the job's own, or whole.

job.json        who wrote it, into how many parts the input is cut, and what the job is
00000012.json   of a part: its job, the rows that were read and made, what was dropped, and the size and digest of
                the rows' file. It is there before that file has its name.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmjax.runtime import files

SEAL, LOCK = "job.json", "lock"
# The names of scratch files, see files.py.
SCRATCH = re.compile(r"\.(\d{8}\.(json|jsonl|parquet)|job\.json)" + re.escape(files.SCRATCH))
AGAIN = "start the same command again, which goes on with what is whole"
ADVICE = "move it away if it is to be kept, else delete it, or name another --output"


class Damaged(ValueError):
    """A note with other contents than were written: the machine went down, the disk was full, or somebody edited it."""


@dataclasses.dataclass(frozen=True)
class Seal:
    """The job that a directory of parts belongs to."""

    made_by: str  # the command, "rmjax.score"
    parts: int  # that the input is cut into
    what: dict[str, Any]  # everything that decides the rows, as JSON

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(self.what, sort_keys=True).encode()).hexdigest()[:32]

    def write(self, directory: Path) -> None:
        files.write_json(directory / SEAL, dataclasses.asdict(self))


def read_seal(directory: Path, made_by: str) -> Seal | None:
    """The job of a directory of parts, None where there are no files; ValueError where they are damaged, or not of this
    command."""
    path = directory / SEAL
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, and the parts of the output need a directory of that name; {ADVICE}")
    names = os.listdir(directory) if directory.is_dir() else []
    if SEAL not in names:
        if others := sorted(name for name in names if name != LOCK and not SCRATCH.fullmatch(name)):
            raise ValueError(
                f"{directory} holds {others[0]} and no {SEAL}, so what is in it was not made by this command, which "
                f"keeps its parts there; {ADVICE}"
            )
        return None
    try:
        values = _object(path)
    except Damaged as damaged:
        raise ValueError(f"{damaged}, so nobody can tell whose parts are in {directory}; {ADVICE}") from None
    writer, parts, what = map(values.get, ("made_by", "parts", "what"))
    if writer != made_by or type(parts) is not int or not isinstance(what, dict):
        raise ValueError(f"{path} was not written by this version of {made_by}; {directory}: {ADVICE}")
    return Seal(made_by, parts, what)


@dataclasses.dataclass(frozen=True)
class Note:
    """The record of a part."""

    job: str  # Seal.id of the job that made it
    part: int  # its number
    bytes: int  # of the rows' file
    sha256: str  # of the rows' file
    read: int  # rows of the input
    rows: int  # that they became
    counts: dict  # what was dropped or turned, by its reason

    def fits(self, path: Path) -> bool:
        """Whether a file is the one that was written; reads it, if the size is right."""
        return path.stat().st_size == self.bytes and files.sha256(path) == self.sha256


def read_note(path: Path) -> Note | None:
    """The note of a part, None where there is none; ValueError for JSON that is no note, Damaged for no JSON (after a
    power cut a file is empty, cut off or ends with zeros).
    """
    try:
        values = _object(path)
    except FileNotFoundError:
        return None
    kinds = {field.name: field.type for field in dataclasses.fields(Note)}
    if values.keys() != kinds.keys() or not all(type(values[name]) is kind for name, kind in kinds.items()):
        raise ValueError(f"{path} is no note of a part; {ADVICE}")
    return Note(**values)


def _object(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise Damaged(f"{path} is {'no JSON' if data else 'empty'}") from None
    return values if isinstance(values, dict) else {}


def difference(before: Any, now: Any) -> str:
    flat = [dict(_flat("", x)) for x in (before, now)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    short = lambda x: json.dumps(x) if len(json.dumps(x)) <= 24 else ""
    both = lambda name: [short(x.get(name)) for x in flat]
    change = lambda was, new: f" is {new}, was {was}" if was and new else " is another"
    return ", ".join(name + change(*both(name)) for name in names)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, x in value.items():
        yield from _flat(f"{prefix} {name}".strip(), x)
