"""The loss and means as (numerator, denominator), so that they add over rows, micro-batches, devices and steps.

A `Sums` maps a name to an array [2]. There is no mean of means anywhere: the one division happens in `ratios`.
Three endings differ: `_count` is a total (its denominator is unused), `_max` and `_min` combine by maximum and minimum.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Sums = dict[str, Any]  # name -> [2]: float32 jax arrays in a step, float64 numpy arrays on the host
PLAIN = tuple(f"{name}_count" for name in ("pairs", "labels", "steps", "responses", "tokens"))  # metrics without _count
LARGEST_LOSS = 700.0  # whose exponential is a float


def fraction(numerator: Any, denominator: Any = 0.0) -> Any:
    """Packs a numerator and a denominator into float32 [2]."""
    return jnp.stack([jnp.asarray(numerator, jnp.float32), jnp.asarray(denominator, jnp.float32)])


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> Sums:
    """Combines two sums on the host; their names must be the same."""
    if a.keys() != b.keys():
        raise ValueError(f"sums of different names: {sorted(a)} and {sorted(b)}")
    return {name: _combine(name, a[name], b[name]) for name in a}


def _combine(name: str, x: Any, y: Any) -> Any:
    if name.endswith("_max"):
        return np.maximum(x, y)
    return np.minimum(x, y) if name.endswith("_min") else x + y


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


def to_metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name: ratios and totals, with `reward_std` in place of the mean square, and `perplexity` of tokens."""
    values = ratios(sums)
    values = {name.removesuffix("_count") if name in PLAIN else name: value for name, value in values.items()}
    square = values.pop("reward_square", None)
    if square is not None:
        values["reward_std"] = max(square - values["reward_mean"] ** 2, 0.0) ** 0.5
    if "tokens" in values and "loss" in values:
        values["perplexity"] = math.exp(min(values["loss"], LARGEST_LOSS))
    return values
