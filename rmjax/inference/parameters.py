"""A config becomes a model: its Hugging Face values, the shapes of its parameters, and their first values."""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import sharding
from rmjax.batches.encoding import json_digest
from rmjax.hardware import flops
from rmjax.kernels import tree_attention
from rmjax.models import config as model_config
from rmjax.models import heads, hf, lora, peft, quantized, weight_files
from rmjax.models.config import ModelConfig
from rmjax.models.lora import Lora
from rmjax.objectives.base import Objective
from rmjax.sharding import path_name


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
        adapters: what is trained beside a frozen base; None where there are none.
        merged_graph: `graph` of the model into which the adapters are merged.
        merged_shapes: `shapes` of that.
    """

    objective: Objective
    mesh: jax.sharding.Mesh
    values: dict[str, Any]
    config: ModelConfig
    graph: Any
    shapes: Any
    stops: tuple[int, ...] = ()
    adapters: Lora | None = None
    merged_graph: Any = None
    merged_shapes: Any = None

    @property
    def plain(self) -> "AbstractModel":
        """The model into which the adapters are merged; itself where there are none."""
        if self.adapters is None:
            return self
        return dataclasses.replace(
            self, graph=self.merged_graph, shapes=self.merged_shapes, adapters=None, merged_graph=None
        )

    @property
    def flops_each(self) -> int:
        """FLOPs that training costs for a token and a parameter of `plain`; see hardware/flops.py."""
        return flops.FROZEN if self.adapters else flops.TRAINED

    def merged(self, params: Any, dtype: DTypeLike) -> Any:
        """The parameters of `plain`, in this dtype (a score head and what an objective learns stay float32).

        The same parameters where there are no adapters.
        """
        if self.adapters is None:
            return params
        return self._merges(jnp.dtype(dtype))(params)

    @functools.cached_property
    def _merges(self) -> Callable[[Any], Callable[[Any], Any]]:
        """For a dtype what merges, compiled once."""
        shapes, scale = self.merged_shapes, cast(Lora, self.adapters).scale
        shardings = jax.tree.map(lambda x: x.sharding, shapes)

        @functools.cache
        def merge(dtype: Any) -> Callable[[Any], Any]:
            stays = lambda path: re.fullmatch(r"(score|objective)/.*", path_name(path))
            dtypes = jax.tree_util.tree_map_with_path(lambda path, x: x.dtype if stays(path) else dtype, shapes)
            return jax.jit(functools.partial(lora.merged, scale=scale, dtypes=dtypes), out_shardings=shardings)

        return merge


def lora_of(config: ConfigDict, platform: str) -> Lora | None:
    """What `config.lora` asks for on this platform; None without a rank."""
    wanted = config.lora
    if wanted.rank is None:
        return None
    alpha = 2 * wanted.rank if wanted.alpha is None else wanted.alpha
    dtype = heads.compute_dtype(config.model.compute_dtype, platform)
    return Lora(
        rank=wanted.rank,
        scale=alpha / (wanted.rank**0.5 if wanted.root_scale else wanted.rank),
        targets=tuple(wanted.targets),
        base=dtype if wanted.base == "auto" else wanted.base,
        dtype=dtype,
    )


def model_values(config: ConfigDict, tokenizer: Any) -> dict[str, Any]:
    """The Hugging Face config values of the model: init_from's, or those of `model.scratch`.

    Raises:
        ValueError: the tokenizer has ids that the model's embedding lacks.
    """
    if config.model.init_from:
        values = hf.read_config(hf.resolve(config.model.init_from), config.model.base)
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
    return hf.generation_stops(hf.base_of(hf.resolve(start), config.model.base) if start else None, values)


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
    abstract = functools.partial(
        heads.abstract,
        model,
        len(objective.labels),
        config.model.param_dtype,
        dtype,
        architecture=objective.architecture,
        attention=form,
    )
    own = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in objective.params().items()}

    def placed(shapes: Any) -> Any:
        shapes = with_own(shapes, own)
        return sharding.with_shardings(shapes, sharding.param_shardings(mesh, shapes))

    graph, shapes = abstract()
    adapters = lora_of(config, platform)
    if adapters is None:
        return AbstractModel(objective, mesh, values, model, graph, placed(shapes), stops)
    adapted_graph, adapted = abstract(adapters=adapters)

    def of_base(path: tuple, x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, adapters.frozen_dtype(path_name(path), x.dtype))

    adapted = jax.tree_util.tree_map_with_path(of_base, adapted)
    return AbstractModel(
        objective, mesh, values, model, adapted_graph, placed(adapted), stops, adapters, graph, placed(shapes)
    )


def init_params(config: ConfigDict, model: AbstractModel) -> tuple[Any, str]:
    """Loads or initialises the parameters, sharded from the start; the second says where the head came from."""
    objective, shapes = model.objective, model_params(model.plain.shapes)
    first = objective.params()
    own = {name: sharding.place(x, model.shapes["objective"][name].sharding) for name, x in first.items()}
    kept = _of_base(model)
    if config.model.init_from:
        directory = hf.resolve(config.model.init_from)
        goes_on = _goes_on(config, model)
        options = {"base": config.model.base, "merges": not goes_on, "kept": kept}
        params, head = hf.load(directory, _read_as(model), model.config, seed=config.seed, **options)
        found = _adapters_in(config, model) if goes_on else {}
    else:
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        kind = {"seed": config.seed, "architecture": objective.architecture}
        init = lambda: heads.init(model.config, len(objective.labels), config.model.param_dtype, **kind)
        params, head = jax.jit(init, out_shardings=shardings)(), "new"
        params = jax.tree_util.tree_map_with_path(lambda path, x: kept(path_name(path), x), params)
        found = {}
    return with_own(_with_adapters(params, model, config.seed, found), own), head


def _goes_on(config: ConfigDict, model: AbstractModel) -> bool:
    """Whether the run trains on the adapters that it starts from, rather than merge them."""
    return model.adapters is not None and peft.is_adapter(hf.resolve(config.model.init_from))


def check_adapters(config: ConfigDict, model: AbstractModel, reads: bool = True) -> None:
    """Refuses what adapters do not go with, before any work; without `reads` no files are looked at.

    Raises:
        ValueError: parameters of the base that config.optim.freezes leaves to be trained, or adapters to be trained on
            that are not those of config.lora.
    """
    if model.adapters is None:
        return
    trained = map("/".join, flatten_dict(split(config, model.shapes)[0]))
    if others := [path for path in trained if not re.fullmatch(config_lib.TRAINED_BESIDE_A_BASE, path)]:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise ValueError(
            f"config.optim.freezes leaves {', '.join(others[:4])}{more} to be trained, and config.lora freezes the "
            "base: freeze them too, or leave config.lora.rank out"
        )
    if reads and config.model.init_from and _goes_on(config, model):
        _adapters_in(config, model)


def _adapters_in(config: ConfigDict, model: AbstractModel) -> dict[str, np.ndarray]:
    """The adapters of the PEFT directory that a run goes on with, by their paths.

    Raises:
        ValueError: they are not those that config.lora asks for.
    """
    directory = hf.resolve(config.model.init_from)
    rows = hf.expected_rows(model_params(model.plain.shapes), model.config)
    found, wanted = hf.adapters_of(directory, rows, model.config), model.adapters
    assert wanted is not None
    kernels = {path for path in (row.path for row in rows) if re.fullmatch(lora.KERNELS, path) and wanted.adapts(path)}
    alike = kernels == set(found) and all(
        (x.ranks == wanted.rank).all() and np.allclose(x.scale, wanted.scale) for x in found.values()
    )
    if not alike:
        terms = peft.read_config(directory)
        raise ValueError(
            f"{directory} is an adapter of rank {terms['r']} and alpha {terms.get('lora_alpha', 8)} on "
            f"{', '.join(sorted(found))}, and config.lora asks for another. To train it on, set config.lora.rank="
            f"{terms['r']}, config.lora.alpha={float(terms.get('lora_alpha', 8))}, config.lora.root_scale="
            f"{bool(terms.get('use_rslora'))} and config.lora.targets to those kernels; or merge it first: "
            "without config.lora.rank it is merged and every parameter is trained"
        )
    factors = {path.removesuffix("kernel"): x for path, x in found.items()}
    return {f"{path}{name}": value for path, x in factors.items() for name, value in ((lora.A, x.a), (lora.B, x.b))}


def _of_base(model: AbstractModel) -> Callable[[str, jax.Array], Any]:
    """What is kept of a parameter that was read, by its path: itself, or, of a frozen base, itself in another dtype."""
    adapters = model.adapters
    if adapters is None:
        return lambda path, x: x
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes):
        name = path_name(path)
        if "/kernel/" in name:  # the parts of a quantized one
            leaves.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = leaf
        else:
            leaves[name] = leaf

    def kept(path: str, x: jax.Array) -> Any:
        leaf = leaves[path]
        if isinstance(leaf, dict):
            made = functools.partial(lora.by_layer, functools.partial(quantized.quantize, kind=adapters.base))
            return jax.jit(made, out_shardings={name: part.sharding for name, part in leaf.items()})(x)
        return x if x.dtype == leaf.dtype else _cast(x, leaf.dtype)

    return kept


_cast = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)


def _read_as(model: AbstractModel) -> Any:
    """Shapes of the base's parameters as they are read: in the dtype that they keep, or are quantized from."""
    shapes = model_params(model.plain.shapes)
    stored = model.values.get("dtype") or model.values.get("torch_dtype")
    if (adapters := model.adapters) is None:
        return shapes

    def one(path: tuple, x: Any) -> Any:
        name = path_name(path)
        dtype = adapters.frozen_dtype(name, x.dtype)
        if adapters.quantizes and re.fullmatch(lora.KERNELS, name):
            dtype = "bfloat16" if stored == "bfloat16" else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _with_adapters(params: Any, model: AbstractModel, seed: int, found: Mapping[str, np.ndarray]) -> Any:
    """The parameters with the adapters that were found, or with new ones."""
    if model.adapters is None:
        return params

    def first(path: tuple, leaf: Any) -> jax.Array:
        if found:
            return sharding.place(found[path_name(path)], leaf.sharding)
        return jax.jit(functools.partial(lora.new, path, leaf, seed), out_shardings=leaf.sharding)()

    own = {
        tuple(path_name(path).split("/")): first(path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes)
        if re.fullmatch(lora.OWN, path_name(path))
    }
    return unflatten_dict({**flatten_dict(params), **own})


