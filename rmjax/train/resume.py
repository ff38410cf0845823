"""How a run goes on in its workdir: what may have changed since it stopped, and what it remembers beside its arrays."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax.batches.chat import Chat
from rmjax.batches.groups import Groups
from rmjax.batches.packing import Plan
from rmjax.checkpoint import Checkpointer
from rmjax.inference import parameters, runs
from rmjax.inference.parameters import AbstractModel
from rmjax.models import hf_export
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.sums import Sums
from rmjax.runtime import agreement, files, ownership, processes
from rmjax.runtime.sealing import MANIFEST
from rmjax.train import optim
from rmjax.train.step import Program

# What becomes of a config key that differs from that of the run so far: the first pattern that matches decides.
REFUSED, LOGGED, FREE = "refused", "allowed and logged", "free"
CHANGES = (
    # No number changes by more than rounding.
    (r"debug|hooks|on_hook_error|mesh\..*|model\.(remat|attention)|plan\.micro_rows", FREE),
    (r"data\.(workers|cache_dir|max_bad_fraction)|checkpoint\.keep_\w+|export\..*|profile\..*", FREE),
    (r"log\.every", LOGGED),
    (r"log\..*|gate\..*", FREE),
    # From here on the run is another one, with the same steps behind it.
    (r"duration|on_nonfinite|eval\..*|checkpoint\.(every|patience|goal)", LOGGED),
    (r"optim\.(learning_rate|schedule|warmup|decay|weight_decay|decays|lr_factors|clip_norm|b1|b2|eps)", LOGGED),
    # The rest decides the rows, the model, the state of the optimizer, or what the best checkpoint is.
    (r".*", REFUSED),
)

WHOLE = "what the objective makes of the data (its template)"  # changes with data and tokenizer as well


def check_workdir(config: ConfigDict, workdir: Path) -> list[str]:
    """Makes sure that workdir and checkpoints hold this very run, or none; one is there once it has saved a checkpoint.

    The config that counts is the one beside the checkpoints: two workdirs may name one directory of them.

    Returns:
        What changed and may change, as "config.optim.learning_rate: 1e-05 before, 5e-06 now".

    Raises:
        ValueError: a key changed that may not; a directory is another run's or somebody else's; or it is in a place
            that needs a package.
    """
    checkpoints = runs.checkpoint_directory(config, workdir)
    try:
        checkpoints.exists()
    except ImportError as error:
        raise ValueError(f"config.checkpoint.dir={config.checkpoint.dir!r} needs a package: {error}") from error
    path = workdir / "config.json"
    older = _older_config(path)
    mine = ownership.require_ours(workdir, "run", "--workdir", older=lambda: older is not None)
    hf_export.require_replaceable(workdir / "export", "the export in --workdir")  # now, not after the training
    if path.exists() and older is None:
        raise ValueError(f"{path} is no run's config; put it back, or choose another --workdir")
    named = None if older is None else epath.Path(older["checkpoint"].get("dir") or workdir / "checkpoints")
    marker = ownership.require_ours(
        checkpoints,
        "checkpoints",
        "config.checkpoint.dir",
        older=lambda: named == checkpoints and _has_steps_only(named),
    )
    if marker and marker["run"]:
        _require_same_run(marker, mine, checkpoints, workdir)
    if marker and "config" in marker:
        before, saved = marker["config"], checkpoints
    elif named is not None:
        before, saved = path.read_text(), named
    else:
        return []
    if not (saved.is_dir() and any((step / MANIFEST).exists() for step in saved.iterdir())):
        return []
    moved = saved == checkpoints  # wherever the checkpoints were, they are here now
    where = workdir if marker is None or marker.get("workdir") == str(workdir.absolute()) else checkpoints
    return _allowed_changes(config_lib.differences(before, config_lib.to_json(config)), moved, where)


def _allowed_changes(differences: list[str], moved: bool, where: os.PathLike) -> list[str]:
    of: dict[str, list[str]] = {REFUSED: [], LOGGED: [], FREE: []}
    for difference in differences:
        key = difference.removeprefix("config.").partition(":")[0]
        if key != "checkpoint.dir" or not moved:
            of[next(what for pattern, what in CHANGES if re.fullmatch(pattern, key))].append(difference)
    if of[REFUSED]:
        undo = "\n  ".join(of[REFUSED])
        raise ValueError(f"{where} holds a run of another config; choose another --workdir, or undo:\n  {undo}")
    return of[LOGGED]


def _older_config(path: Path) -> dict[str, Any] | None:
    """The config in a workdir; None where there is none that is a run's."""
    try:
        values = json.loads(path.read_text())
        known = {"checkpoint", "objective", "optim"} <= values.keys() and isinstance(values["checkpoint"], dict)
        return values if known else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _has_steps_only(checkpoints: epath.Path) -> bool:
    """Whether a directory without a marker is one of checkpoints that a version of rmjax without markers made."""
    names = [path.name for path in checkpoints.iterdir() if path.name not in ownership.NOBODYS]
    return all(re.fullmatch(r"\d+(\.orbax.*)?|broken-\d+", name) for name in names)


