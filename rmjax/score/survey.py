"""Looks at every row before any is scored: whether it can be, and what the output will have."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rmjax.data.sources import local_files, plain, split_spec
from rmjax.runtime import files
from rmjax.runtime.command_line import check_writable
from rmjax.score import job, making, parts, rows
from rmjax.score.making import Options
from rmjax.score.rows import Asked, Kind, Row


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except TypeError:
        return type(value).__name__  # str(value) might hold an address, another one at each reading


ENCODER = json.JSONEncoder(default=_plain, skipkeys=True)
SOME = 64  # rows that are hashed at once
MARGIN = 32  # lists around a row when its depth is tried: the output's row is written further down the stack


@dataclasses.dataclass(frozen=True)
class Survey:
    """The result of reading a job's input once."""

    rows: int  # how many there are
    # Digest of the rows of each part that `job.cut_rows` cuts them into, so that those that are scored are those that
    # were looked at, whatever becomes of the file meanwhile.
    parts: tuple[str, ...]
    kind: Kind  # of the model
    added: dict[str, pa.DataType]  # the columns of scores that a row gets
    # Of the output, for Parquet. That of the first rows would not do: later ones may have other columns,
    # or values where these had none.
    schema: pa.Schema | None
    unscored: dict[str, str]  # what gets no score, in words, by its reason
    unread: dict[str, str]  # the columns and keys that nobody reads, each with an example

    @property
    def digest(self) -> str:
        return hashlib.sha256("".join(self.parts).encode()).hexdigest()


def cut_source(source: Iterable[Asked]) -> Iterator[list[Asked]]:
    return job.cut_rows(source, lambda asked: asked.characters)


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


def survey_input(model: str, input: rows.Input, output: Path, options: Options) -> Survey:
    """Reads every row, and keeps none; ValueError for an unusable row or output, and unsuitable options."""
    check_output(input.source, output)
    kind = rows.kind_of(model)
    unread: dict[str, str] = {}
    asked = rows.open_source(input, kind, unread)
    first = next(asked)
    shape = kind.shape(first.format)
    options.check(shape.name)
    added = shape.added(kind.names)
    columns = making.made_columns(added, options)
    schema = pa.schema([]) if output.suffix == ".parquet" else None
    digests, count = [], 0
    unscored: dict[str, list[str]] = collections.defaultdict(list)
    for chunk in cut_source(itertools.chain([first], asked)):
        for one in chunk:
            if kind.shape(one.format) is not shape:
                raise ValueError(
                    f"{one.where} is {one.format}, and the first row {first.format}, which gets other columns; score "
                    "them apart"
                )
            if both := [name for name in columns if name in options.kept(one)]:
                raise ValueError(
                    f"{one.where} has a column `{both[0]}` already; rename it, the output has its scores there"
                )
            options.check_row(one.where, options.kept(one))
            for bad in one.unscored:
                unscored[bad.reason].append(f"{one.where}: {bad.detail}")
        if schema is not None:
            schema = merged(schema, [options.kept(one) for one in chunk])
        digests.append(digest_rows(chunk))
        count += len(chunk)
    made_schema = None if schema is None else _made_schema(schema, added, options)
    told = {reason: f"{len(x):,} (the first is {x[0]})" for reason, x in unscored.items()}
    return Survey(count, tuple(digests), kind, added, made_schema, told, unread)


def check_output(source: str, output: Path) -> None:
    """Raises ValueError where the output has another ending, is no plain file, is read as input, or not writable."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output={output} must end in .jsonl or .parquet")
    files.check_target(output, "--output")
    if output.exists() and any(output.samefile(file) for item in split_spec(source) for file in local_files(item)):
        raise ValueError(f"--output={output} is read as input; name another")
    check_writable(output, f"--output={output}")


def merged(schema: pa.Schema, some: Sequence[Row]) -> pa.Schema:
    """The schema that holds these rows, too; ValueError for a column whose values have no type in common."""
    for name in dict.fromkeys(name for row in some for name in row):
        try:
            column = pa.schema([(name, pa.array([row.get(name) for row in some]).type)])
            schema = pa.unify_schemas([schema, column], promote_options="permissive")
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(f"column `{name}` fits no Parquet column ({error}); write .jsonl instead") from None
    return schema


def _made_schema(schema: pa.Schema, added: dict[str, pa.DataType], options: Options) -> pa.Schema:
    prompt = schema.field("prompt").type if "prompt" in schema.names else making.TEXT
    kept = [field for field in schema if not (options.takes_responses and field.name == "responses")]
    schema = pa.schema([*kept, *making.made_columns(added, options, prompt).items()])
    parts.check_schema(schema)
    return schema
