"""Cross-entropy of the next token without the logits of all tokens: one chunk of them at a time.

The logits of a chunk are computed, reduced and forgotten; the backward pass computes them again. Unwanted tokens are
put last and never computed, so a conversation of which a tenth is trained costs a tenth.

Shape letters: B rows, T tokens, D width, V vocabulary; P parts of the batch that lie on devices of their own, N tokens
of a part, C tokens of a chunk.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rmjax.sharding import BATCH, constrain

# Tokens of a chunk on each device. A chunk's logits are C x V float32 (0.6 GB for 152,000 words), and its backward adds
# to the table's whole gradient: 8 bytes moved for 6 C operations of each number there, so 10 % of the time with 2,048
# tokens, 19 % with 1,024 and 38 % with 512 on an H200 (reckoned from 700 TFLOP/s and 4.8 TB/s). More tokens lose where
# few are wanted, since the last chunk is computed whole: with a tenth of 4,096 tokens wanted, 2,048 take 1.9 times as
# long as 1,024; with all wanted, 128 to 4,096 take the same (2 CPU cores, V = 32,000, D = 256).
CHUNK = 1024


def cross_entropy(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
    *,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(x @ table.T)[target] of each token, and whether the target is the likeliest word.

    Products take x's dtype and accumulate in float32 or wider, as logits, their log-sum-exp and the table's gradient
    do. Only first derivatives, in reverse mode, and none with respect to `weight`.

    Args:
        x: [B, T, D] normed hidden states.
        table: [V, D] output embedding of any float dtype.
        targets: int [B, T] in [0, V).
        weight: [B, T]; where it is 0 nothing is computed and both results are 0. Its values do not scale them.
        softcap: logits x become softcap * tanh(x / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118).
        chunk: tokens whose logits are held at a time, on each device.

    Returns:
        Two float32 [B, T] (float64 for float64 inputs): the negative log-likelihood in nats, and 1 where the target
        has the largest logit (the first of equal ones), else 0.

    Raises:
        ValueError: shapes that do not fit together.
    """
    b, t, d = x.shape
    if table.ndim != 2 or table.shape[1] != d or targets.shape != (b, t) or weight.shape != (b, t):
        raise ValueError(
            f"x {x.shape}, table {table.shape}, targets {targets.shape}, weight {weight.shape} do not fit together; "
            "expected [B, T, D], [V, D], [B, T], [B, T]"
        )
    parts = math.gcd(b, _row_devices())
    split = lambda y: constrain(y.reshape(parts, -1, *y.shape[2:]), BATCH)
    todo = _todo(split(weight) != 0, min(chunk, b * t // parts))
    nll_PN, correct_PN = _chunked(softcap, split(x), table, split(targets), todo)
    join = lambda y: constrain(y.reshape(b, t), BATCH)
    return join(nll_PN), join(jax.lax.stop_gradient(correct_PN))


def soft_capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """The logits, between -cap and cap; None caps nothing."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _row_devices() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)


class _Todo(NamedTuple):
    """Which tokens are computed together."""

    order_XPC: jax.Array  # int32, indices in N of each chunk's wanted tokens, then all different ones of N and more
    chunks: jax.Array  # int32, chunks with a wanted token, on any device


def _todo(wanted_PN: jax.Array, chunk: int) -> _Todo:
    parts, n = wanted_PN.shape
    wanted_PN = jnp.pad(wanted_PN, ((0, 0), (0, -n % chunk)))
    order_PN = jnp.argsort(~wanted_PN, axis=1, stable=True)
    count_P = wanted_PN.sum(1)
    place = jnp.arange(wanted_PN.shape[1])
    order_PN = jnp.where(place < count_P[:, None], order_PN, n + place).astype(jnp.int32)
    return _Todo(order_PN.reshape(parts, -1, chunk).swapaxes(0, 1), -(-count_P.max() // chunk))


def _take(y_PN: jax.Array, at_PC: jax.Array) -> jax.Array:
    """The tokens of a chunk; 0 for absent ones."""
    return jax.vmap(lambda y, at: y.at[at].get(mode="fill", fill_value=0))(y_PN, at_PC)


def _put(y_PN: jax.Array, at_PC: jax.Array, values_PC: jax.Array) -> jax.Array:
    """Sets the tokens of a chunk, which are all different; drops absent ones."""
    put = lambda y, at, values: y.at[at].set(values.astype(y.dtype), mode="drop", unique_indices=True)
    return jax.vmap(put)(y_PN, at_PC, values_PC)


def _gathered(table_VD: jax.Array, dtype: Any) -> jax.Array:
    """The table for the products: gathered over fsdp once, not in every chunk; words stay split over tensor."""
    return constrain(table_VD.astype(dtype), "tensor", None)


def _logits(x_PCD: jax.Array, table_VD: jax.Array, softcap: float | None) -> jax.Array:
    wide = jnp.promote_types(jnp.float32, x_PCD.dtype)
    return soft_capped(jnp.einsum("pcd,vd->pcv", x_PCD, table_VD, preferred_element_type=wide), softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    softcap: float | None, x_PND: jax.Array, table_VD: jax.Array, targets_PN: jax.Array, todo: _Todo
) -> tuple[jax.Array, jax.Array]:
    return _forward(softcap, x_PND, table_VD, targets_PN, todo)[0]


def _forward(
    softcap: float | None, x_PND: jax.Array, table_VD: jax.Array, targets_PN: jax.Array, todo: _Todo
) -> tuple[Any, Any]:
    words_VD = _gathered(table_VD, x_PND.dtype)

    def chunk(i: jax.Array, found: Any) -> Any:
        at_PC = todo.order_XPC[i]
        logits_PCV, target_PC = _logits(_take(x_PND, at_PC), words_VD, softcap), _take(targets_PN, at_PC)
        lse_PC = jax.nn.logsumexp(logits_PCV, axis=-1)
        nll_PC = lse_PC - jnp.where(_is(target_PC, logits_PCV), logits_PCV, 0).sum(-1)
        values = (nll_PC, logits_PCV.argmax(-1) == target_PC, lse_PC)
        return tuple(_put(y_PN, at_PC, value) for y_PN, value in zip(found, values))

    dtype = jnp.promote_types(jnp.float32, x_PND.dtype)
    nothing = constrain(jnp.zeros(targets_PN.shape, dtype), BATCH)
    nll_PN, correct_PN, lse_PN = jax.lax.fori_loop(0, todo.chunks, chunk, (nothing, nothing, nothing))
    return (nll_PN, correct_PN), (x_PND, table_VD, targets_PN, todo, lse_PN)


def _backward(
    softcap: float | None, saved: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    x_PND, table_VD, targets_PN, todo, lse_PN = saved
    dtype, words_VD = lse_PN.dtype, _gathered(table_VD, x_PND.dtype)

    def chunk(i: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx_PND, dtable_PVD = grads
        at_PC = todo.order_XPC[i]
        x_PCD, lse_PC, slope_PC = (_take(y, at_PC) for y in (x_PND, lse_PN, cotangents[0]))
        logits_PCV = _logits(x_PCD, words_VD, softcap)
        probability_PCV = jnp.exp(logits_PCV - lse_PC[..., None])
        dlogits_PCV = (probability_PCV - _is(_take(targets_PN, at_PC), logits_PCV)) * slope_PC[..., None]
        if softcap is not None:
            dlogits_PCV *= 1 - (logits_PCV / softcap) ** 2
        dlogits_PCV = dlogits_PCV.astype(x_PND.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=dtype)
        dx_PND = _put(dx_PND, at_PC, product("pcv,vd->pcd", dlogits_PCV, words_VD))
        return dx_PND, dtable_PVD + product("pcv,pcd->pvd", dlogits_PCV, x_PCD)

    # Every device adds up its own tokens' part of the table's gradient; they meet once, after the last chunk.
    parts = constrain(jnp.zeros((len(x_PND), *table_VD.shape), dtype), BATCH, "tensor", None)
    nothing = constrain(jnp.zeros_like(x_PND), BATCH)
    dx_PND, dtable_PVD = jax.lax.fori_loop(0, todo.chunks, chunk, (nothing, parts))
    return dx_PND, dtable_PVD.sum(0).astype(table_VD.dtype), None, None


def _is(target_PC: jax.Array, logits_PCV: jax.Array) -> jax.Array:
    """bool [P, C, V]: the target's place. A comparison, since a gather would gather the vocabulary's shards too."""
    return jax.lax.broadcasted_iota(target_PC.dtype, logits_PCV.shape, 2) == target_PC[..., None]


_chunked.defvjp(_forward, _backward)
