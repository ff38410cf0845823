"""Measures reward models: on benchmarks by their official rules, on your own data with intervals, against a gold model.

    python -m rmjax.evaluate --model=runs/tiny/export --data=heldout.jsonl
    python -m rmjax.evaluate --model=runs/7b/export --benchmark=reward_bench,rm_bench
    python -m rmjax.evaluate --model=runs/7b/checkpoints/1200,Skywork/Skywork-Reward-V2-Qwen3-8B --benchmark=judge_bench
    python -m rmjax.evaluate --model=A,B,C --combine=mean --data=heldout.jsonl
    python -m rmjax.evaluate --model=runs/proxy/export --gold=gold_scores.jsonl --train_data=pairs.jsonl

A model is an export, a run, one of its checkpoints, or any Hugging Face sequence classifier of a supported family (a
directory or a hub id). Several models, separated by commas, stand side by side in one table. The responses of a prompt
are computed as one tree. Judges, pairwise or written, see each pair in both orders.

With --combine, several models of one reward are also measured as one: the mean of their rewards, the least (min), the
mean minus the standard deviation (mean_minus_std), or the median. The ensemble stands beside its members, and "errors
told" says whether its wrong pairs can be seen by a small margin, by the spread of the members' rewards, or by the
spread of the margins that they find.

--benchmark takes the names in docs/evaluation.md and reads each from its usual place on the hub; NAME=SOURCE reads a
local copy. --data takes any source that training reads, and measures several, separated by commas, each on its own.
--gold takes rows of `prompt`, `responses` and the gold model's `scores`, as `rmjax.score` writes them.

A judge that writes is asked how likely each verdict is. With --samples=8 it also writes eight judgements of each
question about --data: how often one is right, the likeliest one, and the vote of 2, 4, 8; whether the share of a vote
says how often it is right; consistency of both orders, share of the first position, ties, what cannot be read or was
cut off, length. Of ratings the errors and correlations of one and of the mean.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmjax.runtime import command_line, files, passwords
from rmjax.runtime.command_line import Parser

if TYPE_CHECKING:
    from rmjax.batches.groups import Groups
    from rmjax.inference.judgements import Judge
    from rmjax.inference.reward_model import RewardModel

MOST_SAMPLES = 64
CHUNK = 512  # records of --gold that are scored together
TEXTS = (  # flags that take a text: name, what it is, help
    ("model", "PATH[,PATH]", "models to measure: exports, hub ids, runs or checkpoints"),
    ("combine", "NAME", "also measures several models as one reward: mean, min, mean_minus_std or median of theirs"),
    ("benchmark", "NAME[,NAME]", "benchmarks to run, by name; NAME=SOURCE reads a local copy"),
    ("data", "SOURCE[,SOURCE]", "held-out data to measure on, in any format"),
    ("format", "NAME", "format of --data; default: detected from the columns"),
    (
        "columns",
        "WHAT=COLUMN[,...]",
        "what columns are, as prompt=trajectory,ignore=notes; see docs/data.md",
    ),
    ("gold", "SOURCE", "responses with the scores of a gold model to compare with"),
    (
        "train_data",
        "SOURCE",
        "data that the model was trained on; shows whether it is fitted, and what else has its prompts",
    ),
    ("output", "FILE", "JSON file to write all results to"),
    ("mesh", "AXES", "devices per mesh axis; default data=1,fsdp=-1,tensor=1 (-1: all that are left)"),
    ("template_kwargs", "JSON", "arguments of the chat template, for a model without contract"),
)


def parser() -> Parser:
    command = command_line.parser("rmjax.evaluate", __doc__)
    for name, metavar, text in TEXTS:
        command.add_argument(f"--{name}", default="", metavar=metavar, help=text)
    rows = "number of groups of --train_data to measure; default 1000"
    command.add_argument("--train_rows", type=int, default=1000, metavar="N", help=rows)
    samples = "judgements to sample of each question, for judges that write; default 0, only likelihoods are asked for"
    command.add_argument("--samples", type=int, default=0, metavar="N", help=samples)
    most = "most tokens of a sampled judgement; default 1,024"
    command.add_argument("--max_tokens", type=int, default=1024, metavar="N", help=most)
    dtype = "number type of the computation; auto is float32 on CPUs, else bfloat16"
    command.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help=dtype)
    normalize = "with --combine: subtract the contract's mean from each model's rewards and divide by its deviation"
    command.add_argument("--normalize", action="store_true", help=normalize)
    command.set_defaults(format="auto")
    return command


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with command_line.outcome(debug="--debug" in argv, stopped="stopped; nothing was written"):
        args = checked(parser().parse_args(argv))
        from rmjax.runtime import compile_cache, processes

        processes.start()
        compile_cache.keep_programs()
        reports = evaluate_together(args) if args.combine else {name: evaluate(name, args) for name in args.models}
        if processes.is_first():
            print("\n".join(lines(reports)), flush=True)
            if args.output:
                write(Path(args.output), list(reports.values()))
        processes.finish()


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, when all sources are there, else ValueError or FileNotFoundError; before a model is loaded."""
    from rmjax.data import reading, sources
    from rmjax.evaluate import benchmarks
    from rmjax.inference import ensembles

    args.models = ensembles.named_models(args.model) if args.model else []
    if not args.models:
        raise ValueError("--model is required; --help shows commands that run")
    if args.combine:
        ensembles.combination(args.models, args.combine)
    elif args.normalize:
        raise ValueError("--normalize goes with --combine: what is measured of one model has no scale")
    if args.combine and args.samples:
        raise ValueError("--samples is for judges that write, --combine for models of one reward; give one of them")
    if not (args.benchmark or args.data or args.gold):
        raise ValueError("nothing to measure: name --benchmark, --data or --gold; --help shows commands that run")
    for name, least in (("train_rows", 1), ("samples", 0), ("max_tokens", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}")
    if args.samples > MOST_SAMPLES:
        raise ValueError(f"--samples={args.samples} must be at most {MOST_SAMPLES}")
    if args.samples and not args.data:
        raise ValueError("--samples asks about --data, which is missing")
    if args.output:
        files.check_target(args.output, f"--output={args.output}")
        command_line.check_writable(Path(args.output), f"--output={args.output}")
    args.mesh = mesh_axes(args.mesh)
    args.template_kwargs = command_line.json_object(args.template_kwargs, "--template_kwargs")
    args.tests = benchmarks.parse(args.benchmark) if args.benchmark else []
    for _, source in args.tests:
        for item in sources.split_spec(source):
            sources.parts(item)
    for name in ("data", "gold", "train_data"):
        setattr(args, name, passwords.hide(getattr(args, name)))
        for item in _split(getattr(args, name)):
            reading.open_rows(item, args.format if name == "data" else "auto", args.columns)
    return args


def mesh_axes(text: str) -> dict[str, int]:
    """What --mesh says: "fsdp=8,tensor=2" is {"data": 1, "fsdp": 8, "tensor": 2}; {} of nothing."""
    axes = {"data": 1, "fsdp": -1, "tensor": 1}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in axes or not size.removeprefix("-").isdecimal():
            raise ValueError(f"--mesh={text}: {part!r} is not one of data=N, fsdp=N and tensor=N")
        axes[name] = int(size)
    return axes if text else {}


def load(path: str, args: argparse.Namespace) -> "tuple[RewardModel, int | None]":
    """A run's checkpoint and its step, or an export or foreign model whose contract holds."""
    import jax

    from rmjax import sharding
    from rmjax.inference import runs
    from rmjax.inference.reward_model import load_checked

    mesh = sharding.make_mesh(args.mesh, jax.devices()) if args.mesh else None
    if (place := runs.find(path)) is not None:
        opened = runs.open_checkpoint(place, mesh)
        return runs.reward_model(opened.model, opened.chat, opened.params, args.dtype), opened.step
    return load_checked(path, dtype=args.dtype, template_kwargs=args.template_kwargs, mesh=mesh), None


def evaluate(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for of one model, as evaluation.json has it; with --gold also "gold"."""
    from rmjax.data import sources

    model, step = load(path, args)
    report = {"version": 1, "model": path, "step": step, **measure({path: model}, args)[path]}
    if args.samples:
        judge = sampled_judge(model, args)
        for item in _split(args.data):
            report["sets"][f"{sources.source_name(item)} ({args.samples} samples)"] = judged(judge, item, args)
    return report | ({"gold": against_gold(model, args.gold, args.columns, report["sets"])} if args.gold else {})


def evaluate_together(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The same of the ensemble of all models, by its title, and of each member; the gold model is compared with the
    ensemble alone."""
    from rmjax.inference import ensembles, runs

    if not any(map(runs.find, args.models)):
        ensembles.check(args.models, normalize=args.normalize, template_kwargs=args.template_kwargs)
    members, steps = zip(*(load(name, args) for name in args.models))
    whole = ensembles.Ensemble(members, args.models, args.combine, args.normalize)
    measured = measure({whole.title: whole, **dict(zip(args.models, members))}, args)
    of_whole = {"members": args.models, "combine": args.combine, "normalize": args.normalize}
    said = {whole.title: {"version": 1, "model": whole.title, "step": None, **of_whole}}
    said |= {name: {"version": 1, "model": name, "step": step} for name, step in zip(args.models, steps)}
    reports = {name: {**said[name], **measured[name]} for name in said}
    if args.gold:
        sets = reports[whole.title]["sets"]
        reports[whole.title]["gold"] = against_gold(whole, args.gold, args.columns, sets)
    return reports


def measure(models: Mapping[str, "RewardModel"], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """ "sets" and "benchmarks" of models by their names, which are asked what the first one is, and tokenize alike."""
    import numpy as np

    from rmjax.batches import overlap
    from rmjax.data import ledger, sources
    from rmjax.evaluate import evaluating

    first, model = next(iter(models.items()))
    found: dict[str, dict[str, Any]] = {name: {"sets": {}, "benchmarks": {}} for name in models}
    told = lambda name, label, total: progress(label, total) if name == first else lambda done: None
    learnt = model.objective.task if model.objective else None
    data = [("train", item, "auto", args.train_rows) for item in _split(args.train_data)]
    data += [(sources.source_name(item), item, args.format, None) for item in _split(args.data)]
    trained: list[Groups] = []

    def overlapping(name: str, groups: "Groups") -> "np.ndarray | None":
        """bool [n], those that overlap the training data, which is reported; None without such data."""
        overlaps = [overlap.find(of_training, groups) for of_training in trained]
        for said in filter(None, (found.line(name) for found in overlaps)):
            print(f"warning: {said}", file=sys.stderr)
        return np.any([found.groups for found in overlaps], axis=0) if overlaps else None

    for name, item, format, rows in data:
        tasks = evaluating.measurable_tasks(item, format, learnt, args.columns)
        for kind, task in tasks.items():
            groups = evaluating.read(item, model.chat, task, format=format, columns=args.columns)
            if groups.audit.reasons or groups.audit.unread:
                print(*ledger.rows_lines(groups.audit), sep="\n", file=sys.stderr)
            if name == "train":
                trained.append(groups)
            else:
                overlapping(name, groups)
            groups = groups.sample(rows, 0) if rows else groups
            label = f"{name} ({kind})" if len(tasks) > 1 else name
            for by, each in models.items():
                shown = told(by, label, len(groups))
                found[by]["sets"][label] = evaluating.measured(each, groups, task, progress=shown)
    for test, source in args.tests:
        groups = evaluating.read_benchmark(test, source, model.chat, learnt)
        known = overlapping(test.name, groups)
        for by, each in models.items():
            shown = told(by, test.name, len(groups))
            scores = evaluating.run_benchmark(each, test, groups, overlapping=known, progress=shown)
            found[by]["benchmarks"][test.name] = scores
    return found


def _split(spec: str) -> list[str]:
    from rmjax.data import sources

    return sources.split_spec(spec) if spec else []


def progress(name: str, total: int) -> Callable[[int], None]:
    """Shows how many groups are done; on the terminal's error stream, as results go to the other."""
    from rmjax.runtime.progress import Progress

    line = Progress(total, f"{name}:", unit="groups", stream=sys.stderr)
    line.show(0)  # the first batch compiles

    def show(done: int) -> None:
        line.step(done)
        if done == total:
            line.close()

    return show


def against_gold(model: "RewardModel", source: str, columns: str, sets: dict[str, Any]) -> dict[str, Any]:
    """The model as a proxy of the gold model whose scores are in `source`; see evaluate/gold.py."""
    from rmjax.data import ledger, prompts, reading
    from rmjax.evaluate import gold
    from rmjax.evaluate.scored import Scored

    said: list[tuple[Any, ...]] = []
    histories: list[list[tuple[int, int]]] = []
    scores: list[np.ndarray] = []
    audit = ledger.Audit()
    rows = (record for record in reading.records(source, columns=columns, audit=audit) if "score" in record.attributes)
    while chunk := list(itertools.islice(rows, CHUNK)):
        tools = [record.tools for record in chunk for _ in record.conversations]
        values = model.score([c for record in chunk for c in record.conversations], tools=tools)
        for record in chunk:
            own, values = values[: len(record.conversations)], values[len(record.conversations) :]
            labels = (record.source, record.wins, record.ties, record.margin)
            lengths = np.array([len(c[-1].get("content") or "") for c in record.conversations])
            said.append((record.row, *labels, lengths, np.array(own, np.float64)))
            histories.append(prompts.histories(record))
            scores.append(np.array(record.attributes["score"], np.float64))
    if audit.reasons or audit.unread:
        print(*ledger.rows_lines(audit), sep="\n", file=sys.stderr)
    if not said:
        raise ValueError(f"--gold={source}: no row has scores; expected `prompt`, `responses` and `scores`")
    prompt_ids = prompts.ids(*prompts.flat(histories)).tolist()
    groups = [Scored(row, prompt, *rest) for (row, *rest), prompt in zip(said, prompt_ids)]
    trained = (model.contract or {}).get("metrics", {})
    accuracy = {name: x["metrics"]["accuracy"]["value"] for name, x in sets.items() if "accuracy" in x["metrics"]}
    train = accuracy.get("train") if "train" in sets else trained.get("train_slice/accuracy")
    held_out = (value for name, value in accuracy.items() if name != "train" and value is not None)
    test = next(held_out, trained.get("validation/accuracy"))
    known = {"train_accuracy": train, "test_accuracy": test}
    return gold.compare(groups, scores, **known, resolution=model.resolution)


def sampled_judge(model: "RewardModel", args: argparse.Namespace) -> "Judge":
    """The judge that --samples asks, in place of the model, whose parameters are dropped.

    Raises:
        ValueError: a model that writes no verdicts, or whose `tensor` reaches across processes.
    """
    from rmjax.inference import engines, judgements
    from rmjax.inference.generation import GenerativeModel
    from rmjax.inference.sampler import Drawing
    from rmjax.judging.writing import check_judge

    task = check_judge(model.objective.task if model.objective else None)
    drawing = Drawing(responses=args.samples, max_tokens=args.max_tokens)
    judge = judgements.Judge(GenerativeModel.of(engines.on_this_process(model)), task, drawing, shared=True)
    model.drop_params()
    return judge


def judged(judge: "Judge", source: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a judge writes about labelled data."""
    from rmjax.evaluate import sampled

    told = lambda name, total: progress(f"{source}, {name}", total)
    return sampled.measured(judge, source, format=args.format, columns=args.columns, progress=told)


def lines(reports: dict[str, dict[str, Any]]) -> list[str]:
    """What a person reads: each model on its own, or several side by side."""
    from rmjax.evaluate import gold, tables

    text: list[str] = []
    parts = {name: {**report["sets"], **report["benchmarks"]} for name, report in reports.items()}
    for name, report in reports.items():
        for part, measured in parts[name].items() if len(reports) == 1 else ():
            text += ["", f"{part}, by {name}", *tables.lines(measured)]
        if "gold" in report:
            text += ["", f"against gold, {name}", *gold.lines(report["gold"])]
    return text + (["", *tables.side_by_side(parts)] if len(reports) > 1 else [])


def write(path: Path, reports: list[dict[str, Any]]) -> None:
    """Writes the evaluation of one model, or a list of several; a file that is there is replaced by a whole one."""
    files.check_target(path, "--output")  # again: measuring took its time
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, reports[0] if len(reports) == 1 else {"models": reports})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
