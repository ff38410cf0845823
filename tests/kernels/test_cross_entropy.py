"""The chunked cross-entropy against torch, the plain form, finite differences, and its own promises of memory."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.kernels.cross_entropy import CHUNK, cross_entropy


def inputs(b=3, t=37, d=16, v=101, wanted=0.5, seed=0, dtype=np.float32):
    """x, table, targets and weights, of which this share is not 0."""
    rng = np.random.default_rng(seed)
    weight = (rng.random((b, t)) < wanted) * rng.uniform(0.5, 2, (b, t))
    x, table = rng.normal(size=(b, t, d)), rng.normal(size=(v, d))
    return x.astype(dtype), table.astype(dtype), rng.integers(0, v, (b, t)).astype(np.int32), weight.astype(dtype)


def plain(x, table, targets, weight):
    """All logits at once."""
    logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.promote_types(jnp.float32, x.dtype))
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.where(weight != 0, nll, 0), jnp.where(weight != 0, logits.argmax(-1) == targets, 0)


def weighted(function, **options):
    """The weighted sum of losses, the outputs, and the gradients of x and table."""

    def loss(x, table, targets, weight):
        nll, correct = function(x, table, targets, weight, **options)
        return (nll * weight).sum(), (nll, correct)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("chunk", [7, CHUNK])  # many with a part of one, and one
def test_equals_the_plain_form(chunk):
    run, reference = weighted(cross_entropy, chunk=chunk), weighted(plain)
    for wanted in (0.4, 1.0):
        given = inputs(wanted=wanted)
        (loss, (nll, correct)), grads = run(*given)
        (loss_2, (nll_2, correct_2)), grads_2 = reference(*given)
        assert loss == pytest.approx(float(loss_2), rel=1e-6)
        np.testing.assert_allclose(nll, nll_2, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(correct, correct_2)
        for ours, expected in zip(grads, grads_2):
            np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_torch(softcap):
    import torch

    x, table, targets, weight = inputs(v=53)
    (loss, (nll, correct)), grads = weighted(cross_entropy, chunk=10, softcap=softcap)(x, table, targets, weight)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, table)]
    logits = leaves[0] @ leaves[1].T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    labels = torch.tensor(targets).flatten().long()
    every = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    expected = (every * torch.tensor(weight).flatten()).sum()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    here = weight != 0
    np.testing.assert_allclose(nll[here], every.detach().numpy().reshape(here.shape)[here], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(correct[here], (logits.argmax(-1).numpy() == targets)[here])
    for ours, leaf in zip(grads, leaves):
        np.testing.assert_allclose(ours, leaf.grad, atol=1e-5, rtol=0)


def test_gradients_by_finite_differences():
    with jax.enable_x64():
        x, table, targets, weight = inputs(b=2, t=9, d=4, v=7, dtype=np.float64)
        run = weighted(cross_entropy, chunk=4)
        _, grads = run(x, table, targets, weight)
        assert grads[0].dtype == np.float64
        rng = np.random.default_rng(1)
        for _ in range(4):
            move = [rng.normal(size=a.shape) for a in (x, table)]
            at = lambda e, move=move: float(run(x + e * move[0], table + e * move[1], targets, weight)[0][0])
            slope = sum((m * np.asarray(g)).sum() for m, g in zip(move, grads))
            assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_what_nobody_asks_for_is_not_computed():
    x, table, targets, weight = inputs()
    unused = np.where((weight == 0)[..., None], np.nan, x)  # would show in every result
    (loss, (nll, correct)), (dx, dtable) = weighted(cross_entropy, chunk=16)(unused, table, targets, weight)
    assert np.isfinite(loss) and np.isfinite(dtable).all()
    assert not nll[weight == 0].any() and not correct[weight == 0].any() and not dx[weight == 0].any()
    (loss, _), grads = weighted(cross_entropy)(x, table, targets, 0 * weight)
    assert loss == 0 and not any(map(np.any, grads))


def test_weights_decide_what_is_computed_and_nothing_else():
    x, table, targets, weight = inputs()
    once, ten = (cross_entropy(x, table, targets, w, chunk=16)[0] for w in (weight, -10 * weight))
    np.testing.assert_array_equal(once, ten)
    slope = jax.grad(lambda w: cross_entropy(x, table, targets, w)[0].sum())(weight)
    assert not slope.any()


def test_large_logits_do_not_overflow():
    x, table, targets, weight = inputs(wanted=1)
    (loss, (nll, _)), grads = weighted(cross_entropy, chunk=16)(100 * x, table, targets, weight)
    np.testing.assert_allclose(nll, plain(100 * x, table, targets, weight)[0], rtol=1e-5, atol=1e-3)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in grads)


def test_equal_logits_the_first_is_the_likeliest():
    _, table, targets, weight = inputs(wanted=1)
    x = np.zeros((*targets.shape, table.shape[1]), np.float32)
    nll, correct = cross_entropy(x, table, targets, weight)
    np.testing.assert_array_equal(correct, targets == 0)
    np.testing.assert_allclose(nll, np.log(len(table)), rtol=1e-6)


def test_bfloat16_products_float32_sums():
    x, table, targets, weight = inputs(t=200, wanted=1)
    low = jnp.asarray(x, jnp.bfloat16)
    (_, (nll, _)), (dx, dtable) = weighted(cross_entropy, chunk=32)(low, table, targets, weight)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, table)]
    (_, (nll_2, _)), (dx_2, dtable_2) = weighted(plain)(*rounded, targets, weight)
    assert (nll.dtype, dx.dtype, dtable.dtype) == (np.float32, jnp.bfloat16, np.float32)
    np.testing.assert_allclose(nll, nll_2, atol=1e-5, rtol=0)  # rounded once, at the inputs
    for ours, reference in ((dx, dx_2), (dtable, dtable_2)):
        np.testing.assert_allclose(np.float32(ours), reference, atol=0.01 * np.abs(reference).max(), rtol=0)


def temporaries(b, t, function=cross_entropy, d=32, v=4000):
    """Bytes that loss and gradients need beside inputs and outputs."""
    shapes = ((b, t, d), np.float32), ((v, d), np.float32), ((b, t), np.int32), ((b, t), np.float32)
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    options = {"chunk": 256} if function is cross_entropy else {}
    return weighted(function, **options).lower(*abstract).compile().memory_analysis().temp_size_in_bytes


def test_memory_hardly_grows_with_the_tokens():
    base = temporaries(2, 512)
    assert base >= 4 * 256 * 4000  # the logits of a chunk are in it
    assert temporaries(2, 2048) <= 1.1 * base and temporaries(8, 512) <= 1.1 * base
    assert temporaries(2, 2048, plain) > 2 * temporaries(2, 512, plain)


def test_shapes_that_would_broadcast_are_refused():
    x, table, targets, weight = inputs()
    for bad in ((x, table.T, targets, weight), (x, table, targets[:, :1], weight), (x, table, targets, weight[:1])):
        with pytest.raises(ValueError, match="do not fit together"):
            cross_entropy(*bad)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    script = """
        import jax, numpy as np
        from rmjax.sharding import make_mesh, named
        from test_cross_entropy import cross_entropy, inputs, weighted

        given = inputs(b=8, t=37, d=16, v=104)
        expected = jax.tree.leaves(weighted(cross_entropy, chunk=16)(*given))
        rows = ("data", "fsdp")
        for sizes in ((1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 1, 8)):
            mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)))
            with jax.set_mesh(mesh):
                placed = [named(mesh, rows), named(mesh, "tensor", "fsdp"), named(mesh, rows), named(mesh, rows)]
                run = weighted(cross_entropy, chunk=16)
                arrays = jax.device_put(given, tuple(placed))
                found = jax.block_until_ready(jax.tree.leaves(run(*arrays)))
            for ours, reference in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, reference, atol=1e-5, rtol=1e-6, err_msg=str(sizes))
        print("same")
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), env.get("PYTHONPATH", "")])
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-3000:]
