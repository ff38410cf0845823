"""The GPU kernels of tree attention, interpreted on a CPU and compiled for GPUs that are not here.

Against torch's dense attention in float64 under each token's ancestors as an explicit mask.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tree_attention import (
    assert_near,
    assert_sharded_agrees,
    lay,
    random_heads,
    random_tree,
    rows_of_trees,
    torch_attention,
)

from rmjax.kernels import attention_gpu
from rmjax.kernels.tree_attention import choose, tree_attention
from rmjax.kernels.visible import NO_WINDOW, visible

BLOCK = 16  # the smallest: interpreted kernels are slow
LENGTH = 4 * BLOCK + 5  # of most rows: whole blocks and a part of one


def attend(q, k, v, spans, window=None, *, block=BLOCK, **options):
    """Interpreted attention of rows given by visible_from, visible_until and positions."""
    seen = visible(*spans, window, block=block)
    return tree_attention(q, k, v, seen, form="gpu", interpret=True, **options)


@functools.partial(jax.jit, static_argnames=("block", "softcap"))
def ours(q, k, v, dout, spans, window=None, **options):
    """Output and gradients of q, k, v."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, spans, window, **options), q, k, v)
    return out, *pull(dout)


def torch_softcapped(q, k, v, dout, seen, softcap):
    """Output and gradients of q, k, v, all of which are written out, by torch in float64."""
    import torch

    q, k, v, dout = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (q, k, v, dout))
    heads = lambda x: x.repeat_interleave(q.shape[2] // x.shape[2], 2)
    logits = torch.einsum("bind,bjnd->bnij", q, heads(k)) / q.shape[3] ** 0.5
    logits = (softcap * torch.tanh(logits / softcap)).masked_fill(~torch.tensor(seen)[:, None], -torch.inf)
    out = torch.einsum("bnij,bjnd->bind", logits.softmax(-1), heads(v))
    return [x.detach().numpy() for x in (out, *torch.autograd.grad(out, (q, k, v), dout))]


# -------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize(
    ("width", "n", "m", "length", "block"),
    [(64, 6, 2, 129, 64), (128, 3, 3, 2 * BLOCK, BLOCK), (256, 2, 1, LENGTH, BLOCK)],
)
def test_output_and_gradients_are_torchs(width, n, m, length, block):
    rng = np.random.default_rng(width + block)
    for _ in range(3):
        spans, seen = rows_of_trees(rng, length)
        heads = random_heads(rng, 3, length, n, m, width)
        assert_near(ours(*heads, spans, block=block), torch_attention(*heads, seen), 2e-6)


def test_windows_are_measured_along_the_path():
    rng = np.random.default_rng(0)
    for window in (2, 3, 7, 20, NO_WINDOW):
        spans, seen = rows_of_trees(rng, LENGTH)
        heads = random_heads(rng, 3, LENGTH, 4, 2, 16)
        traced = ours(*heads, spans, jnp.int32(window))
        assert_near(traced, torch_attention(*heads, seen, spans[2], window), 2e-6)
        if window == 7:
            out = jax.jit(attend, static_argnames="window")(*heads[:3], spans, window=7)
            np.testing.assert_allclose(out, traced[0], rtol=1e-6, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    rng = np.random.default_rng(3)
    spans, seen = rows_of_trees(rng, LENGTH)
    q, k, v, dout = random_heads(rng, 3, LENGTH, 4, 2, 16)
    # Logits of some 10,000, of which float32 keeps 1e-3; so do the weights.
    heads = (q * 60, k * 60, v, dout)
    results = ours(*heads, spans, jnp.int32(NO_WINDOW))
    assert_near(results[:1] * 4, torch_attention(*heads, seen)[:1] * 4, 1e-3)
    assert all(np.isfinite(x).all() for x in results)


def test_soft_capped_logits():
    """The cap bends and flattens logits of which the largest are about 12."""
    rng = np.random.default_rng(1)
    spans, seen = rows_of_trees(rng, LENGTH)
    q, *rest = random_heads(rng, 3, LENGTH, 4, 2, 16)
    heads = (3 * q, *rest)
    actual = ours(*heads, spans, softcap=2.0)
    assert_near(actual, torch_softcapped(*heads, seen, 2.0), 2e-6)
    uncapped = torch_attention(*heads, seen)
    assert np.abs(actual[0] - uncapped[0]).max() > 0.1 * np.abs(uncapped[0]).max()


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.bfloat16, 2**-9), (jnp.float16, 2**-12)])
def test_short_inputs_lose_only_their_own_rounding(dtype, rounding):
    """The reference takes the rounded inputs.

    An output is rounded once, and its weights once: under twice the rounding of the largest. Gradients of logits also
    lose that of the output inside a difference, before they too are rounded: four times.
    """
    rng = np.random.default_rng(2)
    spans, seen = rows_of_trees(rng, LENGTH)
    heads = random_heads(rng, 3, LENGTH, 4, 2, 64, dtype)
    results = ours(*heads, spans)
    assert [x.dtype for x in results] == [dtype] * 4
    expected = torch_attention(*heads, seen)
    assert_near(results[:1] * 4, expected[:1] * 4, 2 * rounding)
    assert_near(results, expected, 4 * rounding)