def with_own(params: Any, own: Mapping[str, Any]) -> Any:
    """The model's parameters and, if there are any, the objective's under "objective"."""
    return {**params, "objective": dict(own)} if own else params


def model_params(params: Any) -> Any:
    """The model's parameters without the objective's."""
    return {name: x for name, x in params.items() if name != "objective"}


def split(config: ConfigDict, params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that are trained and those that `config.optim.freezes` keeps, each a nested dict of its own."""
    trained: dict[tuple, Any] = {}
    frozen: dict[tuple, Any] = {}
    for keys, x in flatten_dict(params).items():
        keeps = sharding.first_match(config.optim.freezes, "/".join(keys), "freezes")
        (frozen if keeps else trained)[keys] = x
    return unflatten_dict(trained), unflatten_dict(frozen)


def join(trained: Any, frozen: Any) -> dict[str, Any]:
    """The inverse of `split`."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)})


def describe_trained(config: ConfigDict, model: AbstractModel) -> str:
    """A line that says how many parameters are trained; "" where all are."""
    trained, frozen = ([x.size for x in jax.tree.leaves(part)] for part in split(config, model.shapes))
    if not frozen:
        return ""
    total = sum(x.size for x in jax.tree.leaves(model.plain.shapes))
    how = f" in a base that is kept as {model.adapters.base}" if model.adapters else ""
    return f"trained: {sum(trained):,} parameters beside {total:,}{how}; the others are frozen\n"


def saved(config: ConfigDict, params: Any) -> Any:
    """What a checkpoint holds of the parameters of a run (or of their shapes): those that are trained.

    Of a model without init_from it is all of them, since the others could not be read again.
    """
    return split(config, params)[0] if config.model.init_from else params


def whole(config: ConfigDict, model: AbstractModel, held: Any) -> Any:
    """All parameters, from those that a checkpoint held (`saved`) and the base that the run started from."""
    if flatten_dict(held).keys() == flatten_dict(model.shapes).keys():
        return held
    return join(held, init_params(config, model)[0])


START = "the weights of config.model.init_from"  # their digest, by this name in what a checkpoint remembers


def start_digest(config: ConfigDict) -> str:
    """What tells the weights that a run starts from apart from others; a config as `filled` makes it.

    By names, shapes, dtypes and sizes of files: to read them would take as long as a start. Those of a base that is
    frozen, which no checkpoint holds, by the first numbers of each tensor too.
    """
    weights: Any = None
    if config.model.init_from:
        start = hf.resolve(config.model.init_from)
        reads_again = any(frozen for _, frozen in config.optim.freezes)
        weights = weights_of(start, reads_again)
        if (base := hf.base_of(start, config.model.base)) != start:
            weights = [weights, weights_of(base, reads_again)]
    return json_digest(weights)[:32]


SAMPLED = 4096  # bytes of each tensor that tell it from others


def weights_of(directory: Path, sampled: bool = False) -> dict[str, Any]:
    """The tensors of a model or an adapter in plain values; `sampled` looks at their first numbers."""
    adapter = peft.is_adapter(directory)
    tensors = weight_files.open_file(directory / peft.WEIGHTS) if adapter else weight_files.open_tensors(directory)
    sizes = {file.name: file.stat().st_size for file in directory.glob("*.safetensors")}
    some = lambda tensor: [zlib.crc32(tensor.data[:SAMPLED].tobytes())] if sampled else []
    return {**sizes, **{name: [tensor.dtype, tensor.shape, *some(tensor)] for name, tensor in tensors.items()}}
