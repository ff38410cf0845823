"""Attention over rows of packed token trees: exact, and in memory linear in the length of the row.

A row is cut in blocks. For each block of queries, the blocks of keys that any of them may see are visited
one by one with an online softmax (https://arxiv.org/abs/1805.02867); the backward pass rebuilds the weights
from the logits' log-sum-exp and visits the same pairs (https://arxiv.org/abs/2205.14135). Other trees, and
sibling branches that fill whole blocks, are not computed.

Shape letters: B rows, T tokens, N query heads, M key/value heads, H head width, X blocks of a row, I query
tokens of a block, J key tokens of a block, R = I * N / M queries of a block that share a key/value head: the
rows of one matrix product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Tokens of a block. Forward and backward, float32, B=4 T=1024 N=4 M=2, trees of 100-300 tokens of which half is shared,
# median of 20 calls of `jax.jit(jax.value_and_grad(loss))` at H = 16, 32, 64: 14, 21, 34 ms with 64; 20, 28, 34 ms with
# 128; the dense form takes 113, 118, 144 ms (idle 2-core AMD EPYC, jax 0.10.2, 2026-11-21).
BLOCK = 64
HIDDEN = -1e30  # the logit of an invisible key: finite, so that no difference of two logits is NaN


def tree_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_from: jax.Array,
    visible_until: jax.Array,
    positions: jax.Array,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (scale H**-0.5) in which query i of a row sees key j exactly where

        visible_from[i] <= j <= i  and  i < visible_until[j]  [and positions[i] - positions[j] < window]

    Logits, softmax and sums are float32 or wider whatever the inputs' type; weights are rounded to that type
    before they meet the values. The residuals of the backward pass are named "attention" and "lse", so that a
    remat policy which saves both runs the forward pass once. Only first derivatives, in reverse mode.

    Args:
        q: [B, T, N, H] queries; query head n reads key/value head n // (N / M).
        k: [B, T, M, H] keys, of q's type.
        v: [B, T, M, H] values, of q's type.
        visible_from: int32 [B, T] index in the row of the first key each query may see.
        visible_until: int32 [B, T] index after the last query that may see each key. Every token must see
            itself; a token of padding sees, and is seen by, nothing else.
        positions: int32 [B, T] distance of each token from its root, along its path.
        window: number of keys a query sees along its path, itself included; an int or a scalar array, which
            may be traced. None: all.

    Returns:
        [B, T, N, H] of q's type.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    _check(q, k, v, visible_from, visible_until, positions)
    # The form is picked here, by platform; so far XLA's is the only one.
    return _xla(q, k, v, visible_from, visible_until, positions, window)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, *spans: jax.Array) -> None:
    rows, heads = q.shape[:2], k.shape[2]
    if k.shape != v.shape or k.shape != (*rows, heads, q.shape[3]) or q.shape[2] % heads:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape} do not fit together; "
            "expected q [B, T, N, H] and k, v [B, T, M, H] with N a multiple of M"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one type: cast them to it first")
    for name, x in zip(("visible_from", "visible_until", "positions"), spans):
        if x.shape != rows:
            raise ValueError(f"{name} has shape {x.shape}, expected [B, T] = {rows}, the first two axes of q")


# ---------------------------------------------------------------------------------------------------- XLA


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_from: jax.Array,
    visible_until: jax.Array,
    positions: jax.Array,
    window: int | jax.Array | None,
) -> jax.Array:
    """The form for any platform: pads the row to whole blocks with tokens that see only themselves."""
    rows, length = visible_from.shape
    block = min(BLOCK, length)
    padding = -length % block
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        itself = length + jax.lax.broadcasted_iota(visible_from.dtype, (rows, padding), 1)
        visible_from = jnp.concatenate([visible_from, itself], 1)
        visible_until = jnp.concatenate([visible_until, itself + 1], 1)
        positions = jnp.pad(positions, ((0, 0), (0, padding)))
    in_blocks = lambda x: jnp.asarray(x).reshape(rows, -1, block).swapaxes(0, 1)
    window = None if window is None else jnp.asarray(window)
    spans = _Spans(in_blocks(visible_from), in_blocks(visible_until), in_blocks(positions), window)
    return _attend(q, k, v, spans)[:, :length]


class _Spans(NamedTuple):
    """Which query sees which key: int [X, B, block] by block, and the window."""

    first: jax.Array  # visible_from
    until: jax.Array  # visible_until
    position: jax.Array
    window: jax.Array | None

    def visible(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """bool [B, I, J]: does the query of block i see the key of block j?"""
        tokens = jnp.arange(self.first.shape[-1])
        query_I1, key_J = (i * len(tokens) + tokens)[:, None], j * len(tokens) + tokens
        seen_BIJ = (self.first[i][:, :, None] <= key_J) & (query_I1 < self.until[j][:, None])
        seen_BIJ &= key_J <= query_I1
        if self.window is not None:
            seen_BIJ &= self.position[i][:, :, None] - self.position[j][:, None] < self.window
        return seen_BIJ

    def visits(self) -> tuple[jax.Array, jax.Array]:
        """The blocks of keys to visit for each block of queries: int32 [X, X] padded with -1, and counts [X].

        One list serves all rows: a block is left out when no query of any row can see any of its keys. The
        diagonal comes first: there every query sees itself, so its running maximum is a real logit at once.
        """
        blocks, _, size = self.first.shape
        start_X = jnp.arange(blocks) * size
        some_XXB = self.first.min(-1)[:, None] < start_X[:, None] + size
        some_XXB &= start_X[:, None, None] < self.until.max(-1)
        if self.window is not None:
            some_XXB &= self.position.min(-1)[:, None] - self.position.max(-1) < self.window
        visit_XX = some_XXB.any(-1) & (start_X <= start_X[:, None])
        order_XX = jnp.sort(jnp.where(visit_XX, jnp.arange(blocks), -1), axis=1, descending=True)
        return order_XX, visit_XX.sum(1)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, spans: _Spans) -> jax.Array:
    return _forward(q, k, v, spans)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, spans: _Spans) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, H] and log-sum-exp of the logits [B, T, N]."""
    block = spans.first.shape[-1]
    q_XBMRH, k_XBMJH, v_XBMJH = (_to_blocks(x, k.shape[2], block) for x in (q, k, v))
    order, counts = spans.visits()

    def query_block(_: None, x: tuple) -> tuple:
        i, q_BMRH = x

        def key_block(step: jax.Array, carry: tuple) -> tuple:
            peak_BMR, total_BMR, out_BMRH = carry
            j = order[i, step]
            logits_BMRJ = _logits(q_BMRH, k_XBMJH[j], spans.visible(i, j))
            new_BMR = jnp.maximum(peak_BMR, logits_BMRJ.max(-1))
            weights_BMRJ = jnp.exp(logits_BMRJ - new_BMR[..., None])
            fade_BMR = jnp.exp(peak_BMR - new_BMR)
            more_BMRH = _dot("bmrj,bmjh->bmrh", weights_BMRJ.astype(v.dtype), v_XBMJH[j])
            total_BMR = total_BMR * fade_BMR + weights_BMRJ.sum(-1)
            return new_BMR, total_BMR, out_BMRH * fade_BMR[..., None] + more_BMRH

        none_BMRH = jnp.zeros(q_BMRH.shape, _wide(q))
        start = (jnp.full_like(none_BMRH[..., 0], HIDDEN), none_BMRH[..., 0], none_BMRH)
        peak_BMR, total_BMR, out_BMRH = jax.lax.fori_loop(0, counts[i], key_block, start)
        return None, ((out_BMRH / total_BMR[..., None]).astype(q.dtype), peak_BMR + jnp.log(total_BMR))

    xs = (jnp.arange(len(counts)), q_XBMRH)
    results: tuple[jax.Array, jax.Array] = jax.lax.scan(query_block, None, xs)[1]
    return _from_blocks(results[0], block), _from_blocks(results[1], block)


