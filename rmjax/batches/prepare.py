"""What a run is made of, before its first step: groups, plans and batch shapes, and the model's first parameters."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax.batches import augment, loader, packing, select, token_cache
from rmjax.batches import groups as groups_lib
from rmjax.batches.chat import Chat, load_tokenizer
from rmjax.batches.groups import Groups
from rmjax.batches.loader import Shape
from rmjax.batches.packing import Plan
from rmjax.batches.tasks import Task
from rmjax.data import formats, sources, synthetic
from rmjax.models import hf


@dataclasses.dataclass(frozen=True)
class Split:
    """One set of groups, its plan and the shape of its batches."""

    groups: Groups
    plan: Plan
    shape: Shape


def check_sources(config: ConfigDict, others: Sequence[str] = ()) -> None:
    """Checks, before a model is downloaded, that the data is there and that what config.data chooses of it makes sense.

    Raises:
        FileNotFoundError: a source that is not there.
        ValueError: one of no known kind, or columns, a filter, sample, weights or augmentations that cannot be read.
    """
    formats.parse_columns(config.data.columns)
    augment.parse(config.data.augment)
    select.parse_sample(config.data.sample)
    select.parse_weights(config.data.weights)
    if config.data.filter:
        select.check_filter(config.data.filter)
    if config.data.weights or config.data.sample:
        sources.refuse_equal_names(config.data.train, "config.data.weights and sample")
    for spec in filter(None, (config.data.train, config.data.validation, *others)):
        for item in sources.split_spec(spec):
            sources.parts(item)


def check_columns(config: ConfigDict, task: Task) -> None:
    """Checks by the first rows of each training source that it has the columns that the task wants beside its labels.

    Raises:
        ValueError: it has not; says which there are.
    """
    for item in sources.split_spec(config.data.train) if groups_lib.carried(task) else ():
        rows = [row for _, row in itertools.islice(sources.open_source(item), formats.LOOK)]
        try:
            formats.check_carried(rows, groups_lib.carried(task), config.data.columns)
        except ValueError as error:
            reads = f"config.objective.reward={config.objective.reward!r} reads {', '.join(groups_lib.carried(task))}"
            raise ValueError(f"{item}: {error}; {reads} (config.data.columns says which column is what)") from None


def without_columns(task: Task) -> Task:
    """The task for data that is only measured, which may lack the columns that rewards read."""
    return dataclasses.replace(task, columns=()) if groups_lib.carried(task) else task  # type: ignore[type-var]


def open_chat(config: ConfigDict, workdir: Path) -> Chat:
    """Loads the tokenizer and its template; "synthetic" makes the demo's own in the workdir."""
    source = config.model.tokenizer or hf.tokenizer_of(hf.resolve(config.model.init_from), config.model.base)
    if source == "synthetic":
        source = workdir / "tokenizer"
        synthetic.make_tokenizer(source)
    answer = config.rollout.max_tokens if "rollout" in config else 0  # that is still to be written
    chat = Chat(
        load_tokenizer(source),
        template_kwargs=config_lib.template_kwargs(config),
        max_length=config.data.max_length or config.plan.row_tokens - answer,
        over_long=config.data.over_long,
    )
    for note in chat.notes:
        logging.warning("chat template: %s", note)
    return chat


def build_groups(
    config: ConfigDict,
    chat: Chat,
    task: Task,
    source: str,
    *,
    augmentations: Sequence[str] = (),
    carried: Sequence[str] = (),
    file: Any = None,
) -> Groups:
    """Reads and tokenizes a source; progress is shown on `file`, standard output by default."""
    return token_cache.build(
        source,
        chat,
        task,
        format=config.data.format,
        columns=config.data.columns,
        carried=carried,
        on_bad_row=config.data.on_bad_row,
        max_bad_fraction=config.data.max_bad_fraction,
        workers=config.data.workers,
        cache_dir=config.data.cache_dir,
        augmentations=augmentations,
        progress=file or sys.stdout,
    )


