"""What a compiled step needs on hardware that is not here: memory, what it sends, and the time it takes at least.

    compute   FLOPs of a step (flops.py, "hardware") / devices / peak
    memory    bytes read and written / bandwidth: parameters and optimizer state once each, by the update; and in each
              micro-batch the layers' weights, read forward and backward, and what is kept of every token for the
              backward pass, written and read
    network   bytes that a device sends / its links (topology.py), summed over the collectives of the compiled program

Peaks, bandwidths and links are those of data sheets, and nothing is lost between operations: a bound, which real steps
miss by half or more. Recomputed operations are not in it.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rmjax import sharding
from rmjax.batches import prepare
from rmjax.batches.groups import Group
from rmjax.batches.prepare import Split
from rmjax.evaluate import benchmarks
from rmjax.hardware import flops, memory, topology
from rmjax.hardware.collectives import Collective, collectives
from rmjax.inference import parameters
from rmjax.inference.parameters import AbstractModel
from rmjax.models import heads, hf
from rmjax.models.config import parameter_count
from rmjax.train import questions
from rmjax.train.step import Program

STEPS = 4  # whose FLOPs are counted, from the first on


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of a device's memory; see the module.

    Attributes:
        state: parameters and optimizer state.
        weights: of the layers, in the compute dtype, as the device multiplies with them.
        kept: for the backward pass of a micro-batch.
    """

    state: int
    weights: int
    kept: int
    micro: int

    @property
    def bytes(self) -> int:
        """Read and written in a step."""
        return 2 * self.state + self.micro * 2 * (self.weights + self.kept)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in a step, and how fast it can.

    Attributes:
        flops: floating-point operations.
        peak: of them in a second.
        traffic: bytes read and written.
        bandwidth: of them in a second.
        network: seconds of sending.
    """

    flops: float
    peak: float
    traffic: Traffic
    bandwidth: float
    network: float

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Of computing, of memory, of the network, each alone."""
        return self.flops / self.peak, self.traffic.bytes / self.bandwidth, self.network


def target(config: ConfigDict, name: str) -> tuple[ConfigDict, list[Any] | None, int]:
    """What the hardware of a dry run changes of a run.

    Args:
        name: of the hardware (topology.py); "" is what is here.

    Returns:
        The config, whose `init_from` is a directory, with or without the weights: they are not read. The devices for
        the mesh, None for those that are here. Bytes of each, 0 for what it reports itself.

    Raises:
        ValueError: hardware that is not known, or data or a model that cannot be had; says what is enough.
        RuntimeError: its compiler is not installed.
    """
    if not name:
        return config, None, 0
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is neither needed nor occupied
    devices, config = topology.devices(name), config.copy_and_resolve_references()
    try:
        prepare.check_sources(config, benchmarks.sources_of(config.eval.benchmarks))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}. For --topology a few rows of the same form and length are enough: --config.data.train=FILE "
            "--config.data.validation="
        ) from error
    try:
        if config.model.init_from:
            config.model.init_from = str(hf.resolve(config.model.init_from, weights=False))
    except ValueError as error:
        raise ValueError(
            f"{error}. For --topology a directory with the model's config.json and tokenizer is enough "
            "(--config.model.init_from=DIR): no weights are read"
        ) from error
    return config, devices, topology.memory(name)


def report(name: str, config: ConfigDict, model: AbstractModel, program: Program, train: Split) -> list[str]:
    """What a compiled step needs of the hardware, in lines."""
    mesh = model.mesh
    devices: list[Any] = mesh.devices.flatten().tolist()
    found, unknown = collectives(program.step.as_text(), mesh.size)
    links = {group: topology.link(name, [devices[i] for i in group]) for group in {x.group for x in found}}
    work = Work(
        flops=step_flops(model, *first_groups(config, model, train)) / mesh.size,
        peak=cast(float, flops.peak(devices[0].device_kind)),
        traffic=traffic(config, model, program, train),
        bandwidth=topology.bandwidth(name),
        network=sum(x.times * x.sent / links[x.group] for x in found),
    )
    lines = [f"\ncompiled for {name}, {devices[0].device_kind}; of each device:", *memory_lines(name, program)]
    lines += ["collectives of a step:", *collective_lines(found, links)]
    if unknown:
        lines.append(f"  {unknown} loops send something, but not how often: counted once")
    return [*lines, *time_lines(work, train.plan.steps)]


def clock(seconds: float) -> str:
    """A duration for people: '1.52 s', '20.1 ms', '3.4 us'."""
    scale, unit = next((x for x in ((1, "s"), (1e3, "ms")) if seconds * x[0] >= 1), (1e6, "us"))
    return f"{seconds * scale:.3g} {unit}"


