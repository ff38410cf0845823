"""One config under measurement: what a run builds for it, with random groups for data; its steps, and their pieces.

`benchmark.py` is the command. Shape letters: B rows, T tokens; n groups.
"""

import collections
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import loader, packing, prepare
from rmjax.batches.groups import Groups
from rmjax.batches.loader import Shape
from rmjax.batches.random_groups import RandomGroups
from rmjax.hardware import flops, memory
from rmjax.inference import parameters
from rmjax.inference.parameters import abstract_model
from rmjax.kernels.tree_attention import block_of, choose, tree_attention
from rmjax.kernels.visible import Visible, visible
from rmjax.models import config as model_config
from rmjax.models import decoder, heads, hf
from rmjax.models.config import ModelConfig
from rmjax.runtime.progress import Progress
from rmjax.train import optim
from rmjax.train.step import Move, Program, compile_program, make_step

WARMUP = 3  # steps before those that are measured
VOCABULARY = 4096  # of a `model.scratch` that leaves its size to a tokenizer
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
# Checkpoints whose shape needs no network: regex over the hub id, and SIZES as published.
SHAPES: tuple[tuple[str, tuple[int | bool, ...]], ...] = (
    (r"Qwen/Qwen2\.5-0\.5B(-Instruct)?", (896, 4864, 24, 14, 2, 151936, True)),
    (r"Qwen/Qwen2\.5-1\.5B(-Instruct)?", (1536, 8960, 28, 12, 2, 151936, True)),
    (r"Qwen/Qwen2\.5-7B(-Instruct)?", (3584, 18944, 28, 28, 4, 152064, False)),
)


def model_values(config: ConfigDict) -> dict[str, Any]:
    """The values of config.json for `config.model`: a directory's, a known checkpoint's, or the one file from the Hub.

    Raises:
        ValueError: it cannot be had.
    """
    source = config.model.init_from
    if not source:
        return {"vocab_size": VOCABULARY, **config.model.scratch.to_dict()}
    if Path(source).is_dir():
        return hf.read_config(source)
    if sizes := next((x for pattern, x in SHAPES if re.fullmatch(pattern, source)), None):
        return {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, **dict(zip(SIZES, sizes))}
    if not hf.is_hub_id(source):
        raise ValueError(f"config.model.init_from={source!r} is no directory, and no Hub id (owner/name) either")
    try:
        return hf.read_config(Path(huggingface_hub.hf_hub_download(source, "config.json")).parent)
    except Exception as error:  # of the hub, or of the network
        raise ValueError(
            f"config.model.init_from={source!r} is no directory here, and its config.json could not be had from the "
            f"Hub ({str(error).splitlines()[0]}); give a directory that holds one, or a shape in config.model.scratch"
        ) from error


def resolved(config: ConfigDict, values: dict[str, Any], steps: int) -> ConfigDict:
    """A copy of the config that trains `steps` steps from random weights of this shape, and reads no files.

    Raises:
        ValueError: a config that no run could use either, or one that cannot be measured.
    """
    if config.objective.name != "bradley_terry":
        raise ValueError(
            f"config.objective.name={config.objective.name!r}: random pairs only have a preference; expected a config "
            "of 'bradley_terry'"
        )
    if config.debug:
        raise ValueError("config.debug compiles nothing, so there is nothing to measure; leave it out")
    config = config_lib.filled(config)
    with config.unlocked():
        config.model.init_from, config.model.scratch = "", ConfigDict(values)
    config.model.tokenizer = config.data.train = "random"
    config.data.weights = ""
    config.duration = f"{steps} steps"
    config_lib.check(config)
    return config


