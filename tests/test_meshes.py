"""Any mesh gives the numbers of one device: 8 fake devices in every factorisation, and sizes they do not divide."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import loader, prepare
from rmjax.batches.random_groups import RandomGroups
from rmjax.inference import parameters
from rmjax.inference.parameters import abstract_model
from rmjax.kernels import tree_attention
from rmjax.models import heads
from rmjax.train import optim
from rmjax.train.step import build_program

STEPS = 3
START = functools.cache(lambda model: jax.device_get(jax.jit(lambda: heads.init(model, 1))()))
EVEN = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
# Neither 4 nor 8 divides any of them.
UNEVEN = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 6, "num_key_value_heads": 3}
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]


def train(sizes, *, rows=8, vocabulary=96, base="", **shape):
    """Losses of a few steps [STEPS] and the parameters after them, by name, on data x fsdp x tensor devices.

    `base` is what a frozen one is kept as; "" trains all parameters.
    """
    config = config_lib.demo()
    if base:
        config.lora.rank, config.lora.base = 4, base
        config = config_lib.filled(config)
    config.model.tokenizer = config.data.train = "random"
    config.model.remat = "q,k,v,attention,mid"
    config.plan.row_tokens, config.plan.rows_per_step, config.duration = 64, rows, f"{STEPS} steps"
    # Adam divides by the size of the gradient: without this, rounding decides where a parameter with none goes.
    config.optim.eps = 1e-4
    values = {"vocab_size": vocabulary, **config.model.scratch.to_dict(), **shape}
    with config.unlocked():
        config.model.scratch.update(values)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[: int(np.prod(sizes))])
    model = abstract_model(config, objectives.make(config.objective), mesh, values)
    lengths = np.random.default_rng(0).integers(4, 12, (200, 3))
    groups = RandomGroups(lengths, vocabulary)
    plan = prepare.plan_training(config, groups)
    batches = prepare.batch_shape(groups, plan, sizes[0] * sizes[1], 4)
    with jax.set_mesh(mesh):
        program = build_program(config, model, plan)
        if base:
            params, _ = parameters.init_params(config, model)
        else:
            params = jax.device_put(START(model.config), program.shardings["params"])
        tx = optim.make(config.optim, config.seed)
        trained, _ = parameters.split(config, params)
        opt = jax.jit(tx.init, out_shardings=program.shardings["opt"])(trained)
        step = program.lower(batches, mesh).compile()
        everywhere = sharding.named(mesh)
        state, halted, losses = {"params": params, "opt": opt}, jax.device_put(np.bool_(False), everywhere), []
        for n, batch in enumerate(loader.batches(groups, plan, batches, sharding.named(mesh, sharding.BATCH))):
            number = jax.device_put(np.int32(n), everywhere)
            state, sums, halted = jax.block_until_ready(step(state, batch, number, halted))
            losses.append(np.divide(*jax.device_get(sums["loss"])))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state["params"]))
    placed = jax.tree.leaves(jax.tree.map(lambda x: x.sharding.shard_shape(x.shape) != x.shape, state))
    return np.array(losses), {sharding.path_name(path): x for path, x in leaves}, sum(placed)


def same(mesh, **options):
    """Asserts that a mesh trains as one device does."""
    losses, params, split = train(mesh, **options)
    alone, expected, _ = ALONE(tuple(options.items()))
    assert np.abs(losses - alone).max() <= 1e-5, (mesh, losses, alone)
    worst = max((np.abs(params[name] - expected[name]).max(), name) for name in expected)
    assert worst[0] <= 1e-5, (mesh, worst)
    whole = mesh[0] == 8 or (8 in mesh and options["hidden_size"] % 8)
    assert (split == 0) == bool(whole), "parameters and moments should be split wherever the mesh divides them"
    print(mesh, options, "losses", losses.round(4), "worst", worst)


ALONE = functools.cache(lambda options: train((1, 1, 1), **dict(options)))
PARTS = {
    "kinds": lambda: [same(mesh, **EVEN) for mesh in ((8, 1, 1), (1, 8, 1), (2, 2, 2))],
    "uneven_kinds": lambda: [same(mesh, vocabulary=97, **UNEVEN) for mesh in ((1, 2, 4),)],
    "few_rows_kinds": lambda: [same(mesh, rows=3, **EVEN) for mesh in ((8, 1, 1),)],
    "adapters_kinds": lambda: [same(mesh, base="nf4", **EVEN) for mesh in ((2, 2, 2),)],
    "adapters": lambda: [
        same(mesh, base=base, **EVEN)
        for base in ("float32", "int8", "nf4")
        for mesh in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2))
    ],
    "every_mesh": lambda: [same(mesh, **EVEN) for mesh in MESHES],
    "uneven": lambda: [same(mesh, vocabulary=97, **UNEVEN) for mesh in ((1, 8, 1), (1, 2, 4), (1, 1, 8))],
    "few_rows": lambda: [same(mesh, rows=3, **EVEN) for mesh in ((8, 1, 1), (1, 4, 2))],
}


@pytest.mark.parametrize(
    ("parts", "count"),
    [
        pytest.param(
            ("kinds", "uneven_kinds", "few_rows_kinds", "adapters_kinds"), 3 + 1 + 1 + 1, marks=pytest.mark.slow
        ),
        pytest.param(
            ("every_mesh", "uneven", "few_rows", "adapters"), len(MESHES) + 3 + 2 + 12, marks=pytest.mark.release
        ),
    ],
)
def test_a_mesh_trains_as_one_device_does(parts, count):
    """data x fsdp x tensor of 8 devices; then heads, vocabulary, mlp and width that they do not divide; then 3 rows."""
    # Compiling is nearly all of the time, and what LLVM optimizes changes no number beyond rounding.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, __file__, *parts],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("losses") == count


def test_there_are_ten_meshes_of_eight():
    assert len(MESHES) == 10 and (1, 8, 1) in MESHES and (2, 2, 2) in MESHES


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "tensor", "advice"),
    [(28, 4, 4, 0), (28, 4, 7, 0), (28, 4, 14, 0), (64, 8, 16, 0), (28, 4, 8, 7), (14, 2, 4, 2), (6, 3, 8, 6)],
)
def test_which_heads_can_be_split(query_heads, kv_heads, tensor, advice):
    """7 and 14 split 4 key/value heads by repeating them: 28 of them, one for each query head."""
    why = tree_attention.whole_heads(query_heads, kv_heads, tensor)
    assert (f"config.mesh.tensor={advice} splits it" in why) if advice else not why


if __name__ == "__main__":
    for part in sys.argv[1:]:
        PARTS[part]()
