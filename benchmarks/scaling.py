"""How compile time and memory of a device go with the number of devices, for hardware that is not here.

    JAX_PLATFORMS=cpu python benchmarks/scaling.py v5p:2x2x2 v5p:2x2x4 v5p:4x4x4 v5p:4x8x8
    ... --models=7b,70b --effort=-1     compiled with less effort: three times as fast, some per cent less memory

Prints a Markdown table. Every device has a row of 4,096 tokens in each of two micro-batches and keeps q, k, v and
attention for the backward pass; all devices are on the mesh axis `fsdp`. Needs rmjax[tpu], or rmjax[cuda] for
h200:8 and the like; no accelerator.
"""

import argparse
import time

import jax
import numpy as np

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import prepare
from rmjax.batches.random_groups import RandomGroups
from rmjax.hardware import memory, topology
from rmjax.hardware.collectives import collectives
from rmjax.inference.parameters import abstract_model
from rmjax.train.step import compile_program

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS = {  # Qwen2.5-7B and Llama-3.3-70B
    "7b": {"model_type": "qwen2", "vocab_size": 152064, **dict(zip(KEYS, (3584, 18944, 28, 28, 4)))},
    "70b": {"model_type": "llama", "vocab_size": 128256, **dict(zip(KEYS, (8192, 28672, 80, 64, 8)))},
}
COLUMNS = ("model", "hardware", "devices", "state, GiB", "temporaries, GiB", "of memory", "sent, GiB", "compile, s")


def measure(name: str, values: dict, hardware: str) -> list[str]:
    """A line of the table: what a device holds and sends in a step, and how long it took to compile."""
    config = config_lib.defaults()
    config.model.remat, config.plan.micro_rows = "q,k,v,attention", 1
    mesh = sharding.make_mesh(config.mesh, topology.devices(hardware))
    config.plan.rows_per_step = 2 * mesh.size  # two micro-batches, since nearly every run has several
    config.duration = "2 steps"
    model = abstract_model(config, objectives.make(config.objective), mesh, values)
    groups = RandomGroups(np.full((40 * mesh.size, 3), 400), model.config.vocab)
    plan = prepare.plan_training(config, groups)
    limit, begun = topology.memory(hardware), time.perf_counter()
    try:
        program, *_ = compile_program(config, model, groups, plan, limit)
    except ValueError:
        return [name, hardware, str(mesh.size), "does not fit", "", "", "", f"{time.perf_counter() - begun:.0f}"]
    seconds = time.perf_counter() - begun
    fixed, temporary = memory.program_bytes(program.step)
    found, _ = collectives(program.step.as_text(), mesh.size)
    sent = sum(x.times * x.sent for x in found)
    sizes = [f"{x / 2**30:.2f}" for x in (fixed, temporary)]
    share = f"{(fixed + temporary) / limit:.0%}"
    return [name, hardware, str(mesh.size), *sizes, share, f"{sent / 2**30:.1f}", f"{seconds:.0f}"]


def main() -> None:
    """Prints the table, a line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hardware", nargs="+", help="see rmjax/hardware/topology.py")
    parser.add_argument("--models", default="7b,70b")
    parser.add_argument("--effort", type=float, default=0.0, help="of XLA, from -1 to 1")
    arguments = parser.parse_args()
    jax.config.update("jax_exec_time_optimization_effort", arguments.effort)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for name in arguments.models.split(","):
        for hardware in arguments.hardware:
            print("| " + " | ".join(measure(name, MODELS[name], hardware)) + " |", flush=True)


if __name__ == "__main__":
    main()
