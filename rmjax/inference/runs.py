"""Opens what a run has trained: any of its checkpoints, without its data."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import prepare
from rmjax.batches.chat import Chat, set_pad_token
from rmjax.checkpoint import Checkpointer
from rmjax.inference import parameters
from rmjax.inference.parameters import AbstractModel
from rmjax.inference.reward_model import Kind, RewardModel, longest_context
from rmjax.models import heads
from rmjax.runtime import ownership

START = "start"  # the directory of config.start in a workdir


@dataclasses.dataclass(frozen=True)
class Place:
    """A run, and which of its checkpoints: a number, "best" or "last"."""

    workdir: Path
    step: str = "best"


@dataclasses.dataclass(frozen=True)
class Opened:
    """An opened checkpoint.

    Attributes:
        workdir: of its run.
        config: of its run.
        step: after which it was saved.
        chat: tokenizer and template that the run trained with.
        model: shapes, objective and devices.
        params: the parameters, the objective's under "objective".
    """

    workdir: Path
    config: ConfigDict
    step: int
    chat: Chat
    model: AbstractModel
    params: Any


def find(path: str | Path) -> Place | None:
    """The run that a path names: its directory, that of its checkpoints, or one of these; None where it is no run's."""
    path = Path(path)
    candidates = [(path, "best")]
    if path.name == "checkpoints":
        candidates.append((path.parent, "best"))
    if path.name.isdecimal() and path.parent.name == "checkpoints":
        candidates.append((path.parent.parent, path.name))
    for workdir, step in candidates:
        try:
            values = json.loads((workdir / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(values, dict) and {"checkpoint", "objective", "optim"} <= values.keys():
            return Place(workdir, step)
    return None


def read_config(workdir: Path) -> ConfigDict:
    """The resolved config of a run.

    Raises:
        ValueError: it is that of another version.
    """
    values = config_lib.renamed(json.loads((workdir / "config.json").read_text()))
    name = values["objective"]["name"]
    config = config_lib.defaults(name)
    with config.unlocked():
        config.model.scratch = ConfigDict(values["model"].pop("scratch", {}))
        config.start = ConfigDict(values.pop("start", {}))
    try:
        config.update(values)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{workdir / 'config.json'} is of another version of rmjax: {error}") from None
    return config


def settled(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config of a run as it is run in a workdir: with what stands for "by the others" filled in; one with `start`
    begins with the export of that.

    Until there is one, its model is that of `start`, as far as shapes go.
    """
    config = config_lib.filled(config)
    if not config.start:
        return config
    export = workdir / START / "export"
    if export.exists():
        config.model.init_from = str(export)
        return config
    with config.unlocked():
        for key in ("init_from", "scratch", "tokenizer"):
            config.model[key] = config.start.model[key]
    return config


def open_checkpoint(place: Place, mesh: jax.sharding.Mesh | None = None) -> Opened:
    """Restores the parameters of a checkpoint.

    Args:
        place: of it.
        mesh: to put them on; None is the run's own where it fits the devices here, else all of them on `fsdp`.

    Raises:
        ValueError: there is no such checkpoint, or it is not whole; says which there are.
    """
    config = settled(read_config(place.workdir), place.workdir)
    objective = objectives.of_config(config).exported
    mesh = mesh or _mesh(config)
    with tempfile.TemporaryDirectory() as scratch:
        chat = prepare.open_chat(config, Path(scratch))
    values = parameters.model_values(config, chat.tokenizer)
    set_pad_token(chat, values["vocab_size"])
    stops = parameters.generation_stops(config, objective, values)
    model = parameters.abstract_model(config, objective, mesh, values, stops)
    checkpointer, step = _find_step(config, place)
    try:
        state, host = checkpointer.restore_step(step, {"params": parameters.saved(config, model.shapes)})
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    partly = parameters.split(config, model.shapes)[1] and config.model.init_from
    made_from = host.get("made_from", {}).get(parameters.START)
    if partly and made_from != parameters.start_digest(config):
        raise ValueError(
            f"{parameters.START} changed since the checkpoint of step {step} of {place.workdir} was made, which holds "
            "only what was trained beside them; put back what was there"
        )
    return Opened(place.workdir, config, step, chat, model, parameters.whole(config, model, state["params"]))


def identity(place: Place) -> dict[str, Any]:
    """The run and the step of a checkpoint, as they are in JSON."""
    return {"run": run_id(place.workdir), "step": _find_step(read_config(place.workdir), place)[1]}


def _find_step(config: ConfigDict, place: Place) -> tuple[Checkpointer, int]:
    keep, directory = config.checkpoint, checkpoint_directory(config, place.workdir)
    checkpointer = Checkpointer(
        directory, keep_latest=keep.keep_latest, keep_best=keep.keep_best, metric=keep.metric, mode=keep.mode
    )
    return checkpointer, _step(checkpointer, place.step, directory)


def _step(checkpointer: Checkpointer, wanted: str, directory: epath.Path) -> int:
    """The number of a checkpoint; where none has been evaluated, the best is the last."""
    steps = checkpointer.steps()
    if not steps:
        raise ValueError(f"{directory} has no finished checkpoint; let the run go on until it has saved one")
    best = checkpointer.best_step()
    named = {"best": steps[-1] if best is None else best, "last": steps[-1]}
    step = named.get(wanted, int(wanted) if wanted.isdecimal() else -1)
    if step not in steps and not (directory / str(step)).exists():  # of one that is broken, restoring it says what is
        raise ValueError(f"there is no checkpoint {wanted} in {directory}; there is best, last, {steps}")
    return step


def _mesh(config: ConfigDict) -> jax.sharding.Mesh:
    try:
        return sharding.make_mesh(config.mesh, jax.devices())
    except ValueError:
        return sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())


def reward_model(model: AbstractModel, chat: Chat, params: Any, dtype: str = "auto") -> RewardModel:
    """The reward model of a run's parameters, which it shares; like that of `RewardModel.load` for an export.

    Args:
        model: of the run.
        chat: of the run.
        params: the parameters, the objective's under "objective".
        dtype: of the computation, as config.model.compute_dtype.
    """
    own = jax.device_get(params.get("objective", {}))
    kind = Kind.trained(model.objective.exported, own, model.stops, longest_context(model.values))
    dtype = heads.compute_dtype(dtype, model.mesh.devices.flat[0].platform)
    params = model.merged(params, dtype)
    return RewardModel(chat, model.config, parameters.model_params(params), model.mesh, dtype, kind)


def checkpoint_directory(config: ConfigDict, workdir: Path) -> epath.Path:
    """Where the checkpoints are: config.checkpoint.dir, by default in the workdir."""
    return epath.Path(config.checkpoint.dir or workdir / "checkpoints")


def run_id(workdir: Path) -> str:
    """The id of the run in a workdir; "" of one of a version that made none."""
    marker = ownership.read_marker(workdir, "run")
    return marker["run"] if marker else ""
