"""The TPU form of tree attention, interpreted, against torch's dense attention in float64."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tree_attention import assert_near, lay, random_heads, random_tree, rows_of_trees, torch_attention

from rmjax.kernels import attention_tpu
from rmjax.kernels.tree_attention import choose, tree_attention
from rmjax.kernels.visible import NO_WINDOW, visible

BLOCK = 16  # small, because interpreting is slow
LENGTH = 3 * BLOCK + 9  # whole blocks and a part of one


# Interpreted kernels take long to compile and no time to run.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=UNOPTIMIZED)


@functools.partial(jit, static_argnames="softcap")
def ours(q, k, v, dout, spans, window=None, softcap=None):
    """Output and gradients of q, k, v."""
    seen = visible(*spans, window, block=BLOCK)
    attend = functools.partial(tree_attention, seen=seen, form="tpu", softcap=softcap, interpret=True)
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)


def torch_capped(q, k, v, dout, seen, softcap):
    """Output and gradients with capped logits, by torch in float64, every step written out."""
    import torch

    q, k, v, dout = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (q, k, v, dout))
    repeated = [x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v)]
    logits = torch.einsum("binh,bjnh->bnij", q, repeated[0]) / q.shape[3] ** 0.5
    logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~torch.tensor(seen)[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bnij,bjnh->binh", weights, repeated[1])
    return [x.detach().numpy() for x in (out, *torch.autograd.grad(out, (q, k, v), dout))]


# -------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize(
    ("length", "n", "m", "width"), [(LENGTH, 4, 2, 64), (4 * BLOCK, 3, 1, 128), (BLOCK + 9, 2, 2, 256)]
)
def test_output_and_gradients_are_torchs(length, n, m, width):
    rng = np.random.default_rng(length + n)
    for _ in range(4):
        spans, seen = rows_of_trees(rng, length)
        heads = random_heads(rng, 3, length, n, m, width)
        # The gradient of the logits is a difference of two float32 sums over the width, so its rounding grows as the
        # width's root. It shows where one key is seen and the gradient is 0: at most 0.9e-6, 1.1e-6 and 3.3e-6 of the
        # largest value at widths 64, 128 and 256 (10 draws each on an AMD EPYC, 2026-11-29).
        assert_near(ours(*heads, spans), torch_attention(*heads, seen), 2e-6 * (width / 64) ** 0.5)


def test_windows_are_measured_along_the_path():
    rng = np.random.default_rng(0)
    for window in (2, 7, 20, 100_000):
        spans, seen = rows_of_trees(rng, LENGTH)
        heads = random_heads(rng, 3, LENGTH, 4, 2, 64)
        assert_near(ours(*heads, spans, jnp.int32(window)), torch_attention(*heads, seen, spans[2], window), 2e-6)


def test_capped_logits_and_their_derivative():
    rng = np.random.default_rng(1)
    spans, seen = rows_of_trees(rng, LENGTH)
    q, *rest = random_heads(rng, 3, LENGTH, 4, 2, 64)
    heads = (3 * q, *rest)  # most logits are beyond the cap
    expected = torch_capped(*heads, seen, 2.0)
    assert_near(ours(*heads, spans, softcap=2.0), expected, 2e-6)
    assert np.abs(expected[1] - torch_attention(*heads, seen)[1]).max() > 0.1


@pytest.mark.parametrize("width", [64, 256])
def test_bfloat16_inputs_lose_only_their_own_rounding(width):
    """The reference takes the rounded inputs; the bounds are those of the form for any device, for its reasons."""
    rng = np.random.default_rng(width)
    spans, seen = rows_of_trees(rng, LENGTH)
    heads = random_heads(rng, 3, LENGTH, 4, 2, width, jnp.bfloat16)
    results = ours(*heads, spans)
    assert [x.dtype for x in results] == [jnp.bfloat16] * 4
    expected = torch_attention(*heads, seen)
    assert_near(results[:1] * 4, expected[:1] * 4, 2**-8)
    assert_near(results, expected, 2**-7)


def test_large_logits_neither_overflow_nor_vanish():
    rng = np.random.default_rng(2)
    spans, seen = rows_of_trees(rng, LENGTH)
    q, k, v, dout = random_heads(rng, 3, LENGTH, 4, 2, 64)
    heads = (q * 100, k * 100, v, dout)  # logits of some 10,000, of which float32 keeps 1e-3; so do the weights
    results = ours(*heads, spans)
    assert_near(results[:1] * 4, torch_attention(*heads, seen)[:1] * 4, 1e-3)
    assert all(np.isfinite(x).all() for x in results)


# -------------------------------------------------------------------------------- what is visited


def test_no_block_is_visited_but_those_of_which_a_query_sees_a_key():
    """Row x of X equal rows is NaN in block x: what has met it is NaN, by 0 * NaN at least."""
    rng, blocks = np.random.default_rng(4), 8
    length = blocks * BLOCK
    *spans, ancestors = lay([random_tree(rng, k, 40) for k in (2, 1, 3)], length)
    spans = [jnp.broadcast_to(jnp.asarray(x, jnp.int32), (blocks, length)) for x in spans]
    q, k, v, dout = (jnp.repeat(x, blocks, 0) for x in random_heads(rng, 1, length, 2, 1, 64))
    bad = jnp.arange(blocks)[:, None] == jnp.arange(length) // BLOCK
    poison = lambda x: jnp.where(bad[:, :, None, None], jnp.nan, x)
    met = lambda x: np.isnan(x).any((2, 3)).reshape(blocks, blocks, BLOCK).any(2)
    forward, backward = (
        jit(functools.partial(f, softcap=None, interpret=True)) for f in (attention_tpu.forward, attention_tpu.backward)
    )
    find = jit(functools.partial(visible, block=BLOCK))
    for window in (NO_WINDOW, 20):
        seen = ancestors & (spans[2][0][:, None] - spans[2][0] < window)
        demanded = np.asarray(seen).reshape(blocks, BLOCK, blocks, BLOCK).any((1, 3))
        assert blocks + 3 < demanded.sum() < blocks * (blocks + 1) / 2 - 3  # neither the diagonal nor everything
        known = find(*spans, window)
        out, lse = forward(q, k, v, known)
        np.testing.assert_array_equal(met(forward(q, k, poison(v), known)[0]), demanded.T)
        np.testing.assert_array_equal(met(backward(q, poison(k), v, known, out, lse, dout)[0]), demanded.T)
        _, dk, dv = backward(poison(q), k, v, known, out, lse, poison(dout))
        np.testing.assert_array_equal(met(dk), demanded)
        np.testing.assert_array_equal(met(dv), demanded)
        for visits in (known.by_query, known.by_key):  # and no step of the grid is idle
            assert attention_tpu._pairs(visits)[1] == blocks * demanded.sum()


# -------------------------------------------------------------------------------- on several devices


SHARDED = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    sys.path.insert(0, {tests!r})
    from test_attention_tpu import LENGTH, assert_near, ours, random_heads, rows_of_trees, torch_attention

    assert jax.device_count() == 4
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    rng = np.random.default_rng(5)
    spans, seen = rows_of_trees(rng, LENGTH)
    four = np.array([0, 1, 2, 1])
    heads = random_heads(rng, 4, LENGTH, 4, 2, 64)
    with jax.set_mesh(mesh):
        results = ours(*(put(x, "data", None, "tensor") for x in heads), [put(x[four], "data") for x in spans])
    jax.block_until_ready(results)
    assert all(x.sharding.spec == P("data", None, "tensor") for x in results), [x.sharding for x in results]
    assert_near(results, torch_attention(*heads, seen[four]), 2e-6)
"""


