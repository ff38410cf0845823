"""Frozen kernels in 4 or 8 bits, as the base weights of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

A kernel [..., in, out] becomes two parts, whose names say the kind and whose leading axes are the kernel's own:

- nf4: `nf4` uint8 [..., in / 2, out], two neighbours along the input axis per byte, the first in the high four bits;
  `nf4_absmax` float32 [..., in / block, out]. A block is 64 numbers along the input axis, or gcd(64, in).
- int8: `int8` int8 [..., in, out]; `int8_absmax` float32 [..., 1, out].

Codes, absmax and what is read back are those of bitsandbytes (on the CPU) for the transpose, torch's weight [out, in]:
of `quantize_4bit(quant_type="nf4", blocksize=block)`, which leaves absmax in float32, and of `int8_vectorwise_quant`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

BASES = ("nf4", "int8")
BLOCK = 64
# The paper's appendix E: quantiles of a normal distribution, of which one is 0. float32 [16], as bitsandbytes has them.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
BOUNDS = (NF4[:-1] + NF4[1:]) / 2  # a number on a bound has the lower code
FLOOR = 1e-36  # of absmax: its inverse, times 127, is a float32. A block or channel below it loses its values


@functools.partial(jax.jit, static_argnames="kind")
def quantize(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    """The parts of a kernel, float [..., in, out]; a block or channel of zeros is read back as zeros.

    Raises:
        ValueError: `kind` is not one of BASES, or `in` is odd and the kind is nf4.
    """
    if kind not in BASES:
        raise ValueError(f"unknown kind of base weights {kind!r}; expected one of {', '.join(BASES)}")
    x = kernel.astype(jnp.float32)
    if kind == "int8":
        absmax = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
        return {"int8": jnp.round(x * (_inverse(absmax) * 127)).astype(jnp.int8), "int8_absmax": absmax}
    *stack, inputs, outputs = x.shape
    if inputs % 2:
        raise ValueError(
            f"a kernel of shape {kernel.shape} has an odd input axis ({inputs}), and nf4 packs pairs along it: "
            "expected an even one; use int8 for this model"
        )
    block = math.gcd(BLOCK, inputs)
    x = x.reshape(*stack, inputs // block, block, outputs)
    absmax = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    scaled = x * _inverse(absmax)
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in BOUNDS)
    pairs = codes.reshape(*stack, inputs // 2, 2, outputs)
    return {"nf4": (pairs[..., 0, :] << 4) | pairs[..., 1, :], "nf4_absmax": absmax.squeeze(-2)}


def dequantize(parts: Mapping[str, jax.Array], dtype: DTypeLike) -> jax.Array:
    """The kernel [..., in, out] in `dtype`, computed in float32. For use under jit: outside, it makes many copies."""
    kind = kind_of(parts)
    codes, absmax = parts[kind], parts[f"{kind}_absmax"]
    if kind == "int8":
        return (codes.astype(jnp.float32) * absmax * np.float32(1 / 127)).astype(dtype)
    *stack, pairs, outputs = codes.shape
    codes = codes.reshape(*stack, absmax.shape[-2], -1, outputs)
    # Both halves are finished before they are interleaved. [3584, 18944] to bfloat16, 2026-11-30, jax 0.10.2: 0.11 s on
    # 2 cores of an AMD EPYC, and 0.20 s with the codes interleaved first; 6.4 million cycles on a TPU v5e, as its
    # compiler estimates them, and 8.7 with the codes interleaved first.
    halves = [(_nf4(code) * absmax[..., None, :]).astype(dtype) for code in (codes >> 4, codes & 15)]
    return jnp.stack(halves, axis=-2).reshape(*stack, 2 * pairs, outputs)


def abstract(shape: Sequence[int], kind: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the parts of a kernel of `shape` [..., in, out]; raises what `quantize` does."""
    return jax.eval_shape(functools.partial(quantize, kind=kind), jax.ShapeDtypeStruct(tuple(shape), jnp.float32))


def kind_of(parts: Mapping[str, Any]) -> str:
    """Which of BASES the parts are, by their names."""
    for kind in BASES:
        if kind in parts and f"{kind}_absmax" in parts:
            return kind
    expected = " or ".join(f"{kind} and {kind}_absmax" for kind in BASES)
    raise ValueError(f"found the parts {sorted(parts)}, expected {expected}: are these parts of a quantized kernel?")


def _inverse(absmax: jax.Array) -> jax.Array:
    """1 / absmax, finite. Numbers are multiplied by it, as in bitsandbytes: a division rounds some codes otherwise."""
    return 1 / jnp.maximum(absmax, FLOOR)


def _nf4(codes: jax.Array) -> jax.Array:
    """NF4[codes], float32, by 15 selects: as fast as a table on a CPU, fewer cycles in a TPU compiler's estimate."""
    values: list[Any] = list(NF4)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]
