"""Attention of new tokens over three parts of keys, against one softmax over all of them in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.kernels.decode import decode_attention


def plain(q, keys, values, window):
    """[N, H] of one token that sees the last `window` of its keys [T, M, H], or all."""
    keys, values = (x[-window:] if window else x for x in (keys, values))
    heads = q.shape[0] // keys.shape[1]
    out = []
    for n, query in enumerate(q):
        logits = keys[:, n // heads] @ query / np.sqrt(q.shape[1])
        weights = np.exp(logits - logits.max())
        out.append(weights @ values[:, n // heads] / weights.sum())
    return np.stack(out)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("new_keys", [1, 3, 4])
def test_all_parts_are_one_softmax(window, heads, kv_heads, new_keys):
    rng = np.random.default_rng(0)
    p, k, t, c, e, h = 3, 2, 10, 6, 4, 8
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    keys_values = lambda n, length: (draw(n, kv_heads, length, h), draw(n, kv_heads, length, h))
    prompt, own, new = keys_values(p, t), keys_values(p * k, c), keys_values(p * k, e)
    prompt_keys, own_keys = np.array([0, 4, 10]), np.array([0, 6, 2, 3, 5, 1])
    q = draw(p * k, heads, h)
    found = decode_attention(jnp.array(q), prompt, prompt_keys, own, own_keys, new, new_keys, window=window)
    for s in range(p * k):
        g = s // k
        keys, values = (
            np.swapaxes(
                np.concatenate([a[g, :, : prompt_keys[g]], b[s, :, : own_keys[s]], d[s, :, :new_keys]], 1), 0, 1
            )
            for a, b, d in zip(prompt, own, new)
        )
        np.testing.assert_allclose(found[s], plain(q[s], keys, values, window), atol=1e-5)


def test_capped_logits():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, keys, values = 4 * draw(1, 1, 8), draw(1, 1, 6, 8), draw(1, 1, 6, 8)
    part = lambda a, b: (keys[:, :, a:b], values[:, :, a:b])
    found = decode_attention(q, part(0, 3), jnp.array([3]), part(3, 5), jnp.array([2]), part(5, 6), 1, softcap=1.5)
    weights = jax.nn.softmax(1.5 * jnp.tanh(keys[0, 0] @ q[0, 0] / np.sqrt(8) / 1.5))
    np.testing.assert_allclose(found[0, 0], weights @ values[0, 0], atol=1e-6)


def test_what_stands_behind_the_keys_is_not_seen():
    ones = jnp.ones((1, 1, 4, 4))
    junk = ones.at[:, :, 2:].set(jnp.nan)
    clean = ones.at[:, :, 2:].set(0.0)
    args = (jnp.ones((1, 2, 4)), (ones, ones), jnp.array([2]))
    expected = decode_attention(*args, (clean, clean), jnp.array([2]), (clean, clean), 2)
    junk = jnp.where(jnp.isnan(junk), 7.0, junk)
    found = decode_attention(*args, (junk, clean), jnp.array([2]), (junk, clean), 2)
    np.testing.assert_array_equal(found, expected)
