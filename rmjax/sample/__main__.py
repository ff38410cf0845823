"""Samples responses of a language model to the prompts of a file.

    python -m rmjax.sample --model=DIR --input=prompts.jsonl --output=responses.jsonl --responses=2 --max_tokens=1024

The model is a causal language model of a supported family: a Hugging Face directory or hub id, an export, or a run of
`sft`, whose best checkpoint is taken. Rows are read as training reads them (docs/data.md): `prompt` (text or messages)
or `messages`, with `system`, `history`, `context` and `tools` where they are; of rows that have responses already the
prompt is taken. The output has each row and

    responses         a list of texts
    finish            of each "stop", or "length" where it was cut off at --max_tokens
    response_tokens   how many tokens each has
    log_probs         with --logprobs: of each token of each response, in nats, by the model itself, before
                      temperature, top_k and top_p

so `python -m rmjax.score --input=responses.jsonl --pairs=all` makes preferences of it. A prompt that leaves no room for
--max_tokens gets no response; such rows are counted. A response ends with the ids that generation_config.json, the
tokenizer and the chat template name, and before a text of --stop.

    python -m rmjax.sample --model=DIR --judge=pair --input=pairs.jsonl --output=judgements.jsonl --responses=8

asks about labelled responses instead: about each pair in both orders, or with --judge=score about each rated response.
The output has a row for each question: `messages` (the question), `label` (A, B or tie, or the rating), the columns
above, and `verdicts`, what each response says, null where that cannot be read. A judge that rmjax trained has its own
question, which --judge alone asks. Rows without a label are counted. `python -m rmjax.data keep_right` keeps what is
right.

What is drawn for a row depends on --seed and the row's place in the input, not on the rows beside it. The order is
kept. The output is written in parts and joined, so that the same command goes on after a kill, Ctrl-C (exit code 130)
or SIGTERM (75). Several processes (launch/local.sh N rmjax.sample ...) share the rows; each has the whole model on its
devices.
"""

import argparse
import collections
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmjax.data import ledger
from rmjax.jobs import inputs
from rmjax.jobs import job as jobs
from rmjax.jobs.inputs import Input
from rmjax.judging.verdicts import opened_thought
from rmjax.judging.writing import Writing
from rmjax.runtime import command_line, compile_cache, passwords
from rmjax.runtime.command_line import Parser
from rmjax.sample import rows

if TYPE_CHECKING:  # JAX takes seconds
    from rmjax.sample.judging import Options

# Options that are drawn with: default, unit in the help, and what they say.
DRAWING: dict[str, tuple[int | float, str | None, str]] = {
    "responses": (2, "N", "responses to each prompt; default 2"),
    "max_tokens": (1024, "N", "most tokens of a response; default 1,024"),
    "temperature": (1.0, "T", "number that logits are divided by; 0 takes the likeliest token; default 1"),
    "top_k": (0, "N", "draw from so many of the likeliest tokens; default 0, which is all"),
    "top_p": (1.0, "P", "draw from the likeliest tokens that together reach this probability; default 1"),
    "seed": (0, None, "seed of the random numbers; default 0"),
}
INPUT_HELP = "prompts: JSONL, JSON, Parquet or Arrow file, glob, or hf:// source"
FORMAT_HELP = "format of the rows, a name of the table in docs/data.md; default: detected from the columns"
COLUMNS_HELP = "what columns are, as prompt=question,ignore=notes; see docs/data.md"
STOP_HELP = "texts before which a response ends"
LOGPROBS_HELP = "write the log-probabilities of the tokens, too"
SLOTS_HELP = "prompts under way at a time; fewer need less memory; default 8 on CPUs and 64 elsewhere"
DTYPE_HELP = "number type of the computation; auto is float32 on CPUs, else bfloat16"
JUDGE_HELP = "judge labelled pairs, or rated responses; without a value a judge asks its own question"
TEMPLATE_HELP = "with --judge: Jinja2 file of the question (docs/objectives.md); default: the packaged one"
ATTRIBUTE_HELP = "with --judge=score: what is rated; default: the first that a row has"
SCALE_HELP = "with --judge=score: lowest and highest rating; default 1,5"
NO_TIES_HELP = "with --judge=pair: the verdict is A or B, and ties are left out"
KWARGS_HELP = "arguments of the chat template, for a model without contract"
ROUNDS = 8  # rows of a part for each prompt under way; the last of a part leave slots idle