def read_groups(config: ConfigDict, chat: Chat, task: Task) -> tuple[Groups, Groups]:
    """Reads, tokenizes, filters and splits the data; groups that no row can hold are counted and left out.

    What is split off for validation is neither augmented nor sampled, so it is the same whatever training takes.
    `config.data.validation` may lack the columns that the task wants beside its labels: they serve rewards.
    """

    def read(task: Task, source: str, **options: Sequence[str]) -> Groups:
        groups = build_groups(config, chat, task, source, **options)
        return select.filtered(groups.fitting(config.plan.row_tokens), config.data.filter)

    groups = read(task, config.data.train, augmentations=augment.parse(config.data.augment))
    if config.data.validation:
        train = groups_lib.for_training(groups)
        validation = read(without_columns(task), config.data.validation, carried=groups_lib.carried(task))
    else:
        train, validation = groups_lib.split(groups, config.data.validation_fraction, config.seed)
    train = select.sampled(train, config.data.sample, config.seed)
    refuse_unlabelled(train, getattr(task, "names", ()))
    refuse_without_margin(config, train)
    return train, validation if config.data.validation else validation.audited(train.audit)


def read_again(config: ConfigDict, chat: Chat, task: Task, validation: Groups) -> Groups:
    """The validation set of `read_groups` for another task; what is split off are the same prompts.

    Raises:
        ValueError: the task has no groups of these prompts.
    """
    groups = build_groups(config, chat, task, config.data.validation or config.data.train)
    groups = select.filtered(groups.fitting(config.plan.row_tokens), config.data.filter)
    if not config.data.validation:
        groups = groups.select(np.flatnonzero(np.isin(groups.prompt_ids, validation.prompt_ids)))
    if not len(groups):
        raise ValueError("config.eval.samples: the validation set has no question that a judge could be asked")
    return groups


def refuse_unlabelled(groups: Groups, names: Sequence[str]) -> None:
    """Refuses attributes that no training group has: their outputs would stay random, and count in the reward."""
    if not names:
        return
    mask = groups.column("label/mask")[0].reshape(-1, len(names))
    if missing := [name for a, name in enumerate(names) if not mask[:, a].any()]:
        raise ValueError(
            f"config.objective.attributes: no training group has {', '.join(missing)}; leave it out, or look at the "
            "attributes with `python -m rmjax.data inspect`"
        )


def refuse_without_margin(config: ConfigDict, groups: Groups) -> None:
    """Refuses a loss that is made of margins where no training group has one: it would be that without them."""
    keys = [key for key in ("margin_scale", "scaled") if config.objective.get(key)]
    if keys and not groups.margins.any():
        given = " and ".join(f"config.objective.{key}={config.objective[key]}" for key in keys)
        raise ValueError(
            f"{given}: no training group has a margin; the data needs a column `margin`, or scores of both responses "
            "(config.data.columns says which column is what), or leave the key out"
        )


def plan_training(config: ConfigDict, groups: Groups, make: Callable[..., Plan] | None = None) -> Plan:
    """Plans as many epochs as the run's duration needs; an epoch shows each source as often as its weight says.

    `make` plans a number of epochs with weights of the sources, or None; default is to pack the groups.
    """
    weights = select.weights(groups.sources, config.data.weights) if config.data.weights else None
    make = functools.partial(make or functools.partial(_packed, config, groups), weights=weights)
    amount, unit = config_lib.parse_duration(config.duration)
    if unit == "epoch" and amount == int(amount):
        return make(int(amount))  # epochs differ by a step or two, so whole ones are not counted in steps
    plan = make(1)
    steps = steps_in(config.duration, plan)
    while plan.steps < steps:
        plan = make(max(len(plan.epoch_steps) + 1, round(steps / plan.steps_per_epoch)))
    return plan.first(steps)