def _forward_rule(q: jax.Array, k: jax.Array, v: jax.Array, spans: _Spans) -> tuple[jax.Array, tuple]:
    out, lse = _forward(q, k, v, spans)
    # Named here: names around the custom_vjp would not stop the forward pass from running again.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "lse")
    return out, (q, k, v, spans, out, lse)


def _backward_rule(saved: tuple, dout: jax.Array) -> tuple:
    q, k, v, spans, out, lse = saved
    block = spans.first.shape[-1]
    delta = (out.astype(_wide(q)) * dout.astype(_wide(q))).sum(-1)  # [B, T, N]: each query's mean dweights
    k_XBMJH, v_XBMJH, *queries = (_to_blocks(x, k.shape[2], block) for x in (k, v, q, dout, lse, delta))
    order, counts = spans.visits()

    def query_block(carry: tuple, x: tuple) -> tuple:
        i, q_BMRH, dout_BMRH, lse_BMR, delta_BMR = x

        def key_block(step: jax.Array, carry: tuple) -> tuple:
            dq_BMRH, dk_XBMJH, dv_XBMJH = carry
            j = order[i, step]
            k_BMJH = k_XBMJH[j]
            weights_BMRJ = jnp.exp(_logits(q_BMRH, k_BMJH, spans.visible(i, j)) - lse_BMR[..., None])
            dweights_BMRJ = _dot("bmrh,bmjh->bmrj", dout_BMRH, v_XBMJH[j])
            dlogits_BMRJ = weights_BMRJ * (dweights_BMRJ - delta_BMR[..., None]) * q.shape[-1] ** -0.5
            dlogits_BMRJ, weights_BMRJ = dlogits_BMRJ.astype(q.dtype), weights_BMRJ.astype(q.dtype)
            dq_BMRH += _dot("bmrj,bmjh->bmrh", dlogits_BMRJ, k_BMJH)
            dk_XBMJH = dk_XBMJH.at[j].add(_dot("bmrj,bmrh->bmjh", dlogits_BMRJ, q_BMRH))
            dv_XBMJH = dv_XBMJH.at[j].add(_dot("bmrj,bmrh->bmjh", weights_BMRJ, dout_BMRH))
            return dq_BMRH, dk_XBMJH, dv_XBMJH

        start = (jnp.zeros(q_BMRH.shape, _wide(q)), *carry)
        dq_BMRH, *carry = jax.lax.fori_loop(0, counts[i], key_block, start)
        return tuple(carry), dq_BMRH.astype(q.dtype)

    none_XBMJH = jnp.zeros(k_XBMJH.shape, _wide(k))
    xs = (jnp.arange(len(counts)), *queries)
    results: tuple = jax.lax.scan(query_block, (none_XBMJH, none_XBMJH), xs)
    (dk_XBMJH, dv_XBMJH), dq_XBMRH = results
    return *(_from_blocks(x, block).astype(q.dtype) for x in (dq_XBMRH, dk_XBMJH, dv_XBMJH)), None


