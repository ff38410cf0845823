"""Attention of one new token a slot: over the keys of its prompt, which K slots share, and over those of its own.

The softmax over all parts is one, merged from the maximum and the sum of each, so a prompt's keys are read once for
all of its slots (Hydragen, https://arxiv.org/abs/2402.05099).

Shape letters: P prompts, K slots of a prompt, S = P * K slots, N query heads, M key/value heads, R = N / M, H head
width, T keys of a prompt, C keys of a slot, E keys that are new.
"""

import jax
import jax.numpy as jnp

from rmjax.kernels.cross_entropy import soft_capped

HIDDEN = -1e30  # a logit that no weight comes from


def decode_attention(
    q: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    prompt_keys: jax.Array,
    own: tuple[jax.Array, jax.Array],
    own_keys: jax.Array,
    new: tuple[jax.Array, jax.Array],
    new_keys: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """What the newest token of each slot takes from the values that it sees.

    Args:
        q: [S, N, H] rotated queries; slot s belongs to prompt s // K.
        prompt: rotated keys and values [P, M, T, H], of q's type.
        prompt_keys: int32 [P], how many of them are there; a slot sees all, or those in the window.
        own: rotated keys and values [S, M, C, H] of what each slot wrote after its prompt.
        own_keys: int32 [S] in [0, C], how many of them are there.
        new: rotated keys and values [S, M, E, H] of what each slot wrote after that.
        new_keys: int32 in [1, E], how many of them are there, the newest token's among them.
        window: keys that a token sees, itself included; None is all.
        softcap: as of `tree_attention`.

    Returns:
        [S, N, H] of q's type; products accumulate in float32, and the softmax is float32.
    """
    (prompt_k, prompt_v), (own_k, own_v), (new_k, new_v) = prompt, own, new
    (p, m, t, h), (s, _, c, _), e = prompt_k.shape, own_k.shape, new_k.shape[2]
    k, r = s // p, q.shape[1] // m
    q_PMKRH = jnp.moveaxis(q.reshape(p, k, m, r, h), 1, 2)
    q_SMRH = q.reshape(s, m, r, h)
    own_PK, prompt_P, most_back = own_keys.reshape(p, k), prompt_keys, window or jnp.inf
    # How far back from the newest token each key stands.
    back_PKT = (prompt_P[:, None] + own_PK + new_keys)[..., None] - 1 - jnp.arange(t)
    back_SC = (own_keys + new_keys)[:, None] - 1 - jnp.arange(c)
    back_E = new_keys - 1 - jnp.arange(e)
    sees_PKT = (jnp.arange(t) < prompt_P[:, None])[:, None] & (back_PKT < most_back)
    sees_SC = (jnp.arange(c) < own_keys[:, None]) & (back_SC < most_back)
    sees_SE = jnp.broadcast_to((back_E >= 0) & (back_E < most_back), (s, e))
    sees_own = jnp.concatenate([sees_SC, sees_SE], 1)[:, None, None]

    einsum = lambda spec, x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
    by_prompt = lambda x: jnp.moveaxis(x.reshape(p, k, m, *x.shape[2:]), 1, 2)  # [S, M, ...] to [P, M, K, ...]
    of_prompt = soft_capped(einsum("pmkrh,pmth->pmkrt", q_PMKRH, prompt_k) * h**-0.5, softcap)
    of_prompt = jnp.where(sees_PKT[:, None, :, None], of_prompt, HIDDEN)
    both = [einsum("smrh,smch->smrc", q_SMRH, keys) for keys in (own_k, new_k)]
    of_own = soft_capped(jnp.concatenate(both, -1) * h**-0.5, softcap)
    of_own = by_prompt(jnp.where(sees_own, of_own, HIDDEN))
    most = jnp.maximum(of_prompt.max(-1, initial=HIDDEN), of_own.max(-1))[..., None]
    prompt_weight, own_weight = jnp.exp(of_prompt - most), jnp.exp(of_own - most)
    total = (prompt_weight.sum(-1) + own_weight.sum(-1))[..., None]
    own_weight = jnp.moveaxis(own_weight, 1, 2).reshape(s, m, r, c + e).astype(q.dtype)
    out = einsum("pmkrt,pmth->pmkrh", prompt_weight.astype(q.dtype), prompt_v)
    for weight, values in ((own_weight[..., :c], own_v), (own_weight[..., c:], new_v)):
        out += by_prompt(einsum("smrc,smch->smrh", weight, values))
    return jnp.moveaxis((out / total).astype(q.dtype), 1, 2).reshape(s, r * m, h)
