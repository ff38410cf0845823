"""The training run in order of time, and its loop. `prepare.py` makes its data, `step.py` its step."""

import collections
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import measure, overlap, prepare
from rmjax.batches.chat import Chat, set_pad_token
from rmjax.batches.groups import Groups
from rmjax.batches.loader import BatchSource, PlannedBatches
from rmjax.batches.overlap import Overlap
from rmjax.batches.packing import Plan
from rmjax.batches.prepare import Split
from rmjax.batches.tasks import Task
from rmjax.checkpoint import Checkpointer
from rmjax.data import ledger
from rmjax.evaluate import benchmarks, evaluating, gate
from rmjax.evaluate import outcomes as outcomes_lib
from rmjax.evaluate.benchmarks import Benchmark
from rmjax.export import write as export
from rmjax.hardware import memory
from rmjax.inference import parameters, runs
from rmjax.inference.parameters import AbstractModel, abstract_model
from rmjax.inference.reward_model import RewardModel
from rmjax.judging.asked import Questions
from rmjax.judging.writing import check_judge
from rmjax.models import decoder, hf
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.base import Objective
from rmjax.objectives.grpo import GRPO
from rmjax.objectives.sums import Sums
from rmjax.runtime import agreement, command_line, files, ownership, passwords, processes, signals
from rmjax.runtime.exits import InputError
from rmjax.runtime.signals import Stop, Stopped
from rmjax.train import drawing, finish, optim, questions, resume, sinks
from rmjax.train import dry_run as dry_runs
from rmjax.train import hooks as hooks_lib
from rmjax.train.evaluations import Evaluation, Pass, Sampling
from rmjax.train.hooks import Hooks
from rmjax.train.resume import Host
from rmjax.train.rollouts import Rollouts, reference_log_probs
from rmjax.train.step import Program, build_program, compile_program
from rmjax.train.watch import Watch, reward_drift, work_of_steps
from rmjax.train.writers import Writers

NEW_FILES = ("config.json", "audit.json", "metrics.jsonl", "timings.jsonl", "tensorboard")  # of a run that begins
MOST_ROLLBACKS = 3  # to one checkpoint; if no new one could be saved by then, the rows are not to blame


class NonFiniteError(RuntimeError):
    """A NaN or an infinity in a step's loss or gradients."""


class RollBack(Exception):
    """The step `bad` is not finite, and config.on_nonfinite is "rollback"."""

    def __init__(self, bad: int):
        self.bad = bad


# ----------------------------------------------------------------------------------------------------
# The run, in order of time
# ----------------------------------------------------------------------------------------------------


def run(config: ConfigDict, workdir: Path, dry_run: bool = False, topology: str = "", stop: Stop | None = None) -> None:
    """Trains what the config says and exports it; continues where a run in the same workdir stopped.

    Args:
        config: a config made from `config.defaults()`.
        workdir: where config, data cache, metrics, checkpoints and export go.
        dry_run: print the audit, the plan, the parameters, their sharding and the compiled step's memory; no training.
        topology: of a dry run, hardware that need not be here ("v5p:2x2x4"; topology.py): the step is compiled for it.
        stop: is asked after each step whether to stop.

    Raises:
        ValueError: a config, data or checkpoint that cannot be used; says what to change.
        NonFiniteError: a loss or gradient that is not finite, with config.on_nonfinite="stop", or time and again.
        Stopped: the run was asked to stop, and has saved.
    """
    stop = stop or Stop()
    config_lib.check(passwords.hide_in(config))
    changes = resume.check_workdir(config, workdir)
    if dry_run:
        _run(config, workdir, topology, stop, dry_run=True)
        return
    with _claimed(config, workdir) as (run_id, note):
        if config.start:
            _make_start(config.start, workdir / runs.START, stop)
        _run(config, workdir, topology, stop, run_id=run_id, note=note, changes=changes)