def make_groups(config: ConfigDict, triples: np.ndarray, steps: int, vocabulary: int) -> RandomGroups:
    """Random pairs of these lengths, over and over until an epoch has more steps than will be done.

    The last step of an epoch is part of one, and would be measured as a slow step.

    Args:
        triples: int64 [n, 3] prompt, chosen, rejected.

    Raises:
        ValueError: a tree is longer than a row.
    """
    once = RandomGroups(triples, vocabulary, config.seed)
    keys = ("row_tokens", "rows_per_step", "groups_per_step", "window")
    plan = packing.make_plan(once.lengths, once.ends, **{key: config.plan[key] for key in keys})
    repeats = -(-(steps + 2) * plan.rows_per_step // (len(plan.row_start) - 1))
    return RandomGroups(np.tile(triples, (repeats, 1)), vocabulary, config.seed)


class Work(NamedTuple):
    """What groups hold and cost: of each, float64 [n], or of several together.

    Attributes:
        tokens: of the trees.
        unshared: tokens of the conversations, each whole.
        useful: FLOPs, see flops.py.
        hardware: FLOPs, see flops.py.
    """

    pairs: Any
    tokens: Any
    unshared: Any
    useful: Any
    hardware: Any


class Side:
    """A config, built as a run builds it.

    Attributes:
        name: what it goes by in the report.
        source: where its shape is from.
        config: as it is trained.
        left_out: pairs of the file that no row can hold.
        parameters: all, and without the embedding.
        abstract, mesh, groups, plan: as in a run; `model` are the sizes.
        work: of each group.
        program, shape: after `compile`: the compiled step and what it was compiled for, the shape of its batches.
        compile_s: seconds that took, with every setting that was tried.
        compiled_bytes: what the step needs on a device by the compiler's account.
    """

    program: Program
    shape: Shape
    compile_s: float
    compiled_bytes: int
    _held: dict[str, Any]  # the state, under this name; sides may share it

    def __init__(self, name: str, config: ConfigDict, triples: np.ndarray, steps: int):
        """Plans; nothing is allocated.

        Args:
            config: of a run; what it says of data, tokenizer and weights is not read.
            triples: int64 [n, 3] prompt, chosen, rejected.

        Raises:
            ValueError: a config that cannot be used, or rows too short for any pair.
        """
        self.name, self.source = name, config.model.init_from or "config.model.scratch"
        values = model_values(config)
        self.config = resolved(config, values, WARMUP + steps)
        self.mesh = sharding.make_mesh(self.config.mesh)
        self.abstract = abstract_model(self.config, objectives.make(self.config.objective), self.mesh, values)
        self.model = self.abstract.config
        optim.check(self.config.optim, self.abstract.shapes)
        trees, row = RandomGroups(triples, self.model.vocab).lengths, self.config.plan.row_tokens
        if trees.min() > row:
            raise ValueError(
                f"no tree fits a row of {row} tokens (config.plan.row_tokens); they have {trees.min()} to {trees.max()}"
            )
        self.left_out = int((trees > row).sum())
        random = make_groups(self.config, triples[trees <= row], WARMUP + steps, self.model.vocab)
        self.groups = cast(Groups, random)  # they have all that planning and loading read
        self.plan = prepare.plan_training(self.config, self.groups)
        params = parameters.model_params(self.abstract.plain.shapes)
        self.parameters = model_config.parameter_count(params)
        useful = flops.useful(self.model, params, random.conversations, self.abstract.flops_each)
        hardware = flops.hardware(
            self.model, params, random.lengths, random.ends, random.visible_pairs, self.abstract.flops_each
        )
        self.work = Work(np.ones(len(random)), random.lengths, random.unshared, useful, hardware)

    def compile(self) -> str:
        """Compiles the step as a run does; returns what was settled on, in a line."""
        begun = time.perf_counter()
        self.program, split, line = compile_program(self.config, self.abstract, self.groups, self.plan)
        self.compile_s, self.shape = time.perf_counter() - begun, split.shape
        self.compiled_bytes = sum(memory.program_bytes(self.program.step))
        return line

    def begin(self, other: "Side | None" = None) -> None:
        """Makes the state, or shares that of another side that is alike: what it holds changes no time."""
        program = self.program
        if other is not None and other.program.state == program.state:
            self._held = other._held
        else:
            with jax.set_mesh(self.mesh):
                params, _ = parameters.init_params(self.config, self.abstract)
                tx = optim.make(self.config.optim, self.config.seed)
                trained, _ = parameters.split(self.config, params)
                opt = jax.jit(tx.init, out_shardings=program.shardings["opt"])(trained)
                self._held = {"state": {"params": params, "opt": opt}}
        rows = sharding.named(self.mesh, sharding.BATCH)
        self._ahead = loader.batches(self.groups, self.plan, self.shape, rows)
        self._batch = next(self._ahead)
        self._halted = jax.device_put(np.bool_(False), sharding.named(self.mesh))

    def start(self, number: int) -> tuple[Any, float]:
        """Starts a step, and sends the next batch while the devices compute it.

        Returns:
            What is ready when the step is done, and the seconds that the host waited for the next batch.
        """
        with jax.set_mesh(self.mesh), jax.transfer_guard("disallow"):
            n = jax.device_put(np.int32(number), sharding.named(self.mesh))
            state, sums, self._halted = self.program.step(self._held["state"], self._batch, n, self._halted)
            self._held["state"] = state
            asked = time.perf_counter()
            self._batch = next(self._ahead, self._batch)
        return sums, time.perf_counter() - asked

    def done(self, step: int) -> Work:
        """What a step holds and costs."""
        groups = np.concatenate(self.plan.rows(step))
        return Work(*(float(x[groups].sum()) for x in self.work))

    def attention_seconds(self) -> float:
        """Seconds of attention in a step: alone, in all layers, on the visibility of the next batch.

        Forward and backward, and forward once more where the remat policy recomputes it.
        """
        platform = self.mesh.devices.flat[0].platform
        dtype = heads.compute_dtype(self.config.model.compute_dtype, platform)
        form, _ = choose(self.config.model.attention, platform, self.model.head_dim, dtype)
        where = {name: x[0] for name, x in self._batch.items() if name in heads.WHERE}
        forward, both = time_attention(where, self.model, dtype, form, self.mesh)
        remat = self.program.remat
        again = remat != "none" and "attention" not in decoder.saved_names(remat)
        return self.shape.micro * (both + again * forward)

    def optimizer_seconds(self) -> float | None:
        """Seconds of a step's update alone, with gradients of 1; None where it is done in parts (`optim.state_on`)."""
        if self.config.optim.state_on == "host":
            return None
        place, shardings = sharding.named(self.mesh), self.program.shardings
        halves = make_step(self.config, self.abstract, self.plan)

        def second_half(state: Any, grads: Any, move: Move) -> tuple[Any, jax.Array]:
            params, opt = halves.update(state["params"], state["opt"], grads, move)
            return {"params": params, "opt": opt}, move.norm

        several = self.shape.micro > 1  # then gradients are added in float32
        trained, _ = parameters.split(self.config, self.abstract.shapes)
        ones = lambda: jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32 if several else x.dtype), trained)
        with jax.set_mesh(self.mesh):
            grads = jax.jit(ones, out_shardings=parameters.split(self.config, shardings["params"])[0])()
            one, rate = np.float32(1), np.float32(self.config.optim.learning_rate)
            move = Move(*(jax.device_put(x, place) for x in (one, one, rate, np.int32(0), np.bool_(True))))
            compiled = jax.jit(second_half, donate_argnums=0, out_shardings=(shardings, place))

            def once() -> Any:
                self._held["state"], done = compiled(self._held["state"], grads, move)
                return self._held["state"], done

            return median_seconds(once)


