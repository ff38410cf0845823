"""Looks at every row before any is scored: whether it can be, and what the output will have."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rmjax.inference import contract, ensembles
from rmjax.jobs import inputs
from rmjax.jobs.inputs import Input
from rmjax.jobs.parts import Row
from rmjax.judging.writing import Writing, check_judge
from rmjax.score import judgements, making, rows
from rmjax.score.judgements import Sampling
from rmjax.score.making import Options
from rmjax.score.rows import Asked, Kind


@dataclasses.dataclass(frozen=True)
class Survey:
    """The result of reading a job's input once."""

    read: inputs.Survey
    kind: Kind  # of the model
    added: dict[str, pa.DataType]  # the columns of scores that a row gets
    schema: pa.Schema | None  # of the output, for Parquet
    unscored: dict[str, str]  # what gets no score, in words, by its reason
    unread: dict[str, str]  # the columns and keys that nobody reads, each with an example


def survey_input(
    models: Sequence[str], input: Input, output: Path, options: Options, sampling: Sampling | None = None
) -> Survey:
    """Reads every row, and keeps none; ValueError for an unusable row or output, and unsuitable options.

    Several models are one ensemble, whose members were checked.
    """
    inputs.check_output(input.source, output)
    kind = kind_of(models[0], sampling)
    if len(models) > 1:
        kind = dataclasses.replace(kind, names=[ensembles.SCORE, ensembles.SPREAD])
    unread: dict[str, str] = {}
    first, asked = inputs.first_of(rows.open_source(input, kind, unread))
    shape = kind.shape(first.format)
    options.check(shape.name)
    added = shape.added(kind.names)
    columns = making.made_columns(added, options)
    unscored: dict[str, tuple[int, str]] = {}  # rows of each reason, and the first of them

    def check(one: Asked) -> Row:
        if kind.shape(one.format) is not shape:
            raise ValueError(
                f"{one.where} is {one.format}, and the first row {first.format}, which gets other columns; score them "
                "apart"
            )
        kept = options.kept(one)
        inputs.check_free(one.where, kept, columns)
        options.check_row(one.where, kept)
        for bad in one.unscored:
            before, example = unscored.get(bad.reason, (0, f"{one.where}: {bad.detail}"))
            unscored[bad.reason] = before + 1, example
        return kept

    read = inputs.survey(asked, check, output.suffix == ".parquet")
    schema = None if read.schema is None else _made_schema(read.schema, added, options)
    told = {reason: f"{count:,} (the first is {example})" for reason, (count, example) in unscored.items()}
    return Survey(read, kind, added, schema, told, unread)


def kind_of(model: str, sampling: Sampling | None) -> Kind:
    """What rows are asked for, by the model's contract; ValueError if it has no scores, or nothing to sample."""
    from rmjax import objectives  # JAX takes seconds, which a mistake on the command line need not wait for

    terms = contract.find(model)
    objective = objectives.make(terms["objective"]) if terms else None
    if sampling and (objective is None or not isinstance(objective.task, Writing)):
        raise ValueError("--samples is for judges that write; this model's scores are computed, not sampled")
    if terms is None or objective is None:
        return rows.SCORING
    if objective.architecture == "CausalLM":
        if sampling is None:
            raise ValueError(
                f"{model} is a judge that writes its verdicts: --samples=8 samples eight judgements of each question; "
                "rmjax.evaluate also asks for likelihoods"
            )
        return judgements.kind_of(check_judge(objective.task), sampling)
    kind = rows.SCORING
    if objective.architecture == "TokenClassification":
        kind = rows.STEPWISE
    elif terms["objective"]["name"] == "pairwise":
        kind = rows.JUDGING
    if not objective.labels or kind is rows.STEPWISE:
        return kind
    own = {name: np.array(value, np.float32) for name, value in terms["objective_params"].items()}
    names = list(objective.decode(np.zeros((1, len(objective.labels)), np.float32), own))
    return dataclasses.replace(kind, names=names)


def _made_schema(schema: pa.Schema, added: dict[str, pa.DataType], options: Options) -> pa.Schema:
    prompt = schema.field("prompt").type if "prompt" in schema.names else making.TEXT
    without = ["responses"] if options.takes_responses else []
    return inputs.added_to(schema, making.made_columns(added, options, prompt), without)
