"""Adapters of low rank beside frozen kernels: LoRA (Hu et al. 2021, arXiv:2106.09685).

A linear layer x W becomes x W + scale (x A) B, with A [in, rank] and B [rank, out] in float32. A is drawn from
U(-1, 1) / sqrt(in), as PEFT draws it, and B is 0, so that training begins with the base's own outputs. W is kept in a
dtype of its own, or quantized (QLoRA, quantized.py).
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from rmjax.models import quantized
from rmjax.models.decoder import Decoder, Linear, Quantized
from rmjax.sharding import path_name

A, B = "lora_a", "lora_b"
OWN = r".*/(lora_a|lora_b)"  # the paths of adapters
KERNELS = r"decoder/(layers|last)/.*/kernel"  # what can have an adapter, and what is quantized
MATRICES = r".*/(kernel|embedding)"  # of a frozen base these have its dtype; norms and biases keep param_dtype


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is trained beside the base, and how that is kept.

    Attributes:
        rank: of each adapter.
        scale: of what the adapters add.
        targets: regexes over the paths of kernels; those that one matches get an adapter.
        base: dtype of the frozen matrices: float32, bfloat16, int8 or nf4.
        dtype: of the matrices that are not quantized where the base is.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    base: str
    dtype: str

    @property
    def quantizes(self) -> bool:
        return self.base in quantized.BASES

    def adapts(self, path: str) -> bool:
        """Whether the kernel of this path has an adapter."""
        return any(re.fullmatch(target, path) for target in self.targets)

    def frozen_dtype(self, path: str, dtype: DTypeLike) -> DTypeLike:
        """The dtype of a parameter of the base, which has `dtype` where all are trained."""
        if not re.fullmatch(MATRICES, path) or path.startswith("score/"):
            return dtype
        return self.dtype if self.quantizes else self.base


def linears(decoder: Decoder) -> Iterator[tuple[str, Linear]]:
    """The linear layers of a decoder, by the path of their kernel."""
    for where in ("layers", "last"):
        for name, child in vars(getattr(decoder, where) or nnx.Module()).items():
            if isinstance(child, Linear):
                yield f"decoder/{where}/{name}/kernel", child


def adapt(model: Any, lora: Lora) -> Any:
    """Gives the linear layers of a model without values (`nnx.eval_shape`) their adapters and quantized kernels.

    Raises:
        ValueError: a target matches no kernel.
    """
    found = dict(linears(model.decoder))
    for target in lora.targets:
        if not any(re.fullmatch(target, path) for path in found):
            raise ValueError(
                f"config.lora.targets: {target!r} matches no kernel of a layer (q_proj is '.*/q/kernel' here); they "
                f"are {', '.join(found)}"
            )
    for path, linear in found.items():
        *stack, inputs, outputs = cast(nnx.Param, linear.kernel).shape
        if lora.adapts(path):
            zeros = lambda *shape: nnx.Param(jnp.zeros(shape, jnp.float32))
            linear.lora_a, linear.lora_b = zeros(*stack, inputs, lora.rank), zeros(*stack, lora.rank, outputs)
            linear.scale = lora.scale
        if lora.quantizes:
            linear.kernel = Quantized(quantized.abstract((*stack, inputs, outputs), lora.base))
    return model


def rounded_as(base: str) -> Callable[[str, jax.Array], jax.Array]:
    """What a frozen base that is kept as nf4, int8 or bfloat16 makes of parameters that it reads, in their dtype."""
    one = lambda x: quantized.dequantize(quantized.quantize(x, base), x.dtype)
    read_back = lambda x: by_layer(one, x)
    rounded = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)

    def kept(path: str, x: jax.Array) -> jax.Array:
        if base in quantized.BASES and re.fullmatch(KERNELS, path):
            return jax.jit(read_back, out_shardings=x.sharding)(x)
        if base == "bfloat16" and re.fullmatch(MATRICES, path) and not path.startswith("score/"):
            return jax.jit(rounded, out_shardings=x.sharding)(x)
        return x

    return kept


def by_layer(function: Callable[[Any], Any], kernels: Any) -> Any:
    """A function of a kernel [in, out] (or of its parts and adapters) on one, or on each of a stack.

    One layer after the other, so that what is float32 in between is of one alone.
    """
    return jax.lax.map(function, kernels) if jax.tree.leaves(kernels)[0].ndim == 3 else function(kernels)


def new(path: tuple, leaf: Any, seed: int) -> jax.Array:
    """First values of an adapter's array [..., in, rank] or [..., rank, out]."""
    name = path_name(path)
    if name.endswith(B):
        return jnp.zeros(leaf.shape, leaf.dtype)
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(name.encode())))
    return jax.random.uniform(key, leaf.shape, leaf.dtype, -1, 1) / np.sqrt(leaf.shape[-2])


def merged(params: Mapping[str, Any], scale: float, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the model without adapters, of whom `dtypes` gives a dtype in the same nesting.

    Computed in float32 and rounded once.
    """
    found = {}
    for name, value in params.items():
        if name in (A, B):
            continue
        if name == "kernel" and (isinstance(value, Mapping) or A in params):
            parts = {"kernel": value} | {key: params[key] for key in (A, B) if key in params}
            one = functools.partial(merged_kernel, scale=scale, dtype=dtypes[name])
            found[name] = by_layer(one, parts)
        elif isinstance(value, Mapping):
            found[name] = merged(value, scale, dtypes[name])
        else:
            found[name] = value.astype(dtypes[name])
    return found


def merged_kernel(parts: Mapping[str, Any], scale: float, dtype: DTypeLike) -> jax.Array:
    """[in, out], from a "kernel" and, if it has one, its adapter; computed in float32 and rounded once."""
    kernel = parts["kernel"]
    wide = quantized.dequantize(kernel, jnp.float32) if isinstance(kernel, Mapping) else kernel.astype(jnp.float32)
    if A in parts:
        wide = wide + scale * jnp.matmul(parts[A], parts[B], precision=jax.lax.Precision.HIGHEST)
    return wide.astype(dtype)
