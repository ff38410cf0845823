"""The step: what is differentiated, accumulated over micro-batches, and done to the parameters; and its compilation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rmjax import sharding
from rmjax.batches import loader, prepare
from rmjax.batches.groups import Groups
from rmjax.batches.loader import Shape
from rmjax.batches.packing import Plan
from rmjax.batches.prepare import Split
from rmjax.batches.resampling import Resampled
from rmjax.hardware import memory
from rmjax.inference import parameters
from rmjax.inference.parameters import AbstractModel
from rmjax.models import heads
from rmjax.objectives.base import Objective, Outcomes
from rmjax.objectives.grpo import GRPO
from rmjax.objectives.sums import Sums, fraction
from rmjax.runtime import agreement
from rmjax.train import host_state, optim, questions


def forward(params: Any, batch: dict[str, jax.Array], graph: Any, config: ConfigDict) -> Any:
    """The model's outputs for one micro-batch [B, ...]."""
    model = heads.merge(graph, parameters.model_params(params))
    return model(batch, remat=config.model.remat, scan=not config.debug)


def loss_and_outcomes(
    params: Any, batch: dict[str, jax.Array], graph: Any, objective: Objective, config: ConfigDict
) -> tuple[jax.Array, Outcomes]:
    """The loss of one micro-batch [B, ...], numerator and denominator as [2], and its outcomes."""
    outputs, own = forward(params, batch, graph, config), params.get("objective", {})
    return fraction(*objective.loss_sums(outputs, batch, own)), objective.outcomes(outputs, batch, own)


def accumulate(
    loss: Callable[[Any, Any], tuple[jax.Array, Outcomes]], params: Any, batch: Any, *, varies: bool = False
) -> tuple[Any, Sums]:
    """Sums the gradients of the loss's numerator, and the loss, over the micro-batches of a step [M, B, ...].

    Several are added in float32; that of one has the parameters' dtypes. Beside the sums stand the `outcomes` of all
    micro-batches [M, B, ...]. Where the number of filled ones `varies` from step to step, the others are not computed.
    """

    def one(micro: Any) -> tuple[Any, jax.Array, Outcomes]:
        def numerator(p: Any) -> tuple[jax.Array, tuple[jax.Array, Outcomes]]:
            pair, outcomes = loss(p, micro)
            return pair[0], (pair, outcomes)

        grads, aux = jax.grad(numerator, has_aux=True)(params)
        return grads, *aux

    first = jax.tree.map(lambda x: x[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        grads, pair, outcomes = one(first)
        return grads, {"loss": pair, "outcomes": {name: x[None] for name, x in outcomes.items()}}
    grads, pair, _ = jax.eval_shape(one, first)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (grads, pair))

    def body(carry: tuple[Any, jax.Array], micro: Any) -> tuple[tuple[Any, jax.Array], Outcomes]:
        grads, pair, outcomes = one(micro)
        return (jax.tree.map(jnp.add, carry[0], grads), carry[1] + pair), outcomes

    (grads, pair), outcomes = jax.lax.scan(only_filled(body) if varies else body, start, batch)
    return grads, {"loss": pair, "outcomes": outcomes}


def only_filled(body: Callable[[Any, Any], tuple[Any, Outcomes]]) -> Callable[[Any, Any], tuple[Any, Outcomes]]:
    """The body of `accumulate`'s loop that does nothing for a micro-batch without groups."""

    def filled(carry: Any, micro: Any) -> tuple[Any, Outcomes]:
        outcomes = jax.eval_shape(body, carry, micro)[1]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outcomes)
        return jax.lax.cond((micro["weight"] > 0).any(), lambda: body(carry, micro), lambda: (carry, nothing))

    return filled


class Move(NamedTuple):
    """What an update needs to know beside the gradients; all scalars.

    Attributes:
        weight: what the sums of gradients are divided by.
        norm: of the divided gradients, all together.
        goes_on: whether anything is to move.
    """

    weight: jax.Array
    norm: jax.Array
    rate: jax.Array
    step: jax.Array
    goes_on: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, since jax.jit hashes its methods