# -------------------------------------------------------------------------------- which blocks are visited

X = 8  # blocks of a row
look = jax.jit(functools.partial(visible, block=BLOCK))


@jax.jit
def kernels_with_poison(q, k, v, dout, seen, poison):
    """out, lse, dq and dv where values and cotangents are NaN in one block of each row, that of `poison` [B]; -1: none.

    Values reach `out` and dq, and cotangents dv, of the blocks that read them, be it to multiply them by 0. The
    backward pass is not given `out`, whose NaN would reach a dq that has read none.
    """
    bad = (jnp.arange(q.shape[1]) // BLOCK == poison[:, None])[:, :, None, None]
    v, bad_dout = jnp.where(bad, jnp.nan, v), jnp.where(bad, jnp.nan, dout)
    out, lse = attention_gpu.forward(q, k, v, seen, softcap=None, interpret=True)
    dq, _, dv = attention_gpu.backward(q, k, v, seen, 0 * q, lse, bad_dout, softcap=None, interpret=True)
    return out, lse, dq, dv


def visited(spans, window):
    """For each kernel bool [X, X]: has it read a block (columns) of its other side for one of its own (rows)?"""
    heads = [jnp.tile(y, (X, 1, 1, 1)) for y in random_heads(np.random.default_rng(6), 1, X * BLOCK, 2, 1, 16)]
    spans = [jnp.asarray(np.tile(s, (X, 1)), jnp.int32) for s in spans]
    out, _, dq, dv = kernels_with_poison(*heads, look(*spans, jnp.int32(window)), jnp.arange(X))
    read = {name: np.isnan(x).reshape(X, X, -1) for name, x in (("forward", out), ("dq", dq), ("dkv", dv))}
    assert all((x.any(-1) == x.all(-1)).all() for x in read.values())  # NaN reaches every token of a block
    return {name: x.all(-1).T for name, x in read.items()}


@pytest.mark.parametrize("window", [NO_WINDOW, 9])
def test_each_kernel_visits_exactly_the_blocks_that_the_mask_demands(window):
    rng = np.random.default_rng(5)
    for _ in range(4):
        trees, room = [], (X - 1) * BLOCK  # the last block and what no tree fills are padding
        while len(tree := random_tree(rng, rng.integers(1, 6), 3 * BLOCK)) <= room:
            trees.append(tree)
            room -= len(tree)
        *spans, mask = lay(trees, X * BLOCK)
        mask &= spans[2][:, None] - spans[2] < window
        demanded = mask.reshape(X, BLOCK, X, BLOCK).any((1, 3))
        assert X < demanded.sum() < X * (X + 1) / 2
        for kernel, blocks in visited(spans, window).items():
            np.testing.assert_array_equal(blocks, demanded.T if kernel == "dkv" else demanded, err_msg=kernel)


def test_blocks_out_of_sight_in_a_known_tree_are_not_read():
    first, until = np.arange(X * BLOCK), np.arange(X * BLOCK) + 1
    first[: 4 * BLOCK], until[: 4 * BLOCK] = 0, 4 * BLOCK
    until[BLOCK : 2 * BLOCK] = 2 * BLOCK  # blocks 0..3: a trunk, a branch, and the other branch
    first[4 * BLOCK : 5 * BLOCK], until[4 * BLOCK : 5 * BLOCK] = 4 * BLOCK, 5 * BLOCK  # block 4: a tree
    positions = np.concatenate([np.arange(2 * BLOCK), np.arange(BLOCK, 3 * BLOCK), np.arange(4 * BLOCK) % BLOCK])
    spans, alone = (first, until, positions), [[4], [5], [6], [7]]
    readers = lambda window: [np.flatnonzero(x).tolist() for x in visited(spans, window)["forward"].T]
    assert readers(NO_WINDOW) == [[0, 1, 2, 3], [1], [2, 3], [3], *alone]
    assert readers(BLOCK) == [[0, 1, 2], [1], [2, 3], [3], *alone]


def test_whole_blocks_are_not_masked():
    """A mask that hides all before a query's own block, beside lists that are right, changes no bit."""
    rng = np.random.default_rng(8)
    index = jnp.broadcast_to(jnp.arange(X * BLOCK, dtype=jnp.int32), (X, X * BLOCK))
    seen = look(0 * index, 0 * index + X * BLOCK, index, jnp.int32(NO_WINDOW))  # one long sequence
    assert seen.by_query.whole.sum() == seen.by_key.whole.sum() == X * X * (X - 1) / 2
    wrong = dataclasses.replace(seen, first=index // BLOCK * BLOCK)
    heads = random_heads(rng, X, X * BLOCK, 2, 1, 16)
    for x, y in zip(*(kernels_with_poison(*heads, s, jnp.full(X, -1)) for s in (seen, wrong))):
        np.testing.assert_array_equal(x, y)


def test_log_sum_exp_is_natural():
    rng = np.random.default_rng(4)
    rows = [lay([random_tree(rng, 3, 30)], X * BLOCK) for _ in range(X)]
    *spans, mask = (np.stack(x) for x in zip(*rows))
    heads = random_heads(rng, X, X * BLOCK, 2, 1, 16)
    spans = [jnp.asarray(x, jnp.int32) for x in spans]
    _, lse, _, _ = kernels_with_poison(*heads, look(*spans, jnp.int32(NO_WINDOW)), jnp.full(X, -1))
    q, k = (np.asarray(x, np.float64) for x in heads[:2])
    logits = np.einsum("bind,bjd->bnij", q, k[:, :, 0]) / 4
    expected = np.log(np.where(mask[:, None], np.exp(logits), 0).sum(-1))
    assert lse.dtype == np.float32
    np.testing.assert_allclose(lse, expected, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- in a program


def layers_gradient(policy):
    """Gradient in x [B, T, M, H] of two scanned, checkpointed layers, each with a window of its own."""

    def loss(x, weights, spans, windows):
        def layer(x, one):
            weight, window = one
            q, q_too, k, v = (jnp.einsum("btmh,hi->btmi", x, w) for w in weight)
            out = attend(jnp.stack([q, q_too], 3).reshape(*x.shape[:2], -1, x.shape[3]), k, v, spans, window)
            return x + out.reshape(*x.shape[:3], 2, -1).sum(3), None

        return (jax.lax.scan(jax.checkpoint(layer, policy=policy), x, (weights, windows))[0] ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))


def layers_inputs(rows):
    rng = np.random.default_rng(7)
    length = 3 * BLOCK
    spans = [jnp.concatenate(x) for x in zip(*(rows_of_trees(rng, length)[0] for _ in range(-(-rows // 3))))]
    weights = jnp.asarray(rng.normal(size=(2, 4, 16, 16)) / 4, jnp.float32)
    return random_heads(rng, rows, length, 4, 2, 16)[1], weights, [x[:rows] for x in spans], jnp.asarray([10, 1000])


def test_saved_residuals_spare_the_second_forward_pass():
    policies = jax.checkpoint_policies

    def kernels(policy):
        text = layers_gradient(policy).lower(*layers_inputs(3)).compile().as_text()
        return sorted(re.findall(r' while\(.*op_name="[^"]*/(tree_attention_\w+)/while"', text))  # over their grids

    saved = kernels(policies.save_only_these_names("attention", "lse"))
    assert saved == ["tree_attention_dkv", "tree_attention_dq", "tree_attention_forward"]
    assert kernels(policies.nothing_saveable) == [*saved, "tree_attention_forward"]


@pytest.mark.slow
def test_sharded_rows_and_heads_agree_with_one_device():
    assert_sharded_agrees("test_attention_gpu", data=2, rows=4)


# -------------------------------------------------------------------------------- who is served


@pytest.mark.parametrize(
    ("platform", "width", "dtype", "why"),
    [
        ("cpu", 64, "bfloat16", "run on gpu, not on cpu"),
        ("cuda", 96, "bfloat16", "heads of width 16, 32, 64, 128, 256, not 96"),
        ("cuda", 64, "float32", "bfloat16 and float16, not float32"),
    ],
)
def test_what_is_not_served_is_named(platform, width, dtype, why):
    with pytest.raises(ValueError, match=why):
        choose("gpu", platform, width, dtype)
    assert choose("auto", platform, width, dtype)[0] == "xla"


def test_without_pallas_triton_a_gpu_has_the_form_of_xla(monkeypatch):
    monkeypatch.setattr(attention_gpu, "triton", None)
    form, why = choose("auto", "cuda", 64, "bfloat16")
    assert form == "xla" and "no Pallas-Triton" in why


def test_a_gpu_has_its_own_form():
    for width in (64, 128, 256):
        assert choose("auto", "cuda", width, "bfloat16") == ("gpu", "")


# -------------------------------------------------------------------------------- compiled for GPUs that are not here


def run(code, **environment):
    """Runs a program in its own process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMPILED = """
    import re
    import jax, jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding
    from rmjax.hardware import topology
    from rmjax.kernels.tree_attention import block_of, tree_attention
    from rmjax.kernels.visible import visible

    HEADS, GROUPS = 6, 2
    sharding = SingleDeviceSharding(topology.devices("{device}:1")[0])
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def kernels(width, dtype, window, softcap, policy=None, length=4096 + 64):
        '''Kernels in the program of a layer's output and gradients.'''
        def step(q, k, v, dout, spans, window):
            seen = visible(*spans, window, block=block_of("gpu", length, width))
            layer = lambda q, k, v: tree_attention(q, k, v, seen, form="gpu", softcap=softcap)
            out, pull = jax.vjp(jax.checkpoint(layer, policy=policy) if policy else layer, q, k, v)
            return out, *pull(dout)

        heads = [array(dtype, 2, length, n, width) for n in (HEADS, GROUPS, GROUPS, HEADS)]
        spans = [array(jnp.int32, 2, length)] * 3
        program = jax.jit(step).lower(*heads, spans, array(jnp.int32) if window else None).compile()
        calls = [x for x in program.as_text().splitlines() if " custom-call(" in x and "triton" in x]
        return sorted(re.search("tree_attention_([a-z]+)", x)[1] for x in calls)

    THREE = ["dkv", "dq", "forward"]
    for width in (64, 128, 256):
        assert kernels(width, jnp.bfloat16, False, None) == THREE
        assert kernels(width, jnp.bfloat16, True, 50.0) == THREE
    assert kernels(128, jnp.float16, True, None) == THREE
    for width, length in ((16, 256), (32, 256), (64, 16), (128, 20)):  # narrow heads, and rows of one short block
        assert kernels(width, jnp.bfloat16, False, None, length=length) == THREE
    policies = jax.checkpoint_policies
    save = policies.save_only_these_names("attention", "lse")
    assert kernels(64, jnp.bfloat16, False, None, save) == THREE
    assert kernels(64, jnp.bfloat16, False, None, policies.nothing_saveable) == [*THREE, "forward"]
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="the CUDA plugin of JAX, XLA's compiler for GPUs, is not installed",
)
@pytest.mark.parametrize("device", ["h200", "a100"])
def test_kernels_compile(device):
    run(COMPILED.format(device=device))
