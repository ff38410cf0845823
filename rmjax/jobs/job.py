"""A job over the rows of a file, in parts: each is a file of its own until all are joined, so a kill loses one part.

    OUTPUT.parts/job.json          what the job is, written first and removed last; a directory without it is not ours
    OUTPUT.parts/00000012.json     what a part has to be (notes.py), written before the part has its name
    OUTPUT.parts/00000012.jsonl    the rows made of a part of the input, once they are whole
    OUTPUT.parts/lock              keeps a second start of the same job out

A start reads what earlier ones have done once, and compares it with its notes: 1.5 s per GB of parts (two busy cores of
an AMD EPYC, 2026-11-29). What is not what was written is made again. Joining compares while it copies.

Several processes (processes.py) take turns at the parts; the first joins them, in the order of the input.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rmjax.jobs import notes
from rmjax.jobs.notes import AGAIN, Note, Seal
from rmjax.jobs.parts import Row, cut_by, join_parts, write_rows
from rmjax.models import hf
from rmjax.runtime import agreement, command_line, exits, files, processes, signals

CHUNK = 1024  # rows of a part, at most; they are in memory
CHARACTERS = 16_000_000  # of a part, about; long rows and many responses make smaller parts
VERSION = 4  # of the parts
IDENTITY = (
    *("config.json", "adapter_config.json", "reward_contract.json"),
    *("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"),
)
SAMPLES, SAMPLE = 16, 65_536  # pieces of a file of weights that are compared, and the bytes of each

Counts = collections.Counter[str]
Made = tuple[list[Row], Counts]  # the rows that a part becomes, and counts of what did not


def cut_rows(rows: Iterable[Any], characters: Callable[[Any], int]) -> Iterator[list[Any]]:
    """The parts of the input."""
    return cut_by(rows, lambda row: (1, characters(row)), (CHUNK, CHARACTERS))


def model_identity(directory: Path) -> dict[str, str]:
    """Digests of a model's small files, and of weights the size and pieces from all over, by file name."""
    digests = {path.name: _digest(path, SAMPLES) for path in sorted(directory.glob("*.safetensors*"))}
    digests |= {name: _digest(directory / name) for name in IDENTITY if (directory / name).is_file()}
    if (base := hf.base_of(directory)) != directory:
        digests |= {f"base/{name}": digest for name, digest in model_identity(base).items()}
    return digests