def take_turns(sides: Sequence[Side], steps: int) -> np.ndarray:
    """Does the steps, the sides one after the other, and shows how far they are.

    A step lasts from the end of the one before to its own. As in training the next one is started before that, which
    spares the devices a pause; but not on CPUs, where two steps at once would share the cores.

    Returns:
        float64 [sides, steps, 2]: seconds of each step, and those that the host waited for a batch meanwhile.
    """
    total = WARMUP + steps
    times, progress = np.zeros((len(sides), total, 2)), Progress(total)
    running: list[tuple[int, int, Any]] = []
    ahead = int(sides[0].mesh.devices.flat[0].platform != "cpu")
    last = time.perf_counter()
    for step in range(total + 1):
        for i, side in enumerate(sides):
            if step < total:
                sums, times[i, step, 1] = side.start(step)
                running.append((i, step, sums))
            while len(running) > ahead * (step < total):
                j, finished, sums = running.pop(0)
                jax.block_until_ready(sums)
                now = time.perf_counter()
                times[j, finished, 0], last = now - last, now
                if j == len(sides) - 1:
                    shown = {f"{s.name} s" if len(sides) > 1 else "s": x for s, x in zip(sides, times[:, finished, 0])}
                    progress.step(finished + 1, shown, count=int(sum(s.done(finished).pairs for s in sides)))
    progress.close()
    return times[:, WARMUP:]


def median_seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of `call`, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


def time_attention(
    where: Mapping[str, jax.Array], model: ModelConfig, dtype: str, form: str, mesh: jax.sharding.Mesh
) -> tuple[float, float]:
    """Median seconds of attention alone in all layers: forward, and forward with backward.

    Args:
        where: `positions`, `visible_from`, `visible_until`, int32 [B, T].
        model: of which the heads, their width and the layers' windows count.
        dtype: of queries, keys and values, which are random.
        mesh: over which rows and heads are split.
    """
    rows, tokens = where["positions"].shape
    block = block_of(form, tokens, model.head_dim)
    placed = sharding.named(mesh, sharding.BATCH)
    attend = jax.jit(functools.partial(tree_attention, form=form))

    def draw(seed: int, count: int) -> jax.Array:
        shape = (rows, tokens, count, model.head_dim)
        return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, dtype), out_shardings=placed)()

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, seen: Visible) -> Any:
        out, backward = jax.vjp(lambda *x: attend(*x, seen), q, k, v)
        return out, backward(out)

    seconds = np.zeros(2)
    with jax.set_mesh(mesh):
        q, k, v = draw(0, model.heads), draw(1, model.kv_heads), draw(2, model.kv_heads)
        for window, layers in collections.Counter(model.windows).items():
            find = jax.jit(functools.partial(visible, window=window, block=block))
            seen = find(where["visible_from"], where["visible_until"], where["positions"])
            alone = [median_seconds(functools.partial(f, q, k, v, seen)) for f in (attend, both)]
            seconds += layers * np.array(alone)
    return float(seconds[0]), float(seconds[1])
