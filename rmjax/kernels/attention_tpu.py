"""Tree attention on TPUs, in Pallas: one grid step for each two blocks that must meet, and no other.

The lists of `visible.py` become one list of pairs, over all rows of a device, that the scalar core reads ahead to know
which blocks to copy next. The query heads that share a key/value head are the rows of one matrix product.

Shape letters: B rows, T tokens, N query heads, M key/value heads, H head width, Q blocks of all rows, I query tokens of
a block, J key tokens of a block, R = I * N / M queries of a block that share a key/value head, L lanes, all alike.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rmjax.kernels.attention_xla import HIDDEN, from_blocks, to_blocks
from rmjax.kernels.visible import Visible, Visits

# Chosen by counts; not measured on a TPU. Rows of 8,192 tokens with 230 visible keys a token meet in 1.9 times as many
# entries in blocks of 128 (216 pairs of blocks), 2.7 times in blocks of 256 (78), 4.4 times in blocks of 512 (32); with
# 1,170 visible keys 1.2, 1.3 and 1.6 times (682, 194, 60). Every pair is a step of the grid, with its fixed cost.
BLOCK = 256
HEAD_DIMS = (64, 128, 256)
LANES = 128
VMEM_BYTES = 48 * 2**20  # of the 64 MiB (v5p) or 128 MiB (v5e, v6e) of a core
PAIRS_BYTES = 768 * 2**10  # of the 1 MiB that a core has for scalars

# A pair of blocks is one integer, so that once sorted those of a block stand side by side: from the highest bit, the
# number of the block that is summed for, how many blocks the other is away, and whether the pair needs a mask.
AWAY_BITS = 11
ABSENT = 2**31 - 1  # after the last pair


def block(head_dim: int) -> int:
    del head_dim
    return BLOCK


def refuses(platform: str, head_dim: int, dtype: str) -> str:
    if platform != "tpu":
        return f"the form for TPUs does not run on a {platform}"
    if head_dim not in HEAD_DIMS:
        return f"the form for TPUs serves heads of width {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if dtype not in ("bfloat16", "float32"):
        return f"the form for TPUs computes in bfloat16 or float32, not in {dtype}"
    return ""


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible, *, softcap: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See `attention_xla.forward`.

    Raises:
        ValueError: the rows may have more pairs of blocks than a core can hold: over 196,608, such as one row of
            160,000 tokens, or 64 of 19,900.
    """
    q_QMRH, k_QMJH, v_QMJH = (to_blocks(x, k.shape[2], seen.block) for x in (q, k, v))
    r, h = q_QMRH.shape[2:]
    out_QMRH, lse_QM1R = _call(
        _forward_kernel,
        _Logits(h**-0.5, softcap, seen.windowed),
        seen,
        (seen.by_query, -1),
        own=[q_QMRH],
        other=[k_QMJH, v_QMJH],
        results=[q_QMRH, _statistics(q_QMRH)],
        scratch=[(r, LANES), (r, LANES), (r, h)],
        interpret=interpret,
    )
    out, lse = (from_blocks(x, len(q), seen.block) for x in (out_QMRH, lse_QM1R[:, :, 0]))
    return out, lse.swapaxes(1, 2)


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
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)  # [B, T, N]: each query's mean dweights
    blocks = functools.partial(to_blocks, heads=k.shape[2], block=seen.block)
    queries = [blocks(q), blocks(dout), *(blocks(x)[:, :, None] for x in (lse.swapaxes(1, 2), delta))]
    keys = [blocks(k), blocks(v)]
    (r, h), j = queries[0].shape[2:], seen.block
    call = functools.partial(_call, logits=_Logits(h**-0.5, softcap, seen.windowed), seen=seen, interpret=interpret)
    of_queries = call(
        _dq_kernel,
        visits=(seen.by_query, -1),
        own=queries,
        other=keys,
        results=queries[:1],
        scratch=[(r, LANES), (r, LANES), (r, h)],
    )
    of_keys = call(
        _dkv_kernel, visits=(seen.by_key, 1), own=keys, other=queries, results=keys, scratch=[(j, h), (j, h)]
    )
    dq, dk, dv = (from_blocks(x, len(q), seen.block) for x in (*of_queries, *of_keys))
    return dq, dk, dv


