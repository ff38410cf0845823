"""What `python -m rmjax.data audit` does: reads data as a training run would, and measures it."""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from absl import flags
from ml_collections import ConfigDict, config_flags

from rmjax import config as config_lib
from rmjax import objectives
from rmjax.batches import augment, measure, overlap, prepare, select
from rmjax.batches import groups as groups_lib
from rmjax.batches.chat import Chat
from rmjax.batches.groups import Groups
from rmjax.batches.overlap import RUN, RUN_OF_BYTES, Overlap
from rmjax.batches.tasks import Attributes, Preferences, Steps, Task
from rmjax.data import formats, ledger, prompts, reading
from rmjax.data.records import Record
from rmjax.report import audit as audit_report
from rmjax.report import show
from rmjax.report.section import Items, Section, capital
from rmjax.runtime import config_file, passwords

UNLIMITED = 2**30  # tokens of a conversation


@dataclasses.dataclass(frozen=True)
class DataAudit:
    """What an audit shows."""

    report: dict[str, Any]  # of measure.report
    title: str
    notes: list[str]  # how the data was read
    problems: list[str]  # what has to be put right, sentences without their full stops

    def text(self) -> list[str]:
        """Lines for a terminal, what has to be put right last."""
        look_at = Section("Look at", Items([f"{capital(problem)}." for problem in self.problems]))
        data = [audit_report.overview(self.report), *audit_report.sections(self.report)]
        return show.to_text([Section("", *self.notes), *data, *[look_at] * bool(look_at)])

    def page(self) -> str:
        """An HTML page with plots, what has to be put right first."""
        data = [audit_report.overview(self.report, self.problems), *audit_report.sections(self.report)]
        return show.to_html(f"Audit of {self.title}", data, kind="Audit of data", notes=self.notes)[0]


def audit(args: argparse.Namespace, scratch: Path) -> DataAudit:
    """Audits what the command line of `rmjax.data` asks for, with an empty directory to work in.

    Raises:
        FileNotFoundError: a source, a tokenizer or a config file is not there.
        ValueError: a config or data that cannot be read.
    """
    config = read_config(args)
    asked = (config.data.on_bad_row, config.data.max_bad_fraction)
    config.data.max_bad_fraction = 1.0  # an audit is for data that a run would refuse
    config.data.on_bad_row = "skip" if asked[0] == "error" else asked[0]
    named = bool(args.config or args.objective)
    task = objectives.make(config.objective).task if named else guess_task(config)
    with_tokens = bool(config.model.tokenizer or config.model.init_from)
    if not args.config and not config.data.max_length:
        config.data.max_length = UNLIMITED
    chat = prepare.open_chat(config, scratch) if with_tokens else bytes_chat()
    groups = read_sets(config, chat, task, as_run=bool(args.config))
    plans, config.duration = {}, "1 epoch"
    for name, x in list(groups.items()) if with_tokens else ():
        if x.lengths.min() <= config.plan.row_tokens:
            fitting = x.fitting(config.plan.row_tokens)
            plans[name] = measure.filling(fitting, prepare.plan_training(config, fitting))
            groups[name] = x.audited(fitting.audit)  # it counts those that no row holds
    unit = "tokens" if with_tokens else "bytes"
    report = measure.report(groups, plans=plans, names=getattr(task, "names", ()), unit=unit)
    report["shared"] |= leaks(config, args.benchmark)
    overlaps = against(config, chat, next(iter(groups.values())), args.against, RUN if with_tokens else RUN_OF_BYTES)
    report["overlap"] = {name: _counts(found) for name, found in overlaps.items()}
    lines = [found.line(name) for name, found in overlaps.items()]
    problems = [
        *audit_report.problems(report),
        *filter(None, lines),
        *_refusals(groups, asked),
        *(f"chat template: {x}" for x in chat.notes),
    ]
    learnt = f"{next(iter(report['sets'].values()))['labels']['kind']} {', '.join(getattr(task, 'names', ()))}"
    tokenizer = config.model.tokenizer or config.model.init_from or "none, so lengths are in bytes of ChatML"
    notes = [f"tokenizer: {tokenizer}", f"learnt: {learnt.strip()}", *_accuracy_shown(report, config)]
    return DataAudit(report, config.data.train, notes, problems)


def read_config(args: argparse.Namespace) -> ConfigDict:
    """The config of a run, with what the command line says instead.

    Raises:
        ValueError: a config or a key of it that is wrong, or no source.
    """
    if args.config and args.objective:
        raise ValueError("--objective is a part of --config; give one of them, or --config.objective.KEY=VALUE")
    config = config_file.load(args.config) if args.config else config_lib.defaults(args.objective or "bradley_terry")
    values, argv = flags.FlagValues(), ["audit", *args.overrides]
    try:
        config_flags.DEFINE_config_dict("config", config, "", flag_values=values, lock_config=True, sys_argv=argv)
        values(argv)
    except Exception as error:
        raise ValueError(config_file.explain(error, argv)) from error
    config = passwords.hide_in(values.config)
    config.data.train = args.source or config.data.train
    config.data.validation = args.validation or config.data.validation
    config.model.tokenizer = args.tokenizer or config.model.tokenizer
    config.data.format = args.format if args.format != "auto" else config.data.format
    config.data.columns = args.columns or config.data.columns
    if not config.data.train:
        raise ValueError("no source was named; give one, or a --config that does")
    return config