def run(
    model_path: str,
    source: str,
    output: Path,
    *,
    dtype: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    format: str = "auto",
    columns: str = "",
    stop: Sequence[str] = (),
    log_probs: bool = False,
    slots: int = 0,
    judge: "Options | None" = None,
    **drawing: Any,
) -> tuple[int, dict[str, int]]:
    """Samples for every row of `source` into `output`, or goes on with it.

    Args:
        judge: what is asked about labelled responses; None answers prompts.
        drawing: the fields of sampler.Drawing.

    Returns:
        The number of rows of the input; and, on the first process, "rows" written and counts of other outcomes.

    Raises:
        ValueError: a row, a model or options that cannot be used; nothing is written then.
        RuntimeError: the input was changed meanwhile; no output is written, and finished parts are kept.
        OSError: a file that cannot be read or written.
    """
    from rmjax.inference import generation, runs
    from rmjax.inference.sampler import Drawing
    from rmjax.models import heads, hf
    from rmjax.runtime import processes
    from rmjax.sample import judging

    asked, input, place = Drawing(**drawing), Input(source, format, columns), runs.find(model_path)
    slots = slots or generation.default_groups()
    at_once = ROUNDS * slots
    inputs.check_output(source, output)
    if judge is not None and stop:
        raise ValueError(
            "--stop cuts responses off before a text, and a verdict ends with one; leave it out with --judge"
        )
    task = None if judge is None else judging.task_of(model_path, judge)
    added = {**(rows.COLUMNS if task is None else judging.columns(task)), **(rows.LOG_PROBS if log_probs else {})}
    audit = ledger.Audit()

    def open_source(audit: ledger.Audit) -> Iterator[Any]:
        if task is None:
            return rows.open_source(input, at_once, audit.unread)
        return judging.open_source(input, task, at_once, audit)

    def check(one: Any) -> inputs.Row:
        if task is not None:
            return {}  # nothing is kept of the row itself
        inputs.check_free(one.where, one.row, added)
        return one.row

    surveyed = inputs.survey(open_source(audit), check, output.suffix == ".parquet")
    schema = None if surveyed.schema is None else inputs.added_to(surveyed.schema, added)
    if processes.is_first():
        _tell(audit, task is not None)
    if task is not None and not audit.sources:
        raise ValueError(f"{source}: no row has a label that can be judged; {audit.reasons_text()}")
    what = {
        "model": runs.identity(place) if place else jobs.model_identity(hf.resolve(model_path)),
        "input": surveyed.digest,
        "dtype": heads.compute_dtype(dtype),
        "template_kwargs": dict(template_kwargs or {}),
        **{"format": format, "columns": columns, "stop": list(stop), "log_probs": log_probs, "slots": slots},
        "drawing": {name: str(value) for name, value in vars(asked).items()},
        **({} if task is None else {"judge": dataclasses.asdict(task)}),
    }
    # Opened before the model is loaded, so that a bad place is found at once.
    with jobs.open_job("rmjax.sample", output, schema, what, len(surveyed.parts)) as job:
        if missing := job.missing():
            model = generation.open_model(model_path, dtype=dtype, template_kwargs=template_kwargs)
            sampler = model.sampler(asked, slots)

            def sample(part: Sequence[Any]) -> jobs.Made:
                each = part if task is None else [question for one in part for question in one.questions]
                return _sampled(model, sampler, each, stop, log_probs, task)

            inputs.make_missing(job, missing, surveyed, source, lambda: open_source(ledger.Audit()), sample)
        counts = dict(job.join(surveyed.rows))
    counts.pop("read", None)
    return surveyed.rows, counts


def _tell(audit: ledger.Audit, judging: bool) -> None:
    """Says what is not read; and of rows that are judged, which of them are not."""
    if judging:
        print(*ledger.rows_lines(audit), sep="\n", flush=True)
    elif audit.unread:
        print(f"not read: {', '.join(ledger.unread_texts(audit.unread))}", flush=True)


def _sampled(
    model: Any,
    sampler: Any,
    part: Sequence[rows.Asked],
    stop: Sequence[str],
    log_probs: bool,
    task: "Writing | None" = None,
) -> jobs.Made:
    """The rows that a part becomes; ValueError for a row that the template refuses."""
    from rmjax.inference.judgements import judgements_of
    from rmjax.inference.reward_model import BadConversation

    try:
        prompts = model.prompts(
            [one.conversation for one in part], [one.tools for one in part], [one.number for one in part]
        )
    except BadConversation as bad:
        raise ValueError(f"{part[bad.index].where}: {bad.detail}") from None
    fits = [not model.too_long(prompt, sampler.drawing) for prompt in prompts]
    responses = iter(model.write(sampler, [prompt for prompt, fit in zip(prompts, fits) if fit], stop))
    counts: collections.Counter[str] = collections.Counter()
    made = []
    for one, prompt, fit in zip(part, prompts, fits):
        written = next(responses) if fit else []
        counts["prompt too long"] += not fit
        counts["responses"] += len(written)
        counts["cut off"] += sum(response.finish == "length" for response in written)
        counts["tokens"] += sum(len(response.tokens) for response in written)
        more: dict[str, Any] = {}
        opened = ""
        if task is not None:
            opened = opened_thought(model.chat.tokenizer.decode(prompt.tokens))
            said = [judgement.verdict for judgement in judgements_of(model, task, prompt, written)]
            more["verdicts"] = [None if verdict.kind == "unparseable" else verdict.value for verdict in said]
            counts["questions"] += 1
            counts["unreadable"] += more["verdicts"].count(None)
        if log_probs:
            more["log_probs"] = [response.log_probs.tolist() for response in written]
        made.append(
            {
                **one.row,
                "responses": [opened + response.text for response in written],
                "finish": [response.finish for response in written],
                "response_tokens": [len(response.tokens) for response in written],
                **more,
            }
        )
    return made, +counts


