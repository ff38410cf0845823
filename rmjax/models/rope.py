"""Rotary position embedding: what a config asks for, its frequencies, and the rotation.

The frequencies of every type are those of transformers' `modeling_rope_utils`. Types whose frequencies depend
on the length of the sequence at run time (`dynamic`, `longrope`) have no meaning in a tree and are refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NONE = "none"  # of layers that rotate nothing
TYPES = ("default", "linear", "llama3", "yarn")
NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
)
RUN_TIME_TYPES = ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding of one model; the fields after `factor` are read by the types that are named."""

    type: str = "default"  # one of TYPES, or NONE
    theta: float = 10_000.0  # base of the wavelengths
    factor: float = 1.0  # by how much the context is stretched (all but `default`)
    original_length: int = 0  # context before the stretching, tokens (`llama3`, `yarn`)
    low_freq_factor: float = 1.0  # wavelengths over original_length / this are stretched (`llama3`)
    high_freq_factor: float = 1.0  # wavelengths under original_length / this are not (`llama3`)
    beta_fast: float = 32.0  # rotations over the original context from which a frequency is not stretched (`yarn`)
    beta_slow: float = 1.0  # rotations up to which it is stretched in full (`yarn`)
    truncate: bool = True  # whether the two bounds are rounded to whole dimensions (`yarn`)
    attention_factor: float = 1.0  # what cosine and sine are multiplied by (`yarn`)
    partial: float = 1.0  # of a head's dimensions so many are rotated, the first ones


def rope_from_hf(config: Mapping[str, Any]) -> Rope:
    """Reads the rotary embedding of a config.json, in the form of transformers v4 or v5.

    v4 has `rope_theta` and `rope_scaling` at the top level, v5 has both in `rope_parameters`.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"config.json has RoPE parameters {given!r}, expected an object")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ValueError(f"config.json has RoPE parameters by layer type ({sorted(given)}), expected one set for all")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind in RUN_TIME_TYPES:
        raise ValueError(
            f"RoPE type {kind!r} is not supported: its frequencies depend on the sequence length at run "
            f"time, so a score would depend on how rows are packed. Supported: {', '.join(TYPES)}"
        )
    if kind not in TYPES:
        raise ValueError(f"unknown RoPE type {kind!r}; supported: {', '.join(TYPES)}")
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
        raise ValueError("partial_rotary_factor is not supported: every dimension of a head must be rotated")
    if wrong := [f"{key} {given[key]!r}" for key in NUMBERS if not isinstance(given.get(key), int | float | None)]:
        raise ValueError(f"config.json has the RoPE parameters {', '.join(wrong)}, expected numbers")
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if kind == "default":
        return Rope(theta=theta)
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    if missing := [name for name in needed if given.get(name) is None]:
        raise ValueError(f"RoPE type {kind!r} needs {', '.join(missing)}, found only {sorted(given)}")
    factor = float(given["factor"])
    if kind == "linear":
        return Rope("linear", theta, factor)
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = int(original or config["max_position_embeddings"])
    if kind == "llama3":
        return Rope(kind, theta, factor, original, float(given["low_freq_factor"]), float(given["high_freq_factor"]))
    return Rope(
        kind,
        theta,
        factor,
        original,
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_yarn_attention_factor(given),
    )


def _yarn_attention_factor(given: Mapping[str, Any]) -> float:
    """YaRN (Peng et al. 2023), eq. 22: 0.1 ln(factor) + 1; DeepSeek gives the ratio of two such terms."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    stretch = math.log(given["factor"]) if given["factor"] > 1 else 0.0
    scale = lambda mscale: 0.1 * mscale * stretch + 1.0
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2], or of so many as are rotated: radians per position of each pair of dimensions."""
    head_dim = int(head_dim * rope.partial)
    frequency = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.type == NONE:
        return 0 * frequency
    if rope.type == "default":
        return frequency
    if rope.type == "linear":
        return frequency / np.float32(rope.factor)
    keep = _llama3_keep(rope, frequency) if rope.type == "llama3" else _yarn_keep(rope, head_dim)
    return (frequency / np.float32(rope.factor) * (1 - keep) + frequency * keep).astype(np.float32)


def _llama3_keep(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    """How much of each frequency stays unstretched: 1 for short wavelengths, 0 for long, a ramp between."""
    rotations = rope.original_length * frequency / np.float32(2 * math.pi)
    ramp = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(ramp, 0, 1)


def _yarn_keep(rope: Rope, head_dim: int) -> np.ndarray:
    """The same for YaRN, whose ramp runs over dimensions: `NTK-by-parts`, section 3.2 of the paper."""
    low, high = (
        head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
        for rotations in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0  # as transformers: no division by zero
    return 1 - np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def rope_angles(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [B, T, 1, rotated / 2] each, to be applied to all heads of a token."""
    angles = positions_BT[..., None, None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates dimension i of each head against dimension i + R / 2, in float32; the dtype stays.

    R is twice the last axis of the angles; what is beyond it stays as it is.
    """
    cos, sin = angles
    r = 2 * cos.shape[-1]
    first, second = jnp.split(x_BTNH[..., :r].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
    return rotated if r == x_BTNH.shape[-1] else jnp.concatenate([rotated, x_BTNH[..., r:]], axis=-1)
