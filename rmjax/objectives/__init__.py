"""What is learnt: one file and one row here for each objective."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rmjax.objectives.base import Objective
from rmjax.objectives.bradley_terry import BradleyTerry
from rmjax.objectives.grpo import GRPO
from rmjax.objectives.pairwise import Pairwise
from rmjax.objectives.pointwise import Pointwise
from rmjax.objectives.prm import ProcessReward
from rmjax.objectives.sft import SFT

OBJECTIVES: dict[str, type[Objective]] = {
    "bradley_terry": BradleyTerry,
    "pairwise": Pairwise,
    "pointwise": Pointwise,
    "prm": ProcessReward,
    "sft": SFT,
    "grpo": GRPO,
}


def make(values: Mapping[str, Any]) -> Objective:
    """Builds the objective that `config.objective` names; its other keys are the objective's fields."""
    values = dict(values.items())
    name = values.pop("name")
    if name not in OBJECTIVES:
        raise ValueError(f"config.objective.name={name!r} is unknown; there is {', '.join(sorted(OBJECTIVES))}")
    known = {field.name for field in dataclasses.fields(OBJECTIVES[name])}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known):
        raise ValueError(
            f"config.objective has {', '.join(unknown)}, which {name!r} has not; its keys are "
            f"{', '.join(sorted(known))}. Begin the config file with rmjax.config.defaults({name!r})"
        )
    try:
        return OBJECTIVES[name](**{key: _frozen(value) for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"config.objective: a value of {name!r} is of the wrong type: {error}") from None


def of_config(config: Any) -> Objective:
    """The objective of a run's config: that of `config.objective`, with the heads of `config.model`."""
    several = {} if config.model.heads == 1 else {"heads": config.model.heads}
    return make({**config.objective, **several})


def name_of(objective: Objective) -> str:
    """The name of an objective's kind."""
    return next(name for name, kind in OBJECTIVES.items() if kind is type(objective))


def _frozen(value: Any) -> Any:
    """Lists, which JSON has for tuples, as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
