"""Frozen kernels in 4 or 8 bits, as the base weights of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

A kernel [..., in, out] becomes two parts, whose names say the kind and whose leading axes are the kernel's own:

- nf4: `nf4` uint8 [..., in / 2, out], two neighbours along the input axis per byte, the first in the high four bits;
  `nf4_absmax` float32 [..., in / block, out]. A block is 64 numbers along the input axis, or gcd(64, in).
- int8: `int8` int8 [..., in, out]; `int8_absmax` float32 [..., 1, out].

Codes, absmax and what is read back are those of bitsandbytes for the transpose, torch's weight [out, in]:
`quantize_4bit(quant_type="nf4", blocksize=block)`, without its second quantization of absmax, and
`int8_vectorwise_quant`.
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
TINY = np.finfo(np.float32).tiny


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
        return {"int8": jnp.round(_scaled(x, absmax, 127)).astype(jnp.int8), "int8_absmax": absmax}
    *stack, inputs, outputs = x.shape
    if inputs % 2:
        raise ValueError(
            f"a kernel of shape {kernel.shape} has an odd input axis ({inputs}), and nf4 packs pairs along it: "
            "expected an even one; use int8 for this model"
        )
    block = math.gcd(BLOCK, inputs)
    x = x.reshape(*stack, inputs // block, block, outputs)
    absmax = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    scaled = _scaled(x, absmax, 1)
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in BOUNDS)
    pairs = codes.reshape(*stack, inputs // 2, 2, outputs)
    return {"nf4": (pairs[..., 0, :] << 4) | pairs[..., 1, :], "nf4_absmax": absmax.squeeze(-2)}


def dequantize(parts: Mapping[str, jax.Array], dtype: DTypeLike) -> jax.Array:
    """The kernel [..., in, out] in `dtype`, computed in float32. Call it under jit: eager, it makes many copies."""
    kind = kind_of(parts)
    codes, absmax = parts[kind], parts[f"{kind}_absmax"]
    if kind == "int8":
        return (codes.astype(jnp.float32) * absmax * np.float32(1 / 127)).astype(dtype)
    *stack, pairs, outputs = codes.shape
    codes = codes.reshape(*stack, absmax.shape[-2], -1, outputs)
    # Both halves are finished before they are interleaved: on TPUs that costs least (see CONTRIBUTING's log).
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


def _scaled(x: jax.Array, absmax: jax.Array, largest: int) -> jax.Array:
    """x in units in which absmax is `largest`, float32; where absmax is 0, so is x. A product, for equal codes."""
    return x * (largest / jnp.maximum(absmax, largest * TINY))


def _nf4(codes: jax.Array) -> jax.Array:
    """NF4[codes], float32, by 15 selects: no gather, which accelerators do slowly."""
    values: list[Any] = list(NF4)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]