def time_lines(work: Work, steps: int) -> list[str]:
    """How long a step takes at least, with the formulae; and as many steps."""
    size, used, seconds = memory.size, work.traffic, work.seconds
    read = f"2 x {size(used.state)} state + {used.micro} x 2 x ({size(used.weights)} weights + {size(used.kept)} kept)"
    how = {
        "compute": f"{work.flops:.3g} FLOPs / {work.peak / 1e12:,.0f} TFLOP/s",
        "memory": f"({read}) / {work.bandwidth / 1e9:,.0f} GB/s",
        "network": "bytes sent / links, summed over the collectives",
    }
    least, most = max(seconds), sum(seconds)
    return [
        "a step takes at least (an estimate from data sheets; see rmjax/train/dry_run.py):",
        *(f"  {what:8}{clock(s):>10}   {formula}" for s, (what, formula) in zip(seconds, how.items())),
        f"  {'step':8}{clock(least):>10}   if all three overlap, {clock(most)} if nothing does; {steps:,} steps: "
        f"{least * steps / 3600:.3g} to {most * steps / 3600:.3g} hours at least",
    ]


def memory_lines(name: str, program: Program) -> list[str]:
    """The table of what a device holds."""
    fixed, temporary = memory.program_bytes(program.step)
    params, opt = (sharding.bytes_per_device(program.state[part]) for part in ("params", "opt"))
    all_of_it = topology.memory(name)
    free = all_of_it - fixed - temporary
    rows = {
        "parameters": params,
        "optimizer state": opt,
        "batch and others": fixed - params - opt,
        "temporaries": temporary,
        "headroom": free,
    }
    lines = [f"  {what:18}{memory.size(size):>12}" for what, size in rows.items()]
    return [*lines[:-1], f"{lines[-1]} of {memory.size(all_of_it)} ({free / all_of_it:.1%})"]


def collective_lines(found: list[Collective], links: dict[tuple[int, ...], float]) -> list[str]:
    """The table of what a device sends in a step: one line for each kind and size of group."""
    if not found:
        return ["  none"]
    kinds: dict[tuple[str, int], list[Collective]] = collections.defaultdict(list)
    for x in found:
        kinds[x.kind, len(x.group)].append(x)
    lines = [f"  {'':30}{'times':>8}{'sent by a device':>20}{'at least':>14}"]
    for (kind, size), several in sorted(kinds.items(), key=lambda item: -sum(x.times * x.sent for x in item[1])):
        sent = sum(x.times * x.sent for x in several)
        seconds = sum(x.times * x.sent / links[x.group] for x in several)
        times = sum(x.times for x in several)
        who = kind if kind == "collective-permute" else f"{kind} over {size}"
        lines.append(f"  {who:30}{times:8,}{memory.size(sent):>20}{clock(seconds):>14}")
    return lines


def traffic(config: ConfigDict, model: AbstractModel, program: Program, train: Split) -> Traffic:
    """What a device reads and writes in a step."""
    mesh, params = model.mesh, parameters.model_params(model.plain.shapes)
    tensor = mesh.shape["tensor"]
    platform = mesh.devices.flat[0].platform
    item = jnp.dtype(heads.compute_dtype(config.model.compute_dtype, platform)).itemsize
    rows = train.shape.rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    tokens = rows * train.shape.tokens
    return Traffic(
        state=sum(sharding.bytes_per_device(program.state[part]) for part in ("params", "opt")),
        weights=parameter_count(params)[1] * item // tensor,
        kept=memory.kept(model.config, program.remat) * (model.config.layers - 1) * tokens * item // tensor,
        micro=train.shape.micro,
    )


def first_groups(config: ConfigDict, model: AbstractModel, train: Split) -> tuple[list[Group], int]:
    """The groups of the first `STEPS` steps, or of as many as there are, and their number.

    Of a run that draws its own they are of half the tokens that they may have, and the drawing itself is not in them.
    """
    steps = min(STEPS, train.plan.steps)
    numbers = [int(i) for step in range(steps) for i in np.concatenate(train.plan.rows(step))]
    asked = [train.groups.group(i) for i in numbers]
    if model.objective.draws:
        return [group for question in asked for group in questions.imagined(config, question)], steps
    return asked, steps


def step_flops(model: AbstractModel, chosen: Sequence[Group], steps: int) -> float:
    """FLOPs of a step on all devices, the mean of so many that have these groups."""
    params = parameters.model_params(model.plain.shapes)
    trees = [group.tree for group in chosen]
    tokens = np.array([len(tree) for tree in trees])
    scored = np.array([len(tree.end) for tree in trees])
    if "score" not in params:  # a language model: every token whose next one is learnt
        scored = np.array([np.count_nonzero(group.labels["loss_weight"]) for group in chosen])

    def pairs(window: int | None) -> np.ndarray:
        seen = (tree.positions.astype(np.int64) + 1 for tree in trees)  # a token sees its path, itself included
        return np.array([(x if window is None else np.minimum(x, window)).sum() for x in seen])

    found = flops.hardware(model.config, params, tokens, scored, pairs, model.flops_each)
    return float(found.sum() / steps)
