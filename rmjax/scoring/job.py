"""A scoring job: rows in parts, each part a file of its own until all are joined, so that a kill loses one part.

    OUTPUT.parts/job.json          what the job is, written first and removed first; without it no part counts
    OUTPUT.parts/00000012.jsonl    the rows made of a part of the input; it has this name once it is whole
    OUTPUT.parts/00000012.json     how many rows were read and made, and what was dropped
    OUTPUT.parts/lock              keeps a second start of the same job out

Several processes (processes.py) take turns at the parts; the first joins them, in the order of the input.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmjax import command_line, exits, processes, survival
from rmjax.scoring.rows import Row

CHUNK = 1024  # rows of a part, at most; they are in memory
CHARACTERS = 16_000_000  # of a part, about; long rows and many responses make smaller parts
ROW_GROUP = 65_536, 16 * 2**20  # rows and bytes of a row group of Parquet: whichever is reached first
VERSION = 2  # of the parts
OURS = re.compile(r"\d{8}\.(json|jsonl|parquet)(\.tmp)?|job\.(json|tmp)")
IDENTITY = ("config.json", "reward_contract.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
SAMPLES, SAMPLE = 16, 65_536  # pieces of a file of weights that are compared, and the bytes of each

Scored = tuple[list[Row], collections.Counter[str]]  # the rows that a part becomes, and counts of what did not


def chunks(rows: Iterable[Any], characters: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Cuts rows into parts: lists of at most CHUNK that end where they have CHARACTERS."""
    chunk: list[Any] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += characters(row)
        if len(chunk) >= CHUNK or size >= CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def model_identity(directory: Path) -> dict[str, str]:
    """What tells one model from another without reading all of its weights: digests by the names of its files.

    Of weights the size and pieces from all over the file count, of the small files everything.
    """
    found = {path.name: _digest(path, SAMPLES) for path in sorted(directory.glob("*.safetensors*"))}
    return {**found, **{name: _digest(directory / name) for name in IDENTITY if (directory / name).is_file()}}


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


def check_schema(schema: pa.Schema) -> None:
    """Makes sure that Parquet has all these types.

    Raises:
        ValueError: it has not.
    """
    try:
        pq.ParquetWriter(io.BytesIO(), schema).close()
    except pa.ArrowNotImplementedError as error:
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