def parser() -> Parser:
    command = command_line.parser("rmjax.sample", __doc__)
    add = command.add_argument
    add("--judge", nargs="?", choices=("pair", "score"), const=True, metavar="pair|score", help=JUDGE_HELP)
    add("--template", metavar="FILE", help=TEMPLATE_HELP)
    add("--attribute", metavar="NAME", help=ATTRIBUTE_HELP)
    add("--scale", metavar="LOW,HIGH", help=SCALE_HELP)
    add("--no_ties", action="store_true", help=NO_TIES_HELP)
    add("--model", default="", metavar="PATH", help="language model: a Hugging Face directory, a hub id, or a run")
    add("--input", default="", metavar="SOURCE", help=INPUT_HELP)
    add("--output", default="", metavar="FILE", help="file to write; its ending, .jsonl or .parquet, is its format")
    add("--format", default="auto", metavar="NAME", help=FORMAT_HELP)
    add("--columns", default="", metavar="WHAT=COLUMN[,...]", help=COLUMNS_HELP)
    for name, (default, unit, text) in DRAWING.items():
        add(f"--{name}", type=type(default), default=default, metavar=unit, help=text)
    add("--stop", default="", metavar="TEXT[,TEXT]", help=STOP_HELP)
    add("--logprobs", action="store_true", help=LOGPROBS_HELP)
    add("--slots", type=int, default=0, metavar="N", help=SLOTS_HELP)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help=DTYPE_HELP)
    add("--template_kwargs", default="", metavar="JSON", help=KWARGS_HELP)
    return command


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    with command_line.outcome(debug=debug):
        args = parser().parse_args(argv)
        for name in ("model", "input", "output"):
            if not getattr(args, name):
                raise ValueError(f"--{name} is required; --help shows what a row must have")
        if args.slots < 0:
            raise ValueError(f"--slots={args.slots}, expected at least 0")
        arguments = command_line.json_object(args.template_kwargs, "--template_kwargs")
        judge = _judge_options(args)
    from rmjax.runtime import processes, signals

    stopped = "stopped; the same command goes on with what is sampled"
    with command_line.outcome(debug=debug, stopped=stopped, tell=processes.fail):
        processes.start()
        compile_cache.keep_programs()
        stop = signals.Stop("with what is sampled")  # parts stand a kill, so a signal ends the process at once
        with stop.listening():
            done, counts = run(
                args.model,
                passwords.hide(args.input),
                Path(args.output).expanduser(),
                dtype=args.dtype,
                template_kwargs=arguments,
                format=args.format,
                columns=args.columns,
                stop=list(filter(None, args.stop.split(","))),
                log_probs=args.logprobs,
                slots=args.slots,
                judge=judge,
                **{name: getattr(args, name) for name in DRAWING},
            )
            if processes.is_first():
                print(_summary(done, counts, args.output), flush=True)
            processes.finish()


def _judge_options(args: argparse.Namespace) -> "Options | None":
    """What is said of judging; ValueError for what is said without --judge."""
    from rmjax.sample.judging import Options

    options = Options(
        target=args.judge if isinstance(args.judge, str) else "",
        template=args.template,
        attribute=args.attribute,
        scale=_scale(args.scale) if args.scale else None,
        ties=False if args.no_ties else None,
    )
    if args.judge is None and options.given:
        raise ValueError(
            f"--{next(iter(options.given))} is of the judge's question; give --judge=pair or --judge=score, too"
        )
    return None if args.judge is None else options


def _scale(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--scale={text} is not two numbers, as in 1,5") from None
    return low, high


def _summary(read: int, counts: Mapping[str, int], output: str) -> str:
    """One line: 400 prompts, 796 responses of 12,480 tokens in out.jsonl; cut off 3; prompt too long 2."""
    others = [f"{name} {counts[name]:,}" for name in ("unreadable", "cut off", "prompt too long") if counts.get(name)]
    asked = f"{counts['questions']:,} questions about {read:,} rows" if "questions" in counts else f"{read:,} prompts"
    made = f"{counts.get('responses', 0):,} responses of {counts.get('tokens', 0):,} tokens"
    return "; ".join([f"{asked}, {made} in {output}", *others])


if __name__ == "__main__":
    main()
