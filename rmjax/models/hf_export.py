"""Writes Hugging Face directories, tensor by tensor; the whole model is never on one host."""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from rmjax.models import peft
from rmjax.models.config import ModelConfig
from rmjax.models.families import FAMILIES
from rmjax.models.families.base import PART, SCORE, SCORE_BIAS, Row
from rmjax.models.lora import Lora
from rmjax.models.rope import NONE, Rope
from rmjax.models.weight_files import INDEX
from rmjax.runtime import agreement, ownership, processes
from rmjax.sharding import path_name

PIECE = 32 * 2**20  # bytes of a tensor that are on the host, and whole on a device, at a time
CODES = {np.dtype(jnp.float32): "F32", np.dtype(jnp.bfloat16): "BF16", np.dtype(jnp.float16): "F16"}


def expected_rows(params: Any, config: ModelConfig) -> dict[Row, Any]:
    """Each row of the family's table that the model has, with its leaf of `params`."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    rows = {row: leaves.pop(row.path) for row in FAMILIES[config.family].table if row.path in leaves}
    if leaves:
        raise ValueError(f"the table of {config.family} has no row for {', '.join(leaves)}")
    return rows


def convert(x: jax.Array, *, transposed: bool, dtype: DTypeLike) -> jax.Array:
    """A tensor of one layout in the other, in this dtype."""
    return (jnp.swapaxes(x, -1, -2) if transposed else x).astype(dtype)


def save(
    directory: str | Path,
    params: Any,
    hf_config: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    pad_token_id: int,
    architecture: str = "SequenceClassification",
    labels: Sequence[str] | None = None,
    problem_type: str = "regression",
    also: Callable[[Path], None] | None = None,
    max_shard_bytes: float = 5e9,
    run: str = "",
) -> None:
    """Writes a Hugging Face directory, whole and synced, or not at all.

    Every process of a run must call it, since parameters are gathered, piece by piece; the first one writes.

    Args:
        directory: an export that is there already is replaced; files in it that are not ours are kept.
        hf_config: config.json of the model that the parameters came from; its other values are kept.
        dtype: of the weights on disk; a score head stays float32, rounding it would gain nothing.
        pad_token_id: the right-most token that is none of these is what transformers scores.
        architecture: which class of the family loads it, see heads.make.
        labels: names of the score head's outputs; None is LABEL_0, LABEL_1, ...
        problem_type: what a score head's outputs are to transformers: "regression", or
            "single_label_classification" for logits of exclusive classes.
        also: called with the directory before it gets its name, to write the tokenizer and whatever else; by every
            process, when the weights are there.
        max_shard_bytes: size of the largest weight file.
        run: id of the run that the export is of, for its marker.

    Raises:
        ValueError: `directory` holds something else than an export, or labels that are not the head's.
        OSError: it cannot be written; nothing is left and an export that was there stays.
    """
    rows = expected_rows(params, config)
    outputs = sum(leaf.shape[-1] for row, leaf in rows.items() if row.name == SCORE)
    names = [f"LABEL_{i}" for i in range(outputs)] if labels is None else list(labels)
    if len(set(names)) != len(names) or len(names) != outputs:
        raise ValueError(
            f"the labels {', '.join(names)} must be {outputs} different names, as many as the head's outputs"
        )
    written = config_json(
        hf_config,
        config,
        architecture=architecture,
        labels=names,
        problem_type=problem_type,
        dtype=dtype,
        pad_token_id=pad_token_id,
    )
    tensors = _tensors(rows, config, jnp.dtype(dtype))
    if architecture == "TokenClassification":  # transformers' have a bias
        zero = np.zeros(outputs, np.float32)
        tensors[SCORE_BIAS] = Tensor(zero.shape, zero.dtype, lambda: iter([zero]))
    with _new_export(Path(directory).resolve(), run) as partial:
        _write_weights(partial, tensors, max_shard_bytes)
        if processes.is_first():
            (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        if also is not None:
            agreement.barrier("weights written")
            also(partial)
            agreement.barrier("export complete")


def save_adapter(
    directory: str | Path,
    params: Any,
    config: ModelConfig,
    lora: Lora,
    *,
    base: str,
    root_scale: bool,
    architecture: str,
    also: Callable[[Path], None],
    run: str = "",
) -> None:
    """Writes what is trained beside a base as a PEFT directory, whole and synced, or not at all; see `save`.

    Args:
        params: all parameters of the model, adapters and base.
        base: directory or hub id of the base, for adapter_config.json.
        root_scale: whether alpha is divided by the root of the rank.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    has = lambda path: path in leaves or any(name.startswith(f"{path}/") for name in leaves)  # or is quantized
    rows = [row for row in FAMILIES[config.family].table if has(row.path)]
    tensors = _tensors(dict(peft.tensor_rows(rows, leaves)), config, jnp.dtype("float32"))
    if architecture == "TokenClassification":  # transformers' have a bias
        zero = np.zeros(leaves["score/kernel"].shape[-1], np.float32)
        tensors[peft.PREFIX + SCORE_BIAS] = Tensor(zero.shape, zero.dtype, lambda: iter([zero]))
    adapted = peft.adapted_rows(rows, leaves)
    alpha = lora.scale * (lora.rank**0.5 if root_scale else lora.rank)
    terms = peft.adapter_config(
        lora, adapted, config.layers, alpha=alpha, root_scale=root_scale, base=base, architecture=architecture
    )
    with _new_export(Path(directory).resolve(), run) as partial:
        _write_file(partial / peft.WEIGHTS, tensors)
        if processes.is_first():
            (partial / peft.CONFIG).write_text(json.dumps(terms, indent=2) + "\n")
        agreement.barrier("weights written")
        also(partial)
        agreement.barrier("export complete")


