"""Attention over rows of packed token trees: exact, in memory linear in the row, in time by what is visible.

One function with three forms: `xla` for any device, `gpu` and `tpu` by Pallas. A row is cut in blocks; for each block
of queries the blocks of keys that it must meet (`visible.py`) are visited one by one with an online softmax
(https://arxiv.org/abs/1805.02867), and the backward pass rebuilds the weights from the logits' log-sum-exp
(https://arxiv.org/abs/2205.14135).

Shape letters: B rows, T tokens, N query heads, M key/value heads, H head width.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from rmjax.kernels import attention_gpu, attention_tpu, attention_xla
from rmjax.kernels.visible import Visible
from rmjax.sharding import BATCH

# Each form has `block(head_dim)`, `refuses(platform, head_dim, dtype)`, `forward` and `backward`; what they take and
# give is in attention_xla.py.
FORMS: dict[str, ModuleType] = {"xla": attention_xla, "gpu": attention_gpu, "tpu": attention_tpu}


def choose(form: str, platform: str, head_dim: int, dtype: str) -> tuple[str, str]:
    """The form for a device, and why it is not the device's own, if it is not.

    `form` may be "auto": the device's own form where it serves this model, else "xla". `platform` is JAX's name: cpu,
    gpu or cuda, tpu. ValueError where the requested form does not serve.
    """
    own = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    asked = own if form == "auto" else form
    if asked not in FORMS:
        return "xla", "" if platform == "cpu" else f"there is no form for {platform}"
    why = FORMS[asked].refuses(own, head_dim, dtype)
    if why and form != "auto":
        raise ValueError(f"config.model.attention={form!r} cannot be used: {why}; 'auto' falls back to 'xla'")
    return ("xla", why) if why else (asked, "")


def block_of(form: str, length: int, head_dim: int) -> int:
    """Tokens of a block: the form's, or less for shorter rows."""
    return min(FORMS[form].block(head_dim), max(16, 1 << (length - 1).bit_length()))


def tree_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Visible,
    *,
    form: str = "xla",
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Scaled dot-product attention (scale H**-0.5) in which each query of a row sees the keys that `seen` says.

    Logits, softmax and sums are float32 or wider whatever the inputs' type; weights are rounded to that type
    before they meet the values. The residuals of the backward pass are named "attention" and "lse", so that a
    remat policy which saves both runs the forward pass once. Only first derivatives, in reverse mode. Under a mesh
    each device attends its own rows and heads (shard_map). Key/value heads are repeated where `tensor` does not divide
    them; where it does not divide the query heads either, all heads stay whole (`whole_heads`).

    Args:
        q: [B, T, N, H] queries; query head n reads key/value head n // (N / M).
        k, v: [B, T, M, H] keys and values, of q's type.
        seen: made by `visible` with `block=block_of(form, T, H)`.
        form: "xla", "gpu" or "tpu"; see `choose`.
        softcap: logits x become softcap * tanh(x / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118).
        interpret: run a Pallas form's kernels step by step on any device, for tests.

    Returns:
        [B, T, N, H] of q's type.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    length = q.shape[1]
    padded = seen.first.shape[1]
    _check(q, k, v, seen)
    k, v = (_repeated(x, q.shape[2]) for x in (k, v))
    if padded > length:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
    return _attend(form, softcap, interpret, q, k, v, seen)[:, :length]


def whole_heads(heads: int, kv_heads: int, tensor: int) -> str:
    """Why attention cannot be split over so many `tensor` devices, and what to do; "" if it can."""
    fits = [n for n in range(1, tensor + 1) if heads % math.lcm(kv_heads, n) == 0]
    if tensor in fits:
        return ""
    return (
        f"config.mesh.tensor={tensor} does not divide the {heads} heads of {kv_heads} keys and values, so each device "
        f"computes the attention of all heads; config.mesh.tensor={fits[-1]} splits it"
    )


def _repeated(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values [B, T, M, H] with as many heads as `tensor` can split, if the query heads can be split alike."""
    wanted = math.lcm(x.shape[2], jax.sharding.get_abstract_mesh().shape.get("tensor", 1))
    return x if heads % wanted else jnp.repeat(x, wanted // x.shape[2], axis=2)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> None:
    rows, heads = q.shape[:2], k.shape[2]
    if k.shape != v.shape or k.shape != (*rows, heads, q.shape[3]) or q.shape[2] % heads:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit together; "
            "expected q [B, T, N, H] and k, v [B, T, M, H] with N a multiple of M"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one type: cast them to it first")
    if seen.first.shape != (rows[0], rows[1] + -rows[1] % seen.block):
        raise ValueError(
            f"`seen` is of rows {seen.first.shape}, expected those of q, {rows}, in blocks of {seen.block}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    form: str, softcap: float | None, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible
) -> jax.Array:
    return _forward_rule(form, softcap, interpret, q, k, v, seen)[0]


def _forward_rule(
    form: str, softcap: float | None, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible
) -> tuple[jax.Array, tuple]:
    specs = _Specs.of(q, k, seen)
    forward = functools.partial(FORMS[form].forward, softcap=softcap, interpret=interpret)
    inputs = (*[specs.heads] * 3, specs.seen)
    out, lse = _on_devices(forward, inputs, (specs.heads, specs.lse))(q, k, v, seen)
    # Named here: names around the custom_vjp would not stop the forward pass from running again.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "lse")
    return out, (q, k, v, seen, out, lse)


def _backward_rule(form: str, softcap: float | None, interpret: bool, saved: tuple, dout: jax.Array) -> tuple:
    q, k, v, seen, out, lse = saved
    specs = _Specs.of(q, k, seen)
    backward = functools.partial(FORMS[form].backward, softcap=softcap, interpret=interpret)
    inputs = (*[specs.heads] * 3, specs.seen, specs.heads, specs.lse, specs.heads)
    return *_on_devices(backward, inputs, (specs.heads,) * 3)(q, k, v, seen, out, lse, dout), None


_attend.defvjp(_forward_rule, _backward_rule)


class _Specs(NamedTuple):
    """How the arrays are split over the mesh: rows over what it has of BATCH, heads over `tensor`."""

    heads: P  # of [B, T, N, H]
    lse: P  # of [B, N, T]
    seen: Visible

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, seen: Visible) -> "_Specs":
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(axis for axis in BATCH if axis in mesh.shape)
        rows = axes if axes and q.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
        tensor = mesh.shape.get("tensor", 1)
        heads = "tensor" if tensor > 1 and q.shape[2] % tensor == k.shape[2] % tensor == 0 else None
        of_rows = jax.tree.map(lambda x: P(rows) if x.ndim else P(), seen)
        return cls(P(rows, None, heads), P(rows, heads), of_rows)


def _on_devices(function: Callable[..., Any], inputs: tuple, outputs: tuple) -> Callable[..., Any]:
    """The function on each device's own rows and heads; without a mesh it is the function."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)