def _digest(path: Path, samples: int = 0) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if not samples or size <= samples * SAMPLE:
            digest.update(file.read())
        else:
            for i in range(samples):
                file.seek(i * (size - SAMPLE) // (samples - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def open_job(made_by: str, output: Path, schema: pa.Schema | None, what: dict[str, Any], parts: int) -> Iterator["Job"]:
    """A job of a command that goes on, or begins, of so many `parts`; `what` is all that decides the rows, as JSON.

    Its work is kept however the block ends, except when bad input is found in a job that began here: whatever mends the
    input makes another job.

    Raises:
        ValueError: finished parts of another job are there (says what differs), or another process is at this one; or
            processes that were started together have different jobs.
    """
    what = {"version": VERSION, "rows": CHUNK, "characters": CHARACTERS, **json.loads(json.dumps(what))}
    job = Job(output, schema, Seal(made_by, parts, what))
    folders = files.missing_directories(job.directory)
    agreement.require_same("job", job.seal.id, "model, input or flags")
    if processes.is_first():
        notes.read_seal(job.directory, made_by)  # first, as a lock is a file in what may be somebody else's directory
    with signals.alone(job.directory, "--output"):
        new = list(map(str, folders)) if processes.is_first() and job.begin() else None
        new = agreement.agree("job begins", new)  # of a job that goes on None
        try:
            yield job
        except Exception as error:
            if new is not None and _is_worthless(error, job):
                job.remove()
                (job.directory / "lock").unlink(missing_ok=True)  # where the first process holds it, which ends at once
                _remove_empty(job.directory, *map(Path, new))
            raise
    if not (job.directory / notes.SEAL).exists():
        _remove_empty(job.directory)


def _remove_empty(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # somebody else's files are in it, or it is gone
            path.rmdir()


def _is_worthless(error: Exception, job: "Job") -> bool:
    """Whether nobody can go on after this error; a failing file system is no reason to lose finished work."""
    if command_line.code_of(error) != exits.BAD_INPUT:
        return False
    return isinstance(error, ValueError) or not job.has_parts()


class Job:
    """The parts of one output; see `open_job`."""

    def __init__(self, output: Path, schema: pa.Schema | None, seal: Seal):
        self.output, self.seal, self.parts = output, seal, seal.parts
        self.schema = schema  # of Parquet; None of JSONL
        self.directory = output.absolute().with_name(f"{output.name}.parts")
        self.turns = len(agreement.gather("job", None))  # processes that share the parts

    def begin(self) -> bool:
        """Goes on with what is there, or begins (True); ValueError for parts of another job, or files of no job."""
        before = notes.read_seal(self.directory, self.seal.made_by)
        if before is not None and before != self.seal and self.has_parts():
            difference = notes.difference(before.what, self.seal.what)
            problem = f"{self.directory} holds what an earlier job has done, but {difference}"
            raise ValueError(f"{problem}. Put that back to go on, delete the directory, or name another --output")
        if before == self.seal:
            return False
        if before is not None:
            self.remove(before.id)
        self.seal.write(self.directory)
        return True

    def part(self, number: int) -> Path:
        return self.directory / f"{number:08d}{self.output.suffix}"

    def note(self, number: int) -> Path:
        return self.directory / f"{number:08d}.json"

    def has_parts(self) -> bool:
        return any(re.fullmatch(r"\d{8}\.(jsonl|parquet)", name) for name in os.listdir(self.directory))

    def missing(self) -> list[int]:
        """The unfinished parts of this process; reads the others. ValueError where a part is foreign."""
        mine = range(processes.number(), self.parts, self.turns)
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return [number for number, done in zip(mine, pool.map(self._is_done, mine)) if not done]

    def _is_done(self, number: int) -> bool:
        """Whether a part is as it was written; reports one that was and no longer is."""
        part = self.part(number)
        try:
            note = self._noted(number)
        except notes.Damaged as damaged:
            print(f"{damaged}; its rows are made again", flush=True)
            return False
        if note is None:
            if part.exists():
                raise ValueError(f"{part} was not made by this job, which notes what it makes; {notes.ADVICE}")
            return False
        if not part.exists():
            return False
        if not (fits := note.fits(part)):
            print(f"{part} is not what was written there; its rows are made again", flush=True)
        return fits

    def _noted(self, number: int) -> Note | None:
        note = notes.read_note(self.note(number))
        if note is not None and (note.job, note.part) != (self.seal.id, number):
            raise ValueError(f"{self.note(number)} is of another job, or of another part of this one; {notes.ADVICE}")
        return note

    def write(self, number: int, read: int, made: Made) -> None:
        """Writes the rows made of a part, which had `read` rows."""
        rows, counts = made
        with files.whole(self.part(number)) as scratch:
            write_rows(scratch, rows, self.schema)
            size, digest = scratch.stat().st_size, files.sha256(scratch)
            note = Note(self.seal.id, number, size, digest, read, len(rows), dict(counts))
            files.write_json(self.note(number), dataclasses.asdict(note), indent=None)

    def read_before(self, missing: Collection[int]) -> int:
        """The number of input rows in the parts that are done already."""
        done = (n for n in range(self.parts) if n not in missing and self.part(n).exists())
        with contextlib.suppress(notes.Damaged):  # another process's, which says so
            return sum(note.read for n in done if (note := notes.read_note(self.note(n))))
        return 0

    def join(self, total: int, tell: Callable[[Counts], None] = lambda counts: None) -> Counts:
        """Gives the output its name, removes the parts, and returns counts of rows read, made and dropped (process 0).

        `tell` is given the counts while the parts are there, so that they are told after a kill, too.

        RuntimeError where the parts do not have `total` rows, or one differs from its note; ValueError where the
        output's name is taken by now, or a note is foreign.
        """
        agreement.barrier("made")
        with command_line.under_way():  # whatever is wrong now, what is made is kept
            counts = self._join(total, tell) if processes.is_first() else Counts()
        agreement.barrier("joined")
        return counts

    def _join(self, total: int, tell: Callable[[Counts], None]) -> Counts:
        part_notes, counts = self._notes(), Counts()
        for note in part_notes:
            counts.update({"read": note.read, "rows": note.rows, **note.counts})
        if counts["read"] != total:
            problem = f"{self.directory} has what became of {counts['read']} rows, but there are {total}"
            raise RuntimeError(f"{problem}; delete the directory and start again")
        files.check_target(self.output, "--output")  # it may be another thing than when the job began
        with files.whole(self.output) as scratch:
            join_parts([*zip(map(self.part, range(self.parts)), part_notes)], scratch, self.schema)
        tell(counts)
        self.remove()
        return counts

    def _notes(self) -> list[Note]:
        """The note of every part; RuntimeError where one is damaged or missing."""
        part_notes = []
        for number in range(self.parts):
            try:
                note = self._noted(number)
            except notes.Damaged as damaged:
                raise RuntimeError(f"{damaged}; {AGAIN}") from None
            if note is None or not self.part(number).exists():
                raise RuntimeError(f"{(self.note if note is None else self.part)(number)} is missing; {AGAIN}")
            part_notes.append(note)
        return part_notes

    def remove(self, job: str = "") -> None:
        """Removes all that a job (`Seal.id`; "" is this one) noted, the last part first: after a kill it goes on."""
        for name in sorted(os.listdir(self.directory), reverse=True):
            path = self.directory / name
            if notes.SCRATCH.fullmatch(name):
                path.unlink(missing_ok=True)
            elif re.fullmatch(r"\d{8}\.json", name) and _is_note_of(path, job or self.seal.id):
                path.with_suffix(self.output.suffix).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        files.sync(self.directory)  # else a machine that goes down could keep a part and not what says whose it is
        (self.directory / notes.SEAL).unlink(missing_ok=True)


def _is_note_of(path: Path, job: str) -> bool:
    with contextlib.suppress(ValueError):
        return (note := notes.read_note(path)) is not None and note.job == job
    return False
