"""Judgements of labelled rows: each row becomes the questions that a judge is asked about its responses."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from rmjax import objectives
from rmjax.data import reading
from rmjax.data.ledger import Audit
from rmjax.data.sources import source_name, split_spec
from rmjax.inference import contract, runs
from rmjax.jobs.inputs import Input
from rmjax.jobs.parts import Row
from rmjax.judging.asked import in_words, labelled_questions
from rmjax.judging.writing import Writing, check_judge
from rmjax.objectives.sft import SFT
from rmjax.sample import rows

TEXT = pa.string()


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says of the question; None is the default, or what the model's own question has."""

    target: str = ""  # "pair" or "score"; "" is what the model judges
    template: str | None = None  # file with the question
    attribute: str | None = None  # what is rated
    scale: tuple[float, float] | None = None  # lowest and highest rating
    ties: bool | None = None  # whether a verdict may be "tie"

    @property
    def given(self) -> dict[str, Any]:
        """What is said, by the flag that says it."""
        values = {"template": self.template, "attribute": self.attribute, "scale": self.scale, "no_ties": self.ties}
        return {name: value for name, value in values.items() if value is not None}


OTHERS = {"pair": ("attribute", "scale"), "score": ("no_ties",)}  # flags that say nothing about what is judged


def task_of(model: str, options: Options) -> Writing:
    """What a model is asked: a judge its own question, any other language model that of the options.

    Raises:
        ValueError: options that contradict a judge's own question, or that are missing, unknown or unsuitable.
    """
    own = _own_task(model)
    if isinstance(own, Writing) and own.target != "messages":
        if options.given or options.target not in ("", own.target):
            said = [f"--{name}" for name in options.given] or [f"--judge={options.target}"]
            raise ValueError(
                f"{model} is a judge with a question of its own (target {own.target}), and {', '.join(said)} asks for "
                "another; give --judge alone"
            )
        return check_judge(own)
    if not options.target:
        raise ValueError(f"{model} is no judge with a question of its own; give --judge=pair or --judge=score")
    if idle := [f"--{name}" for name in options.given if name in OTHERS[options.target]]:
        raise ValueError(f"{', '.join(idle)} does nothing with --judge={options.target}; leave it out")
    values = {"template": options.template, "scale": options.scale, "ties": options.ties}
    attributes = (options.attribute,) if options.attribute else ()
    try:
        known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return SFT(target=options.target, attributes=attributes, **known).task
    except ValueError as error:
        raise ValueError(str(error).replace("config.objective.", "--")) from None


def _own_task(model: str) -> Any:
    """The task of a run, or of an export; None of a foreign model."""
    if place := runs.find(model):
        return objectives.make(runs.read_config(place.workdir).objective).exported.task
    terms = contract.find(model)
    return objectives.make(terms["objective"]).task if terms else None


def columns(task: Writing) -> dict[str, pa.DataType]:
    """The columns of the output; a row is a question."""
    said = TEXT if task.target == "pair" else pa.float64()
    return {
        "messages": pa.list_(pa.struct({"role": TEXT, "content": TEXT})),  # the question
        "label": said,  # the right verdict
        **rows.COLUMNS,
        "verdicts": pa.list_(said),  # of each response; null where it cannot be read
    }


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row, and the questions about it; none where it has no label."""

    where: str  # "file.jsonl:17"
    row: Row
    questions: Sequence[rows.Asked]

    @property
    def characters(self) -> int:
        """Its share of a part."""
        return sum(question.characters for question in self.questions)


def open_source(input: Input, task: Writing, at_once: int, audit: Audit) -> Iterator[Asked]:
    """Reads the rows of a source; the audit counts those without a label, and those that cannot be used."""
    number = 0  # of the next question
    for item in split_spec(input.source):
        layout, named_rows = reading.open_rows(item, input.format, input.columns)
        audit.unread = {**dict(layout.unread), **audit.unread}
        for where, row in named_rows:
            audit.rows += 1
            questions: list[rows.Asked] = []
            for record in reading.read_row(layout, row, source_name(item), where, False, audit):
                asked, bad = labelled_questions(record, task)
                for one in bad[:1]:
                    audit.add(one.reason, record.row, one.detail, kept=bool(asked))
                if asked:
                    audit.sources[record.source] = audit.sources.get(record.source, 0) + 1
                for question in asked:
                    made = {"messages": [dict(question.asked)], "label": in_words(question.label, task)}
                    place = number + len(questions)
                    questions.append(rows.Asked(where, made, place, (question.asked,), None, at_once))
            number += len(questions)
            yield Asked(where, row, questions)
