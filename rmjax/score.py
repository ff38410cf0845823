"""Scores a file of conversations.

    python -m rmjax.score --model=runs/tiny/export --input=conversations.jsonl --output=scores.jsonl

A row is a conversation in `messages` (a list of {role, content}), or `prompt` and `response` (texts, or messages and a
text). The output has the same rows with a column `score`, in the same order; its ending says JSONL or Parquet.
"""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags

MODEL = flags.DEFINE_string("model", "", "Hugging Face directory or hub id of a reward model.")
INPUT = flags.DEFINE_string("input", "", "JSONL, JSON, Parquet or Arrow file, glob or hf:// source.")
OUTPUT = flags.DEFINE_string("output", "", "JSONL or Parquet file to write.")
DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Computation; auto: float32 on CPUs only.")
CHUNK = 1024  # rows held in memory


def conversation_of(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The conversation of a row.

    Raises:
        ValueError: none of the columns that can hold one; names those that are there.
    """
    if isinstance(row.get("messages"), list):
        return row["messages"]
    prompt, response = row.get("prompt"), row.get("response")
    if isinstance(response, str) and isinstance(prompt, str | list):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return [*turns, {"role": "assistant", "content": response}]
    raise ValueError(
        f"{where} has columns {', '.join(sorted(row)) or 'none'}; expected `messages` (a list of {{role, content}}), "
        f"or `prompt` and `response`"
    )


class Output:
    """A JSONL or Parquet file that appears under its name when it is complete."""

    def __init__(self, path: Path):
        if path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"--output={path} must end in .jsonl or .parquet")
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.text = self.partial.open("w") if path.suffix == ".jsonl" else None
        self.table: pq.ParquetWriter | None = None

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows."""
        if self.text:
            self.text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        table = pa.Table.from_pylist(list(rows), schema=self.table.schema if self.table else None)
        self.table = self.table or pq.ParquetWriter(self.partial, table.schema)
        self.table.write_table(table)

    def close(self) -> None:
        """Puts the file in its place."""
        for stream in (self.text, self.table):
            if stream:
                stream.close()
        self.partial.replace(self.path)


def chunks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Cuts an iterator into lists."""
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def run(model_path: str, source: str, output: Path, dtype: str = "auto") -> int:
    """Scores every row of `source` into `output`; returns their number.

    Raises:
        ValueError: a row without a conversation, or a model that cannot score; nothing is written then.
    """
    from rmjax import contract
    from rmjax.data.sources import open_source
    from rmjax.reward_model import RewardModel, float32_scores
    from rmjax.writers import Progress

    rows = open_source(source)
    sink = Output(output)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} has no rows")
    conversation_of(first[1], first[0])  # before the model is loaded
    model = RewardModel.load(model_path, dtype=dtype)
    if model.contract:
        contract.check_scores(model.contract, float32_scores(model, [r["token_ids"] for r in model.contract["golden"]]))
    progress, done = Progress(0, 0, unit="rows"), 0
    for chunk in chunks(itertools.chain([first], rows), CHUNK):
        scores = model.score([conversation_of(row, where) for where, row in chunk])
        sink.write([{**row, "score": score} for (_, row), score in zip(chunk, scores)])
        done += len(chunk)
        progress.step(done, {}, groups=len(chunk))
    progress.close()
    sink.close()
    return done


def main(argv: Sequence[str]) -> None:
    """Runs the command; an error is one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; options are written --name=value")
    for flag in (MODEL, INPUT, OUTPUT):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} is required")
    try:
        done = run(MODEL.value, INPUT.value, Path(OUTPUT.value).expanduser(), DTYPE.value)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{done} scores in {OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