def _packed(config: ConfigDict, groups: Groups, epochs: int, weights: np.ndarray | None) -> Plan:
    sizes = {"rows_per_step": config.plan.rows_per_step, "groups_per_step": config.plan.groups_per_step}
    return plan_epochs(config, groups, groups.lengths, epochs, weights, **sizes)


def plan_epochs(
    config: ConfigDict, groups: Groups, lengths: np.ndarray, epochs: int, weights: np.ndarray | None, **sizes: int
) -> Plan:
    """A plan of so many epochs by the config's rows, window and seed; `sizes` are those of a step (packing.py)."""
    return packing.make_plan(
        lengths,
        groups.ends,
        row_tokens=config.plan.row_tokens,
        window=config.plan.window,
        epochs=epochs,
        seed=config.seed,
        source=groups.source,
        weights=weights,
        **sizes,
    )


def batch_shape(groups: Groups, plan: Plan, row_devices: int, micro_rows: int) -> Shape:
    most = int(groups.responses.max())
    return loader.plan_shape(plan, most, micro_rows=micro_rows, row_devices=row_devices, labels=groups.fields)


def plan_evaluations(
    config: ConfigDict, sets: Mapping[str, Groups], row_devices: int, micro_rows: int
) -> dict[str, Split]:
    """Plans one pass over each set in which every group stands exactly once; all have batches of one shape."""
    make = lambda groups: packing.make_plan(
        groups.lengths,
        groups.ends,
        row_tokens=config.plan.row_tokens,
        rows_per_step=micro_rows * row_devices,
        window=config.plan.window,
        seed=None,
    )
    plans = {name: make(groups) for name, groups in sets.items()}
    shapes = [batch_shape(groups, plans[name], row_devices, micro_rows) for name, groups in sets.items()]
    most = {field: max(getattr(s, field) for s in shapes) for field in ("micro", "rows", "groups", "ends", "responses")}
    shape = dataclasses.replace(shapes[0], **most)
    return {name: Split(sets[name], plan, shape) for name, plan in plans.items()}


def steps_in(duration: str, plan: Plan, least: int = 1) -> int:
    """A duration in steps of this plan; "%" is of all its steps."""
    per_epoch, per_step = plan.steps_per_epoch, plan.groups_per_step
    steps = config_lib.steps_of(duration, steps_per_epoch=per_epoch, groups_per_step=per_step, total=plan.steps)
    return max(least, steps)


def describe_plan(groups: Groups, plan: Plan) -> list[str]:
    line = (
        f"plan: {plan.steps} steps of {plan.rows_per_step} rows x {plan.row_tokens} tokens, "
        f"{plan.groups_per_step:.1f} groups a step, {plan.fill:.1%} full, "
        f"{1 - groups.lengths.sum() / groups.unshared.sum():.1%} of the tokens saved by sharing prompts"
    )
    return [line, _mixture(groups, plan)] if len(groups.sources) > 1 else [line]


def describe_shape(shape: Shape) -> str:
    return (
        f"batch: {shape.micro} micro-batches of {shape.rows} rows; at most {shape.groups} groups and {shape.ends} "
        f"scored tokens in a row, {shape.responses} responses in a group"
    )


def _mixture(groups: Groups, plan: Plan) -> str:
    """What the first epoch shows, or as much of it as is planned."""
    shown = plan.first(plan.epoch_steps[0]).groups
    have, drawn = (np.bincount(x, minlength=len(groups.sources)) for x in (groups.source, groups.source[shown]))
    largest = np.argsort(-drawn, kind="stable")[:12].tolist()
    parts = [f"{groups.sources[k]} {drawn[k]:,} of {have[k]:,} ({drawn[k] / len(shown):.1%})" for k in largest]
    others = len(groups.sources) - len(parts)
    return "an epoch shows: " + ", ".join(parts) + (f" and {others} more sources" if others else "")