def _records(config: ConfigDict) -> Iterator[Record]:
    return reading.records(config.data.train, format=config.data.format, columns=config.data.columns)


def guess_task(config: ConfigDict) -> Task:
    """What can be learnt from the first records; of those without labels, to write as they do."""
    first = list(itertools.islice(_records(config), formats.LOOK))
    if any(record.wins.any() or record.ties.any() for record in first):
        return Preferences("keep")
    if names := list(dict.fromkeys(name for record in first for name in record.attributes)):
        return Attributes(tuple(names))
    if any(record.steps for record in first):
        return Steps()
    return objectives.make(config_lib.defaults("sft").objective).task


def bytes_chat() -> Chat:
    """A chat whose tokens are the bytes of ChatML."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    bytes_alone = tokenizers.Tokenizer(model)
    bytes_alone.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
    turn = "<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    return Chat(tokenizer)


def read_sets(config: ConfigDict, chat: Chat, task: Task, *, as_run: bool) -> dict[str, Groups]:
    """The sets that a run trains on and validates with; without `as_run` none is split off, and no tree is too long."""
    with contextlib.redirect_stdout(sys.stderr):  # progress
        if as_run:
            train, validation = prepare.read_groups(config, chat, task)
            return {"training": train, "validation": validation}
        read = lambda task, source, **options: select.filtered(
            prepare.build_groups(config, chat, task, source, **options), config.data.filter
        )
        augmentations = augment.parse(config.data.augment)
        train = groups_lib.for_training(read(task, config.data.train, augmentations=augmentations))
        train = select.sampled(train, config.data.sample, config.seed)
        if config.data.validation:
            measured = prepare.without_columns(task)
            validation = read(measured, config.data.validation, carried=groups_lib.carried(task))
            return {"training": train, "validation": validation}
        return {"data": train}


def leaks(config: ConfigDict, benchmarks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The prompts of each benchmark that are in the training data, as data/prompts.py compares them."""
    rows, histories = _histories(_records(config) if benchmarks else ())
    found = {}
    for name in benchmarks:
        their_rows, theirs = _histories(reading.records(name))
        own_ids, their_ids = prompts.ids_of_both(histories, theirs)
        shared, *pairs = np.intersect1d(own_ids, their_ids, return_indices=True)
        examples = [[rows[i], their_rows[j]] for i, j in sorted(np.transpose(pairs).tolist())[: measure.EXAMPLES]]
        found[name] = {"prompts": len(shared), "of": len(np.unique(their_ids)), "examples": examples}
    return found


def against(
    config: ConfigDict, chat: Chat, train: Groups, benchmarks: Sequence[tuple[str, str, str]], run: int
) -> dict[str, Overlap]:
    """What of benchmarks, each a name, a source and a format, is in the training data; tokenized as these are."""
    found = {}
    for name, source, format in benchmarks:
        of_benchmark = config.copy_and_resolve_references()
        of_benchmark.data.update({"train": source, "format": format, "columns": "", "on_bad_row": "keep"})
        with contextlib.redirect_stdout(sys.stderr):  # progress
            measured = prepare.build_groups(of_benchmark, chat, guess_task(of_benchmark), source)
        found[name] = overlap.find(train, measured, run)
    return found


def _counts(found: Overlap) -> dict[str, Any]:
    groups = int(found.groups.sum())
    return {
        "groups": groups,
        "of": len(found.groups),
        "by_prompt": int(found.prompts.sum()),
        "examples": found.examples,
    }


def _histories(records: Iterable[Record]) -> tuple[list[str], tuple[np.ndarray, np.ndarray]]:
    read = [(record.row, prompts.histories(record)) for record in records]
    return [row for row, _ in read], prompts.flat(of_record for _, of_record in read)


def _accuracy_shown(report: dict[str, Any], config: ConfigDict) -> list[str]:
    """What the validation data can show for config.gate.accuracy; [] where that asks nothing, or has no meaning."""
    name, measured = list(report["sets"].items())[-1]
    least, share, prompts = config.gate.accuracy, config.data.validation_fraction, measured["prompts"]
    if not least or measured["labels"]["kind"] not in ("preferences", "verdicts", "steps"):
        return []
    if name == "validation":
        return [ledger.accuracy_shown(prompts, least)]
    return [f"config.data.validation_fraction={share:g}: {ledger.accuracy_shown(round(prompts * share), least)}"]


def _refusals(groups: dict[str, Groups], asked: tuple[str, float]) -> list[str]:
    refusals = []
    for name, x in groups.items():
        try:
            x.audit.check(*asked)
        except ValueError as error:
            refusals.append(f"training would refuse {name}: {error}")
    return refusals
