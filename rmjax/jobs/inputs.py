"""The rows of a job: read once to see what they are, and again to work on them; what changed in between is found."""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from rmjax.data.sources import local_files, plain, split_spec
from rmjax.jobs import job as jobs
from rmjax.jobs import parts
from rmjax.jobs.parts import Row
from rmjax.runtime import files
from rmjax.runtime.command_line import check_writable


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except TypeError:
        return type(value).__name__  # str(value) might hold an address, another one at each reading


ENCODER = json.JSONEncoder(default=_plain, skipkeys=True)
SOME = 64  # rows that are hashed at once
MARGIN = 32  # lists around a row when its depth is tried: the output's row is written further down the stack


@dataclasses.dataclass(frozen=True)
class Input:
    """Where the rows are, and how they are read."""

    source: str
    format: str = "auto"
    columns: str = ""  # what columns are, see config.data.columns


class Asked(Protocol):
    """A row of the input, and what is asked about it."""

    @property
    def where(self) -> str: ...  # "file.jsonl:17"

    @property
    def row(self) -> Row: ...

    @property
    def characters(self) -> int: ...  # about how much work it is


A = TypeVar("A", bound=Asked)


@dataclasses.dataclass(frozen=True)
class Survey:
    """The result of reading a job's input once.

    Attributes:
        rows: how many there are.
        parts: digests of the rows of each part, so that those that are worked on are those that were looked at,
            whatever becomes of the file meanwhile.
        schema: of what is kept of the rows, for Parquet; None for JSONL. That of the first rows would not do: later
            ones may have other columns, or values where these had none.
    """

    rows: int
    parts: tuple[str, ...]
    schema: pa.Schema | None

    @property
    def digest(self) -> str:
        return hashlib.sha256("".join(self.parts).encode()).hexdigest()


def survey(asked: Iterable[A], check: Callable[[A], Row], parquet: bool) -> Survey:
    """Reads every row, and keeps none; ValueError for one that `check` refuses, or that cannot be written.

    `check` gives the columns that the output keeps of a row.
    """
    schema = pa.schema([]) if parquet else None
    digests, count = [], 0
    for part in cut(asked):
        kept = [check(one) for one in part]
        if schema is not None:
            schema = merged(schema, kept)
        digests.append(digest_rows(part))
        count += len(part)
    return Survey(count, tuple(digests), schema)


def cut(asked: Iterable[A]) -> Iterator[list[A]]:
    """The parts of the input."""
    return jobs.cut_rows(asked, lambda one: one.characters)


def digest_rows(part: Sequence[Asked]) -> str:
    """7 us for a row of 1,600 characters (AMD EPYC, 2026-11-29). ValueError for a row too deep to write."""
    total = hashlib.sha256()
    for start in range(0, len(part), SOME):
        some = part[start : start + SOME]
        try:
            total.update(_json([asked.row for asked in some]))
        except RecursionError:
            deep = next((asked for asked in some if not _is_encodable(asked.row)), some[-1])
            raise ValueError(f"{deep.where}: a value has lists or objects within each other by the hundred") from None
    return total.hexdigest()


def _is_encodable(row: Row) -> bool:
    try:
        return bool(_json([row]))
    except RecursionError:
        return False


def _json(value: Any) -> bytes:
    for _ in range(MARGIN):
        value = [value]
    return ENCODER.encode(value).encode()


def check_output(source: str, output: Path) -> None:
    """Raises ValueError where the output has another ending, is no plain file, is read as input, or not writable."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output={output} must end in .jsonl or .parquet")
    check_file(source, output, "--output")


def check_file(source: str, path: Path, flag: str) -> None:
    """Raises ValueError, with `flag`, where a file to be written is no plain file, is read as input or not writable."""
    files.check_target(path, flag)
    if path.exists() and any(path.samefile(file) for item in split_spec(source) for file in local_files(item)):
        raise ValueError(f"{flag}={path} is read as input; name another")
    check_writable(path, f"{flag}={path}")


def check_free(where: str, row: Row, columns: Collection[str]) -> None:
    """Raises ValueError, with the row's name, where it has a column of those that the output will have."""
    if both := [name for name in columns if name in row]:
        raise ValueError(f"{where} has a column `{both[0]}` already; rename it, the output has its own there")


def merged(schema: pa.Schema, some: Sequence[Row]) -> pa.Schema:
    """The schema that holds these rows, too; ValueError for a column whose values have no type in common."""
    for name in dict.fromkeys(name for row in some for name in row):
        try:
            column = pa.schema([(name, pa.array([row.get(name) for row in some]).type)])
            schema = pa.unify_schemas([schema, column], promote_options="permissive")
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(f"column `{name}` fits no Parquet column ({error}); write .jsonl instead") from None
    return schema


def added_to(schema: pa.Schema, columns: dict[str, pa.DataType], without: Sequence[str] = ()) -> pa.Schema:
    """The schema of rows with more columns, without others; ValueError where Parquet cannot hold it."""
    kept = [field for field in schema if field.name not in without]
    schema = pa.schema([*kept, *columns.items()])
    parts.check_schema(schema)
    return schema


def make_missing(
    job: jobs.Job,
    missing: Sequence[int],
    surveyed: Survey,
    source: str,
    read_again: Callable[[], Iterable[A]],
    make: Callable[[list[A]], jobs.Made],
) -> None:
    """Makes the missing parts of this process, with progress; RuntimeError where the input's rows have changed."""
    from rmjax.runtime import processes
    from rmjax.runtime.progress import Progress

    wanted, done, number = set(missing), 0, -1
    if processes.is_first() and (before := job.read_before(wanted)):
        print(f"{before:,} of {surveyed.rows:,} rows are done already, by an earlier start", flush=True)
    progress = Progress(len(missing), "part", unit="rows", stream=sys.stderr) if processes.is_first() else None
    changed = lambda how: RuntimeError(
        f"{source} was changed meanwhile: {how}. No output is written. Put it back and start the same command again, "
        f"which goes on, or delete {job.directory} and begin with it as it is now"
    )

    def again() -> Iterator[list[A]]:
        try:
            yield from cut(read_again())
        except ValueError as error:  # rows that cannot be read now could be read by the survey
            raise changed(str(error)) from error

    for number, part in enumerate(again()):
        if number in wanted:
            if digest_rows(part) != surveyed.parts[number]:
                raise changed(f"from {part[0].where} on it has other rows than before")
            job.write(number, len(part), make(part))
            done += 1
            if progress is not None:  # the other processes are taken to be as fast as this one
                progress.step(done, count=len(part) * job.turns)
    if progress is not None:
        progress.close()
    if number + 1 != len(surveyed.parts):
        raise changed("it has not as many rows as before")


def first_of(asked: Iterator[A]) -> tuple[A, Iterator[A]]:
    """The first row, and all of them."""
    first = next(asked)
    return first, itertools.chain([first], asked)
