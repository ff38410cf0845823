"""Rewards of what a judge writes, by name; a team adds its own:

    from rmjax.judging import rewards

    @rewards.register("short")
    def short(answer):
        return rewards.better(answer) - 0.001 * answer.tokens

in the file of its config, whose `config.objective.reward = "short"` names it. A reward is a number, or NaN for an
answer that is not to be trained on. It is not asked about an answer that cannot be read, or was cut off
(`config.objective.unreadable`, `config.rollout.truncated`).

One that reads further columns of the row names them, and has their cells in `answer.columns`:

    @rewards.register("found", columns=("reference",))
    def found(answer):
        return rewards.better(answer) + 0.5 * (answer.columns["reference"] in answer.text)

Sources: `closeness` is the reward of OpenJudge's pointwise judge, `decay` that of RM-Gallery, `consistent` that of J1,
arXiv:2505.10320.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from rmjax.judging.verdicts import Verdict
from rmjax.suggestions import did_you_mean


class Answer(NamedTuple):
    """What a judge wrote, and what it was asked."""

    id: str  # of the row that was asked about
    question: str  # the prompt as the model read it
    text: str  # what it wrote, a thought included
    verdict: Verdict  # that was read in it
    label: str | float  # the right one: "A", "B" or "tie", or a rating
    strength: float  # how much better the preferred response of a pair is; NaN where it is not known
    scale: tuple[float, float]  # lowest and highest rating
    tokens: int  # that it wrote
    finish: str  # "stop", or "length" where it was cut off
    other: Verdict | None  # of the same sample about the other order of a pair
    columns: Mapping[str, Any] = MappingProxyType({})  # those that the reward was registered with, as the row has them


Reward = Callable[[Answer], float]
REWARDS: dict[str, Reward] = {}
COLUMNS: dict[str, tuple[str, ...]] = {}  # of the row, that a reward reads
DEFAULTS = {"pair": "better", "score": "closeness"}  # by what is judged


def register(name: str, columns: Sequence[str] = ()) -> Callable[[Reward], Reward]:
    """Names a reward for `config.objective.reward`.

    Args:
        name: of it.
        columns: of the row, that it reads; "meta.tests" is the key `tests` of an object in the column `meta`. A row in
            which one is missing or null is not trained on, and counts as `no_column`.
    """
    names = (columns,) if isinstance(columns, str) else tuple(columns)

    def remember(reward: Reward) -> Reward:
        REWARDS[name], COLUMNS[name] = reward, names
        return reward

    return remember


def named(name: str, target: str) -> Reward:
    """The reward of that name, "" for the usual one of the target ("pair" or "score"); ValueError if there is none."""
    name = name or DEFAULTS[target]
    if name not in REWARDS:
        hint = did_you_mean(name, REWARDS)
        raise ValueError(
            f"config.objective.reward={name!r} is none of {', '.join(REWARDS)}{hint}; rewards.register adds one"
        )
    return REWARDS[name]


def columns_of(name: str, target: str) -> tuple[str, ...]:
    """The columns that the reward of that name reads; errors as of `named`."""
    named(name, target)
    return COLUMNS.get(name or DEFAULTS[target], ())


def of(reward: Reward, answer: Answer) -> float:
    """The reward of an answer.

    Raises:
        RuntimeError: the function fails, or gives no number; names the row.
    """
    try:
        value = float(reward(answer))
    except Exception as error:
        where = f"the reward {getattr(reward, '__name__', reward)!r} of an answer about {answer.id}"
        raise RuntimeError(f"{where} failed: {type(error).__name__}: {error}") from error
    if math.isinf(value):
        name = getattr(reward, "__name__", reward)
        raise RuntimeError(f"the reward {name!r} of an answer about {answer.id} is {value}; expected a number, or NaN")
    return value


def _distance(answer: Answer) -> float:
    """Between rating and label, 1 from one end of the scale to the other."""
    low, high = answer.scale
    return abs(float(answer.verdict.value) - float(answer.label)) / (high - low)


@register("exact")
@register("better")
def better(answer: Answer) -> float:
    """1 for the right verdict or rating, else 0."""
    return float(answer.verdict.value == answer.label)


@register("consistent")
def consistent(answer: Answer) -> float:
    """1 if this verdict is right, and that of the same sample about the other order too."""
    swapped = {"A": "B", "B": "A"}.get(str(answer.label), answer.label)
    return better(answer) if answer.other is None else better(answer) * float(answer.other.value == swapped)


@register("linear")
def linear(answer: Answer) -> float:
    """1 at the label, 0 at the other end of the scale."""
    return 1 - _distance(answer)


@register("closeness")
def closeness(answer: Answer) -> float:
    """Labels 0 and 1 exactly, others as `linear`."""
    return better(answer) if answer.label in (0, 1) else linear(answer)


@register("decay")
def decay(answer: Answer) -> float:
    """exp(-2 distance), the distance being 1 from one end of the scale to the other."""
    return math.exp(-2 * _distance(answer))