def config_json(
    hf_config: Mapping[str, Any],
    config: ModelConfig,
    *,
    architecture: str,
    labels: Sequence[str],
    problem_type: str,
    dtype: DTypeLike,
    pad_token_id: int,
) -> dict[str, Any]:
    """The config.json of an export, for transformers v4 and v5 and the servers that read the older form."""
    head = {
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "num_labels": len(labels),
        "problem_type": problem_type,
        "token_classification_bias": True,
    }
    kept = {key: value for key, value in hf_config.items() if key not in head}
    if architecture != "TokenClassification":
        del head["token_classification_bias"]
    return {
        **kept,
        "architectures": [FAMILIES[config.family].architecture(architecture)],
        **({"tie_word_embeddings": config.tied} if architecture == "CausalLM" else head),
        "pad_token_id": pad_token_id,
        "dtype": jnp.dtype(dtype).name,
        "torch_dtype": jnp.dtype(dtype).name,
        **_rope(hf_config, config),
    }


def _rope(hf_config: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The rotary embedding in the forms of transformers v4 and v5; of a family with several, as it was given."""
    if FAMILIES[config.family].ropes_by_type:
        return {}
    of_all = next((rope for rope in config.ropes if rope.type != NONE), Rope())
    rope = {**(hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}), "rope_type": of_all.type}
    for name in ("type", "rope_theta"):  # `type` is what v4 used first; two names for one thing can disagree
        rope.pop(name, None)
    return {
        "rope_theta": of_all.theta,
        "rope_scaling": None if of_all.type == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": of_all.theta},
    }


@contextlib.contextmanager
def _new_export(directory: Path, run: str) -> Iterator[Path]:
    """A directory to write into that gets its name when all went well; only process 0 touches the disk."""
    if not processes.is_first():
        yield directory.with_name(f".{directory.name}.partial")
        return
    require_replaceable(directory)
    with ownership.new_directory(directory, "export", run) as partial:
        yield partial


def require_replaceable(directory: Path, flag: str = "the export's directory") -> None:
    """Refuses (ValueError) a directory that an export cannot replace: one that is there and is no export of ours."""
    ownership.require_ours(directory, "export", flag, older=(directory / ownership.OLDER_CONTRACT).is_file)


class Tensor(NamedTuple):
    """A tensor to write: its shape and dtype on disk, and what brings it to the host, some rows after the others."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _tensors(rows: Mapping[Row, Any], config: ModelConfig, dtype: np.dtype) -> dict[str, Tensor]:
    tensors = {}
    for row, leaf in rows.items():
        stored = jnp.dtype("float32") if row.name == SCORE else dtype
        for layer, name in enumerate(row.names(config.layers)):
            pieces = functools.partial(_pieces, row, leaf, layer, stored)
            tensors[name] = Tensor(row.shape(leaf), stored, pieces)
    return _fused(tensors)


def _fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the parts of fused ones joined along their first axis."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = name.partition(PART)[0]
        if (before := found.get(whole)) is not None:
            shape = before.shape[0] + tensor.shape[0], *tensor.shape[1:]
            both = functools.partial(
                lambda *parts: itertools.chain(*(part() for part in parts)), before.pieces, tensor.pieces
            )
            tensor = Tensor(shape, tensor.dtype, both)
        found[whole] = tensor
    return found


def _write_weights(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: float) -> None:
    """One file, or several numbered ones and an index; one piece of a tensor at a time is on the host."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(max_shard_bytes),
    )
    for file, names in split.filename_to_tensors.items():
        _write_file(directory / file, {name: tensors[name] for name in names})
    if split.is_sharded and processes.is_first():
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file: the header's length in 8 bytes, the header in JSON, the tensors end to end.

    The larger numbers stand first, so that each tensor is aligned (https://github.com/huggingface/safetensors#format).
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].size
        code, shape = CODES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if processes.is_first() else contextlib.nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in tensors[name].pieces():
                if file is not None:
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def _pieces(row: Row, leaf: Any, layer: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Rows of a tensor of the checkpoint, [out, in], gathered from all devices."""
    shape = row.shape(leaf)
    step = max(1, PIECE * shape[0] // (math.prod(shape) * dtype.itemsize))
    mesh = leaf.sharding.mesh if isinstance(getattr(leaf, "sharding", None), NamedSharding) else None
    everywhere = NamedSharding(mesh, P()) if mesh else None
    # Rows of an array that is split between rows would be gathered with all others, so columns are split.
    placed = everywhere if step >= shape[0] or mesh is None else NamedSharding(mesh, P(None, _dividing(mesh, shape[1])))
    tensor = _tensor(leaf, layer, stacked=row.stacked, transposed=row.transposed, dtype=dtype, sharding=placed)
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        yield np.asarray(tensor if rows == shape[0] else _rows(tensor, start, rows=rows, sharding=everywhere))


def _dividing(mesh: Mesh, size: int) -> tuple[str, ...]:
    """The mesh axes, from the last, that divide `size` together."""
    axes: tuple[str, ...] = ()
    for axis in reversed(mesh.axis_names):
        if size % math.prod(mesh.shape[a] for a in (axis, *axes)) == 0:
            axes = (axis, *axes)
    return axes


@functools.partial(jax.jit, static_argnames=("stacked", "transposed", "dtype", "sharding"))
def _tensor(
    x: jax.Array, layer: int, *, stacked: bool, transposed: bool, dtype: np.dtype, sharding: NamedSharding | None
) -> jax.Array:
    one = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) if stacked else x
    one = convert(one, transposed=transposed, dtype=dtype)
    return one if sharding is None else jax.lax.with_sharding_constraint(one, sharding)


@functools.partial(jax.jit, static_argnames=("rows", "sharding"))
def _rows(tensor: jax.Array, start: int, *, rows: int, sharding: NamedSharding | None) -> jax.Array:
    piece = jax.lax.dynamic_slice_in_dim(tensor, start, rows)
    return piece if sharding is None else jax.lax.with_sharding_constraint(piece, sharding)
