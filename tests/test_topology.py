"""Compiled for TPUs that are not here: the kernels of attention, and whole steps of the shipped configs."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import memory, objectives, sharding, topology
from rmjax.data.loader import Shape
from rmjax.data.packing import Plan
from rmjax.kernels.tree_attention import block_of, tree_attention
from rmjax.kernels.visible import visible
from rmjax.models import config as model_config
from rmjax.step import abstract_model, build_program

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, XLA's compiler for TPUs, is not installed"
)
needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="the CUDA plugin of JAX, XLA's compiler for GPUs, is not installed",
)
CONFIGS = Path(__file__).parents[1] / "configs"


def kernels(compiled):
    """The names of the Pallas kernels in a compiled program."""
    calls = re.findall(r"%(\S+) = .* custom-call\(.*custom_call_target=\"tpu_custom_call\"", compiled.as_text())
    return sorted(call.partition(".")[0] for call in calls)


# -------------------------------------------------------------------------------- names


@needs_libtpu
@pytest.mark.parametrize(("name", "count"), [("v5e:1x1", 1), ("v5e:2x4", 8), ("v5p:2x2x4", 16), ("v6e:4x4", 16)])
def test_a_slice_has_its_chips(name, count):
    devices = topology.devices(name)
    assert [device.platform for device in devices] == ["tpu"] * count


@pytest.mark.parametrize("name", ["v5e", "v5e:8", "v5e:2x", "v5e:3x4", "v5p:2x4", "v6e:0x2", "v6e:4x4x4"])
def test_a_slice_that_cannot_be_is_named(name):
    with pytest.raises(ValueError, match=rf"topology '{name}': expected chips like 2x"):
        topology.devices(name)


@needs_cuda
def test_gpus_stand_in_hosts_of_eight():
    """In its own process, since the plugin loads without a GPU only where JAX is told so before it starts."""
    code = """if True:
        from rmjax import topology
        for name, count, hosts in (("h200:1", 1, 1), ("a100:8", 8, 1), ("h100:64", 64, 8)):
            devices = topology.devices(name)
            assert [device.platform for device in devices] == ["gpu"] * count
            assert len({device.process_index for device in devices}) == hosts
    """
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)


@pytest.mark.parametrize("name", ["h200", "h200:0", "h200:1x8", "h100:12", "a100:-8"])
def test_a_number_of_gpus_that_cannot_be_is_named(name):
    with pytest.raises(ValueError, match=rf"topology '{name}': expected 1 to 8 GPUs or a multiple of 8"):
        topology.devices(name)


def test_a_device_that_is_not_known_is_named():
    for function in (topology.devices, topology.memory):
        with pytest.raises(ValueError, match=r"topology 'tpu9:2x2' is not known; expected one of h200.* v5e"):
            function("tpu9:2x2")


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_memory_is_what_the_compiler_has(name):
    one = jax.sharding.SingleDeviceSharding(topology.devices(name)[0])
    copy = lambda size: jax.jit(jnp.copy).lower(jax.ShapeDtypeStruct((size // 2,), jnp.int8, sharding=one)).compile()
    copy(int(0.99 * topology.memory(name)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        copy(int(1.01 * topology.memory(name)))


# -------------------------------------------------------------------------------- kernels


def compile_attention(
    name, *, width, heads=(4, 2), length=512, dtype=jnp.bfloat16, window=False, softcap=None, of=None
):
    """Output and gradients of attention (or `of` it), rows over one axis of a 2 x 2 slice and heads over the other."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, topology.devices(name))
    put = lambda dtype, *shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, *spec))
    n, m = heads
    arrays = [put(dtype, 4, length, x, width, spec=("data", None, "tensor")) for x in (n, m, m, n)]
    spans = [put(jnp.int32, 4, length, spec=("data",))] * 3

    def gradients(q, k, v, dout, spans, window):
        seen = visible(*spans, window, block=block_of("tpu", length, width))
        attend = lambda q, k, v: tree_attention(q, k, v, seen, form="tpu", softcap=softcap)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    with jax.set_mesh(mesh):
        window = put(jnp.int32, spec=()) if window else None
        return jax.jit(of or gradients).lower(*arrays, spans, window).compile()


