"""Scores a file of any size: conversations, the responses of prompts, pairs, comparisons, or solutions step by step.

    python -m rmjax.score --model=runs/tiny/export --input=conversations.jsonl --output=scores.jsonl
    python -m rmjax.score --model=... --input=responses.jsonl --output=best.jsonl --best_of_n
    python -m rmjax.score --model=... --input=responses.jsonl --output=pairs.jsonl --pairs=best_worst
    python -m rmjax.score --model=... --input=pairs.parquet --output=clean.parquet --relabel --min_margin=0.5

What a row must have depends on what the model was trained for; the first row decides. `prompt` is a text or a list of
{role, content}.

    rewards, attributes   `messages`, or `prompt` and `response`      adds `score` and each attribute
                          `prompt` and `responses` (a list)           adds `scores`, a list, and one of each attribute
                          `chosen` and `rejected`, `prompt`           adds `chosen_score` and `rejected_score`
    comparisons           `prompt`, `response_a`, `response_b`        adds `A`, `B` and `tie`: probabilities
    steps                 `prompt`, `completions` (a list of texts)   adds `scores`, one for each step

The responses of a prompt share its computation. The output has the rows in the order of the input; its ending says
JSONL or Parquet. (JSONL holds dates, decimals and bytes as text.) The input is read twice: all of it is checked before
the model is loaded. What is scored is kept in OUTPUT.parts until all is, so that the same command goes on after a kill.
Several processes (launch/local.sh N rmjax.score ...) share the rows; each has the whole model on its devices.
"""

import dataclasses
import glob
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from absl import app, flags

from rmjax import command_line, passwords, startup
from rmjax.command_line import check_writable, leaving_nothing
from rmjax.data import sources
from rmjax.data.sources import open_source, split_spec
from rmjax.scoring import job as jobs
from rmjax.scoring import making, rows
from rmjax.scoring.making import Options
from rmjax.scoring.rows import Row, Shape

MODEL = flags.DEFINE_string("model", "", "Hugging Face directory or hub id of a reward model.")
INPUT = flags.DEFINE_string("input", "", "JSONL, JSON, Parquet or Arrow file, glob or hf:// source.")
OUTPUT = flags.DEFINE_string("output", "", "JSONL or Parquet file to write.")
DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Computation; auto: float32 on CPUs only.")
TEMPLATE_KWARGS = flags.DEFINE_string("template_kwargs", "", "JSON object: arguments of a foreign model's template.")
NORMALIZE = flags.DEFINE_bool("normalize", False, "Scores minus the contract's mean, divided by its deviation.")
BEST_OF_N = flags.DEFINE_bool("best_of_n", False, "Of `responses`: the best as `response`, with its score.")
PAIRS = flags.DEFINE_enum("pairs", "", ["", "best_worst", "all"], "Of `responses`: pairs `chosen`, `rejected`.")
RELABEL = flags.DEFINE_bool("relabel", False, "Of pairs: the response of the higher score becomes `chosen`.")
TIES = flags.DEFINE_float("tie_threshold", 0.0, "With --pairs, --relabel: scores no further apart are ties, dropped.")
LEAST = flags.DEFINE_float("min_margin", -math.inf, "Drops pairs of a smaller margin, chosen minus rejected.")
MOST = flags.DEFINE_float("max_margin", math.inf, "Drops pairs of a larger margin.")


def survey(
    model: str, source: str, output: Path, options: Options
) -> tuple[int, Shape, dict[str, pa.DataType], pa.Schema | None]:
    """Checks every row before any is scored.

    Returns:
        The number of rows, their shape, the columns that each gets; and for Parquet the schema of what is made of
        them. That of the first rows would not do: later ones may have other columns, or values where these had none.

    Raises:
        ValueError: a row that cannot be scored, by name; options that do not go with the rows; or an output that
            cannot be written.
    """
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output={output} must end in .jsonl or .parquet")
    if output.is_dir() or _reads(source, output):
        raise ValueError(f"--output={output} is {'a directory' if output.is_dir() else 'read as input'}; name another")
    check_writable(output, f"--output={output}")
    count, schema = 0, pa.schema([]) if output.suffix == ".parquet" else None
    shape: Shape | None = None
    added: dict[str, pa.DataType] = {}
    for chunk in jobs.chunks(open_source(source)):
        if shape is None:
            shape, added = rows.shape_of(model, chunk[0][1])
            if shape.read(chunk[0][1]) is not None:  # else the row itself is told
                options.check(shape.name)
        for where, row in chunk:
            rows.check(where, row, shape, added)
        count += len(chunk)
        if schema is not None:
            schema = merged(schema, [row for _, row in chunk])
    if shape is None:
        raise ValueError(f"{source} has no rows")
    if schema is not None:
        for name, type in added.items():
            schema = schema.append(pa.field(name, type))
        schema = making.columns(schema, options)
        jobs.check_schema(schema)
    return count, shape, added, schema


