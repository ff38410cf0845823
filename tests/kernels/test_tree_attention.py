"""Tree attention against torch's dense attention in float64, masked by each token's ancestors."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.batches.trees import build_tree
from rmjax.kernels.attention_xla import BLOCK
from rmjax.kernels.tree_attention import block_of, choose, tree_attention
from rmjax.kernels.visible import visible

LENGTH = 3 * BLOCK + 9  # of most rows: whole blocks and a part of one

# -------------------------------------------------------------------------------- inputs


def random_tree(rng, k, longest):
    """A tree of k sequences: each leaves an earlier one anywhere, its end included, for 1..longest tokens."""
    sequences = [rng.integers(0, 1000, rng.integers(1, longest + 1))]
    for _ in range(k - 1):
        trunk = sequences[rng.integers(len(sequences))]
        branch = rng.integers(0, 1000, rng.choice([1, rng.integers(1, longest + 1)]))
        sequences.append(np.concatenate([trunk[: rng.integers(len(trunk) + 1)], branch]))
    return build_tree(sequences)


def lay(trees, length):
    """One row of trees end to end: visible_from, visible_until, positions, mask of ancestors [T, T]."""
    first, until = np.arange(length), np.arange(length) + 1
    positions, seen, start = np.zeros(length, int), np.eye(length, dtype=bool), 0
    for tree in trees:
        stop = start + len(tree)
        first[start:stop], until[start:stop] = start, start + tree.visible_until
        positions[start:stop] = tree.positions
        last_at_depth = {}
        for i in range(start, stop):  # in a depth-first order the parent is the last token one step less deep
            depth = positions[i]
            if depth:
                seen[i] |= seen[last_at_depth[depth - 1]]
            last_at_depth[depth] = i
        start = stop
    return first, until, positions, seen


def rows_of_trees(rng, length):
    """Three rows: trees of K = 1..5 with padding after them, trees to the last token, only padding."""
    packed, room = [], length
    for k in (3, 1, 5, 2, 4, 3, 2, 5):
        tree = random_tree(rng, k, max(length // 8, 2))
        if len(tree) <= room:
            packed.append(tree)
            room -= len(tree)
    if room == 0:
        room = len(packed.pop())
    full = [*packed, build_tree([rng.integers(0, 1000, room)])]
    first, until, positions, seen = (np.stack(x) for x in zip(*(lay(t, length) for t in (packed, full, []))))
    return [jnp.asarray(x, jnp.int32) for x in (first, until, positions)], seen


def random_heads(rng, b, t, n, m, h, dtype=np.float32):
    """q, k, v and the cotangent of the output."""
    shapes = ((b, t, n, h), (b, t, m, h), (b, t, m, h), (b, t, n, h))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def torch_attention(q, k, v, dout, seen, positions=None, window=None):
    """Output and gradients of q, k, v by torch in float64, under an explicit mask."""
    import torch  # here, so that the process of several devices need not wait for it

    if window is not None:
        positions = np.asarray(positions)
        seen = seen & (positions[:, :, None] - positions[:, None] < window)
    q, k, v, dout = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (q, k, v, dout))
    repeats = q.shape[2] // k.shape[2]
    heads = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    mask = torch.tensor(seen)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return [x.detach().numpy() for x in (out, *gradients)]


def attend(q, k, v, spans, window=None, *, form="xla", **options):
    """Tree attention of rows given by visible_from, visible_until and positions."""
    seen = visible(*spans, window, block=block_of(form, q.shape[1], q.shape[3]))
    return tree_attention(q, k, v, seen, form=form, **options)


@jax.jit
def ours(q, k, v, dout, spans, window=None):
    """Output and gradients of q, k, v."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, spans, window), q, k, v)
    return out, *pull(dout)


