"""A config becomes a model: its Hugging Face values, the shapes of its parameters, and their first values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from rmjax import sharding
from rmjax.kernels import tree_attention
from rmjax.models import config as model_config
from rmjax.models import heads, hf
from rmjax.models.config import ModelConfig
from rmjax.objectives.base import Objective


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model before it has parameters.

    Attributes:
        objective: what it learns.
        mesh: the devices of its parameters.
        values: of its Hugging Face config.json.
        config: its sizes.
        graph: of `nnx.split`.
        shapes: of all parameters, the objective's under "objective", with their shardings.
        stops: of a language model, the token ids that end a response; see `generation_stops`.
    """

    objective: Objective
    mesh: jax.sharding.Mesh
    values: dict[str, Any]
    config: ModelConfig
    graph: Any
    shapes: Any
    stops: tuple[int, ...] = ()


def model_values(config: ConfigDict, tokenizer: Any) -> dict[str, Any]:
    """The Hugging Face config values of the model: init_from's, or those of `model.scratch`.

    Raises:
        ValueError: the tokenizer has ids that the model's embedding lacks.
    """
    if config.model.init_from:
        values = hf.read_config(hf.resolve(config.model.init_from))
    else:
        values = {"vocab_size": len(tokenizer), **config.model.scratch.to_dict()}
    longest, positions = config.data.max_length or config.plan.row_tokens, values.get("max_position_embeddings")
    if positions and longest > positions:
        logging.warning(
            "conversations of up to %d tokens are let in (config.data.max_length), the model knows %d positions; "
            "servers will refuse longer ones",
            longest,
            positions,
        )
    if why := tokens_without_row(tokenizer, values.get("vocab_size", len(tokenizer))):
        raise ValueError(f"{why}; or name the tokenizer that the model was trained with (config.model.tokenizer)")
    return values


def generation_stops(config: ConfigDict, objective: Objective, values: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a response by what the model starts from: generation_config.json there, else `values`.

    () of a model that does not write.
    """
    if objective.architecture != "CausalLM":
        return ()
    start = config.model.init_from
    return hf.generation_stops(hf.resolve(start) if start else None, values)


def tokens_without_row(tokenizer: Any, rows: int) -> str:
    """Which tokens have no row in an embedding of that many, and what to do; "" if all have one."""
    if len(tokenizer) <= rows:
        return ""
    first = tokenizer.convert_ids_to_tokens(list(range(rows, min(len(tokenizer), rows + 3))))
    return (
        f"the tokenizer has {len(tokenizer)} ids but the model's embedding {rows} rows, so that "
        f"{', '.join(map(repr, first))}{' and others' if len(tokenizer) > rows + 3 else ''} have none: call "
        f"resize_token_embeddings({len(tokenizer)}) in transformers and save the model again"
    )


def abstract_model(
    config: ConfigDict,
    objective: Objective,
    mesh: jax.sharding.Mesh,
    values: dict[str, Any],
    stops: tuple[int, ...] = (),
) -> AbstractModel:
    """The model of a config, these Hugging Face config values (`model_values`) and stops; nothing is allocated.

    Raises:
        ValueError: values that no model here has, or a form of attention that does not serve.
    """
    model = model_config.from_hf(values)
    platform = mesh.devices.flat[0].platform
    dtype = heads.compute_dtype(config.model.compute_dtype, platform)
    form, why = tree_attention.choose(config.model.attention, platform, model.head_dim, dtype)
    if why:
        logging.warning("attention falls back to the form for any device (xla): %s", why)
    if why := tree_attention.whole_heads(model.heads, model.kv_heads, mesh.shape["tensor"]):
        logging.warning("%s", why)
    graph, shapes = heads.abstract(
        model,
        len(objective.labels),
        config.model.param_dtype,
        dtype,
        architecture=objective.architecture,
        attention=form,
    )
    own = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in objective.params().items()}
    shapes = with_own(shapes, own)
    shapes = sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))
    return AbstractModel(objective, mesh, values, model, graph, shapes, stops)


def init_params(config: ConfigDict, model: AbstractModel) -> tuple[Any, str]:
    """Loads or initialises the parameters, sharded from the start; the second says where the head came from."""
    objective, shapes = model.objective, model_params(model.shapes)
    first = objective.params()
    own = {name: sharding.place(x, model.shapes["objective"][name].sharding) for name, x in first.items()}
    if config.model.init_from:
        params, head = hf.load(hf.resolve(config.model.init_from), shapes, model.config, seed=config.seed)
    else:
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        kind = {"seed": config.seed, "architecture": objective.architecture}
        init = lambda: heads.init(model.config, len(objective.labels), config.model.param_dtype, **kind)
        params, head = jax.jit(init, out_shardings=shardings)(), "new"
    return with_own(params, own), head


def with_own(params: Any, own: Mapping[str, Any]) -> Any:
    """The model's parameters and, if there are any, the objective's under "objective"."""
    return {**params, "objective": dict(own)} if own else params


def model_params(params: Any) -> Any:
    """The model's parameters without the objective's."""
    return {name: x for name, x in params.items() if name != "objective"}
