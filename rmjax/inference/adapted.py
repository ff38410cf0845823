"""Reward models that are adapters of one base, which is held once."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rmjax import sharding
from rmjax.inference import contract
from rmjax.inference.reward_model import RewardModel
from rmjax.models import heads, hf, lora, peft
from rmjax.models.lora import Lora


def load_sharing(load: Callable[[Path], RewardModel], paths: Sequence[str | Path]) -> list[RewardModel]:
    """Models as `load` loads each; those that are adapters of one base share the arrays of that.

    Each adapter is merged first, one at a time, as `load` does it and checks it. An adapter that is alone with its base
    stays so, as does one whose kernels have different ranks or scales.
    """
    directories = [hf.resolve(path) for path in paths]
    bases = [hf.base_of(directory) if peft.is_adapter(directory) else None for directory in directories]
    held: dict[Any, Any] = {}
    models = []
    for directory, base in zip(directories, bases):
        model = load(directory)
        if base is not None and bases.count(base) > 1 and (found := _adapters(directory, model)):
            model = _beside(directory, model, *found, held)
        models.append(model)
    return models


def _adapters(directory: Path, model: RewardModel) -> tuple[Lora, dict[str, np.ndarray]] | None:
    """The adapters of a directory and their arrays by path; None where they are not all alike."""
    found = hf.adapters_of(directory, hf.expected_rows(model.params, model.config), model.config)
    ranks = {int(rank) for x in found.values() for rank in np.ravel(x.ranks)}
    scales = {float(scale) for x in found.values() for scale in np.ravel(x.scale)}
    if len(ranks) != 1 or len(scales) != 1:
        return None
    targets = tuple(map(re.escape, sorted(found)))
    adapters = Lora(ranks.pop(), scales.pop(), targets, base=model.dtype, dtype=model.dtype)
    return adapters, {
        path.removesuffix("kernel") + name: x for path, f in found.items() for name, x in ((lora.A, f.a), (lora.B, f.b))
    }


def _beside(
    directory: Path, model: RewardModel, adapters: Lora, arrays: dict[str, np.ndarray], held: dict[Any, Any]
) -> RewardModel:
    """The model with its adapters beside the base; `held` are the parameters of bases, and gets this one's."""
    kind = model.kind
    _, plain = heads.abstract(model.config, len(kind.labels), model.dtype, model.dtype, architecture=kind.architecture)
    plain = sharding.with_shardings(plain, sharding.param_shardings(model.mesh, plain))
    head = model.params["score"]
    model.drop_params()
    kept_as = contract.base_kept_as(kind.contract)
    key = hf.base_of(directory), kept_as
    if key not in held:
        kept = lora.rounded_as(kept_as)
        held[key], _ = hf.load(directory, plain, model.config, seed=0, require_head=True, merges=False, kept=kept)
    own = {tuple(path.split("/")): jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
    shapes = unflatten_dict({**flatten_dict(plain), **own})
    places = flatten_dict(sharding.param_shardings(model.mesh, shapes))
    placed = {path: sharding.place(arrays["/".join(path)], places[path]) for path in own}
    params = {**unflatten_dict({**flatten_dict(held[key]), **placed}), "score": head}
    return RewardModel(model.chat, model.config, params, model.mesh, model.dtype, kind, adapters)
