"""A look at every row before any is scored: whether it can be, and what the output will have."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rmjax.data.sources import local_files, open_source, plain, split_spec
from rmjax.runtime import files
from rmjax.runtime.command_line import check_writable
from rmjax.score import job, making, parts, rows
from rmjax.score.making import Options
from rmjax.score.rows import Row, Shape


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except TypeError:
        return type(value).__name__  # str(value) might have an address in it, another one at each reading


ENCODER = json.JSONEncoder(default=_plain, skipkeys=True)
SOME = 64  # rows that are hashed at once
MARGIN = 32  # lists around a row when its depth is tried: the output's row is written further down the stack


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of a job's input."""

    rows: int  # how many there are
    # Digest of the rows of each part that `job.cut_rows` cuts them into, so that those that are scored are those that
    # were looked at, whatever becomes of the file meanwhile.
    parts: tuple[str, ...]
    shape: Shape  # of every row
    added: dict[str, pa.DataType]  # the columns of scores that a row gets
    # Of what is made of the rows, for Parquet. That of the first rows would not do: later ones may have other columns,
    # or values where these had none.
    schema: pa.Schema | None

    def chunks(self, source: Iterable[tuple[str, Row]]) -> Iterable[list[tuple[str, Row]]]:
        """The parts of the input."""
        return job.cut_rows(source, lambda item: rows.count_characters(item[1], self.shape))

    @property
    def digest(self) -> str:
        """Of all rows."""
        return hashlib.sha256("".join(self.parts).encode()).hexdigest()


def digest_rows(part: Sequence[tuple[str, Row]]) -> str:
    """Of rows, whatever they were read from; 7 us for a row of 1,600 characters (AMD EPYC, 2026-11-29).

    Raises:
        ValueError: a row of lists within lists within lists, which could be read and not written; names it.
    """
    total = hashlib.sha256()
    for start in range(0, len(part), SOME):
        some = part[start : start + SOME]
        try:
            total.update(_json([row for _, row in some]))
        except RecursionError:
            raise ValueError(f"{_deep(some)}: a value has lists or objects within each other by the hundred") from None
    return total.hexdigest()


def _deep(part: Sequence[tuple[str, Row]]) -> str:
    for where, row in part:
        try:
            _json([row])
        except RecursionError:
            return where
    return part[-1][0]


def _json(value: Any) -> bytes:
    for _ in range(MARGIN):
        value = [value]
    return ENCODER.encode(value).encode()


def survey_input(model: str, source: str, output: Path, options: Options) -> Survey:
    """Reads every row, and keeps none.

    Raises:
        ValueError: a row that cannot be scored, by name; options that do not go with the rows; or an output that
            cannot be written.
    """
    check_output(source, output)
    source_rows = open_source(source)
    first = next(source_rows, None)
    if first is None:
        raise ValueError(f"{source} has no rows")
    shape, added = rows.shape_of(model, first[1])
    if shape.read(first[1]) is not None:  # else the row itself is told
        options.check(shape.name)
    columns = making.made_columns(added, options)
    schema = pa.schema([]) if output.suffix == ".parquet" else None
    digests: list[str] = []
    survey = Survey(0, (), shape, added, schema)
    for chunk in survey.chunks(_checked(itertools.chain([first], source_rows), shape, columns, options)):
        if schema is not None:
            schema = merged(schema, [row for _, row in chunk])
        digests.append(digest_rows(chunk))
        survey = dataclasses.replace(survey, rows=survey.rows + len(chunk))
    survey = dataclasses.replace(survey, parts=tuple(digests))
    if schema is not None:
        survey = dataclasses.replace(survey, schema=_made(schema, added, options))
    return survey


def _checked(
    source: Iterable[tuple[str, Row]], shape: Shape, columns: Collection[str], options: Options
) -> Iterator[tuple[str, Row]]:
    """Passes rows through that can be scored, before anything is made of them."""
    for where, row in source:
        rows.check_row(where, row, shape, columns)
        options.check_row(where, row)
        yield where, row


def check_output(source: str, output: Path) -> None:
    """Makes sure that the output can be written.

    Raises:
        ValueError: it cannot, is of another kind than JSONL and Parquet, is no plain file, or is read.
    """
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output={output} must end in .jsonl or .parquet")
    files.check_target(output, "--output")
    if _reads(source, output):
        raise ValueError(f"--output={output} is read as input; name another")
    check_writable(output, f"--output={output}")


def _reads(source: str, path: Path) -> bool:
    """Whether a file is among those of a source."""
    return path.exists() and any(path.samefile(file) for item in split_spec(source) for file in local_files(item))


def merged(schema: pa.Schema, some: Sequence[Row]) -> pa.Schema:
    """The schema that holds these rows, too.

    Raises:
        ValueError: a column whose values have no type in common.
    """
    for name in dict.fromkeys(name for row in some for name in row):
        try:
            column = pa.schema([(name, pa.array([row.get(name) for row in some]).type)])
            schema = pa.unify_schemas([schema, column], promote_options="permissive")
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(f"column `{name}` fits no Parquet column ({error}); write .jsonl instead") from None
    return schema


def _made(schema: pa.Schema, added: dict[str, pa.DataType], options: Options) -> pa.Schema:
    """The schema of what is made of rows of this one."""
    prompt = schema.field("prompt").type if "prompt" in schema.names else making.TEXT
    kept = [field for field in schema if not (options.takes_responses and field.name == "responses")]
    schema = pa.schema([*kept, *making.made_columns(added, options, prompt).items()])
    parts.check_schema(schema)
    return schema
