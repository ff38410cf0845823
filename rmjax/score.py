"""Scores a file of conversations, of pairs or of solutions step by step.

    python -m rmjax.score --model=runs/tiny/export --input=conversations.jsonl --output=scores.jsonl

What a row must have depends on what the model was trained for. `prompt` is a text or a list of {role, content}.

    rewards, attributes   `messages`, or `prompt` and `response`              adds `score` and each attribute
    comparisons           `prompt`, `response_a`, `response_b`                adds `A`, `B` and `tie`: probabilities
    steps                 `prompt`, `completions` (a list of texts)           adds `scores`, one for each step

The output has the same rows with these columns added, in the same order; its ending says JSONL or Parquet. (JSONL
holds dates, decimals and bytes as text.) The input is read twice: all of it is checked before the model is loaded.
"""

import dataclasses
import glob
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import app, flags

from rmjax import command_line, contract, passwords, startup
from rmjax.command_line import check_writable, leaving_nothing
from rmjax.data.records import BadRow, check_conversation
from rmjax.data.sources import open_source, split_spec

MODEL = flags.DEFINE_string("model", "", "Hugging Face directory or hub id of a reward model.")
INPUT = flags.DEFINE_string("input", "", "JSONL, JSON, Parquet or Arrow file, glob or hf:// source.")
OUTPUT = flags.DEFINE_string("output", "", "JSONL or Parquet file to write.")
DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Computation; auto: float32 on CPUs only.")
TEMPLATE_KWARGS = flags.DEFINE_string("template_kwargs", "", "JSON object: arguments of a foreign model's template.")
CHUNK = 1024  # rows held in memory

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How rows of one shape are read and scored.

    Attributes:
        columns: what a row needs, in words.
        read: the prompt with each response of a row, as conversations; None where the columns are not there.
        score: (model, rows, what `read` gave for each) to the columns that each row gets.
    """

    columns: str
    read: Callable[[Row], list[Any] | None]
    score: Callable[[Any, list[Row], list[list[Any]]], list[Row]]


def _answered(row: Row, *names: str) -> list[Any] | None:
    prompt, responses = row.get("prompt"), [row.get(name) for name in names]
    if not isinstance(prompt, str | list) or not all(isinstance(response, str) for response in responses):
        return None
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [[*turns, {"role": "assistant", "content": response}] for response in responses]


def _conversation(row: Row) -> list[Any] | None:
    return [row["messages"]] if isinstance(row.get("messages"), list) else _answered(row, "response")


def _separated(row: Row) -> list[str] | None:
    """The steps of a row as training reads them: each but the first begins with the separator."""
    texts = row.get("completions")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    separator = "\n" if row.get("separator") is None else str(row["separator"])
    return [separator * bool(i) + text for i, text in enumerate(texts)]


def _steps(row: Row) -> list[Any] | None:
    texts = _separated(row)
    return None if texts is None else _answered({**row, "response": "".join(texts)}, "response")


def _rewards(model: Any, rows: list[Row], conversations: list[list[Any]]) -> list[Row]:
    values = model.values([whole for (whole,) in conversations])
    return [dict(zip(values, map(float, row))) for row in zip(*values.values())]


def _verdicts(model: Any, rows: list[Row], conversations: list[list[Any]]) -> list[Row]:
    return model.judge([a for a, _ in conversations], [b for _, b in conversations])


def _step_scores(model: Any, rows: list[Row], conversations: list[list[Any]]) -> list[Row]:
    prompts, texts = [whole[:-1] for (whole,) in conversations], [_separated(row) for row in rows]
    return [{"scores": values} for values in model.steps(prompts, texts, separator="")]


REWARDS = Kind("`messages` (a list of {role, content}), or `prompt` and `response`", _conversation, _rewards)
VERDICTS = Kind(
    "`prompt`, `response_a` and `response_b`", lambda row: _answered(row, "response_a", "response_b"), _verdicts
)
STEPS = Kind("`prompt` and `completions` (a list of texts)", _steps, _step_scores)


def kind_of(model: str) -> tuple[Kind, dict[str, pa.DataType]]:
    """How rows are scored by a model, and the columns they get, from its contract alone; others give `score`.

    Raises:
        ValueError: a contract that cannot be read, or a model that scores nothing.
    """
    from rmjax import objectives

    terms = contract.find(model)
    if terms is None:
        return REWARDS, {"score": pa.float64()}
    objective = objectives.make(terms["objective"])
    if objective.architecture == "CausalLM":
        raise ValueError(
            f"{model} is a judge that writes its verdicts: generate with transformers or a server, and read them with "
            "rmjax.data.judging.parse_verdict"
        )
    if objective.architecture == "TokenClassification":
        return STEPS, {"scores": pa.list_(pa.float64())}
    own = {name: np.array(value, np.float32) for name, value in terms["objective_params"].items()}
    names = objective.decode(np.zeros((1, len(objective.labels)), np.float32), own)
    return VERDICTS if terms["objective"]["name"] == "pairwise" else REWARDS, dict.fromkeys(names, pa.float64())


def conversations_of(row: Row, kind: Kind, added: Mapping[str, Any]) -> list[Any]:
    """The conversations of a row that are scored.

    Args:
        row: the row.
        kind: of the model.
        added: the columns that the row will get.

    Raises:
        ValueError: the columns are not there, or some would be changed or lost.
    """
    if taken := [name for name in added if name in row]:
        raise ValueError(f"has a column `{taken[0]}` already; rename it, the output has its scores there")
    for name in ("system", "tools"):
        if row.get(name):
            raise ValueError(f"has a column `{name}`, which is not read; write it into `messages`, or drop the column")
    if (found := kind.read(row)) is None:
        raise ValueError(f"has columns {', '.join(sorted(row)) or 'none'}; expected {kind.columns}")
    return found


def chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Cuts an iterator into lists of at most CHUNK."""
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def survey(source: str, output: Path, kind: Kind, added: Mapping[str, pa.DataType]) -> tuple[int, pa.Schema | None]:
    """Checks every row before any is scored.

    Args:
        source: the input.
        output: where the scores go.
        kind: how the model's rows are read.
        added: the columns that each row will get.

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
    check_writable(output, f"--output={output}")
    count, schema = 0, pa.schema([]) if output.suffix == ".parquet" else None
    for chunk in chunks(open_source(source)):
        for where, row in chunk:
            try:
                for conversation in conversations_of(row, kind, added):
                    check_conversation(conversation)
            except BadRow as bad:
                raise ValueError(f"{where}: {bad.detail}") from None
            except ValueError as error:
                raise ValueError(f"{where} {error}") from None
        count += len(chunk)
        if schema is not None:
            schema = merged(schema, [row for _, row in chunk])
    for name, type in added.items():
        schema = None if schema is None else schema.append(pa.field(name, type))
    return count, schema


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

    kind, added = kind_of(model_path)
    count, schema = survey(source, output, kind, added)
    # The output is opened before the model is loaded, so that a bad place is found at once.
    with leaving_nothing(output.absolute().parent), Output(output, schema) as sink:
        model = load_checked(model_path, dtype=dtype, template_kwargs=template_kwargs)
        progress = Progress(-(-count // CHUNK), unit="rows")
        for step, chunk in enumerate(chunks(open_source(source)), 1):
            try:
                rows = [row for _, row in chunk]
                scores = kind.score(model, rows, [conversations_of(row, kind, added) for row in rows])
            except BadConversation as bad:
                raise ValueError(f"{chunk[bad.index][0]}: {bad.detail}") from None
            if scores[0].keys() != added.keys():
                raise ValueError(
                    f"{model_path} gives {', '.join(scores[0])}, expected {', '.join(added)}: it is no model of ours, "
                    "and its outputs are no reward; see RewardModel.values"
                )
            sink.write([{**row, **columns} for row, columns in zip(rows, scores)])
            progress.step(step, {}, groups=len(chunk))
        progress.close()
    return count


def main(_: Sequence[str]) -> None:
    """Runs the command; see command_line.py for what becomes of errors."""
    with command_line.outcome(debug=command_line.DEBUG.value):
        for flag in (MODEL, INPUT, OUTPUT):
            if not flag.value:
                raise flags.Error(f"--{flag.name} is required; --help shows what a row must have")
        output, arguments = Path(OUTPUT.value).expanduser(), template_kwargs(TEMPLATE_KWARGS.value)
        startup.keep_programs()
        done = run(MODEL.value, passwords.hide(INPUT.value), output, DTYPE.value, arguments)
    print(f"{done} scores in {OUTPUT.value}")


def template_kwargs(text: str) -> dict[str, Any] | None:
    """What --template_kwargs says, if anything.

    Raises:
        ValueError: it is no JSON object.
    """
    if not text:
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--template_kwargs={text} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--template_kwargs={text} is not a JSON object")
    return values


def cli() -> None:
    """Parses flags and runs `main`."""
    app.run(main, flags_parser=command_line.parse_strictly)


if __name__ == "__main__":
    cli()
