"""Scores a file of any size: conversations, the responses of prompts, pairs, comparisons, or solutions step by step.

    python -m rmjax.score --model=runs/tiny/export --input=conversations.jsonl --output=scores.jsonl
    python -m rmjax.score --model=... --input=responses.jsonl --output=best.jsonl --best_of_n
    python -m rmjax.score --model=A,B,C --combine=min --input=conversations.jsonl --output=scores.jsonl
    python -m rmjax.score --model=... --input=responses.jsonl --output=pairs.jsonl --pairs=best_worst
    python -m rmjax.score --model=... --input=pairs.parquet --output=clean.parquet --relabel --min_margin=0.5

Rows are read as training reads them: every format of docs/data.md, with its turns, `system` and `tools`, and the files
that `rmjax.data convert` writes. The first rows decide the format, or --format names it. Labels are not needed, and not
read. What the model was trained for decides which columns are added:

    rewards, attributes   `messages`, or `prompt` and `response`      adds `score` and each attribute
                          `prompt` and `responses` (a list)           adds `scores`, a list, and one of each attribute
                          `chosen` and `rejected`, `prompt`           adds `chosen_score` and `rejected_score`
                          any other format                            adds `score` if it has one response, else `scores`
    comparisons           `prompt`, `response_a`, `response_b`,       adds `A`, `B` and `tie`: probabilities; A is the
                          or any format of two responses              first response, or the chosen one
    steps                 `prompt`, `completions` (a list of texts),  adds `scores`, one for each step; a list of such
                          or any format with steps                    lists where a row has several responses
    judge that writes     as for rewards, or for a judge of pairs     with --samples: `score` (the mean of the ratings
                                                                      that can be read), or shares of A, B and tie; and
                                                                      `unreadable`, the share of the other judgements

Rewards of several heads (config.model.heads) have `spread` beside them, or `chosen_spread` and `rejected_spread`.
A response that is empty or null has no score: null, counted on the last line, and nothing is chosen by it. What the
chat template does not show of rows (system messages, tools, thoughts) is counted there, too, by the names of
docs/data.md.
The responses of a prompt share its computation. The output has the rows in the order of the input, with their other
columns; its ending (.jsonl or .parquet) chooses the format. Rows that the options below make have their columns under
the names of this page (`prompt`, `system`), whatever they were called. JSONL holds dates, decimals and bytes as
text. A score that is not finite becomes null. Options make other rows from the scores:

    --best_of_n           `responses` become `response`, the best one, with its `score` and attributes
    --pairs=best_worst    `responses` become a pair, `chosen` and `rejected`, with both scores and `margin`;
    --pairs=all           or every pair that is no tie, as a file to train on (lists of turns if `prompt` is a list)
    --relabel             `chosen` and `rejected` (and columns named after them) change places where the rejected
                          response has the higher score; `preference` and `preference_strength` become null
    --min_margin, --max_margin, --tie_threshold    drop pairs by chosen_score - rejected_score, which becomes `margin`
    --normalize           rewards minus their mean, divided by their deviation, both from the export's contract; of
                          several models each by its own, before they are combined

Several models, separated by commas, are combined to one reward by --combine: the mean of theirs, which is the default,
the least of them (min), their mean minus their standard deviation (mean_minus_std), or their median. `score` is then
the combined reward, and `spread` the standard deviation of the members' rewards (a list beside `scores`, and
`chosen_spread` and `rejected_spread` of pairs). The models must give one reward each, and render and tokenize alike.

The last line counts the rows that were dropped, the pairs that changed places and the tokens that were computed;
--summary=FILE writes these counts as JSON. The whole input is checked before the model is loaded, and an input that
changes while it is scored is an error. Scored parts are kept in OUTPUT.parts until the output is complete, so that the
same command continues after a kill, Ctrl-C (exit code 130), SIGTERM (75) or a power cut; a damaged part is scored
again. An existing file OUTPUT is replaced when the new one is complete. A link or a directory as OUTPUT is refused, and
so is a directory OUTPUT.parts that this command did not make. Several processes (launch/local.sh N rmjax.score ...)
share the rows; each has the whole model on its devices.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from rmjax.data import ledger
from rmjax.jobs import inputs
from rmjax.jobs import job as jobs
from rmjax.jobs.inputs import Input
from rmjax.runtime import command_line, compile_cache, files, passwords
from rmjax.score import making, rows, survey
from rmjax.score.judgements import Sampling
from rmjax.score.making import Options
from rmjax.score.survey import Survey

MODEL = flags.DEFINE_string(
    "model", "", "Reward model: a Hugging Face directory or hub id; several, separated by commas, are combined."
)
COMBINE = flags.DEFINE_string(
    "combine",
    "",
    "How the rewards of several models become one: mean (the default), min, mean_minus_std or median.",
)
INPUT = flags.DEFINE_string("input", "", "Rows to score: JSONL, JSON, Parquet or Arrow file, glob, or hf:// source.")
FORMAT = flags.DEFINE_string(
    "format", "auto", "Format of the rows, a name of the table in docs/data.md; auto sees it in their columns."
)
COLUMNS = flags.DEFINE_string(
    "columns", "", "What columns are, as prompt=trajectory,ignore=notes (docs/data.md); their usual names need none."
)
OUTPUT = flags.DEFINE_string("output", "", "File to write; its ending, .jsonl or .parquet, chooses the format.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    "auto",
    ["auto", "float32", "bfloat16"],
    "Number type of the computation; auto is float32 on CPUs, else bfloat16.",
)
TEMPLATE_KWARGS = flags.DEFINE_string(
    "template_kwargs", "", "JSON object: arguments of the chat template, for a model without contract."
)
NORMALIZE = flags.DEFINE_bool(
    "normalize",
    False,
    "Subtract the contract's mean from rewards and divide by its deviation; of each of several models.",
)
BEST_OF_N = flags.DEFINE_bool("best_of_n", False, "Keep the best of `responses`, as `response` with its score.")
PAIRS = flags.DEFINE_enum(
    "pairs", "", ["", "best_worst", "all"], "Make pairs of `responses`: the best and the worst, or all."
)
RELABEL = flags.DEFINE_bool("relabel", False, "Make the response with the higher score the `chosen` one of its pair.")
TIES = flags.DEFINE_float(
    "tie_threshold",
    0.0,
    "With --pairs or --relabel: drop pairs whose scores differ by at most this much, or by less "
    "than the computation can tell (docs/scoring.md); default 0.",
)
SAMPLES = flags.DEFINE_integer(
    "samples", 0, "Judgements to sample of each question, of a judge that writes.", lower_bound=0
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 1024, "Most tokens of a sampled judgement.", lower_bound=1)
LEAST = flags.DEFINE_float("min_margin", -math.inf, "Drop pairs with a smaller margin (chosen minus rejected score).")
MOST = flags.DEFINE_float("max_margin", math.inf, "Drop pairs with a larger margin.")
SUMMARY = flags.DEFINE_string("summary", "", "JSON file to write the counts of the last line to.")
COMPUTED, UNSHARED = "tokens computed", "tokens unshared"  # counts of a part


def run(
    model_path: str,
    source: str,
    output: Path,
    dtype: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
    normalize: bool = False,
    format: str = "auto",
    columns: str = "",
    sampling: Sampling | None = None,
    summary: Path | None = None,
    combine: str = "",
) -> tuple[int, dict[str, int]]:
    """Scores every row of `source` into `output`, or goes on with it.

    Args:
        model_path: a model, or several, separated by commas.
        summary: file of the counts, see `_as_json`; written by the first process.
        combine: how the rewards of several models become one, a name of `ensembles.COMBINATIONS`.

    Returns:
        The number of rows of the input; and, on the first process, "rows" written and counts of other outcomes.

    Raises:
        ValueError: a row, a model or options that cannot be used; nothing is written then.
        RuntimeError: the input was changed meanwhile; no output is written, and finished parts are kept.
        OSError: a file that cannot be read or written.
    """
    from rmjax.inference import contract, ensembles
    from rmjax.models import heads, hf
    from rmjax.runtime import processes

    start = time.monotonic()
    options = options or Options()
    if summary:
        check_summary(source, output, summary)
    models = ensembles.named_models(model_path)
    if combine := ensembles.combination(models, combine):
        ensembles.check(models, normalize=normalize, template_kwargs=template_kwargs)
    elif normalize:
        mean, std = contract.normalization(contract.find(model_path))
        options = dataclasses.replace(options, mean=mean, std=std)
    input = Input(source, format, columns)
    surveyed = survey.survey_input(models, input, output, options, sampling)
    if processes.is_first():
        if combine:
            print(ensembles.words(models, combine), flush=True)
        if surveyed.unread:
            print(f"not read: {', '.join(ledger.unread_texts(surveyed.unread))}", flush=True)
        for reason, told in surveyed.unscored.items():
            print(f"no score: {reason} {told}", flush=True)
    identities = [jobs.model_identity(hf.resolve(model)) for model in models]
    what = {
        "model": dict(enumerate(identities, 1)) if combine else identities[0],
        "input": surveyed.read.digest,
        "dtype": heads.compute_dtype(dtype),
        "template_kwargs": dict(template_kwargs or {}),
        "format": input.format,
        "columns": input.columns,
        "sampling": dataclasses.asdict(sampling) if sampling else {},
        "options": {name: str(value) for name, value in dataclasses.asdict(options).items()},
        **({"combine": combine, "normalize": normalize} if combine else {}),
    }

    def tell(counts: jobs.Counts) -> None:
        if summary:
            summary.parent.mkdir(parents=True, exist_ok=True)
            seconds = round(time.monotonic() - start, 3)
            files.write_json(summary, _as_json(counts, seconds, counts_tokens=sampling is None))

    # Opened before the model is loaded, so that a bad place is found at once.
    with jobs.open_job("rmjax.score", output, surveyed.schema, what, len(surveyed.read.parts)) as job:
        if missing := job.missing():
            loading = {"dtype": dtype, "template_kwargs": template_kwargs}
            model = ensembles.load_checked(models, combine, normalize=normalize, **loading)
            score = lambda part: _scored(model, part, surveyed, options, model_path)
            read_again = lambda: rows.open_source(input, surveyed.kind)
            inputs.make_missing(job, missing, surveyed.read, source, read_again, score)
        counts = dict(job.join(surveyed.read.rows, tell))
    counts.pop("read", None)
    return surveyed.read.rows, counts


def _scored(model: Any, part: Sequence[rows.Asked], surveyed: Survey, options: Options, model_path: str) -> jobs.Made:
    """The rows that a part becomes; ValueError for a row that the template refuses, and a model without rewards."""
    work = model.inference.work
    computed, unshared = work.computed, work.unshared
    scores = surveyed.kind.score(model, part)
    if other := next((x for x in scores if x.keys() != surveyed.added.keys()), None):
        raise ValueError(
            f"{model_path} gives {', '.join(other)}, expected {', '.join(surveyed.added)}: it is no model of ours, "
            "and its outputs are no reward; see RewardModel.values"
        )
    counts = +making.Counts({COMPUTED: work.computed - computed, UNSHARED: work.unshared - unshared})
    counts.update(reason for asked in part for reason in surveyed.kind.left_out(model, asked))
    counts.update(f"without a score: {bad.reason}" for asked in part for bad in asked.unscored)
    chooses = options.takes_responses or options.makes_margins
    resolution = getattr(model, "resolution", 0.0) if chooses else 0.0
    make = lambda asked, x: making.make_rows(options.kept(asked), x, options, counts, resolution)
    return [new for asked, x in zip(part, scores) for new in make(asked, x)], counts


def main(_: Sequence[str]) -> None:
    debug = command_line.DEBUG.value
    with command_line.outcome(debug=debug):
        for flag in (MODEL, INPUT, OUTPUT):
            if not flag.value:
                raise flags.Error(f"--{flag.name} is required; --help shows what a row must have")
        arguments = command_line.json_object(TEMPLATE_KWARGS.value, "--template_kwargs")
    options = Options(BEST_OF_N.value, PAIRS.value, RELABEL.value, TIES.value, LEAST.value, MOST.value)
    from rmjax.runtime import processes, signals

    stopped = "stopped; the same command goes on with what is scored"
    with command_line.outcome(debug=debug, stopped=stopped, tell=processes.fail):
        processes.start()
        compile_cache.keep_programs()
        source, output = passwords.hide(INPUT.value), Path(OUTPUT.value).expanduser()
        stop = signals.Stop("with what is scored")  # parts stand a kill, so a signal ends the process at once
        with stop.listening(), _memory_explained():
            sampling = Sampling(SAMPLES.value, MAX_TOKENS.value) if SAMPLES.value else None
            done, counts = run(
                MODEL.value,
                source,
                output,
                dtype=DTYPE.value,
                template_kwargs=arguments,
                options=options,
                normalize=NORMALIZE.value,
                format=FORMAT.value,
                columns=COLUMNS.value,
                sampling=sampling,
                summary=Path(SUMMARY.value).expanduser() if SUMMARY.value else None,
                combine=COMBINE.value,
            )
            if processes.is_first():
                print(_summary(done, counts, OUTPUT.value), flush=True)
            processes.finish()


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise RuntimeError(
            f"the machine's memory is not enough ({error or 'MemoryError'}). What is scored is kept: the same command "
            "goes on with it where more memory is free; rows of very long texts or very many responses take the most"
        ) from error


def check_summary(source: str, output: Path, summary: Path) -> None:
    """Raises ValueError where the file of --summary is the output or the input, or may not be written."""
    if summary.resolve() == output.resolve():
        raise ValueError(f"--summary={summary} is --output, too; name another")
    inputs.check_file(source, summary, "--summary")


def _as_json(counts: Mapping[str, int], seconds: float, counts_tokens: bool) -> dict[str, Any]:
    """The numbers of the last line, for programs; they are of the whole job, `seconds` of this start alone.

    {"version": 1, "rows": 4, "written": 2, "outcomes": {"dropped: tie": 2}, "tokens_computed": 96,
    "tokens_unshared": 160, "seconds": 3.2}
    """
    tokens = {"tokens_computed": counts.get(COMPUTED, 0), "tokens_unshared": counts.get(UNSHARED, 0)}
    return {
        "version": 1,
        "rows": counts["read"],
        "written": counts["rows"],
        "outcomes": {name: counts[name] for name in sorted(counts) if name not in ("read", "rows", COMPUTED, UNSHARED)},
        **(tokens if counts_tokens else dict.fromkeys(tokens)),
        "seconds": seconds,
    }


def _summary(read: int, counts: Mapping[str, int], output: str) -> str:
    """One line: 4 rows scored, 2 written to out.jsonl; relabelled 1; dropped: tie 2."""
    written = counts["rows"]
    others = sorted((reason, n) for reason, n in counts.items() if reason not in ("rows", COMPUTED, UNSHARED))
    more = "".join(f"; {reason} {n:,}" for reason, n in others)
    if counts.get(COMPUTED):  # none by a start that had nothing left to score, of a version that counted none
        more += f"; {counts[COMPUTED]:,} tokens computed, {counts.get(UNSHARED, 0):,} if no prompt were shared"
    if written == read and not others:
        return f"{read} scores in {output}{more}"
    return f"{read} rows scored, {written} written to {output}{more}"


def cli() -> None:
    app.run(main, flags_parser=command_line.parse_strictly)


if __name__ == "__main__":
    cli()