@pytest.mark.slow  # the other forms share its shard_map, and test_topology.py compiles it
def test_sharded_rows_and_heads_are_torchs():
    code = textwrap.dedent(SHARDED.format(tests=os.path.dirname(__file__)))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# -------------------------------------------------------------------------------- what it refuses


def test_what_it_does_not_serve_is_named():
    assert choose("auto", "tpu", 128, "bfloat16") == ("tpu", "")
    form, why = choose("auto", "tpu", 80, "bfloat16")
    assert form == "xla" and "64, 128, 256, not 80" in why
    with pytest.raises(ValueError, match=r"does not run on a cpu"):
        choose("tpu", "cpu", 128, "bfloat16")
    with pytest.raises(ValueError, match=r"bfloat16 or float32, not in float64"):
        choose("tpu", "tpu", 128, "float64")


def test_more_pairs_of_blocks_than_a_core_can_hold_are_named():
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    rows, length = 2, 2**17

    def attend(x, spans):
        return tree_attention(x, x, x, visible(*spans, block=256), form="tpu", interpret=True)

    with pytest.raises(ValueError, match=r"2 rows of 512 blocks .* 262,656 pairs, .* holds 196,608"):
        jax.eval_shape(attend, shape(rows, length, 1, 64), [shape(rows, length, dtype=jnp.int32)] * 3)
