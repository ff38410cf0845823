"""Tree attention on any device, by XLA: block by block, in the order of `visible.py`.

Shape letters: B rows, T tokens, N query heads, M key/value heads, H head width, X blocks of a row, I query
tokens of a block, J key tokens of a block, R = I * N / M queries of a block that share a key/value head: the
rows of one matrix product; Q = B * X blocks of all rows.
"""

import jax
import jax.numpy as jnp

from rmjax.kernels.visible import Visible

BLOCK = 64
HIDDEN = -1e30  # the logit of an invisible key: finite, so that no difference of two logits is NaN


def block(head_dim: int) -> int:
    del head_dim
    return BLOCK


def refuses(platform: str, head_dim: int, dtype: str) -> str:
    """Why this form does not serve such a model on such a device; "" where it does."""
    del platform, head_dim, dtype
    return ""


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible, *, softcap: float | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Attends the rows of one device: q [B, T, N, H], k and v [B, T, M, H]; T is a multiple of `seen.block`.

    `interpret` runs a kernel step by step, on any device; it is unused here.

    Returns:
        [B, T, N, H] of q's type, and the log-sum-exp of each query's logits, float32 or wider [B, N, T].
    """
    del interpret
    heads, blocks = k.shape[2], seen.by_query.total.shape[1]
    q_QMRH, k_QMJH, v_QMJH = (to_blocks(x, heads, seen.block) for x in (q, k, v))
    order_QX, total_Q = seen.by_query.order.reshape(-1, blocks), seen.by_query.total.reshape(-1)

    def query_block(_: None, x: tuple) -> tuple:
        at, q_MRH = x
        row = at // blocks * blocks

        def key_block(step: jax.Array, carry: tuple) -> tuple:
            peak_MR, total_MR, out_MRH = carry
            other = row + order_QX[at, step]
            logits_MRJ = _masked(_logits(q_MRH, k_QMJH[other], softcap), seen, at, other)
            new_MR = jnp.maximum(peak_MR, logits_MRJ.max(-1))
            weights_MRJ = jnp.exp(logits_MRJ - new_MR[..., None])
            fade_MR = jnp.exp(peak_MR - new_MR)
            more_MRH = _dot("mrj,mjh->mrh", weights_MRJ.astype(v.dtype), v_QMJH[other])
            total_MR = total_MR * fade_MR + weights_MRJ.sum(-1)
            return new_MR, total_MR, out_MRH * fade_MR[..., None] + more_MRH

        none_MRH = jnp.zeros(q_MRH.shape, _wide(q))
        start = (jnp.full_like(none_MRH[..., 0], HIDDEN), none_MRH[..., 0], none_MRH)
        peak_MR, total_MR, out_MRH = jax.lax.fori_loop(0, total_Q[at], key_block, start)
        return None, ((out_MRH / total_MR[..., None]).astype(q.dtype), peak_MR + jnp.log(total_MR))

    results: tuple[jax.Array, jax.Array] = jax.lax.scan(query_block, None, (jnp.arange(len(total_Q)), q_QMRH))[1]
    out, lse = (from_blocks(x, len(q), seen.block) for x in results)
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
    """Gradients of q, k and v on one device, of their shapes and types.

    `out` and `lse` are the results of `forward`, `dout` [B, T, N, H] is the cotangent of `out`.
    """
    del interpret
    heads, blocks = k.shape[2], seen.by_query.total.shape[1]
    delta = (out.astype(_wide(q)) * dout.astype(_wide(q))).sum(-1)  # [B, T, N]: each query's mean dweights
    k_QMJH, v_QMJH, *queries = (to_blocks(x, heads, seen.block) for x in (k, v, q, dout, lse.swapaxes(1, 2), delta))
    order_QX, total_Q = seen.by_query.order.reshape(-1, blocks), seen.by_query.total.reshape(-1)

    def query_block(carry: tuple, x: tuple) -> tuple:
        at, q_MRH, dout_MRH, lse_MR, delta_MR = x
        row = at // blocks * blocks

        def key_block(step: jax.Array, carry: tuple) -> tuple:
            dq_MRH, dk_QMJH, dv_QMJH = carry
            other = row + order_QX[at, step]
            k_MJH = k_QMJH[other]
            capped_MRJ = _logits(q_MRH, k_MJH, softcap)
            weights_MRJ = jnp.exp(_masked(capped_MRJ, seen, at, other) - lse_MR[..., None])
            dweights_MRJ = _dot("mrh,mjh->mrj", dout_MRH, v_QMJH[other])
            dlogits_MRJ = weights_MRJ * (dweights_MRJ - delta_MR[..., None]) * q.shape[-1] ** -0.5
            if softcap is not None:
                dlogits_MRJ *= 1 - (capped_MRJ / softcap) ** 2
            dlogits_MRJ, weights_MRJ = dlogits_MRJ.astype(q.dtype), weights_MRJ.astype(q.dtype)
            dq_MRH += _dot("mrj,mjh->mrh", dlogits_MRJ, k_MJH)
            dk_QMJH = dk_QMJH.at[other].add(_dot("mrj,mrh->mjh", dlogits_MRJ, q_MRH))
            dv_QMJH = dv_QMJH.at[other].add(_dot("mrj,mrh->mjh", weights_MRJ, dout_MRH))
            return dq_MRH, dk_QMJH, dv_QMJH

        start = (jnp.zeros(q_MRH.shape, _wide(q)), *carry)
        dq_MRH, *carry = jax.lax.fori_loop(0, total_Q[at], key_block, start)
        return tuple(carry), dq_MRH.astype(q.dtype)

    none_QMJH = jnp.zeros(k_QMJH.shape, _wide(k))
    results: tuple = jax.lax.scan(query_block, (none_QMJH, none_QMJH), (jnp.arange(len(total_Q)), *queries))
    (dk_QMJH, dv_QMJH), dq_QMRH = results
    dq, dk, dv = (from_blocks(x, len(q), seen.block).astype(q.dtype) for x in (dq_QMRH, dk_QMJH, dv_QMJH))
    return dq, dk, dv


def _logits(q_MRH: jax.Array, k_MJH: jax.Array, softcap: float | None) -> jax.Array:
    logits_MRJ = _dot("mrh,mjh->mrj", q_MRH, k_MJH) * q_MRH.shape[-1] ** -0.5
    return logits_MRJ if softcap is None else softcap * jnp.tanh(logits_MRJ / softcap)


def _masked(logits_MRJ: jax.Array, seen: Visible, at: jax.Array, other: jax.Array) -> jax.Array:
    """The logits of query block `at` and key block `other` of all rows, HIDDEN where the query does not see the key."""
    blocks = seen.by_query.total.shape[1]
    of = lambda x, n: x.reshape(-1, seen.block)[n]
    tokens = jnp.arange(seen.block)
    query_I1, key_J = (at % blocks * seen.block + tokens)[:, None], other % blocks * seen.block + tokens
    seen_IJ = (of(seen.first, at)[:, None] <= key_J) & (key_J <= query_I1) & (query_I1 < of(seen.until, other))
    if seen.windowed:
        seen_IJ &= of(seen.position, at)[:, None] - of(seen.position, other) < seen.window
    seen_RJ = jnp.tile(seen_IJ, (logits_MRJ.shape[1] // seen.block, 1))
    return jnp.where(seen_RJ, logits_MRJ, HIDDEN)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=_wide(a))


def _wide(x: jax.Array) -> jnp.dtype:
    """The type to compute in: float32, or x's own where that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def to_blocks(x: jax.Array, heads: int, block: int) -> jax.Array:
    """[B, T, N, ...] to [Q, M, R, ...]; N = M = `heads` for keys, where R is J."""
    rows, length, n, *rest = x.shape
    x = x.reshape(rows * length // block, block, heads, n // heads, *rest)
    x = jnp.moveaxis(x, (2, 3, 1), (1, 2, 3))
    return x.reshape(*x.shape[:2], -1, *rest)


def from_blocks(x: jax.Array, rows: int, block: int) -> jax.Array:
    blocks, heads, _, *rest = x.shape
    x = x.reshape(blocks, heads, -1, block, *rest)
    x = jnp.moveaxis(x, (1, 2, 3), (2, 3, 1))
    return x.reshape(rows, -1, x.shape[2] * x.shape[3], *rest)
