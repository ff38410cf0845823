"""Which policy is taken: the cheapest that fits, by the account of the real compiler."""

import jax
import jax.numpy as jnp
import pytest

from rmjax.hardware import memory
from rmjax.models.config import from_hf

SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
MODEL = from_hf({"model_type": "qwen2", **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2})


def layers(remat, x):
    """The gradient of a stack of layers that keeps or recomputes what it squares."""
    body = lambda x, _: (jnp.tanh(x @ jnp.ones((256, 256))) ** 2, None)
    body = jax.checkpoint(body) if remat == "full" else body
    return jax.grad(lambda x: jax.lax.scan(body, x, length=32)[0].sum())(x)


def compiled(remat, rows):
    return jax.jit(layers, static_argnums=0).lower(remat, jnp.ones((rows * 64, 256))).compile()


def test_the_cheapest_policy_that_fits_is_taken():
    needs = {remat: sum(memory.program_bytes(compiled(remat, 4))) for remat in ("none", "full")}
    assert needs["full"] < 0.8 * needs["none"]  # or the test would show nothing
    choices = [("none", 4), ("full", 4)]
    for most, expected in ((needs["none"] * 1.1, "none"), (needs["none"], "full"), (needs["full"] * 1.1, "full")):
        fit = memory.settle(iter(choices), compiled, lambda *_: 0, most)
        assert (fit.remat, fit.micro_rows) == (expected, 4)
        assert memory.size(needs[expected]) in fit.line and memory.size(most) in fit.line
    with pytest.raises(ValueError, match=r"a step needs .* of a device that has .*remat='full'.*use more devices"):
        memory.settle(iter(choices), compiled, lambda *_: 0, needs["full"])


def test_what_cannot_fit_is_not_compiled():
    tried = []

    def compile_step(remat, rows):
        tried.append((remat, rows))
        return compiled(remat, rows)

    least = lambda remat, rows: {"none": 2**40}.get(remat, 0)
    memory.settle(iter([("none", 4), ("full", 4)]), compile_step, least, 2**30)
    assert tried == [("full", 4)]
    with pytest.raises(ValueError, match=r"needs 1024\.00 GiB of a device that has 1\.00 GiB"):
        memory.settle(iter([("none", 4)]), compile_step, least, 2**30)


def test_a_compiler_that_refuses_is_a_step_that_does_not_fit():
    def compile_step(remat, rows):
        if remat == "none":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
        if remat == "q":
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
        return compiled(remat, rows)

    fit = memory.settle(iter([("none", 4), ("full", 4)]), compile_step, lambda *_: 0, 2**30)
    assert fit.remat == "full"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        memory.settle(iter([("q", 4)]), compile_step, lambda *_: 0, 2**30)


def test_recomputing_comes_after_smaller_micro_batches():
    def listed(*choice):
        return list(memory.candidates(*choice))

    auto = listed("auto", 0, 4096, 100)
    assert auto[:3] == [(memory.POLICIES[0], 4), (memory.POLICIES[0], 2), (memory.POLICIES[1], 4)]
    assert auto[-3:] == [("full", 4), ("full", 2), ("full", 1)]
    assert listed("auto", 3, 4096, 100) == [(policy, 3) for policy in memory.POLICIES]
    assert listed("full", 0, 512, 8) == [("full", 8), ("full", 4), ("full", 2), ("full", 1)]
    assert listed("full", 0, 8192, 7)[0] == ("full", 1) and listed("full", 0, 4096, 6)[0] == ("full", 3)
    assert listed("q,mid", 0, 32_768, 8) == [("q,mid", 1)]


def test_policies_keep_less_and_less():
    kept = [memory.kept(MODEL, remat) for remat in ("none", *memory.POLICIES)]
    assert kept == sorted(kept, reverse=True)
    assert memory.kept(MODEL, "gate") == 32 + 64
