"""Compiled for TPUs that are not here: the kernels of attention, and whole steps of the shipped configs."""

import dataclasses
import functools
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import objectives, sharding
from rmjax.batches import prepare
from rmjax.batches.random_groups import RandomGroups
from rmjax.config import filled
from rmjax.hardware import memory, topology
from rmjax.inference.parameters import abstract_model
from rmjax.kernels.tree_attention import block_of, tree_attention
from rmjax.kernels.visible import visible
from rmjax.train import drawing, dry_run, questions
from rmjax.train.step import compile_program

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, XLA's compiler for TPUs, is not installed"
)
needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="the CUDA plugin of JAX, XLA's compiler for GPUs, is not installed",
)
CONFIGS = Path(__file__).parents[2] / "configs"


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
        from rmjax.hardware import topology
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
    assert sum(memory.program_bytes(copy(int(0.99 * topology.memory(name))))) == pytest.approx(
        0.99 * topology.memory(name), rel=1e-3
    )
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


SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
REAL = {64: {"heads": (28, 4), "window": True}, 128: {"heads": (28, 4)}, 256: {"heads": (16, 8), "softcap": 50.0}}


def of_a_release(case, in_ci=False):
    """A case that CI leaves out: compilers take minutes, and kernels, models, configs and the lock alone change it."""
    return pytest.param(*case, marks=pytest.mark.slow if in_ci else pytest.mark.release)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[
            of_a_release((name, {"width": h} | REAL[h]), name == "v5p:2x2x1" and h == 128)
            for name in SLICES
            for h in REAL
        ],
        of_a_release(("v5p:2x2x1", {"width": 128, "heads": (64, 2)})),  # 32 heads share one: the largest blocks
        of_a_release(("v5p:2x2x1", {"width": 256, "heads": (16, 8), "dtype": jnp.float32})),
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

# What config.json of the checkpoints says: hidden, mlp, layers, heads, key/value heads, vocabulary.
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers")
KEYS += ("num_attention_heads", "num_key_value_heads", "vocab_size")
QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
LLAMA = {"model_type": "llama", "rope_theta": 5e5, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN2
    | dict(zip(KEYS, (896, 4864, 24, 14, 2, 151936)))
    | {"tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B-Instruct": QWEN2 | dict(zip(KEYS, (3584, 18944, 28, 28, 4, 152064))),
    "Qwen/Qwen3-8B": QWEN2
    | dict(zip(KEYS, (4096, 12288, 36, 32, 8, 151936)))
    | {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960},
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA | dict(zip(KEYS, (8192, 28672, 80, 64, 8, 128256))),
    "google/gemma-2-9b-it": {"model_type": "gemma2", "head_dim": 256, "max_position_embeddings": 8192}
    | dict(zip(KEYS, (3584, 14336, 42, 16, 8, 256000))),
    "google/gemma-3-12b-it": {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 1024}
    | dict(zip(KEYS, (3840, 15360, 48, 16, 8, 262208)))
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 131072},
}
# Of the groups of each objective's config: mean tokens of a tree, responses, scored tokens.
GROUPS = {
    "bradley_terry": (1200, 2, 2),
    "pairwise": (4000, 2, 2),
    "pointwise": (650, 1, 1),
    "prm": (300, 1, 8),
    "sft": (900, 1, 1),
    "grpo": (1500, 2, 2),
}


def large(path):
    """A config of one of MODELS, and the hardware that its docstring names."""
    names = re.findall(r"--topology=(\w+:\w+)", re.search(r"Hardware: ([^.;]*)", path.read_text())[1])
    return filled(runpy.run_path(str(path))["get_config"]()), names


CASES = [
    (path.stem, name) for path in sorted(CONFIGS.glob("*.py")) if "tiny" not in path.stem for name in large(path)[1]
]


class Learnt(RandomGroups):
    """Pairs in which a language model learns a twentieth of the tokens."""

    def group(self, index):
        group = super().group(index)
        return dataclasses.replace(group, labels={"loss_weight": np.arange(len(group.tree)) % 20 == 0})


def compile_config(config, name):
    """The step of a config as `--dry_run --topology` compiles it, with groups of random tokens for its data."""
    mesh = sharding.make_mesh(config.mesh, topology.devices(name))
    objective = objectives.make(config.objective)
    model = abstract_model(config, objective, mesh, MODELS[config.model.init_from])
    tokens, responses, ends = GROUPS[config.objective.name]
    groups = Learnt(np.random.default_rng(0).integers(tokens // 6, tokens // 2, (4096, 3)), model.config.vocab)
    groups.fields, groups.responses = objective.task.fields, np.full(len(groups), responses)
    groups.ends, groups.longest = np.full(len(groups), ends), groups.conversations.max(1)
    ask = functools.partial(questions.plan_questions, config, groups) if objective.draws else None
    plan = prepare.plan_training(config, groups, ask)
    limit = topology.memory(name)
    program, split, line = compile_program(config, model, groups, plan, limit)
    if objective.draws:
        line += "".join(f"\n{said}" for said in compile_sampler(config, model, groups, program, limit))
    return program, split, model, line


def compile_sampler(config, model, groups, program, limit):
    """What the sampler of a config needs beside what training keeps; it must fit."""
    sampler = drawing.make_sampler(config, model, SimpleNamespace(stops={0}), groups, program.state, limit)
    kept = sum(sharding.bytes_per_device(program.state[part]) for part in ("params", "opt"))
    programs = drawing.compiled(sampler, model, groups)
    for part in programs.values():
        assert kept + sum(memory.program_bytes(part)) < 0.95 * limit
    return drawing.describe_sampler(sampler, programs, limit)


def fits(config, name):
    """Asserts that the step fits with 5 % to spare and runs our kernels; prints what was chosen."""
    program, split, model, line = compile_config(config, name)
    assert sum(memory.program_bytes(program.step)) < 0.95 * topology.memory(name)
    report = dry_run.report(name, config, model, program, split)
    print(line, *report, sep="\n")
    return program.step


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_names_its_hardware(path):
    _, names = large(path)
    if "tiny" in path.stem:
        assert "Hardware: any CPU" in path.read_text() and not names
    else:
        assert {name.partition(":")[0] in topology.TPUS for name in names} == {True, False}, "a GPU and a TPU"


@pytest.fixture
def least_effort():
    """Compiles three times as fast; what a step needs is within 5 % (bt_qwen7b on v5p:2x2x2: 47.1 GiB, else 49.2)."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


def on(devices):
    """The configs of such devices, of which CI compiles the first."""
    cases = [case for case in CASES if case[1].partition(":")[0] in devices]
    return [of_a_release(case, case[0] == "bt_qwen7b") for case in cases]


@needs_libtpu
@pytest.mark.parametrize(("config", "name"), on(topology.TPUS))
def test_a_config_fits_the_tpu_it_names(config, name, least_effort):
    assert set(kernels(fits(large(CONFIGS / f"{config}.py")[0], name))) == set(THREE)


@needs_cuda
@pytest.mark.parametrize(("config", "name"), on(topology.GPUS))
def test_a_config_fits_the_gpu_it_names(config, name):
    """In its own process, as above."""
    code = f"import test_topology as t; t.fits(t.large(t.CONFIGS / '{config}.py')[0], '{name}')"
    path = os.pathsep.join((str(CONFIGS.parent), str(Path(__file__).parent), str(Path(__file__).parents[1])))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