def _require_same_run(
    marker: dict[str, Any], mine: dict[str, Any] | None, checkpoints: epath.Path, workdir: Path
) -> None:
    """Raises ValueError where the checkpoints are another run's.

    A workdir that was lost (a new machine, checkpoints in a bucket) is known by its path.
    """
    theirs = marker.get("workdir")
    if mine["run"] == marker["run"] if mine else theirs == str(workdir.absolute()):
        return
    raise ValueError(
        f"{checkpoints} has the checkpoints of another run, whose workdir is {theirs}; give each run its own "
        f"config.checkpoint.dir. (If that run has moved here, copy its {ownership.MARKER} into {workdir})"
    )


def claim(config: ConfigDict, workdir: Path) -> str:
    """Marks the workdir as this run's, on the first process; returns the run's id on all.

    Raises:
        ValueError: a marker is damaged.
    """
    run = ""
    if processes.is_first():
        checkpoints = ownership.read_marker(runs.checkpoint_directory(config, workdir), "checkpoints") or {}
        mine = runs.run_id(workdir)
        run = mine or checkpoints.get("run") or ownership.new_id()
        if not mine:
            ownership.write_marker(workdir, "run", run)
    return agreement.agree("run", run)


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes the resolved config into the workdir, whole."""
    files.write_whole(workdir / "config.json", config_lib.to_json(config))


def identity(
    config: ConfigDict, chat: Chat, values: dict[str, Any], train: Groups, validation: Groups
) -> dict[str, str]:
    """What a run is made of, by fingerprints; `values` are the Hugging Face config values of its model."""
    return {
        "the training data": train.origin,
        "the validation data": validation.origin,
        **chat.identity(),
        "the model's config": _digest(values),
        parameters.START: parameters.start_digest(config),
        WHOLE: _digest([train.fingerprint, validation.fingerprint]),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


@dataclasses.dataclass
class Host:
    """What the run remembers beside its arrays; saved with each checkpoint, so that a resumed run writes equal lines.

    Attributes:
        made_from: see `identity`; resuming with anything else is refused.
        rows: fingerprint of the rows of the plan's steps so far, see `Plan.digest`.
        window: sums since the last training line of the metrics.
        best: best value of checkpoint.metric so far.
        waits: evaluations since then.
        skipped: steps that moved nothing because they, or one after them, were not finite.
        left_out: [first step, step to go on from] of the steps that a rollback left out.
        unevaluated: whether the evaluation that is due at this step has been left to the next start.
        stopped: whether the run ended early.
        rewards: the mean rewards of the evaluation before training, by their names.
    """

    made_from: dict[str, str]
    rows: str = ""
    window: Sums = dataclasses.field(default_factory=dict)
    best: float | None = None
    waits: int = 0
    skipped: int = 0
    left_out: list[list[int]] = dataclasses.field(default_factory=list)
    unevaluated: bool = False
    stopped: bool = False
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)

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

    def judge(self, value: float | None, mode: str, patience: int, goal: float = 0.0) -> None:
        """Takes in an evaluation's value of the metric; decides whether to stop early."""
        better = value is not None and (
            self.best is None or (value > self.best if mode == "max" else value < self.best)
        )
        self.best, self.waits = (value, 0) if better else (self.best, self.waits + 1)
        self.stopped = self.ends(mode, patience, goal)

    def ends(self, mode: str, patience: int, goal: float) -> bool:
        """Whether the run stops early, by config.checkpoint."""
        reached = bool(goal) and self.best is not None and (self.best >= goal if mode == "max" else self.best <= goal)
        return reached or (bool(patience) and self.waits >= patience)

    def leave_out(self, start: int, bad: int, steps: int) -> None:
        """Leaves out the rows of the steps from `start`, gone back to, to the `bad` one, of a plan of `steps`."""
        self.left_out.append([start, bad + 1])
        self.skipped += bad + 1 - start
        self.unevaluated = bad + 1 == steps  # then nothing follows that would be evaluated and saved

    def next_step(self, start: int) -> int:
        """The step that follows the checkpoint `start`: a later one where its rows are left out."""
        first, after = self.left_out[-1] if self.left_out else (-1, -1)
        return after if first == start else start

    def check(self, made_from: dict[str, str], plan: Plan, start: int) -> None:
        """Makes sure that the run goes on with what it was made from, as the checkpoint of step `start` remembers it.

        Raises:
            ValueError: something changed; says what.
        """
        again = "choose another --workdir, or put back what was there"
        changed = [name for name, value in made_from.items() if self.made_from.get(name) != value]
        if changed := [name for name in changed if name != WHOLE] or changed:
            raise ValueError(f"{listed(changed)} changed since the checkpoint of step {start} was made; {again}")
        if start > plan.steps:
            raise ValueError(
                f"the checkpoint of step {start} is beyond the {plan.steps} steps that the run has now; raise "
                "config.duration, or choose another --workdir"
            )
        if self.rows != plan.digest(start):
            raise ValueError(
                f"the plan has other rows in the {start} steps that are done, though its data and config are the same: "
                f"was it made by another version of rmjax or numpy? {again}"
            )


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def restore_or_init(
    config: ConfigDict,
    checkpointer: Checkpointer,
    program: Program,
    model: AbstractModel,
    made_from: dict[str, str],
    plan: Plan,
    bad: int | None = None,
) -> tuple[dict[str, Any], Host, int]:
    """The newest whole checkpoint, or freshly loaded or initialised parameters; and the step to go on from.

    The rows of a `bad` step after the checkpoint are left out, as are those of all steps between (PaLM,
    arXiv:2204.02311, section 5.1). `made_from` is `identity`; `program` has the shapes and shardings of the state.

    Raises:
        ValueError: the checkpoint was made from something else.
    """
    shapes = program.state["params"]
    restored = checkpointer.restore({**program.state, "params": parameters.saved(config, shapes)})
    if restored is not None:
        start, state, values = restored
        host = Host.from_json(values)
        host.check(made_from, plan, start)
        state = {**state, "params": parameters.whole(config, model, state["params"])}
        rule = config.checkpoint
        host.stopped = host.ends(rule.mode, rule.patience, rule.goal)
        print(f"continuing from step {start}", flush=True)
    else:
        params, head = parameters.init_params(config, model)
        if "score" in params:
            print(f"score head: {head}, norm {float(jnp.linalg.norm(params['score']['kernel'])):.4g}", flush=True)
        tx = optim.make(config.optim, config.seed)
        trained, _ = parameters.split(config, params)
        opt = jax.jit(tx.init, out_shardings=program.shardings["opt"])(trained)
        start, state, host = 0, {"params": params, "opt": opt}, Host(made_from)
    if bad is not None:
        host.leave_out(start, bad, plan.steps)
        print(f"the rows of steps {start} to {bad} are left out; {host.skipped} steps so far", flush=True)
    return state, host, start