def _reads(source: str, path: Path) -> bool:
    """Whether a file is among those of a source."""
    names = [str(Path(item).expanduser()) for item in split_spec(source)]
    inside = [str(f) for name in names if Path(name).is_dir() for f in Path(name).rglob("*")]
    files = {*names, *inside, *(f for name in names for f in glob.glob(name, recursive=True))}
    return path.exists() and any(Path(f).exists() and path.samefile(f) for f in files)


def merged(schema: pa.Schema, some: Sequence[Row]) -> pa.Schema:
    """The schema that holds these rows, too.

    Raises:
        ValueError: a column whose values have no type in common.
    """
    for name in dict.fromkeys(name for row in some for name in row):
        try:
            found = pa.schema([(name, pa.array([row.get(name) for row in some]).type)])
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"column `{name}` fits no Parquet column ({error}); write .jsonl instead") from None
    return schema


def run(
    model_path: str,
    source: str,
    output: Path,
    dtype: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
    normalize: bool = False,
) -> tuple[int, dict[str, int]]:
    """Scores every row of `source` into `output`, or goes on with it.

    Returns:
        The number of rows of the input; and "rows", those written, with what was dropped or turned, by its reason.

    Raises:
        ValueError: a row, a model or options that cannot be used; nothing is written then.
        OSError: a file that cannot be read or written.
    """
    from rmjax import contract, processes, reward_model
    from rmjax.models import hf
    from rmjax.writers import Progress

    options = options or Options()
    if normalize:
        mean, std = contract.normalization(contract.find(model_path))
        options = dataclasses.replace(options, mean=mean, std=std)
    count, shape, added, schema = survey(model_path, source, output, options)
    directory = hf.resolve(model_path)
    # The job is opened before the model is loaded, so that a bad place is found at once.
    with leaving_nothing(output.absolute().parent):
        what = {"model": jobs.model_identity(directory), "input": sources.fingerprint(source), "dtype": dtype}
        told = {key: str(value) for key, value in dataclasses.asdict(options).items()}
        job = jobs.Job(output, schema, {**what, "template_kwargs": template_kwargs, "options": told})
        model = reward_model.load_checked(model_path, dtype=dtype, template_kwargs=template_kwargs)

        def score(chunk: list[Any]) -> jobs.Scored:
            some = [row for _, row in chunk]
            try:
                scores = shape.score(model, some, [rows.conversations_of(row, shape, added) for row in some])
            except reward_model.BadConversation as bad:
                raise ValueError(f"{_row_of(chunk, shape, bad.index)}: {bad.detail}") from None
            if scores[0].keys() != added.keys():
                raise ValueError(
                    f"{model_path} gives {', '.join(scores[0])}, expected {', '.join(added)}: it is no model of ours, "
                    "and its outputs are no reward; see RewardModel.values"
                )
            counts: making.Counts = making.Counts()
            made = [new for row, x in zip(some, scores) for new in making.make(row, x, options, counts)]
            return made, counts

        turns = len(processes.gather("turns", None))
        progress = Progress(-(-count // (jobs.CHUNK * turns)), unit="rows", stream=sys.stderr)
        step = [0, 0]

        def tell(size: int, done: bool) -> None:
            step[0] += 1
            if done:
                step[1] += size
            else:
                progress.step(step[0], {}, groups=size)

        job.run(open_source(source), score, tell)
        progress.close()
        if step[1] and processes.is_first():
            print(f"{step[1]:,} rows were scored by an earlier start", flush=True)
        return count, dict(job.join(count))


def _row_of(chunk: Sequence[tuple[str, Row]], shape: Shape, conversation: int) -> str:
    """The row that a conversation of a chunk is from."""
    for where, row in chunk:
        conversation -= len(shape.read(row) or ()) if shape.name in ("responses", "pair") else 1
        if conversation < 0:
            return where
    return chunk[-1][0]


def main(_: Sequence[str]) -> None:
    """Runs the command; see command_line.py for what becomes of errors."""
    with command_line.outcome(
        debug=command_line.DEBUG.value, stopped="stopped; the same command goes on with what is scored"
    ):
        for flag in (MODEL, INPUT, OUTPUT):
            if not flag.value:
                raise flags.Error(f"--{flag.name} is required; --help shows what a row must have")
        output = Path(OUTPUT.value).expanduser()
        arguments = command_line.json_object(TEMPLATE_KWARGS.value, "--template_kwargs")
        told = Options(BEST_OF_N.value, PAIRS.value, RELABEL.value, TIES.value, LEAST.value, MOST.value)
        from rmjax import processes

        processes.start()
        startup.keep_programs()
        source = passwords.hide(INPUT.value)
        done, counts = run(MODEL.value, source, output, DTYPE.value, arguments, told, NORMALIZE.value)
        if processes.is_first():
            made = counts.pop("rows")
            more = "".join(f"; {reason} {n:,}" for reason, n in counts.items())
            print(f"{done} scores in {OUTPUT.value}" if made == done and not more else
                  f"{done} rows scored, {made} written to {OUTPUT.value}{more}")  # fmt: skip
        processes.finish()


def cli() -> None:
    """Parses flags and runs `main`."""
    app.run(main, flags_parser=command_line.parse_strictly)


if __name__ == "__main__":
    cli()