def join_parts(parts: Iterable[Path], output: Path, schema: pa.Schema | None) -> None:
    """Writes the rows of the parts into one file, in this order."""
    if schema is None:
        with output.open("wb") as file:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file)
        return
    with pq.ParquetWriter(output, schema) as writer:
        for table in _row_groups(pq.read_table(part, schema=schema) for part in parts):
            writer.write_table(table)
            pa.default_memory_pool().release_unused()  # else the pool keeps ever more of what it was given back


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Neighbours put together: the footer has an entry for every row group, and would grow with the rows."""
    some: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        some.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= ROW_GROUP[0] or size >= ROW_GROUP[1]:
            yield pa.concat_tables(some)
            some, rows, size = [], 0, 0
    if rows:
        yield pa.concat_tables(some)


@contextlib.contextmanager
def opened(output: Path, schema: pa.Schema | None, what: dict[str, Any], parts: int) -> Iterator["Job"]:
    """A job that goes on, or begins.

    What it has done is kept however the block ends, but for bad input that is found on the way in a job that began
    here: whatever mends that makes another job.

    Args:
        output: the file that is made.
        schema: of its rows, for Parquet.
        what: everything that decides the rows, as JSON.
        parts: into how many the input is cut.

    Raises:
        ValueError: finished parts of another job are there (says what differs), or another process is at this one; or
            processes that were started together have different jobs.
    """
    job = Job(output, schema, parts)
    made = [path for path in (job.directory, *job.directory.parents) if not path.exists()]
    what = {"version": VERSION, "rows": CHUNK, "characters": CHARACTERS, **json.loads(json.dumps(what))}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    processes.require_same("scoring job", digest, "model, input or flags")
    with survival.alone(job.directory, "--output"):
        new = list(map(str, made)) if processes.is_first() and job.begin(what) else None
        new = processes.agree("scoring begins", new)  # of a job that goes on None
        try:
            yield job
        except Exception as error:
            if new is not None and _is_worthless(error, job):
                job.remove()
                (job.directory / "lock").unlink(missing_ok=True)  # where the first process holds it, which ends at once
                _remove_empty([job.directory, *map(Path, new)])
            raise
    if not job.seal.exists():
        _remove_empty([job.directory])


def _is_worthless(error: Exception, job: "Job") -> bool:
    """Whether nobody can go on after this; a file system that fails for a while is no reason to lose what is done."""
    if command_line.code_of(error) != exits.BAD_INPUT:
        return False
    return isinstance(error, ValueError) or not job.has_parts()


def _remove_empty(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # somebody else's files are in it, or it is gone
            path.rmdir()


class Job:
    """The parts of one output; see `opened`.

    Attributes:
        output: the file that is made.
        schema: of Parquet; None of JSONL.
        parts: how many there will be.
        directory: of the parts.
        seal: the file that says what the job is.
    """

    def __init__(self, output: Path, schema: pa.Schema | None, parts: int):
        self.output, self.schema, self.parts = output, schema, parts
        self.directory = output.absolute().with_name(f"{output.name}.parts")
        self.seal = self.directory / "job.json"

    def begin(self, what: dict[str, Any]) -> bool:
        """Goes on with what is there, or begins; True if it begins.

        Raises:
            ValueError: finished parts of another job.
        """
        before = json.loads(self.seal.read_text()) if self.seal.exists() else None
        if before is not None and before != what and self.has_parts():
            raise ValueError(
                f"{self.directory} holds what an earlier job has done, but {_difference(before, what)}. Put that back "
                "to go on, delete the directory, or name another --output"
            )
        if before == what:
            return False
        self.remove()
        scratch = self.seal.with_suffix(".tmp")
        scratch.write_text(json.dumps(what, indent=1) + "\n")
        scratch.replace(self.seal)
        return True

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.directory / f"{number:08d}{self.output.suffix}"

    def has_parts(self) -> bool:
        """Whether any part is done."""
        return any(re.fullmatch(r"\d{8}\.(jsonl|parquet)", name) for name in os.listdir(self.directory))

    def missing(self) -> list[int]:
        """The parts of this process that are not done."""
        turns = len(processes.gather("scoring", None))
        return [n for n in range(processes.number(), self.parts, turns) if not self.part(n).exists()]

    def write(self, number: int, read: int, made: Scored) -> None:
        """Writes what was made of the `read` rows of a part."""
        rows, counts = made
        path = self.part(number)
        path.with_suffix(".json").write_text(json.dumps({"read": read, "rows": len(rows), **counts}) + "\n")
        scratch = path.with_name(f"{path.name}.tmp")
        write_rows(scratch, rows, self.schema)
        scratch.replace(path)

    def counts(self) -> collections.Counter[str]:
        """Rows that were read and made and what was dropped, of all parts that are done."""
        found: collections.Counter[str] = collections.Counter()
        for number in range(self.parts):
            if self.part(number).exists():
                found.update(json.loads(self.part(number).with_suffix(".json").read_text()))
        return found

    def join(self, total: int) -> collections.Counter[str]:
        """Gives the output its name, removes the parts, and returns their counts; on the first process.

        Raises:
            RuntimeError: the parts are not of `total` rows.
        """
        counts: collections.Counter[str] = collections.Counter()
        processes.barrier("scored")
        if processes.is_first():
            counts = self.counts()
            if counts["read"] != total:
                raise RuntimeError(
                    f"{self.directory} has the scores of {counts['read']} rows, but there are {total}: the input was "
                    "changed meanwhile, or the parts were. Delete the directory and start again"
                )
            scratch = self.output.with_name(f"{self.output.name}.partial")
            join_parts(map(self.part, range(self.parts)), scratch, self.schema)
            scratch.replace(self.output)
            self.remove()
        processes.barrier("joined")
        return counts

    def remove(self) -> None:
        """Removes the job's files: the seal first, so that a kill on the way leaves nothing that seems to be done."""
        self.seal.unlink(missing_ok=True)
        for name in os.listdir(self.directory):
            if OURS.fullmatch(name):
                (self.directory / name).unlink(missing_ok=True)


def _difference(before: Any, now: Any) -> str:
    """What of a job changed, in words."""
    flat = [dict(_flat("", x)) for x in (before, now)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    short = lambda x: json.dumps(x) if len(json.dumps(x)) <= 24 else ""
    both = lambda name: [short(x.get(name)) for x in flat]
    told = lambda was, new: f" is {new}, was {was}" if was and new else " is another"
    return ", ".join(name + told(*both(name)) for name in names)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, x in value.items():
        yield from _flat(f"{prefix} {name}".strip(), x)