# -------------------------------------------------------------------------------- grid


class _Logits(NamedTuple):
    """How a query and a key make a logit."""

    scale: float
    softcap: float | None
    windowed: bool

    def of(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """[A, H] and [B, H] to [A, B], before any mask."""
        logits = self.scale * _dot(a, b, 1, 1)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def derivative(self, logits: jax.Array) -> jax.Array | float:
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)


def _statistics(q_QMRH: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*q_QMRH.shape[:2], 1, q_QMRH.shape[2]), jnp.float32)


def _call(
    kernel: Callable[..., None],
    logits: _Logits,
    seen: Visible,
    visits: tuple[Visits, int],
    *,
    own: Sequence[jax.Array],
    other: Sequence[jax.Array],
    results: Sequence[Any],
    scratch: Sequence[tuple[int, int]],
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs a kernel over pairs of blocks.

    The kernel takes `logits`, then refs of the pairs, the window, the spans of either side, `own`, `other`, `results`,
    a side's spans as columns, and `scratch`.

    Args:
        visits: for each block that is summed for the blocks that it meets; and the sign of their distance.
        own, other: [Q, M, ...] arrays of the side that is summed for, and of the side that it meets.
        results: shapes and types of the sums, [Q, M, ...], which are returned.
        scratch: shapes of float32 sums.
    """
    pairs, count = _pairs(visits[0])
    inputs = [_spans(seen), _spans(seen), *own, *other]
    of_own = lambda pair: _own(pair)
    of_other = lambda pair: _own(pair) + visits[1] * _away(pair)
    sides = [of_own, of_other, *[of_own] * len(own), *[of_other] * len(other)]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(own[0].shape[1], count),
        in_specs=[_block_spec(x, side) for x, side in zip(inputs, sides)],
        out_specs=[_block_spec(x, of_own) for x in results],
        scratch_shapes=[
            pltpu.VMEM((3, seen.block, LANES), jnp.int32),
            *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
        ],
    )
    call = pl.pallas_call(
        functools.partial(kernel, logits),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=f"tree_attention{kernel.__name__.removesuffix('_kernel')}",
    )
    return call(pairs, seen.window.reshape(1), *inputs)


def _block_spec(x: Any, side: Callable[[jax.Array], jax.Array]) -> pl.BlockSpec:
    """One block and one head of [Q, M, ...]; a single head serves all."""
    one, rest = x.shape[1] == 1, x.shape[2:]
    place = lambda m, n, pairs, window: (side(pairs[n]), 0 if one else m, *[0] * len(rest))
    return pl.BlockSpec((None, None, *rest), place)


def _pairs(visits: Visits) -> tuple[jax.Array, jax.Array]:
    """The sorted pairs of all rows, then ABSENT; and their number. ValueError where a core cannot hold them."""
    rows, blocks, _ = visits.order.shape
    most = rows * blocks * (blocks + 1) // 2
    if 4 * most > PAIRS_BYTES:
        raise ValueError(
            f"{rows} rows of {blocks} blocks may have {most:,} pairs, and the form for TPUs holds "
            f"{PAIRS_BYTES // 4:,}; choose fewer rows in a micro-batch, shorter rows, or config.model.attention='xla'"
        )
    at = jnp.arange(rows * blocks, dtype=jnp.int32).reshape(rows, blocks, 1)
    step = jnp.arange(blocks, dtype=jnp.int32)
    away = jnp.abs(visits.order - at % blocks)
    pair = (at << AWAY_BITS | away) << 1 | (step >= visits.whole[..., None])
    pair = jax.lax.sort(jnp.where(step < visits.total[..., None], pair, ABSENT).reshape(-1), is_stable=False)[:most]
    return jnp.append(pair, ABSENT), visits.total.sum()


def _own(pair: jax.Array) -> jax.Array:
    return pair >> AWAY_BITS + 1


def _away(pair: jax.Array) -> jax.Array:
    return pair >> 1 & 2**AWAY_BITS - 1


def _spans(seen: Visible) -> jax.Array:
    """int32 [Q, 1, 3, I]: each token's first, until and position; the former two count from the first row."""
    rows, length = seen.first.shape
    start = jnp.arange(rows, dtype=jnp.int32)[:, None] * length
    spans = jnp.stack([seen.first + start, seen.until + start, seen.position])
    return spans.reshape(3, -1, 1, seen.block).transpose(1, 2, 0, 3)


# -------------------------------------------------------------------------------- kernels


def _forward_kernel(
    logits: _Logits,
    pairs: Any,
    window: Any,
    query_spans: Any,
    key_spans: Any,
    q_RH: Any,
    k_JH: Any,
    v_JH: Any,
    out_RH: Any,
    lse_1R: Any,
    columns: Any,
    peak_RL: Any,
    total_RL: Any,
    sum_RH: Any,
) -> None:
    width = sum_RH.shape[1]

    def begin() -> None:
        columns[...] = _as_columns(query_spans[...])
        peak_RL[...] = jnp.full_like(peak_RL, HIDDEN)
        total_RL[...] = jnp.zeros_like(total_RL)
        sum_RH[...] = jnp.zeros_like(sum_RH)

    def visit(pair: jax.Array, masked: bool) -> None:
        logits_RJ = logits.of(q_RH[...], k_JH[...])
        if masked:
            seen_IJ = _seen(logits, _own(pair), _own(pair) - _away(pair), columns, key_spans, window, 0)
            logits_RJ = _hide(logits_RJ, seen_IJ, 0)
        peak = jnp.maximum(peak_RL[...], logits_RJ.max(1, keepdims=True))
        weights_RJ = jnp.exp(logits_RJ - _lanes(peak, logits_RJ.shape[1]))
        fade = jnp.exp(peak_RL[...] - peak)
        total_RL[...] = total_RL[...] * fade + weights_RJ.sum(1, keepdims=True)
        sum_RH[...] = sum_RH[...] * _lanes(fade, width) + _dot(weights_RJ.astype(v_JH.dtype), v_JH[...], 1, 0)
        peak_RL[...] = peak

    def end() -> None:
        out_RH[...] = (sum_RH[...] / _lanes(total_RL[...], width)).astype(out_RH.dtype)
        lse_1R[...] = (peak_RL[...] + jnp.log(total_RL[...])).T[:1]

    _step(pairs, begin, visit, end)


def _dq_kernel(
    logits: _Logits,
    pairs: Any,
    window: Any,
    query_spans: Any,
    key_spans: Any,
    q_RH: Any,
    dout_RH: Any,
    lse_1R: Any,
    delta_1R: Any,
    k_JH: Any,
    v_JH: Any,
    dq_RH: Any,
    columns: Any,
    lse_RL: Any,
    delta_RL: Any,
    sum_RH: Any,
) -> None:
    def begin() -> None:
        columns[...] = _as_columns(query_spans[...])
        lse_RL[...], delta_RL[...] = _column(lse_1R[...]), _column(delta_1R[...])
        sum_RH[...] = jnp.zeros_like(sum_RH)

    def visit(pair: jax.Array, masked: bool) -> None:
        capped_RJ = logits_RJ = logits.of(q_RH[...], k_JH[...])
        keys = logits_RJ.shape[1]
        if masked:
            seen_IJ = _seen(logits, _own(pair), _own(pair) - _away(pair), columns, key_spans, window, 0)
            logits_RJ = _hide(logits_RJ, seen_IJ, 0)
        weights_RJ = jnp.exp(logits_RJ - _lanes(lse_RL[...], keys))
        dweights_RJ = _dot(dout_RH[...], v_JH[...], 1, 1)
        dlogits_RJ = weights_RJ * (dweights_RJ - _lanes(delta_RL[...], keys)) * logits.derivative(capped_RJ)
        sum_RH[...] += _dot(dlogits_RJ.astype(k_JH.dtype), k_JH[...], 1, 0)

    def end() -> None:
        dq_RH[...] = sum_RH[...].astype(dq_RH.dtype)

    _step(pairs, begin, visit, end)


def _dkv_kernel(
    logits: _Logits,
    pairs: Any,
    window: Any,
    key_spans: Any,
    query_spans: Any,
    k_JH: Any,
    v_JH: Any,
    q_RH: Any,
    dout_RH: Any,
    lse_1R: Any,
    delta_1R: Any,
    dk_JH: Any,
    dv_JH: Any,
    columns: Any,
    dk_sum_JH: Any,
    dv_sum_JH: Any,
) -> None:
    """Queries are lanes here, so that no large matrix is transposed for its product."""

    def begin() -> None:
        columns[...] = _as_columns(key_spans[...])
        dk_sum_JH[...] = jnp.zeros_like(dk_sum_JH)
        dv_sum_JH[...] = jnp.zeros_like(dv_sum_JH)

    def visit(pair: jax.Array, masked: bool) -> None:
        capped_JR = logits_JR = logits.of(k_JH[...], q_RH[...])
        if masked:
            seen_JI = _seen(logits, _own(pair) + _away(pair), _own(pair), query_spans, columns, window, 1)
            logits_JR = _hide(logits_JR, seen_JI, 1)
        weights_JR = jnp.exp(logits_JR - lse_1R[...])
        dv_sum_JH[...] += _dot(weights_JR.astype(dout_RH.dtype), dout_RH[...], 1, 0)
        dweights_JR = _dot(v_JH[...], dout_RH[...], 1, 1)
        dlogits_JR = weights_JR * (dweights_JR - delta_1R[...]) * logits.derivative(capped_JR)
        dk_sum_JH[...] += _dot(dlogits_JR.astype(q_RH.dtype), q_RH[...], 1, 0)

    def end() -> None:
        dk_JH[...] = dk_sum_JH[...].astype(dk_JH.dtype)
        dv_JH[...] = dv_sum_JH[...].astype(dv_JH.dtype)

    _step(pairs, begin, visit, end)


def _step(
    pairs: Any, begin: Callable[[], None], visit: Callable[[jax.Array, bool], None], end: Callable[[], None]
) -> None:
    """Runs what the pair of this grid step needs: `begin` and `end` where it is the first and last of its block."""
    n = pl.program_id(1)
    pair, own = pairs[n], _own(pairs[n])
    pl.when((n == 0) | (_own(pairs[jnp.maximum(n - 1, 0)]) != own))(begin)
    for masked in (True, False):
        pl.when((pair & 1 == 1) == masked)(functools.partial(visit, pair, masked))
    pl.when(_own(pairs[n + 1]) != own)(end)


def _seen(
    logits: _Logits, query_block: jax.Array, key_block: jax.Array, queries: Any, keys: Any, window: Any, axis: int
) -> jax.Array:
    """Which queries see which keys: [I, J] with queries along `axis` 0, whose spans are columns; [J, I] with 1."""
    columns, rows = (queries, keys) if axis == 0 else (keys, queries)
    size = rows.shape[1]
    column = lambda n: _lanes(columns[n], size)
    row = lambda n: rows[n : n + 1, :]
    query, key = (column, row) if axis == 0 else (row, column)
    index = lambda block, axis: block * size + jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)
    query_index, key_index = index(query_block, axis), index(key_block, 1 - axis)
    seen = (query(0) <= key_index) & (key_index <= query_index) & (query_index < key(1))
    return seen & (query(2) - key(2) < window[0]) if logits.windowed else seen


def _hide(logits: jax.Array, seen: jax.Array, axis: int) -> jax.Array:
    """The logits of all heads, which follow each other along `axis`, HIDDEN where a query does not see a key."""
    heads = jnp.split(logits, logits.shape[axis] // seen.shape[axis], axis)
    return jnp.concatenate([jnp.where(seen, head, HIDDEN) for head in heads], axis)


def _as_columns(spans_3I: jax.Array) -> jax.Array:
    """[3, I] to [3, I, L]."""
    return jnp.stack([_column(spans_3I[n : n + 1]) for n in range(3)])


def _column(x_1R: jax.Array) -> jax.Array:
    """[1, R] to [R, L]."""
    return jnp.broadcast_to(x_1R, (LANES, x_1R.shape[1])).T


def _lanes(x_RL: jax.Array, size: int) -> jax.Array:
    """[R, L] to [R, size]."""
    return x_RL[:, :size] if size <= LANES else jnp.tile(x_RL, (1, size // LANES))


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The product over an axis of each, exact where its inputs are float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