_attend.defvjp(_forward_rule, _backward_rule)


def _logits(q_BMRH: jax.Array, k_BMJH: jax.Array, seen_BIJ: jax.Array) -> jax.Array:
    """Scaled logits [B, M, R, J] of a block, HIDDEN where the query does not see the key."""
    logits_BMRJ = _dot("bmrh,bmjh->bmrj", q_BMRH, k_BMJH) * q_BMRH.shape[-1] ** -0.5
    seen_BRJ = jnp.tile(seen_BIJ, (1, q_BMRH.shape[2] // seen_BIJ.shape[1], 1))
    return jnp.where(seen_BRJ[:, None], logits_BMRJ, HIDDEN)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=_wide(a))


def _wide(x: jax.Array) -> jnp.dtype:
    """The type to compute in: float32, or x's own where that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _to_blocks(x: jax.Array, heads: int, block: int) -> jax.Array:
    """[B, T, N, ...] to [X, B, M, R, ...]; N = M = `heads` for keys, where R is J."""
    rows, length, n, *rest = x.shape
    x = x.reshape(rows, length // block, block, heads, n // heads, *rest)
    x = jnp.moveaxis(x, (1, 3, 4, 2), (0, 2, 3, 4))
    return x.reshape(*x.shape[:3], -1, *rest)


def _from_blocks(x: jax.Array, block: int) -> jax.Array:
    """The inverse of `_to_blocks`."""
    blocks, rows, heads, _, *rest = x.shape
    x = x.reshape(blocks, rows, heads, -1, block, *rest)
    x = jnp.moveaxis(x, (0, 2, 3, 4), (1, 3, 4, 2))
    return x.reshape(rows, blocks * block, -1, *rest)