def assert_near(actual, expected, tolerance):
    """Equal to `tolerance` of each array's largest value."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=name)


# -------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize(
    ("length", "n", "m"), [(LENGTH, 4, 2), (4 * BLOCK - 1, 3, 1), (2 * BLOCK, 2, 2), (BLOCK // 2 + 1, 4, 2)]
)
def test_output_and_gradients_are_torchs(length, n, m):
    rng = np.random.default_rng(length + n)
    for _ in range(4):
        spans, seen = rows_of_trees(rng, length)
        heads = random_heads(rng, 3, length, n, m, 8)
        assert_near(ours(*heads, spans), torch_attention(*heads, seen), 2e-6)


def test_windows_are_measured_along_the_path():
    rng = np.random.default_rng(0)
    for window in (2, 3, 7, 40, 100_000):
        spans, seen = rows_of_trees(rng, LENGTH)
        heads = random_heads(rng, 3, LENGTH, 4, 2, 8)
        traced = ours(*heads, spans, jnp.int32(window))
        assert_near(traced, torch_attention(*heads, seen, spans[2], window), 2e-6)
        if window == 7:
            out = jax.jit(attend, static_argnames="window")(*heads[:3], spans, window=7)
            np.testing.assert_allclose(out, traced[0], rtol=1e-6, atol=1e-6)


def test_float64_shows_that_only_rounding_differs():
    rng = np.random.default_rng(0)
    spans, seen = rows_of_trees(rng, 3 * BLOCK)
    with jax.enable_x64(True):
        heads = random_heads(rng, 3, 3 * BLOCK, 4, 2, 8, np.float64)
        assert_near(ours(*heads, spans, window=jnp.int32(30)), torch_attention(*heads, seen, spans[2], 30), 1e-13)


def test_bfloat16_inputs_lose_only_their_own_rounding():
    """The reference takes the rounded inputs.

    An output is rounded once (2**-9 of itself) and its weights once (2**-9 each): under 2**-8 of the largest.
    Gradients of logits also lose 2**-9 of the output inside a difference, before they too are rounded: 2**-7.
    """
    rng = np.random.default_rng(1)
    spans, seen = rows_of_trees(rng, 3 * BLOCK)
    heads = random_heads(rng, 3, 3 * BLOCK, 4, 2, 32, jnp.bfloat16)
    results = ours(*heads, spans)
    assert [x.dtype for x in results] == [jnp.bfloat16] * 4
    expected = torch_attention(*heads, seen)
    assert_near(results[:1] * 4, expected[:1] * 4, 2**-8)
    assert_near(results, expected, 2**-7)


def test_large_logits_neither_overflow_nor_vanish():
    rng = np.random.default_rng(2)
    spans, seen = rows_of_trees(rng, LENGTH)
    q, k, v, dout = random_heads(rng, 3, LENGTH, 4, 2, 8)
    # Logits of some 10,000, of which float32 keeps 1e-3; so do the weights.
    heads = (q * 100, k * 100, v, dout)
    assert_near(ours(*heads, spans)[:1] * 4, torch_attention(*heads, seen)[:1] * 4, 1e-3)
    assert all(np.isfinite(x).all() for x in ours(*heads, spans))


# -------------------------------------------------------------------------------- locality


@pytest.mark.parametrize("alone_by", ["padding", "window"])
def test_a_token_alone_gives_its_own_value(alone_by):
    rng = np.random.default_rng(3)
    index = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (3, LENGTH))
    spans = (index, index + 1, 0 * index) if alone_by == "padding" else rows_of_trees(rng, LENGTH)[0]
    q, k, v, dout = random_heads(rng, 3, LENGTH, 4, 2, 8)
    out, dq, dk, dv = ours(q, k, v, dout, spans, None if alone_by == "padding" else jnp.int32(1))
    np.testing.assert_array_equal(out, np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(dv, dout.reshape(3, LENGTH, 2, 2, 8).sum(3), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dq, 0, atol=1e-5)
    np.testing.assert_allclose(dk, 0, atol=1e-5)


def test_other_trees_in_the_row_change_no_bit():
    rng = np.random.default_rng(4)
    trees = [random_tree(rng, k, 20) for k in (2, 4, 3)]
    start, stop = len(trees[0]), len(trees[0]) + len(trees[1])
    spans = [jnp.asarray([x] * 3, jnp.int32) for x in lay(trees, LENGTH)[:3]]
    inside = np.zeros((1, LENGTH, 1, 1), bool)
    inside[:, start:stop] = True
    q, k, v, dout = random_heads(rng, 3, LENGTH, 4, 2, 8)
    others = random_heads(rng, 3, LENGTH, 4, 2, 8)[:3]
    changed = [jnp.where(inside, x, 3 * y) for x, y in zip((q, k, v), others)]
    dout = jnp.where(inside, dout, 0)
    before, after = ours(q, k, v, dout, spans), ours(*changed, dout, spans)
    for x, y in zip(before, after):
        np.testing.assert_array_equal(x[:, start:stop], y[:, start:stop])
    for gradient in after[1:]:
        assert not np.where(inside, 0, gradient).any()


def test_a_tree_gives_the_same_wherever_it_stands():
    rng = np.random.default_rng(5)
    tree, other = random_tree(rng, 5, 20), random_tree(rng, 3, 20)
    size = len(tree)
    filler = build_tree([np.arange(LENGTH - len(other) - size)])
    spans = [np.stack(x) for x in zip(*(lay(t, LENGTH)[:3] for t in ([tree], [other, tree], [other, filler, tree])))]
    heads = random_heads(rng, 3, LENGTH, 4, 2, 8)
    starts = (0, len(other), LENGTH - size)
    for row, start in enumerate(starts):
        heads = [x.at[row, start : start + size].set(x[0, :size]) for x in heads]
    results = ours(*heads, [jnp.asarray(x, jnp.int32) for x in spans])
    first, *rest = ([x[row, start : start + size] for x in results] for row, start in enumerate(starts))
    for there in rest:
        assert_near(there, first, 2e-6)


def test_blocks_out_of_sight_are_not_read():
    """NaN there would reach the output through 0 * NaN."""
    first, until = np.zeros(5 * BLOCK, np.int32), np.full(5 * BLOCK, 4 * BLOCK, np.int32)
    until[BLOCK : 2 * BLOCK] = 2 * BLOCK  # blocks 0..3: a trunk, a branch, and the other branch; block 4: a tree
    first[4 * BLOCK :], until[4 * BLOCK :] = 4 * BLOCK, 5 * BLOCK
    positions = np.concatenate([np.arange(2 * BLOCK), np.arange(BLOCK, 3 * BLOCK), np.arange(BLOCK)])
    spans = [jnp.asarray(x, jnp.int32)[None] for x in (first, until, positions)]
    q, k, v, _ = random_heads(np.random.default_rng(6), 1, 5 * BLOCK, 2, 1, 8)
    run = jax.jit(attend)

    def poisoned(blocks, window=100_000):
        index = np.arange(5 * BLOCK) // BLOCK
        bad = jnp.asarray(np.isin(index, blocks))[None, :, None, None]
        out = run(q, jnp.where(bad, jnp.nan, k), jnp.where(bad, jnp.nan, v), spans, window)
        return sorted(set(index[np.isnan(out).any((0, 2, 3))].tolist()))

    assert poisoned([0]) == [0, 1, 2, 3]
    assert poisoned([1]) == [1]
    assert poisoned([2]) == [2, 3]
    assert poisoned([4]) == [4]
    assert poisoned([0], BLOCK) == [0, 1, 2]


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
    spans = [jnp.concatenate(x) for x in zip(*(rows_of_trees(rng, LENGTH)[0] for _ in range(rows // 3)))]
    weights = jnp.asarray(rng.normal(size=(2, 4, 8, 8)) / 3, jnp.float32)
    return random_heads(rng, rows, LENGTH, 4, 2, 8)[1], weights, spans, jnp.asarray([10, 1000])


def test_saved_residuals_spare_the_second_forward_pass():
    inputs = layers_inputs(3)
    policies = jax.checkpoint_policies
    saved, full = (
        layers_gradient(policy).lower(*inputs).compile()
        for policy in (policies.save_only_these_names("attention", "lse"), policies.nothing_saveable)
    )
    loops = lambda compiled: compiled.as_text().count(" while(")
    assert loops(full) == loops(saved) + 2  # over queries and over keys, once more
    for x, y in zip(saved(*inputs), full(*inputs)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_memory_of_a_gradient_is_linear_in_the_row():
    def peak(length):
        shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
        heads = (shape(1, length, 4, 16), *[shape(1, length, 2, 16)] * 2, shape(1, length, 4, 16))
        memory = ours.lower(*heads, (shape(1, length, dtype=jnp.int32),) * 3).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    assert peak(16_384) <= 2.2 * peak(8_192)
    assert peak(16_384) < 16_384**2  # one [T, T] array of bytes


SHARDED = """
    import sys
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    sys.path.insert(0, {tests!r})
    from {module} import layers_gradient, layers_inputs

    assert jax.device_count() == {data} * 2
    mesh = jax.make_mesh(({data}, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    gradient = layers_gradient(jax.checkpoint_policies.save_only_these_names("attention", "lse"))
    x, weights, spans, windows = layers_inputs({rows})
    inputs = (put(x, "data", None, "tensor"), put(weights), [put(s, "data") for s in spans], put(windows))
    with jax.set_mesh(mesh):
        compiled = gradient.lower(*inputs).compile()
    split = jax.block_until_ready(compiled(*inputs))
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    assert split[1].sharding.is_equivalent_to(inputs[0].sharding, 4), split[1].sharding
    for a, b in zip(split, gradient(x, weights, spans, windows)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
"""


def assert_sharded_agrees(module, data, rows):
    """`layers_gradient` of a test module over a mesh of data x 2 gives what one device gives, and sends no keys."""
    code = textwrap.dedent(SHARDED.format(tests=os.path.dirname(__file__), module=module, data=data, rows=rows))
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={2 * data}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_sharded_rows_and_heads_agree_with_one_device():
    assert_sharded_agrees("test_tree_attention", data=4, rows=12)


# -------------------------------------------------------------------------------- which form


def test_devices_without_a_form_of_their_own_take_that_of_any_device():
    assert choose("auto", "cpu", 64, "float32") == choose("xla", "gpu", 128, "bfloat16") == ("xla", "")
    form, why = choose("auto", "metal", 64, "float32")
    assert form == "xla" and "metal" in why


# -------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_named():
    q, k, v, _ = random_heads(np.random.default_rng(9), 1, 8, 4, 2, 8)
    index = jnp.arange(8, dtype=jnp.int32)[None]
    spans = (index, index + 1, index)
    with pytest.raises(ValueError, match=r"N a multiple of M"):
        attend(q[:, :, :3], k, v, spans)
    with pytest.raises(ValueError, match=r"do not fit together"):
        attend(q, k[:, :7], v[:, :7], spans)
    with pytest.raises(ValueError, match=r"k bfloat16"):
        attend(q, k.astype(jnp.bfloat16), v, spans)
    with pytest.raises(ValueError, match=r"visible_until has shape \(1, 7\), expected .* \(1, 8\)"):
        attend(q, k, v, (index, index[:, 1:], index))