class Step:
    """One optimizer step, `train_step`.

    Its two halves are apart for those who run them apart (host_state.py, the benchmark).

    Attributes:
        loss: (params, micro-batch) -> loss [2], outcomes.
        rate: learning rate of a step.
        tx: see `optim.make`.
        varies: see `accumulate`.
    """

    loss: Callable[[Any, Any], tuple[jax.Array, Outcomes]]
    rate: optim.Schedule
    tx: optax.GradientTransformation
    config: ConfigDict
    varies: bool = False

    def train_step(
        self, state: dict[str, Any], batch: Any, number: jax.Array, halted: jax.Array
    ) -> tuple[dict[str, Any], Sums, jax.Array]:
        """Trains on one batch.

        Args:
            state: {"params", "opt"}.
            batch: arrays [M, B, ...].
            number: int32 scalar, of the step, from 0.
            halted: bool scalar, whether an earlier step asked to stop: then the state stays as it was. The loop reads
                a step's sums only after it has started the next one.

        Returns:
            The new state; the step's sums as `accumulate` gives them, with `grad_norm`, `learning_rate` and
            `nonfinite_count`; `halted` for the next step.
        """
        grads, sums, halted, move = self.gradients(state["params"], batch, number, halted)
        params, opt = self.update(state["params"], state["opt"], grads, move)
        return {"params": params, "opt": opt}, sums, halted

    def gradients(
        self, params: Any, batch: Any, number: jax.Array, halted: jax.Array
    ) -> tuple[Any, Sums, jax.Array, Move]:
        """The first half: summed gradients of what is trained, and what `update` needs. Counts what is not finite."""
        trained, frozen = parameters.split(self.config, params)
        loss = lambda trained, micro: self.loss(parameters.join(trained, frozen), micro)
        grads, sums = accumulate(loss, trained, batch, varies=self.varies)
        weight = jnp.maximum(sums["loss"][1], jnp.finfo(jnp.float32).tiny)
        norm, lr = optax.tree.norm(mean(grads, weight)), self.rate(number)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"][0])
        move = Move(weight, norm, lr, number, finite & ~halted & (sums["loss"][1] > 0))
        extra = {"grad_norm": (norm, 1), "learning_rate": (lr, 1), "nonfinite_count": (~finite, 0)}
        halted = halted | (~finite & (self.config.on_nonfinite == "stop"))
        sums |= {name: fraction(*value) for name, value in extra.items()}
        return grads, sums, halted, move

    def update(self, params: Any, opt: Any, grads: Any, move: Move) -> tuple[Any, Any]:
        """The second half: moves parameters and optimizer state, or leaves both as they were.

        `params` may have frozen ones among them, which are not touched. All three trees may be parts, see `optim.make`;
        `grads` and `move` are those of `gradients`.
        """
        trained, frozen = parameters.split(self.config, params)
        grads = optim.clipped(self.config.optim, mean(grads, move.weight), move.norm)
        updates, moved_opt = self.tx.update(grads, opt, trained)
        moved = optim.apply(trained, updates, move.rate, self.config.seed, move.step)
        kept = jax.tree.map(lambda a, b: jnp.where(move.goes_on, a, b), (moved, moved_opt), (trained, opt))
        return parameters.join(kept[0], frozen), kept[1]


