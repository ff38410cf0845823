"""Tree attention on GPUs: three kernels in Pallas-Triton that walk the lists of blocks of `visible.py`.

Forward and dQ take a block of queries of one head and walk the blocks of keys that it must meet; dK/dV takes a block of
keys and walks the blocks of queries, for all query heads that read it (FlashAttention-2,
https://arxiv.org/abs/2307.08691). Whole blocks come first, in a loop without masks; no other block is read.

Logits are in base 2 inside the kernels: exp2 is an instruction of the hardware, and its factor joins the scale.

Shape letters: B rows, T tokens, N query heads, M key/value heads, G = N / M, H head width, X blocks of a row, I query
tokens of a block, J key tokens of a block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rmjax.kernels.visible import Visible, Visits

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:  # deprecated since JAX 0.11
    triton = None

HIDDEN = -1e30  # the logit of an invisible key: finite, so that no difference of two logits is NaN
LOG2E = math.log2(math.e)
HEAD_DIMS = (16, 32, 64, 128, 256)  # the sides of Triton's products are powers of two, and at least 16
# Not float32: tensor cores would round it to TF32, and products without them do not fit a core's registers.
DTYPES = ("bfloat16", "float16")


def block(head_dim: int) -> int:
    """Tokens of a block: the rows of one tensor core instruction of Hopper. More would skip less."""
    del head_dim
    return 64


def refuses(platform: str, head_dim: int, dtype: str) -> str:
    if platform != "gpu":
        return f"its kernels run on gpu, not on {platform}"
    if triton is None:
        return "this version of JAX has no Pallas-Triton, in which its kernels are written"
    if head_dim not in HEAD_DIMS:
        return f"its kernels take heads of width {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if dtype not in DTYPES:
        return f"its kernels take {' and '.join(DTYPES)}, not {dtype}"
    return ""


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible, *, softcap: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    view = _Views(q, k, seen)
    out, lse = _launch(
        functools.partial(_forward_kernel, softcap=softcap),
        "tree_attention_forward",
        seen,
        [(q, view.block), (k, view.keys), (v, view.keys)],
        [(q, view.block), (view.sums, view.block_sums)],
        interpret,
    )
    return out, lse


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Visible,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    softcap: float | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    view = _Views(q, k, seen)
    dq, delta = _launch(
        functools.partial(_dq_kernel, softcap=softcap),
        "tree_attention_dq",
        seen,
        [
            (q, view.block),
            (k, view.keys),
            (v, view.keys),
            (out, view.block),
            (lse, view.block_sums),
            (dout, view.block),
        ],
        [(q, view.block), (view.sums, view.block_sums)],
        interpret,
    )
    dk, dv = _launch(
        functools.partial(_dkv_kernel, softcap=softcap),
        "tree_attention_dkv",
        seen,
        [
            (q, view.group),
            (k, view.block),
            (v, view.block),
            (lse, view.group_sums),
            (delta, view.group_sums),
            (dout, view.group),
        ],
        [(k, view.block), (v, view.block)],
        interpret,
    )
    return dq, dk, dv


# -------------------------------------------------------------------------------- kernels
# Their parts of the arrays come as references, those of `seen` in a Visible: its row, and its own lists of blocks.


def _forward_kernel(
    seen: Visible, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, lse_ref: Any, *, softcap: float | None
) -> None:
    q_IH = q_ref[...]
    queries = _queries(seen, pl.program_id(0), axis=1)

    def visit(masked: bool, at: jax.Array, _: jax.Array, carry: tuple) -> tuple:
        peak_I, total_I, out_IH = carry
        here = _tokens(seen, at)
        logits_IJ = _logits(q_IH, k_ref[here], softcap)[0]
        if masked:
            logits_IJ = jnp.where(_sees(seen, queries, _keys(seen, at, axis=0)), logits_IJ, HIDDEN)
        new_I = jnp.maximum(peak_I, logits_IJ.max(1))
        weights_IJ = jnp.exp2(logits_IJ - new_I[:, None])
        fade_I = jnp.exp2(peak_I - new_I)
        out_IH = out_IH * fade_I[:, None] + _dot(weights_IJ.astype(v_ref.dtype), v_ref[here])
        return new_I, total_I * fade_I + weights_IJ.sum(1), out_IH

    none_I, none_IH = (jnp.zeros(q_IH.shape[:n], jnp.float32) for n in (1, 2))
    peak_I, total_I, out_IH = _walk(seen.by_query, visit, (none_I + HIDDEN, none_I, none_IH))
    out_ref[...] = (out_IH / total_I[:, None]).astype(out_ref.dtype)
    lse_ref[...] = (peak_I + jnp.log2(total_I)) / LOG2E


def _dq_kernel(
    seen: Visible,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    dout_ref: Any,
    dq_ref: Any,
    delta_ref: Any,
    *,
    softcap: float | None,
) -> None:
    q_IH, dout_IH, lse_I1 = q_ref[...], dout_ref[...], lse_ref[...][:, None] * LOG2E
    queries = _queries(seen, pl.program_id(0), axis=1)
    delta_I = (out_ref[...].astype(jnp.float32) * dout_IH.astype(jnp.float32)).sum(1)
    delta_ref[...] = delta_I

    def visit(masked: bool, at: jax.Array, _: jax.Array, dq_IH: jax.Array) -> jax.Array:
        here = _tokens(seen, at)
        k_JH = k_ref[here]
        logits_IJ, slope_IJ = _logits(q_IH, k_JH, softcap)
        weights_IJ = jnp.exp2(logits_IJ - lse_I1)
        if masked:
            weights_IJ = jnp.where(_sees(seen, queries, _keys(seen, at, axis=0)), weights_IJ, 0.0)
        dlogits_IJ = weights_IJ * (_dot(dout_IH, v_ref[here].T) - delta_I[:, None]) * slope_IJ
        return dq_IH + _dot(dlogits_IJ.astype(k_JH.dtype), k_JH)

    dq_IH = _walk(seen.by_query, visit, jnp.zeros(q_IH.shape, jnp.float32))
    dq_ref[...] = (dq_IH * q_IH.shape[1] ** -0.5).astype(dq_ref.dtype)


def _dkv_kernel(
    seen: Visible,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dout_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    softcap: float | None,
) -> None:
    """Logits lie keys before queries here, as the left operands of both products need them."""
    k_JH, v_JH = k_ref[...], v_ref[...]
    keys = _keys(seen, pl.program_id(0), axis=1)

    def visit(masked: bool, at: jax.Array, head: jax.Array, carry: tuple) -> tuple:
        dk_JH, dv_JH = carry
        here = _tokens(seen, at)
        q_IH, dout_IH = q_ref[here, head], dout_ref[here, head]
        logits_JI, slope_JI = _logits(k_JH, q_IH, softcap)
        weights_JI = jnp.exp2(logits_JI - lse_ref[head, here][None] * LOG2E)
        if masked:
            weights_JI = jnp.where(_sees(seen, _queries(seen, at, axis=0), keys), weights_JI, 0.0)
        dv_JH += _dot(weights_JI.astype(dout_IH.dtype), dout_IH)
        dlogits_JI = weights_JI * (_dot(v_JH, dout_IH.T) - delta_ref[head, here][None]) * slope_JI
        dk_JH += _dot(dlogits_JI.astype(q_IH.dtype), q_IH)
        return dk_JH, dv_JH

    none_JH = jnp.zeros(k_JH.shape, jnp.float32)
    dk_JH, dv_JH = _walk(seen.by_key, visit, (none_JH, none_JH), heads=q_ref.shape[1])
    dk_ref[...] = (dk_JH * k_JH.shape[1] ** -0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv_JH.astype(dv_ref.dtype)


def _walk(visits: Visits, visit: Callable[..., Any], carry: Any, heads: int = 1) -> Any:
    """Visits the blocks of a list once for each of `heads`: whole ones without a mask, then the others.

    Heads are part of one loop, so that loads made ahead of their use run on from head to head.
    """
    whole, total = visits.whole[...] * heads, visits.total[...] * heads

    def step(masked: bool, n: jax.Array, carry: Any) -> Any:
        return visit(masked, visits.order[jax.lax.div(n, heads)], jax.lax.rem(n, heads), carry)

    carry = jax.lax.fori_loop(0, whole, functools.partial(step, False), carry)
    return jax.lax.fori_loop(whole, total, functools.partial(step, True), carry)


def _tokens(seen: Visible, at: jax.Array) -> Any:
    return pl.ds(at * seen.block, seen.block)


def _queries(seen: Visible, at: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """Index, first visible key and position of a block's queries, with a new axis for the keys."""
    return _of_block(seen, at, axis, seen.first)


