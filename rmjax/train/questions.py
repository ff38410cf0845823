"""The questions of a run of reinforcement learning: their plan, what a step of them has at most, and its batch's shape.

A step draws its samples, so what is known ahead are bounds; micro-batches that a step does not fill are not computed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rmjax.batches import actions, prepare
from rmjax.batches.actions import Sample
from rmjax.batches.groups import Group, Groups
from rmjax.batches.loader import Shape
from rmjax.batches.packing import Plan
from rmjax.batches.prepare import Split
from rmjax.inference.engines import Recorded
from rmjax.objectives.grpo import GRPO


def plan_questions(config: ConfigDict, groups: Groups, epochs: int, weights: np.ndarray | None) -> Plan:
    """A plan whose steps have `config.rollout.prompts_per_step` questions, each in a row of its own.

    With `config.objective.updates` each step stands there so many times.
    """
    whole_rows = np.full(len(groups), config.plan.row_tokens)
    of_step = config.rollout.prompts_per_step
    plan = prepare.plan_epochs(config, groups, whole_rows, epochs, weights, rows_per_step=of_step)
    times = config.objective.updates
    if times == 1:
        return plan
    steps = [np.concatenate(plan.rows(step)) for step in range(plan.steps) for _ in range(times)]
    sizes = [len(step) for step in steps]
    return dataclasses.replace(
        plan,
        groups=np.concatenate(steps),
        row_start=np.arange(sum(sizes) + 1),
        step_start=np.concatenate([[0], np.cumsum(sizes)]),
        epoch_steps=tuple(n * times for n in plan.epoch_steps),
        steps_per_epoch=plan.steps_per_epoch * times,
    )


def describe_plan(config: ConfigDict, groups: Groups, plan: Plan) -> str:
    rollout, orders = config.rollout, int(groups.responses.max())
    each = f"{rollout.samples} answers" + (" to each of both orders" if orders > 1 else "")
    return (
        f"plan: {plan.steps} steps of {rollout.prompts_per_step} questions, {each}, each of at most "
        f"{rollout.max_tokens} tokens"
    )


def check(config: ConfigDict, values: Mapping[str, Any], groups: Groups, plan: Plan) -> None:
    """Makes sure, before anything is compiled, that questions can be answered.

    Args:
        values: of the model's config.json.
        groups: the questions of the training data.
        plan: of them.

    Raises:
        ValueError: the model's context is too short, or config.rollout.source lacks answers.
        FileNotFoundError: config.rollout.source is not there.
    """
    check_room(values, groups, config.rollout.max_tokens, "config.rollout.max_tokens")
    if config.rollout.source:
        if config.rollout.dead == "resample":
            raise ValueError("config.rollout.dead='resample' draws again, which config.rollout.source cannot")
        prompts = [p for i in np.unique(plan.groups).tolist() for p in groups.group(i).tree.sequences()]
        if missing := Recorded(config.rollout.source).missing(prompts, config.rollout.samples):
            raise ValueError(
                f"config.rollout.source={config.rollout.source!r} has fewer than {config.rollout.samples} answers "
                f"(config.rollout.samples) to {missing:,} of the {len(prompts):,} prompts that the run asks; a line "
                'is {"prompt": [ids], "responses": [{"tokens": [ids], "log_probs": [...], "finish": "stop"}, ...]}'
            )


def check_room(values: Mapping[str, Any], groups: Groups, most: int, key: str) -> None:
    """Makes sure that the model has room for every question and an answer of `most` tokens, which `key` says.

    Raises:
        ValueError: its context is too short.
    """
    longest, room = int(groups.longest.max()), int(values.get("max_position_embeddings") or 0)
    if room and longest + most > room:
        raise ValueError(
            f"the longest question has {longest:,} tokens and an answer up to {most:,} ({key}), the model's context is "
            f"{room:,}; lower {key} to {max(room - longest, 0):,} or less, or config.data.max_length"
        )


def work_of_steps(config: ConfigDict, split: Split) -> dict[str, np.ndarray]:
    """What is known of each step ahead, see `watch.work_of_steps`: float64 [steps] of `questions` and `answers`."""
    plan = split.plan
    sizes = np.diff(plan.step_start).astype(np.float64)
    prompts = np.add.reduceat(split.groups.responses[plan.groups].astype(np.float64), plan.step_start[:-1])
    return {"questions": sizes, "answers": prompts * config.rollout.samples}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What any step has at most.

    Attributes:
        rows: of `row_tokens` tokens.
        groups: trees, of all rows.
        samples: of all questions.
    """

    rows: int
    groups: int
    samples: int


def bounds(config: ConfigDict, groups: Groups, plan: Plan) -> Bounds:
    """What the steps of a plan have at most, when every sample is as long as it may be and shares its prompt alone."""
    row, own = config.plan.row_tokens, config.rollout.max_tokens + 1
    samples = groups.responses.astype(np.int64) * config.rollout.samples
    prompts = groups.lengths.astype(np.int64)
    in_a_part = np.maximum((row - prompts) // own, 1)
    parts = np.where(prompts + samples * own <= row, 1, -(-samples // in_a_part))
    tokens = samples * own + parts * np.minimum(prompts, row)
    of_steps = lambda x: np.add.reduceat(x[plan.groups], plan.step_start[:-1])
    # Of rows that are filled best fit, no two have room for each other.
    rows = np.minimum(of_steps(parts), 2 * of_steps(tokens) // row + 1)
    return Bounds(int(rows.max()), int(of_steps(parts).max()), int(of_steps(samples).max()))


def imagined(config: ConfigDict, question: Group) -> list[Group]:
    """The groups of a question whose answers are made up: half as long as they may be, and unlike from the first token
    on."""
    n, k = max(1, config.rollout.max_tokens // 2), config.rollout.samples
    answers = np.random.default_rng(0).integers(0, 1000, (k, n), np.int32)
    answers[:, 0] = np.arange(k)
    none = np.zeros(n, np.float32)
    samples = [Sample(prompt, answer, none, 1.0) for prompt in question.tree.sequences() for answer in answers]
    return actions.groups(samples, 1.0, float(len(samples)), config.plan.row_tokens, question.id)


def batch_shape(
    config: ConfigDict, objective: GRPO, groups: Groups, plan: Plan, row_devices: int, micro_rows: int
) -> Shape:
    """The shape of every step's batch; micro-batches that a step does not fill are not computed."""
    most = bounds(config, groups, plan)
    per_device = math.ceil(most.rows / row_devices)
    rows = min(micro_rows, per_device)
    fields = tuple(objective.fields.items())
    in_a_row = min(most.groups, config.plan.row_tokens)
    samples = int(groups.responses.max()) * config.rollout.samples
    micro, tokens = math.ceil(per_device / rows), config.plan.row_tokens
    return Shape(micro, rows * row_devices, tokens, in_a_row, most.samples, samples, fields)