def _make_start(config: ConfigDict, workdir: Path, stop: Stop) -> None:
    """Runs `config.start`, unless that is done."""
    resume.check_workdir(config, workdir)
    if not (workdir / "export").exists():  # it appears whole, at the end
        print(f"config.start is run first, in {workdir}", flush=True)
        run(config, workdir, stop=stop)


@contextlib.contextmanager
def _claimed(config: ConfigDict, workdir: Path) -> Iterator[tuple[str, Callable[..., Path]]]:
    """Marks workdir and checkpoints as this run's and keeps others out; gives the run's id, and what notes new files.

    Bad input that is found later leaves nothing that was noted.
    """
    if not processes.is_first():
        yield resume.claim(config, workdir), lambda path, made=False: path
        return
    with contextlib.ExitStack() as stack:
        if config.checkpoint.dir and "://" not in config.checkpoint.dir:
            stack.enter_context(signals.alone(Path(config.checkpoint.dir), "config.checkpoint.dir"))
        note = stack.enter_context(
            command_line.leaving_nothing(workdir, unless=runs.START if config.start else "checkpoints")
        )
        for name in (ownership.MARKER, *NEW_FILES):
            note(workdir / name)
        yield resume.claim(config, workdir), note


def _run(
    config: ConfigDict,
    workdir: Path,
    topology: str,
    stop: Stop,
    *,
    dry_run: bool = False,
    run_id: str = "",
    note: Callable[..., Path] = lambda path, made=False: path,
    changes: Sequence[str] = (),
) -> None:
    # ---- Config and devices: what is cheap to check is checked first
    given, config = config, runs.settled(config, workdir)
    objective = objectives.of_config(config)
    task = objective.task
    config, devices, limit = dry_runs.target(config, topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    if dry_run and config.debug:
        raise ValueError("config.debug compiles nothing, so there is nothing for --dry_run to show; leave one out")
    prepare.check_sources(config, benchmarks.sources_of(config.eval.benchmarks))
    prepare.check_columns(config, task)
    hooks = Hooks(hooks_lib.find(config.hooks), config.on_hook_error)
    if not dry_run and processes.is_first():
        sinks.check(config)

    # ---- Tokenizer and model: names and shapes only
    with tempfile.TemporaryDirectory() as scratch:
        chat = prepare.open_chat(config, Path(scratch))
    values = parameters.model_values(config, chat.tokenizer)
    pad, changed = set_pad_token(chat, values["vocab_size"])
    if changed:
        print(f"pad token: {chat.tokenizer.pad_token!r} ({pad}), because the tokenizer's could be mistaken for text")
    export.check_tokenizer(chat, values)
    stops = parameters.generation_stops(config, objective, values)
    model = abstract_model(config, objective, mesh, values, stops)
    optim.check(config.optim, model.shapes)
    parameters.check_adapters(config, model, reads=not topology)
    if config.model.remat != "auto":
        decoder.saved_names(config.model.remat)
    if config.model.init_from and not topology:
        directory, shapes = hf.resolve(config.model.init_from), parameters.model_params(model.plain.shapes)
        hf.check(directory, shapes, model.config, config.model.base)
    shown = "sharding" if dry_run else False
    print(parameter_overview.get_parameter_overview(model.shapes, include_stats=shown))
    print(parameters.describe_trained(config, model), end="")

    # ---- Data
    with agreement.first_then_others("data"):
        train_groups, validation_groups = prepare.read_groups(config, chat, task)
    fingerprints = [train_groups.fingerprint, validation_groups.fingerprint]
    agreement.require_same("config and data", [config_lib.to_json(config), *fingerprints], "config or data")
    print("\n".join(ledger.lines(train_groups, validation_groups)), flush=True)
    objective = objective.fitted(train_groups)
    model = dataclasses.replace(model, objective=objective)
    if objective.found:
        print(objective.found, flush=True)
    sets = {"validation": validation_groups}
    if config.eval.train_groups:
        sets["train_slice"] = train_groups.sample(config.eval.train_groups, config.seed)
    passed = {} if objective.draws else sets
    drawn = _sampled(config, objective, model, chat, sets)
    with agreement.first_then_others("benchmarks"):
        tests = evaluating.read_benchmarks(config, chat, objective.exported.task)
    overlaps = {test.name: overlap.find(train_groups, test_groups) for test, test_groups in tests}
    for name, found in overlaps.items():
        if said := found.line(name):
            logging.warning("%s", said)

    # ---- Plan
    if objective.draws:
        ask = functools.partial(questions.plan_questions, config, train_groups)
        plan = prepare.plan_training(config, train_groups, ask)
        questions.check(config, values, train_groups, plan)
        print(questions.describe_plan(config, train_groups, plan), flush=True)
    else:
        plan = prepare.plan_training(config, train_groups)
        print("\n".join(prepare.describe_plan(train_groups, plan)), flush=True)
    for of_set in drawn.values():
        questions.check_room(values, of_set.groups, config_lib.answer_tokens(config), "config.eval.max_tokens")

    # ---- Compile
    if dry_run:
        program, train, _ = _compile(config, model, train_groups, plan, passed, limit)
        if objective.draws and not config.rollout.source:
            of_device = limit or memory.limit(mesh.local_devices[0])
            sampler = drawing.make_sampler(config, model, chat, train_groups, program.state, of_device)
            programs = drawing.compiled(sampler, model, train_groups)
            print("\n".join(drawing.describe_sampler(sampler, programs, of_device)), flush=True)
        if topology:
            print("\n".join(dry_runs.report(topology, config, model, program, train)))
        return
    checkpointer = Checkpointer(
        runs.checkpoint_directory(config, workdir),
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        metric=config.checkpoint.metric,
        mode=config.checkpoint.mode,
        owner={"run": run_id, "workdir": str(workdir.absolute()), "config": config_lib.to_json(given)},
    )
    with hooks.told_of_the_end(), contextlib.closing(checkpointer), ThreadPoolExecutor(1) as pool, jax.set_mesh(mesh):
        compiling = pool.submit(_compile, config, model, train_groups, plan, passed, limit)

        # ---- Restore: weights or a checkpoint are read while the step is compiled
        states = build_program(config, model, plan)  # for the shapes and shardings of the state
        made_from = resume.identity(config, chat, values, train_groups, validation_groups)
        restore = functools.partial(resume.restore_or_init, config, checkpointer, states, model, made_from, plan)
        state, host, start = restore()
        print("".join(f"changed since the last start: {change}\n" for change in changes), end="", flush=True)
        if processes.is_first():
            resume.save_config(given, workdir)
            _save_audit(workdir / "audit.json", train_groups, plan, validation_groups, objective)
        program, train, passes = compiling.result()
        evaluations: dict[str, Evaluation] = {**passes, **drawn}
        agreement.barrier("compiled")  # devices wait for a late process less patiently

        # ---- Loop: from the newest checkpoint again after each step that rolls back
        rows = sharding.named(mesh, sharding.BATCH)
        source: BatchSource
        if isinstance(objective, GRPO):
            least = agreement.gather("sampler memory", memory.limit(mesh.local_devices[0]))
            engine = drawing.make_engine(config, model, chat, train_groups, program.state, min(least))
            reference = reference_log_probs(config, model) if objective.kl else None
            source = Rollouts(config, objective, chat, train, rows, engine, workdir / "rollouts", reference)
            work = questions.work_of_steps(config, train)
        else:
            source = PlannedBatches(train.groups, train.plan, train.shape, rows)
            work = work_of_steps(train, model)
        hooks.tell("start", workdir=str(workdir), config=config.to_dict(), step=start, steps=source.steps)
        rollbacks: collections.Counter[int] = collections.Counter()
        while True:
            watch = Watch.open(config, workdir, work, objective.shown, mesh)
            writers = Writers.open(workdir, config, start)
            with contextlib.closing(writers):
                for path in writers.made():
                    note(path, made=True)
                told = checkpointer, writers, watch, stop, hooks
                job = Run(config, model, chat, program, source, train, evaluations, tests, overlaps, *told)
                try:
                    # Nothing goes to or from the devices unless it is asked for.
                    disallow = jax.transfer_guard("disallow")
                    with contextlib.closing(watch), command_line.under_way(), stop.defer_signals(), disallow:
                        last = loop(job, state, host, start)
                except RollBack as error:
                    bad = error.bad
                else:
                    # ---- Finish
                    del state  # makes room for the export
                    with command_line.under_way():
                        conclude(job, workdir, last, run_id)
                    return
            with command_line.under_way():  # the loop's arrays are gone with its frame, so there is room for others
                state, host, start = restore(bad)
            rollbacks[start] += 1
            if rollbacks[start] > MOST_ROLLBACKS:
                raise NonFiniteError(
                    f"step {bad} is not finite, and {MOST_ROLLBACKS} times before a step after checkpoint {start} was "
                    "not: leaving out rows does not help. Lower config.optim.learning_rate; the same workdir goes on "
                    "from there."
                )


def _sampled(
    config: ConfigDict, objective: Objective, model: AbstractModel, chat: Chat, sets: dict[str, Groups]
) -> dict[str, Sampling]:
    """What is measured by judgements that the model writes: the sets of `grpo`; "sampled", the questions of `sft`'s
    validation set, where config.eval.samples asks for them."""
    if isinstance(objective, GRPO):
        return {name: Sampling(groups, objective.task, model, chat, config) for name, groups in sets.items()}
    if not config.eval.samples:
        return {}
    task = Questions(dataclasses.replace(check_judge(objective.task), both_orders=True))
    with agreement.first_then_others("questions"):
        groups = prepare.read_again(config, chat, task, sets["validation"])
    print(f"sampled: {config.eval.samples} judgements of each of {len(groups):,} groups of questions", flush=True)
    return {"sampled": Sampling(groups, task, model, chat, config)}


def _compile(
    config: ConfigDict, model: AbstractModel, train: Groups, plan: Plan, sets: dict[str, Groups], limit: int
) -> tuple[Program, Split, dict[str, Pass]]:
    """Compiles step and evaluation of sets, and prints what was chosen; see `compile_program` for `limit`."""
    program, split, line = compile_program(config, model, train, plan, limit)
    axes = " x ".join(f"{axis} {size}" for axis, size in model.mesh.shape.items())
    print(f"mesh: {axes} on {model.mesh.size} devices\n{prepare.describe_shape(split.shape)}\n{line}", flush=True)
    if not sets:
        return program, split, {}
    row_devices = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    splits = prepare.plan_evaluations(config, sets, row_devices, split.shape.rows // row_devices)
    program = program.with_evaluation(next(iter(splits.values())).shape, model.mesh)
    return program, split, {name: Pass(of_set, model.objective.task, model.mesh) for name, of_set in splits.items()}


# ----------------------------------------------------------------------------------------------------
# Loop
# ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop needs, made once."""

    config: ConfigDict
    model: AbstractModel
    chat: Chat
    program: Program
    source: BatchSource
    train: Split  # what `source` was planned from
    evaluations: dict[str, Evaluation]  # by the name that their metrics carry
    tests: list[tuple[Benchmark, Groups]]  # the benchmarks of config.eval.benchmarks
    overlaps: dict[str, Overlap]  # of the benchmarks with the training data, by name
    checkpointer: Checkpointer
    writers: Writers
    watch: Watch
    stop: Stop
    hooks: Hooks

    @property
    def steps_block(self) -> bool:
        """Whether a step must end before the next one starts: several CPU devices of one process can deadlock."""
        mesh = self.model.mesh
        return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def every(self, duration: str) -> int:
        """A duration of the config in steps."""
        return prepare.steps_in(duration, self.train.plan)

    @functools.cached_property
    def task(self) -> Task:
        return self.model.objective.task  # once, since it checks its template whenever it is asked for

    def step_sums(self, step: int, sums: Sums) -> Sums:
        """A step's sums on the host, with its metrics from its outcomes [M, B, ...] and those of its batch."""
        outcomes = {name: x.reshape(-1, *x.shape[2:]) for name, x in sums.pop("outcomes").items()}
        return {**outcomes_lib.step_sums(self.task, outcomes), **sums_lib.to_host(sums), **self.source.sums(step)}

    def evaluate(self, state: dict[str, Any], host: Host, step: int) -> dict[str, float] | None:
        """Evaluates every split and writes one line; None if the run is to stop before that is done."""
        values: dict[str, float] = {}
        for name, evaluation in self.evaluations.items():
            metrics = evaluation.metrics(self.program, state["params"], self.stop.agreed)
            if metrics is None:
                return None
            values |= {f"{name}/{key}": value for key, value in metrics.items()}
        model: RewardModel | None = None  # made where there is a benchmark: adapters are merged for it
        for test, groups in self.tests:
            if self.stop.agreed():
                return None
            params, dtype = state["params"], self.config.model.compute_dtype
            model = runs.reward_model(self.model, self.chat, params, dtype) if model is None else model
            values |= evaluating.flat(test, evaluating.run_benchmark(model, test, groups))
        if step == 0:
            host.rewards = {name: value for name, value in values.items() if name.endswith("/reward_mean")}
        values |= reward_drift(values, host.rewards)
        self.writers.write(step, values)
        self.hooks.tell("evaluation", step=step, metrics=values)
        return values

    def write_window(self, host: Host, step: int, timings: dict[str, float] | None = None) -> None:
        """Writes the training line of the steps since the last one; `timings` are the hooks' alone."""
        values = sums_lib.to_metrics(host.window) if host.window else {}
        values.pop("nonfinite_count", None)
        values["skipped_steps"] = float(host.skipped)
        host.window = {}
        values = {f"train/{key}": value for key, value in values.items()}
        self.writers.write(step, values)
        self.hooks.tell("log", step=step, metrics=values, timings=timings or {})

    def settle(self, state: dict[str, Any], host: Host, done: int, evaluates: bool, saved: bool = False) -> None:
        """Evaluates if that is due and saves; if the run is to stop meanwhile, the next start evaluates.

        Args:
            state: after `done` steps.
            host: changes.
            done: the number of steps.
            evaluates: whether an evaluation is due.
            saved: whether the state is saved already, and only the evaluation is not.
        """
        values = self.evaluate(state, host, done) if evaluates else None
        host.unevaluated = evaluates and values is None
        if values is not None:
            self.watch.progress.note(f"step {done}: {in_words(values, self)}")
            rule = self.config.checkpoint
            host.judge(values.get(rule.metric), rule.mode, rule.patience, rule.goal)
            if host.stopped and host.window:
                self.write_window(host, done)
        if not saved:
            self.save(state, host, done, values)
        elif values is not None:
            self.checkpointer.amend(done, host.to_json(), values)
        self.watch.resume()

    def save(self, state: dict[str, Any], host: Host, done: int, values: dict[str, float] | None = None) -> None:
        """Starts saving the state after `done` steps, and the values of its evaluation if there was one."""
        host.rows = self.source.digest(done)
        self.writers.sync()  # the next start goes on with the lines up to here
        kept = {**state, "params": parameters.saved(self.config, state["params"])}
        self.checkpointer.save(done, kept, host.to_json(), values)

    def tell_of_saves(self) -> None:
        """Tells the hooks of the checkpoints that were finished since the last call."""
        for step, directory in self.checkpointer.newly_finished():
            self.hooks.tell("save", step=step, directory=str(directory))

    def not_finite(self, state: dict[str, Any], host: Host, step: int) -> None:
        """Handles a step that is not finite as config.on_nonfinite says: stop, skip, or roll back."""
        rows = self.source.names(step)
        shown = ", ".join(rows[:20]) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        what = f"step {step}: the loss or a gradient is NaN or infinite. Its groups: {shown}"
        if self.config.on_nonfinite == "skip":
            host.skipped += 1
            logging.warning("%s. It was skipped; %d so far", what, host.skipped)
        elif self.config.on_nonfinite == "rollback":
            logging.warning("%s", what)
            raise RollBack(step)
        else:
            if step not in self.checkpointer.steps():
                self.save(state, host, step)
            self.checkpointer.wait()
            raise NonFiniteError(
                f"{what}. The state from before it is saved as checkpoint {step}. Look at these rows, lower "
                "config.optim.learning_rate, or set config.on_nonfinite=skip, or rollback to leave out the rows since "
                "the last checkpoint as well; the same workdir goes on from there."
            )


def loop(run: Run, state: dict[str, Any], host: Host, start: int) -> int:
    """Trains from step `start` to the end of the batches or an early stop; returns the number of steps done.

    While the devices compute a step, the host reads the sums of the one before and sends the next batch.
    """
    config, source = run.config, run.source
    log_every, eval_every = run.every(config.log.every), run.every(config.eval.every)
    save_every = run.every(config.checkpoint.every or config.eval.every)
    watch, progress = run.watch, run.watch.progress
    if start == 0:
        before = run.evaluate(state, host, 0)
        if before is None:
            raise Stopped(0)
        if config.checkpoint.metric not in before:
            names = ", ".join(sorted(before))
            raise InputError(f"config.checkpoint.metric={config.checkpoint.metric!r} is not measured; there is {names}")
        progress.note(f"before training: {in_words(before, run)}")
    done, saved = host.next_step(start), start
    if host.unevaluated:
        run.settle(state, host, done, evaluates=True, saved=done == saved)
        saved = done
    elif host.stopped or done == source.steps:
        progress.note("the run is done: nothing is trained, only exported")
    everywhere = sharding.named(run.model.mesh)
    # Each is asked for when the step before it has begun, with the parameters that it leaves.
    ahead = watch.batches((source.batch(step, state["params"]) for step in range(done, source.steps)), done)
    batch, halted = next(ahead, None), sharding.place(np.bool_(False), everywhere)
    unread: list[tuple[int, Any]] = []

    def read(step: int, sums: Any) -> None:
        sums = run.step_sums(step, jax.device_get(sums))
        if sums["nonfinite_count"][0]:
            run.not_finite(state, host, step)
        else:
            source.check(step, sums)
            host.count(sums)
        watch.done(step + 1, sums_lib.to_metrics(sums))
        if (step + 1) % log_every == 0 or step + 1 == source.steps:
            timings = watch.scalars()
            run.write_window(host, step + 1, timings)
            run.writers.timing(step + 1, timings)

    stops = False
    for step in range(done, source.steps):
        if host.stopped or host.unevaluated or (stops := run.stop.agreed(step + 1)):
            break
        run.tell_of_saves()
        with watch.step(step + 1):
            state, sums, halted = run.program.step(state, batch, sharding.place(np.int32(step), everywhere), halted)
        watch.follow(step + 1, sums)
        unread.append((step, sums))
        batch = next(ahead, None)
        done = step + 1
        evaluates, saves = done % eval_every == 0 or done == source.steps, done % save_every == 0
        while len(unread) > (0 if evaluates or saves or run.steps_block else 1):
            read(*unread.pop(0))
        if evaluates or saves:
            run.settle(state, host, done, evaluates)
            saved = done
    while unread:
        read(*unread.pop(0))
    if stops and done > saved:
        run.save(state, host, done)
    run.checkpointer.wait()
    run.tell_of_saves()
    if stops or host.unevaluated:
        raise Stopped(done)
    if host.stopped:
        why = f"has not improved on {host.best} for {host.waits} evaluations" if host.waits else f"reached {host.best}"
        progress.note(f"stopped early: {config.checkpoint.metric} {why}")
    return done


def in_words(values: dict[str, float], run: Run) -> str:
    """The metrics a person looks at after an evaluation, in one line."""
    metric = run.config.checkpoint.metric.rpartition("/")[2]
    names = dict.fromkeys((*run.model.objective.shown, metric))
    found = {name: values.get(f"validation/{name}") for name in names}
    parts = {name: value for name, value in found.items() if value is not None}  # NaN is null in metrics.jsonl
    text = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
    seen, new = values.get(f"train_slice/{metric}"), parts.get(metric)
    return f"validation {text}" + ("" if seen is None or new is None else f"; {metric} in training {seen - new:+.3g}")


# ----------------------------------------------------------------------------------------------------
# Finish
# ----------------------------------------------------------------------------------------------------


def conclude(run: Run, workdir: Path, last: int, run_id: str) -> None:
    """Measures and exports the best or the last step, and says where everything is and whether it is good enough.

    Raises:
        NotGoodEnough: it is not, and config.gate.exit_code asks to say so; everything is written.
    """
    best = run.checkpointer.best_step() if run.config.export.step == "best" else None
    step = last if best is None else best
    shapes = parameters.saved(run.config, run.program.state["params"])
    state, _ = run.checkpointer.restore_step(step, {"params": shapes})
    verdict, metrics = finish.write(
        run.config,
        workdir,
        run.model,
        run.chat,
        parameters.whole(run.config, run.model, state["params"]),
        step,
        run.evaluations,
        run.tests,
        run.overlaps,
        run.train.groups.fingerprint,
        run.checkpointer.metrics(step),
        run_id,
    )
    steps = ", ".join(map(str, run.checkpointer.steps()))
    report = ""
    if run.config.log.report:
        report = f"report:      {workdir / 'report.html'}\n"
        run.writers.keep(workdir / "report.html")
    named = config_lib.sinks(run.config)
    tensorboard = f" and {workdir / 'tensorboard'}" if "tensorboard" in named else ""
    services = ", ".join(name for name in named if name != "tensorboard")
    sent = f"logged to:   {services}, project {run.config.log.project}\n" if services else ""
    print(
        f"\nstep {step}: {in_words(metrics, run)}\n"
        + "\n".join(gate.text(verdict))
        + f"\nexport:      {workdir / 'export'}\n{report}"
        f"checkpoints: {runs.checkpoint_directory(run.config, workdir)} (steps {steps})\n"
        f"metrics:     {workdir / 'metrics.jsonl'}{tensorboard}\n{sent}"
        f"score with:  python -m rmjax.score --model={workdir / 'export'} --input=FILE --output=scores.jsonl",
        flush=True,
    )
    passed = {"export": str(workdir / "export"), "passed": verdict["passed"]}
    run.hooks.tell("end", status="finished", step=step, metrics=metrics, **passed)
    if run.config.gate.exit_code and not verdict["passed"]:
        raise finish.NotGoodEnough(
            f"the model fails the quality gate (config.gate); {workdir / 'quality.json'} says why"
        )


def _save_audit(path: Path, train: Groups, plan: Plan, validation: Groups, objective: Objective) -> None:
    """Writes what the data is like as JSON; `python -m rmjax.data audit --config=FILE --html=FILE` draws it."""
    report = measure.report(
        {"training": train, "validation": validation},
        plans={} if objective.draws else {"training": measure.filling(train, plan)},
        names=getattr(objective.task, "names", ()),
    )
    files.write_json(path, report)
