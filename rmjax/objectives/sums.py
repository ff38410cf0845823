"""Losses and metrics as (numerator, denominator), so that they add over rows, micro-batches, devices and batches.

A `Sums` maps a name to an array [2]. There is no mean of means anywhere: the one division happens in `ratios`.
Three endings differ: `_count` is a total (its denominator is unused), `_max` and `_min` combine by maximum and minimum.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Sums = dict[str, Any]  # name -> [2]: float32 jax arrays in a step, float64 numpy arrays on the host


def fraction(numerator: Any, denominator: Any = 0.0) -> Any:
    """Packs a numerator and a denominator into float32 [2]."""
    return jnp.stack([jnp.asarray(numerator, jnp.float32), jnp.asarray(denominator, jnp.float32)])


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> Sums:
    """Combines two sums, of the same names; numpy stays numpy.

    Raises:
        ValueError: the names differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"sums of different names: {sorted(a)} and {sorted(b)}")
    return {name: _combine(name, a[name], b[name]) for name in a}


def nothing(like: Mapping[str, Any]) -> Sums:
    """What adds nothing to sums of these names and shapes."""
    start = lambda name: -jnp.inf if name.endswith("_max") else jnp.inf if name.endswith("_min") else 0.0
    return {name: jnp.full(x.shape, start(name), x.dtype) for name, x in like.items()}


def _combine(name: str, x: Any, y: Any) -> Any:
    xp = np if isinstance(x, np.ndarray) else jnp
    if name.endswith("_max"):
        return xp.maximum(x, y)
    return xp.minimum(x, y) if name.endswith("_min") else x + y


def to_host(sums: Mapping[str, Any]) -> Sums:
    """float64 numpy copies, so that long sums keep their digits."""
    return {name: np.asarray(value, np.float64) for name, value in sums.items()}


def ratios(sums: Mapping[str, Any]) -> dict[str, float]:
    """Divides; a name whose denominator is 0 is left out, because it was not measured."""
    whole = ("_count", "_max", "_min")
    values = {
        name: float(x[0]) if name.endswith(whole) else float(x[0] / x[1])
        for name, x in sums.items()
        if name.endswith(whole) or x[1] != 0
    }
    return {name: value for name, value in values.items() if abs(value) != float("inf")}


def with_reward_std(values: dict[str, float]) -> dict[str, float]:
    """Puts `reward_std` in the place of `reward_square`, the mean square, where it was measured."""
    values = dict(values)
    square = values.pop("reward_square", None)
    if square is not None:
        values["reward_std"] = max(square - values["reward_mean"] ** 2, 0.0) ** 0.5
    return values
