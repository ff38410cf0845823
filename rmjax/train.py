"""The training run, top to bottom: config, model, loop, export. `prepare.py` makes its data, `step.py` its step."""

import contextlib
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import export, objectives, optim, prepare, sharding
from rmjax.checkpoint import Checkpointer
from rmjax.data import audit, loader
from rmjax.data.chat import Chat, set_pad_token
from rmjax.models import config as model_config
from rmjax.models import decoder, hf
from rmjax.models.config import ModelConfig
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.base import Objective
from rmjax.objectives.sums import Sums
from rmjax.prepare import Split
from rmjax.step import Program, abstract_model, build_program, compile_program
from rmjax.writers import Progress, Writers

# Keys that may differ between the runs that share a workdir: they change no number by more than rounding.
FREE_KEYS = tuple(
    f"config.{key}"
    for key in (
        *("mesh.", "model.remat", "model.attention", "plan.micro_rows", "data.workers", "data.cache_dir"),
        *("log.tensorboard", "log.wandb", "export."),
    )
)


class NonFiniteError(RuntimeError):
    """A NaN or an infinity in a step's loss or gradients."""


# ----------------------------------------------------------------------------------------------------
# Config and workdir
# ----------------------------------------------------------------------------------------------------


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes sure that the workdir holds this very run, or none: a run is there once it has saved a checkpoint.

    Raises:
        ValueError: the workdir holds a run of another config; names the keys.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, checkpoints = workdir / "config.json", workdir / "checkpoints"
    if not path.exists() or not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        return
    changed = config_lib.differences(path.read_text(), config_lib.to_json(config))
    changed = [d for d in changed if not d.startswith(FREE_KEYS)]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another config; choose another --workdir, or undo:\n  " + "\n  ".join(changed)
        )


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes the resolved config into the workdir, whole."""
    path = workdir / "config.json"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(config_lib.to_json(config))
    scratch.replace(path)


# ----------------------------------------------------------------------------------------------------
# Loop
# ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Host:
    """What the run remembers beside its arrays; saved with each checkpoint, so that a resumed run writes equal lines.

    Attributes:
        data: fingerprints of training and validation data; resuming with others is refused.
        window: sums since the last training line of the metrics.
        best: best value of checkpoint.metric so far.
        waits: evaluations since then.
        skipped: steps that were skipped because they were not finite.
        stopped: whether the run ended early.
    """

    data: str
    window: Sums = dataclasses.field(default_factory=dict)
    best: float | None = None
    waits: int = 0
    skipped: int = 0
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats keep every digit."""
        return {**vars(self), "window": {name: x.tolist() for name, x in self.window.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Host":
        """The inverse of `to_json`."""
        return cls(**{**values, "window": {name: np.array(x) for name, x in values["window"].items()}})

    def count(self, sums: Sums) -> None:
        """Adds a step's sums to the window."""
        self.window = sums_lib.add(self.window, sums) if self.window else sums

    def judge(self, value: float | None, mode: str, patience: int) -> None:
        """Takes in an evaluation's value of the metric; decides whether to stop early."""
        better = value is not None and (
            self.best is None or (value > self.best if mode == "max" else value < self.best)
        )
        self.best, self.waits = (value, 0) if better else (self.best, self.waits + 1)
        self.stopped = bool(patience) and self.waits >= patience


def evaluate(
    program: Program, params: Any, split: Split, objective: Objective, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Metrics over every group of the split, each exactly once."""
    total: Sums = {}
    outcomes: list[dict[str, np.ndarray]] = []
    for batch in loader.batches(split.groups, split.plan, split.shape, sharding.named(mesh, sharding.BATCH)):
        sums, seen = jax.device_get(program.evaluate(params, batch))
        sums = sums_lib.to_host(sums)
        total = sums_lib.add(total, sums) if total else sums
        outcomes.append(seen)
    return objective.summary(total, {n: np.concatenate([seen[n] for seen in outcomes]) for n in outcomes[0]})


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop needs, made once."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    objective: Objective
    program: Program
    train: Split
    evaluations: dict[str, Split]  # by the name that their metrics carry
    checkpointer: Checkpointer
    writers: Writers

    @property
    def steps_block(self) -> bool:
        """Whether a step must end before the next one starts: several CPU devices of one process can deadlock."""
        return self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu"

    def every(self, duration: str) -> int:
        """A duration of the config in steps."""
        return prepare.steps_in(duration, self.train.plan)

    def evaluate(self, state: dict[str, Any], step: int) -> dict[str, float]:
        """Evaluates every split and writes one line."""
        values = {
            f"{name}/{key}": value
            for name, split in self.evaluations.items()
            for key, value in evaluate(self.program, state["params"], split, self.objective, self.mesh).items()
        }
        self.writers.write(step, values)
        return values

    def write_window(self, host: Host, step: int) -> None:
        """Writes the training line of the steps since the last one."""
        values = self.objective.summary(host.window) if host.window else {}
        values.pop("nonfinite_count", None)
        values["skipped_steps"] = float(host.skipped)
        host.window = {}
        self.writers.write(step, {f"train/{key}": value for key, value in values.items()})

    def stop_nonfinite(self, state: dict[str, Any], host: Host, step: int) -> None:
        """Saves the state from before the bad step and raises."""
        if step not in self.checkpointer.steps():
            self.checkpointer.save(step, state, host.to_json(), None)
        self.checkpointer.wait()
        split = self.train
        rows = [split.groups.id(int(i)) for row in split.plan.rows(step) for i in row]
        shown = ", ".join(rows[:20]) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        raise NonFiniteError(
            f"step {step}: the loss or a gradient is NaN or infinite. The state from before it is saved as checkpoint "
            f"{step}. Its groups: {shown}. Look at these rows, lower config.optim.learning_rate, or set "
            f"config.on_nonfinite=skip in a new workdir to leave such steps out and count them."
        )


def loop(run: Run, state: dict[str, Any], host: Host, start: int) -> int:
    """Trains from step `start` to the end of the plan or an early stop; returns the number of steps done.

    While the devices compute a step, the host reads the sums of the one before and sends the next batch.
    """
    config, plan = run.config, run.train.plan
    log_every, eval_every = run.every(config.log.every), run.every(config.eval.every)
    save_every = run.every(config.checkpoint.every or config.eval.every)
    progress = Progress(plan.steps, start)
    if start == 0:
        before = run.evaluate(state, 0)
        if config.checkpoint.metric not in before:
            names = ", ".join(sorted(before))
            raise ValueError(f"config.checkpoint.metric={config.checkpoint.metric!r} is not measured; there is {names}")
        progress.note(f"before training: {in_words(before, run)}")
    rows, everywhere = sharding.named(run.mesh, sharding.BATCH), sharding.named(run.mesh)
    ahead = loader.batches(run.train.groups, plan, run.train.shape, rows, start)
    batch, halted = next(ahead, None), jax.device_put(np.bool_(False), everywhere)
    unread: list[tuple[int, Any]] = []

    def read(step: int, sums: Any) -> None:
        sums = sums_lib.to_host(jax.device_get(sums))
        if not sums["nonfinite_count"][0]:
            host.count(sums)
        elif config.on_nonfinite == "stop":
            run.stop_nonfinite(state, host, step)
        else:
            host.skipped += 1
            logging.warning("step %d is not finite and was skipped; %d so far", step, host.skipped)
        shown = {n: x for n, x in run.objective.summary(sums).items() if n in (*run.objective.shown, "learning_rate")}
        progress.step(step + 1, shown, groups=sum(len(row) for row in plan.rows(step)))
        if (step + 1) % log_every == 0 or step + 1 == plan.steps:
            run.write_window(host, step + 1)
            run.writers.timing(step + 1, progress.rates())

    done = start
    for step in range(start, plan.steps):
        if host.stopped:
            break
        state, sums, halted = run.program.step(state, batch, jax.device_put(np.int32(step), everywhere), halted)
        unread.append((step, sums))
        batch = next(ahead, None)
        done, last = step + 1, step + 1 == plan.steps
        evaluates, saves = done % eval_every == 0 or last, done % save_every == 0
        while len(unread) > (0 if evaluates or saves or run.steps_block else 1):
            read(*unread.pop(0))
        values: dict[str, float] | None = None
        if evaluates:
            values = run.evaluate(state, done)
            progress.note(f"step {done}: {in_words(values, run)}")
            host.judge(values.get(config.checkpoint.metric), config.checkpoint.mode, config.checkpoint.patience)
            if host.stopped and host.window:
                run.write_window(host, done)
        if evaluates or saves:
            run.checkpointer.save(done, state, host.to_json(), values)
    if host.stopped:
        progress.note(
            f"stopped early: {config.checkpoint.metric} has not improved on {host.best} for {host.waits} evaluations"
        )
    progress.close()
    run.checkpointer.wait()
    return done


def in_words(values: dict[str, float], run: Run) -> str:
    """The metrics a person looks at after an evaluation, in one line."""
    metric = run.config.checkpoint.metric.rpartition("/")[2]
    names = dict.fromkeys((*run.objective.shown, metric))
    found = {name: values.get(f"validation/{name}") for name in names}
    parts = {name: value for name, value in found.items() if value is not None}  # NaN is null in metrics.jsonl
    text = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    seen, new = values.get(f"train_slice/{metric}"), parts.get(metric)
    return f"validation {text}" + ("" if seen is None or new is None else f"; {metric} in training {seen - new:+.3g}")


# ----------------------------------------------------------------------------------------------------
# Run
# ----------------------------------------------------------------------------------------------------


def run(config: ConfigDict, workdir: Path, dry_run: bool = False) -> None:
    """Trains what the config says and exports it; continues where a run in the same workdir stopped.

    Args:
        config: a config made from `config.defaults()`.
        workdir: where config, data cache, metrics, checkpoints and export go.
        dry_run: print the audit, the plan, the parameters, their sharding and the compiled step's memory; no training.

    Raises:
        ValueError: a config, data or checkpoint that cannot be used; says what to change.
        NonFiniteError: a loss or gradient that is not finite, with config.on_nonfinite="stop".
    """
    config_lib.check(config)
    objective = objectives.make(config.objective)
    mesh = sharding.make_mesh(config.mesh)
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    check_workdir(config, workdir)
    if dry_run and config.debug:
        raise ValueError("config.debug compiles nothing, so there is nothing for --dry_run to show; leave one out")
    prepare.check_sources(config)

    chat = prepare.open_chat(config, workdir)
    values = prepare.model_values(config, len(chat.tokenizer))
    pad, changed = set_pad_token(chat, values["vocab_size"])
    if changed:
        print(f"pad token: {chat.tokenizer.pad_token!r} ({pad}), because the tokenizer's could be mistaken for text")
    export.check_tokenizer(chat, values)
    model = model_config.from_hf(values)
    graph, shapes = abstract_model(config, model, objective, mesh)
    optim.check(config.optim, shapes)
    if config.model.remat != "auto":
        decoder.saved_names(config.model.remat)
    if config.model.init_from:
        hf.check(hf.resolve(config.model.init_from), prepare.model_params(shapes), model)
    print(parameter_overview.get_parameter_overview(shapes, include_stats="sharding" if dry_run else False))

    train_groups, validation_groups = prepare.read_groups(config, chat, objective.task)
    lines = audit.lines(train_groups, validation_groups)
    print("\n".join(lines), flush=True)
    plan = prepare.plan_training(config, train_groups)
    print("\n".join(prepare.describe_plan(train_groups, plan)), flush=True)
    sets = {"validation": validation_groups}
    if config.eval.train_groups:
        sets["train_slice"] = train_groups.sample(config.eval.train_groups, config.seed)

    def compiled() -> tuple[Program, Split, dict[str, Split]]:
        program, train, line = compile_program(config, model, graph, objective, shapes, mesh, train_groups, plan)
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        print(f"mesh: {axes} on {mesh.size} devices\n{prepare.describe_shape(train.shape)}\n{line}", flush=True)
        evaluations = prepare.plan_evaluations(config, sets, row_devices, train.shape.rows // row_devices)
        return program.with_evaluation(next(iter(evaluations.values())).shape, mesh), train, evaluations

    if dry_run:
        compiled()
        return

    checkpointer = Checkpointer(
        workdir / "checkpoints",
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        metric=config.checkpoint.metric,
        mode=config.checkpoint.mode,
    )
    save_config(config, workdir)
    prepare.save_audit(workdir / "audit.json", train_groups, plan, validation_groups, objective.task)
    with contextlib.closing(checkpointer), ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compiled)  # while the weights are read
        with jax.set_mesh(mesh):
            data = f"{train_groups.fingerprint} {validation_groups.fingerprint}"
            shell = build_program(config, graph, objective, shapes, mesh, plan)
            state, host, start = restore_or_init(config, checkpointer, shell, model, objective, data)
            program, train, evaluations = compiling.result()
            with contextlib.closing(Writers.open(workdir, config, start)) as writers:
                job = Run(config, mesh, objective, program, train, evaluations, checkpointer, writers)
                with jax.transfer_guard("disallow"):  # nothing goes to or from the devices unless it is asked for
                    last = loop(job, state, host, start)
            del state  # makes room for the export
            finish(job, workdir, model, values, chat, last)


def restore_or_init(
    config: ConfigDict,
    checkpointer: Checkpointer,
    program: Program,
    model: ModelConfig,
    objective: Objective,
    data: str,
) -> tuple[dict[str, Any], Host, int]:
    """The newest whole checkpoint, or freshly loaded or initialised parameters; and the step to go on from.

    Raises:
        ValueError: the checkpoint was made from other data.
    """
    restored = checkpointer.restore(program.state)
    if restored is not None:
        start, state, values = restored
        host = Host.from_json(values)
        if host.data != data:
            raise ValueError(
                "the data, the chat template or the tokenizer changed since the checkpoint was made; "
                "choose another --workdir, or put them back"
            )
        print(f"continuing from step {start}", flush=True)
        return state, host, start
    params, head = prepare.init_params(config, model, objective, program.state["params"])
    if "score" in params:
        print(f"score head: {head}, norm {float(jnp.linalg.norm(params['score']['kernel'])):.4g}", flush=True)
    tx = optim.make(config.optim, config.seed)
    opt = jax.jit(tx.init, out_shardings=program.shardings["opt"])(params)
    return {"params": params, "opt": opt}, Host(data), 0


# ----------------------------------------------------------------------------------------------------
# Export
# ----------------------------------------------------------------------------------------------------


def finish(run: Run, workdir: Path, model: ModelConfig, values: dict[str, Any], chat: Chat, last: int) -> None:
    """Exports the best or the last step with its contract, and says where everything is."""
    best = run.checkpointer.best_step() if run.config.export.step == "best" else None
    step = last if best is None else best
    state, _ = run.checkpointer.restore_step(step, {"params": run.program.state["params"]})
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    metrics = next((x for x in reversed(lines) if x["step"] == step and "validation/loss" in x), {"step": float(step)})
    export.write(
        workdir / "export",
        state["params"],
        objective=run.objective,
        config=run.config,
        values=values,
        model=model,
        chat=chat,
        metrics=metrics,
        data=run.train.groups.fingerprint,
        validation=run.evaluations["validation"].groups,
    )
    tensorboard = f" and {workdir / 'tensorboard'}" if run.config.log.tensorboard else ""
    print(
        f"\nstep {step}: {in_words(metrics, run)}\n"
        f"export:      {workdir / 'export'}\n"
        f"checkpoints: {workdir / 'checkpoints'} (steps {', '.join(map(str, run.checkpointer.steps()))})\n"
        f"metrics:     {workdir / 'metrics.jsonl'}{tensorboard}\n"
        f"score with:  python -m rmjax.score --model={workdir / 'export'} --input=FILE --output=scores.jsonl",
        flush=True,
    )