def _keys(seen: Visible, at: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """Index, end of the visible queries and position of a block's keys, with a new axis for the queries."""
    return _of_block(seen, at, axis, seen.until)


def _of_block(seen: Visible, at: jax.Array, axis: int, span: Any) -> tuple[jax.Array, ...]:
    here = _tokens(seen, at)
    index = at * seen.block + jnp.arange(seen.block, dtype=jnp.int32)
    columns = (index, span[here], seen.position[here]) if seen.windowed else (index, span[here])
    return tuple(jnp.expand_dims(x, axis) for x in columns)


def _sees(seen: Visible, queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> jax.Array:
    query, first, *query_position = queries
    key, until, *key_position = keys
    visible = (first <= key) & (key <= query) & (query < until)
    if seen.windowed:
        visible &= query_position[0] - key_position[0] < seen.window[...]
    return visible


def _logits(a: jax.Array, b: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | float]:
    """Base-2 logits of two blocks of tokens [*, H], and their derivative in the logits before the soft-cap."""
    products, scale = _dot(a, b.T), a.shape[1] ** -0.5
    if softcap is None:
        return products * (scale * LOG2E), 1.0
    share = jnp.tanh(products * (scale / softcap))
    return share * (softcap * LOG2E), 1 - share * share


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


# -------------------------------------------------------------------------------- launch


class _Views:
    """What one kernel call sees of each array; the grid is (blocks, rows, heads).

    `block` is the call's own block and head of [B, T, *, H]; `keys` the row and the head of [B, T, M, H] that its query
    head reads; `group` the row and the heads of [B, T, N, H] that read its key/value head; `block_sums`, `group_sums`
    are the same of [B, N, T], and `sums` is the shape and type of that.
    """

    def __init__(self, q: jax.Array, k: jax.Array, seen: Visible):
        rows, length, heads, width = q.shape
        group = heads // k.shape[2]
        self.block = pl.BlockSpec((None, seen.block, None, width), lambda at, row, head: (row, at, head, 0))
        self.keys = pl.BlockSpec((None, length, None, width), lambda at, row, head: (row, 0, head // group, 0))
        self.group = pl.BlockSpec((None, length, group, width), lambda at, row, head: (row, 0, head, 0))
        self.block_sums = pl.BlockSpec((None, None, seen.block), lambda at, row, head: (row, head, at))
        self.group_sums = pl.BlockSpec((None, group, length), lambda at, row, head: (row, head, 0))
        self.sums = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)


def _launch(
    kernel: Callable[..., None],
    name: str,
    seen: Visible,
    inputs: list[tuple[Any, pl.BlockSpec]],
    outputs: list[tuple[Any, pl.BlockSpec]],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel over (blocks, rows, heads of the first output).

    The kernel takes references to its parts of `seen`, the inputs (arrays) and the outputs (arrays of their shapes and
    types), as their block specs cut them.
    """
    rows, length, heads, width = outputs[0][0].shape
    blocks = length // seen.block
    scalar: Any = pl.BlockSpec((), lambda at, row, head: ())
    tokens: Any = pl.BlockSpec((None, length), lambda at, row, head: (row, 0))
    order: Any = pl.BlockSpec((None, None, blocks), lambda at, row, head: (row, at, 0))
    count: Any = pl.BlockSpec((None, None), lambda at, row, head: (row, at))
    lists = Visits(order, count, count)
    spec = dataclasses.replace(
        seen, first=tokens, until=tokens, position=tokens, window=scalar, by_query=lists, by_key=lists
    )
    return pl.pallas_call(
        kernel,
        grid=(blocks, rows, heads),
        in_specs=[spec, *(view for _, view in inputs)],
        out_specs=[view for _, view in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        # With two stages two blocks of queries of width 128 share a core of an A100 (a third would leave one), as on
        # Hopper; but no copy goes ahead of its use (benchmarks/compiled_kernels.py). 256 takes registers of 8 warps.
        compiler_params=triton.CompilerParams(num_warps=4 if width <= 128 else 8, num_stages=2),
        interpret=interpret,
        name=name,
    )(seen, *(array for array, _ in inputs))
