"""Scores a file of conversations.

    python -m rmjax.score --model=runs/tiny/export --input=conversations.jsonl --output=scores.jsonl

A row is a conversation in `messages` (a list of {role, content}), or `prompt` and `response` (texts, or messages and a
text). The output has the same rows with a column `score`, in the same order; its ending says JSONL or Parquet. (JSONL
holds dates, decimals and bytes as text.) The input is read twice: all of it is checked before the model is loaded.
"""

import glob
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags

from rmjax.data.records import BadRow, check_conversation
from rmjax.data.sources import open_source, split_spec

MODEL = flags.DEFINE_string("model", "", "Hugging Face directory or hub id of a reward model.")
INPUT = flags.DEFINE_string("input", "", "JSONL, JSON, Parquet or Arrow file, glob or hf:// source.")
OUTPUT = flags.DEFINE_string("output", "", "JSONL or Parquet file to write.")
DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Computation; auto: float32 on CPUs only.")
TEMPLATE_KWARGS = flags.DEFINE_string("template_kwargs", "", "JSON object: arguments of a foreign model's template.")
CHUNK = 1024  # rows held in memory

Row = dict[str, Any]


def conversation_of(row: Row) -> list[dict[str, Any]]:
    """The conversation of a row.

    Raises:
        ValueError: none of the columns that can hold one, or columns that would change or lose something.
    """
    if "score" in row:
        raise ValueError("has a column `score` already; rename it, the output has its scores there")
    for name in ("system", "tools"):
        if row.get(name):
            raise ValueError(f"has a column `{name}`, which is not read; write it into `messages`, or drop the column")
    if isinstance(row.get("messages"), list):
        return row["messages"]
    prompt, response = row.get("prompt"), row.get("response")
    if isinstance(response, str) and isinstance(prompt, str | list):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return [*turns, {"role": "assistant", "content": response}]
    raise ValueError(
        f"has columns {', '.join(sorted(row)) or 'none'}; expected `messages` (a list of {{role, content}}), "
        f"or `prompt` and `response`"
    )


def chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Cuts an iterator into lists of at most CHUNK."""
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def survey(source: str, output: Path) -> tuple[int, pa.Schema | None]:
    """Checks every row before any is scored.

    Returns:
        The number of rows; for Parquet also the schema that holds them all with their scores. That of the first rows
        would not do: later ones may have other columns, or values where these had none.

    Raises:
        ValueError: a row without a conversation that can be scored, by name; or an output that cannot be.
    """
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output={output} must end in .jsonl or .parquet")
    if output.is_dir() or _reads(source, output):
        raise ValueError(f"--output={output} is {'a directory' if output.is_dir() else 'read as input'}; name another")
    count, schema = 0, pa.schema([]) if output.suffix == ".parquet" else None
    for chunk in chunks(open_source(source)):
        for where, row in chunk:
            try:
                check_conversation(conversation_of(row))
            except BadRow as bad:
                raise ValueError(f"{where}: {bad.detail}") from None
            except ValueError as error:
                raise ValueError(f"{where} {error}") from None
        count += len(chunk)
        if schema is not None:
            schema = merged(schema, [row for _, row in chunk])
    return count, None if schema is None else schema.append(pa.field("score", pa.float64()))


def _reads(source: str, path: Path) -> bool:
    """Whether a file is among those of a source."""
    names = [str(Path(item).expanduser()) for item in split_spec(source)]
    inside = [str(f) for name in names if Path(name).is_dir() for f in Path(name).rglob("*")]
    files = {*names, *inside, *(f for name in names for f in glob.glob(name, recursive=True))}
    return path.exists() and any(Path(f).exists() and path.samefile(f) for f in files)


def merged(schema: pa.Schema, rows: Sequence[Row]) -> pa.Schema:
    """The schema that holds these rows, too.

    Raises:
        ValueError: a column whose values have no type in common.
    """
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            found = pa.schema([(name, pa.array([row.get(name) for row in rows]).type)])
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"column `{name}` fits no Parquet column ({error}); write .jsonl instead") from None
    return schema


class Output:
    """A JSONL file, or Parquet if there is a schema, that gets its name when all is written and else leaves nothing."""

    def __init__(self, path: Path, schema: pa.Schema | None):
        self.path, self.partial, self.schema = path, path.with_name(path.name + ".partial"), schema
        self.file: Any = None

    def __enter__(self) -> "Output":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.file = self.partial.open("w") if self.schema is None else pq.ParquetWriter(self.partial, self.schema)
        except pa.ArrowNotImplementedError as error:
            self.partial.unlink(missing_ok=True)
            raise ValueError(f"Parquet cannot hold these rows ({error}); write .jsonl instead") from None
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            self.file.close()
            if kind is None:
                self.partial.replace(self.path)
        finally:
            self.partial.unlink(missing_ok=True)

    def write(self, rows: Sequence[Row]) -> None:
        """Appends rows."""
        if self.schema is None:
            self.file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        else:
            self.file.write_table(pa.Table.from_pylist(list(rows), schema=self.schema))


def run(
    model_path: str,
    source: str,
    output: Path,
    dtype: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """Scores every row of `source` into `output`; returns their number.

    Raises:
        ValueError: a row without a conversation, or a model that cannot score; nothing is written then.
        OSError: a file that cannot be read or written.
    """
    from rmjax.reward_model import BadConversation, load_checked
    from rmjax.writers import Progress

    count, schema = survey(source, output)
    with Output(output, schema) as sink:  # before the model is loaded, so that a bad place is found at once
        model = load_checked(model_path, dtype=dtype, template_kwargs=template_kwargs)
        progress = Progress(-(-count // CHUNK), unit="rows")
        for step, chunk in enumerate(chunks(open_source(source)), 1):
            try:
                scores = model.score([conversation_of(row) for _, row in chunk])
            except BadConversation as bad:
                raise ValueError(f"{chunk[bad.index][0]}: {bad.detail}") from None
            sink.write([{**row, "score": score} for (_, row), score in zip(chunk, scores)])
            progress.step(step, {}, groups=len(chunk))
        progress.close()
    return count


def main(argv: Sequence[str]) -> None:
    """Runs the command; an error is one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are written --name=value")
    for flag in (MODEL, INPUT, OUTPUT):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} is required")
    try:
        template_kwargs = json.loads(TEMPLATE_KWARGS.value) if TEMPLATE_KWARGS.value else None
    except json.JSONDecodeError as error:
        raise app.UsageError(f"--template_kwargs={TEMPLATE_KWARGS.value} is not JSON: {error}") from None
    if not isinstance(template_kwargs, dict | None):
        raise app.UsageError(f"--template_kwargs={TEMPLATE_KWARGS.value} is not a JSON object")
    try:
        done = run(MODEL.value, INPUT.value, Path(OUTPUT.value).expanduser(), DTYPE.value, template_kwargs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{done} scores in {OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