THREE = ["tree_attention_dkv", "tree_attention_dq", "tree_attention_forward"]


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v5e:2x2", {"width": 64}),
        ("v5p:2x2x1", {"width": 128, "window": True}),
        ("v6e:2x2", {"width": 256, "softcap": 50.0}),
        ("v5e:2x2", {"width": 128, "length": 60}),  # one short block
        ("v5e:2x2", {"width": 64, "length": 20, "dtype": jnp.float32}),
    ],
)
def test_kernels_compile(name, options):
    compiled = compile_attention(name, **options)
    assert kernels(compiled) == THREE
    assert not re.search(r"all-(gather|to-all|reduce)\(", compiled.as_text())  # each device has what it needs


REAL = {64: {"heads": (28, 4), "window": True}, 128: {"heads": (28, 4)}, 256: {"heads": (16, 8), "softcap": 50.0}}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {"width": h} | REAL[h]) for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2") for h in REAL],
        ("v5p:2x2x1", {"width": 128, "heads": (64, 2)}),  # 32 heads share one: the largest blocks
        ("v5p:2x2x1", {"width": 256, "heads": (16, 8), "dtype": jnp.float32}),
    ],
)
def test_kernels_of_real_models_compile(name, options):
    assert kernels(compile_attention(name, **options)) == THREE


@needs_libtpu
def test_saved_residuals_spare_the_second_forward_pass():
    def gradient(policy):
        def loss(q, k, v, dout, spans, window):
            seen = visible(*spans, window, block=64)
            layer = lambda q, _: (tree_attention(q, k, v, seen, form="tpu"), None)
            return (jax.lax.scan(jax.checkpoint(layer, policy=policy), q, None, length=2)[0] * dout).sum()

        return kernels(compile_attention("v5e:2x2", width=64, length=64, of=jax.grad(loss, (0, 1, 2))))

    policies = jax.checkpoint_policies
    assert gradient(policies.save_only_these_names("attention", "lse")) == THREE
    assert gradient(policies.nothing_saveable) == [*THREE, "tree_attention_forward"]


# -------------------------------------------------------------------------------- whole steps

# Of Qwen2.5-0.5B-Instruct and Qwen2.5-7B-Instruct.
SIZES = {
    "bt_qwen0_5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "bt_qwen7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
}
FAMILY = {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}


def compile_step(name, config_name, settings):
    """A step of two micro-batches of one row a device."""
    config = runpy.run_path(str(CONFIGS / f"{config_name}.py"))["get_config"]()
    config.update_from_flattened_dict(settings)
    mesh = sharding.make_mesh(config.mesh, topology.devices(name))
    objective = objectives.make(config.objective)
    model = model_config.from_hf(FAMILY | SIZES[config_name])
    graph, params = abstract_model(config, model, objective, mesh)
    rows = 2 * mesh.size
    plan = Plan(
        groups=np.arange(8 * rows, dtype=np.int32),
        row_start=np.arange(rows + 1) * 8,
        step_start=np.array([0, rows]),
        epoch_steps=(1,),
        steps_per_epoch=1,
        rows_per_step=rows,
        row_tokens=config.plan.row_tokens,
        fill=1.0,
        max_groups=16,
        max_ends=32,
    )
    shape = Shape(2, mesh.size, plan.row_tokens, 16, 32, 2, tuple(objective.task.fields.items()))
    with jax.set_mesh(mesh):
        return build_program(config, graph, objective, params, mesh, plan).lower(shape, mesh).compile()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "settings"),
    [
        ("v5e:2x4", "bt_qwen0_5b", {"model.remat": "q,k,v,attention,mid"}),
        ("v5p:2x2x4", "bt_qwen7b", {"model.remat": "q,k,v,attention,mid"}),
        ("v6e:4x4", "bt_qwen7b", {"model.remat": "attention"}),
    ],
)
def test_a_step_fits_the_device(name, config, settings):
    compiled = compile_step(name, config, settings)
    assert sum(memory.of(compiled)) < memory.SHARE * topology.memory(name)
    assert set(kernels(compiled)) == set(THREE)