def mean(grads: Any, weight: jax.Array) -> Any:
    """Sums of gradients, divided, in float32."""
    return jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled, and the shapes it is compiled for.

    Attributes:
        step: (state, batch, step number, halted) -> (state, sums, halted); the state is donated.
        evaluate: (params, batch) -> (loss [2], outcomes [B, ...]).
        state: shapes and shardings of {"params", "opt"}.
        shardings: those of `state`.
        remat: what the backward pass recomputes, as `config.model.remat`.
    """

    step: Any
    evaluate: Any
    state: Any
    shardings: Any
    remat: str = "full"

    def lower(self, shape: Shape, mesh: jax.sharding.Mesh) -> Any:
        """The step for batches of this shape, ready to be compiled; call it where the mesh is set."""
        rows, one = sharding.named(mesh, sharding.BATCH), sharding.named(mesh)
        scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=one)
        return self.step.lower(self.state, loader.abstract_batch(shape, rows), scalar(jnp.int32), scalar(jnp.bool_))

    def with_evaluation(self, shape: Shape, mesh: jax.sharding.Mesh) -> "Program":
        """The program with its evaluation compiled for batches of this shape."""
        if not hasattr(self.evaluate, "lower"):  # config.debug
            return self
        batch = loader.abstract_batch(shape, sharding.named(mesh, sharding.BATCH))
        with jax.set_mesh(mesh):
            return dataclasses.replace(self, evaluate=self.evaluate.lower(self.state["params"], batch).compile())


def make_step(config: ConfigDict, model: AbstractModel, plan: Plan) -> Step:
    """The step of a run with this plan; `config.model.remat` is not "auto"."""
    warmup, decay = (prepare.steps_in(d, plan, least=0) for d in (config.optim.warmup, config.optim.decay))
    rate = optim.schedule(config.optim, plan.steps, warmup, decay)
    loss = lambda params, micro: loss_and_outcomes(params, micro, model.graph, model.objective, config)
    return Step(loss, rate, optim.make(config.optim, config.seed), config, model.objective.draws)


def build_program(config: ConfigDict, model: AbstractModel, plan: Plan) -> Program:
    """Builds the jitted step and evaluation; `config.model.remat` is not "auto"."""
    halves = make_step(config, model, plan)
    replicated = sharding.named(model.mesh)
    trained, _ = parameters.split(config, model.shapes)
    opt = jax.eval_shape(halves.tx.init, trained)
    shardings = {
        "params": jax.tree.map(lambda x: x.sharding, model.shapes),
        "opt": optim.state_shardings(opt, trained, replicated),
    }
    step: Any = halves.train_step
    evaluate = lambda params, batch: halves.loss(params, jax.tree.map(lambda x: x[0], batch))
    if not config.debug:
        if config.optim.state_on == "host":
            step, shardings = host_state.HostStep.wrap(halves, model.shapes, shardings, replicated)
        else:
            step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated, replicated))
        evaluate = jax.jit(evaluate, out_shardings=replicated)
    state = sharding.with_shardings({"params": model.shapes, "opt": opt}, shardings)
    return Program(step, evaluate, state, shardings, config.model.remat)


def _rows_of_steps(config: ConfigDict, objective: Objective, groups: Groups, plan: Plan) -> int:
    """The most rows that a step of the plan has."""
    return questions.bounds(config, groups, plan).rows if objective.draws else int(np.diff(plan.step_start).max())


def compile_program(
    config: ConfigDict, model: AbstractModel, groups: Groups, plan: Plan, limit: int = 0
) -> tuple[Program, Split, str]:
    """Compiles the step for the plan's batches with the cheapest settings that fit the devices (memory.py).

    Args:
        limit: bytes of a device; 0 is what it reports, which devices that are not here cannot.

    Returns:
        The program, its step compiled; the plan with the shape of its batches; a line that says what was chosen.

    Raises:
        ValueError: no settings fit.
    """
    mesh = model.mesh
    if model.objective.heads > 1:
        groups = Resampled(groups, model.objective.heads, config.seed)
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    most_rows = -(-_rows_of_steps(config, model.objective, groups, plan) // row_devices)
    choices = memory.candidates(config.model.remat, config.plan.micro_rows, plan.row_tokens, most_rows)

    @functools.cache
    def build_with_remat(remat: str) -> Program:
        settled = config.copy_and_resolve_references()
        settled.model.remat = remat
        return build_program(settled, model, plan)

    def split(rows: int) -> Split:
        if isinstance(objective := model.objective, GRPO):
            return Split(groups, plan, questions.batch_shape(config, objective, groups, plan, row_devices, rows))
        return Split(groups, plan, prepare.batch_shape(groups, plan, row_devices, rows))

    if config.debug:
        remat, rows = next(choices)
        return build_with_remat(remat), split(rows), "step: not compiled (config.debug)"

    def compile_step(remat: str, rows: int) -> Any:
        with jax.set_mesh(mesh):
            return build_with_remat(remat).lower(split(rows).shape, mesh).compile()

    item = jnp.dtype(heads.compute_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)).itemsize

    def least(remat: str, rows: int) -> int:
        values = memory.kept(model.config, remat) * (model.config.layers - 1) * rows * plan.row_tokens
        return sharding.bytes_per_device(build_with_remat(remat).state) + values // mesh.shape["tensor"] * item

    if not limit:  # all processes must settle on the same, so the smallest device decides
        limit = min(agreement.gather("memory", memory.limit(mesh.local_devices[0])))
    fit = memory.settle(choices, compile_step, least, limit)
    return dataclasses.replace(build_with_remat(fit.remat), step=fit.compiled), split(fit.micro_rows), fit.line
