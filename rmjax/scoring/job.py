"""A scoring job: rows in chunks, each chunk a file of its own until all are joined, so that a kill loses one chunk.

    OUTPUT.parts/job.json          what the job is; another one is refused there
    OUTPUT.parts/00000012.jsonl    the rows made of the chunk, whole; 00000012.json beside it counts them

Several processes (processes.py) take turns at the chunks; the first joins them, in the order of the input.
"""

import collections
import hashlib
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rmjax import processes
from rmjax.scoring.rows import Row

CHUNK = 1024  # rows of a part; they are in memory
VERSION = 1  # of the parts
IDENTITY = ("config.json", "reward_contract.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")

Scored = tuple[list[Row], collections.Counter[str]]  # the rows that a chunk becomes, and counts of what did not


def chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Cuts an iterator into lists of at most CHUNK."""
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def model_identity(directory: Path) -> dict[str, Any]:
    """What tells one model from another without reading its weights: small files, and the sizes of all."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    sizes = {path.name: path.stat().st_size for path in sorted(directory.glob("*.safetensors*"))}
    return {**sizes, **{name: digest(directory / name) for name in IDENTITY if (directory / name).is_file()}}


def check_schema(schema: pa.Schema) -> None:
    """Makes sure that Parquet has all these types.

    Raises:
        ValueError: it has not.
    """
    try:
        pq.ParquetWriter(io.BytesIO(), schema).close()
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"Parquet cannot hold these rows ({error}); write .jsonl instead") from None


class Writer:
    """Writes rows into a JSONL file, or into Parquet if there is a schema."""

    def __init__(self, path: Path, schema: pa.Schema | None):
        self.schema = schema
        self.file: Any = path.open("w") if schema is None else pq.ParquetWriter(path, schema)

    def write(self, rows: Sequence[Row]) -> None:
        """Appends rows."""
        if self.schema is None:
            self.file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        else:
            self.file.write_table(pa.Table.from_pylist(list(rows), schema=self.schema))

    def append(self, part: Path) -> None:
        """Appends a part."""
        if self.schema is None:
            with part.open("rb") as source:
                self.file.flush()
                shutil.copyfileobj(source, self.file.buffer)
        elif (table := pq.read_table(part, schema=self.schema)).num_rows:
            self.file.write_table(table)

    def close(self) -> None:
        """Ends the file."""
        self.file.close()


class Job:
    """The parts of one output.

    Attributes:
        output: the file that is made.
        schema: of Parquet; None of JSONL.
        directory: of the parts.
    """

    def __init__(self, output: Path, schema: pa.Schema | None, what: dict[str, Any]):
        """Opens the parts of a job, or begins it.

        Args:
            output: the file that is made.
            schema: of its rows, for Parquet.
            what: everything that decides the rows, as JSON.

        Raises:
            ValueError: the parts of another job are there; says what differs.
        """
        self.output, self.schema = output, schema
        self.directory = output.with_name(f"{output.name}.parts")
        if processes.is_first():
            self._begin({"version": VERSION, "rows_per_part": CHUNK, **what})
        processes.barrier("scoring begins")

    def _begin(self, what: dict[str, Any]) -> None:
        told = self.directory / "job.json"
        if told.exists():
            before, now = json.loads(told.read_text()), json.loads(json.dumps(what))
            if different := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
                raise ValueError(
                    f"{self.directory} holds what an earlier job has done, and {', '.join(different)} changed since: "
                    "put that back to go on, delete the directory, or name another --output"
                )
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        scratch = self.directory / "job.tmp"
        scratch.write_text(json.dumps(what, indent=1) + "\n")
        scratch.replace(told)

    def part(self, number: int) -> Path:
        """The file of a chunk."""
        return self.directory / f"{number:08d}{self.output.suffix}"

    def write(self, number: int, made: Scored) -> None:
        """Writes the rows of a chunk; they count once their file has its name."""
        rows, counts = made
        path = self.part(number)
        path.with_suffix(".json").write_text(json.dumps({"rows": len(rows), **counts}) + "\n")
        scratch = path.with_name(f"{path.name}.tmp")
        writer = Writer(scratch, self.schema)
        writer.write(rows)
        writer.close()
        scratch.replace(path)

    def run(self, rows: Iterator[Any], score: Callable[[list[Any]], Scored], told: Callable[[int, bool], None]) -> None:
        """Scores the chunks of this process that have no part yet.

        Args:
            rows: of the input, in order.
            score: what a chunk of them becomes.
            told: is told of each chunk how many rows it has, and whether they were done before.
        """
        turns, mine = len(processes.gather("scoring", None)), processes.number()
        for number, chunk in enumerate(chunks(rows)):
            if number % turns != mine:
                continue
            done = self.part(number).exists()
            if not done:
                self.write(number, score(chunk))
            told(len(chunk), done)
        processes.barrier("scored")

    def join(self, total: int) -> collections.Counter[str]:
        """Joins the parts of `total` rows of input in their order and removes them; the counts of all."""
        counts: collections.Counter[str] = collections.Counter()
        if processes.is_first():
            scratch = self.output.with_name(f"{self.output.name}.partial")
            writer = Writer(scratch, self.schema)
            for number in range(-(-total // CHUNK)):
                part = self.part(number)
                counts.update(json.loads(part.with_suffix(".json").read_text()))
                writer.append(part)
            writer.close()
            scratch.replace(self.output)
            shutil.rmtree(self.directory)
        processes.barrier("joined")
        return counts
