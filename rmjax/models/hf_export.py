"""Writes Hugging Face directories, tensor by tensor; the whole model is never on one host."""

import contextlib
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from rmjax.models.config import ModelConfig
from rmjax.models.hf_tables import CLASSES, INDEX, SCORE, SCORE_BIAS, WEIGHTS, Row, convert, expected_rows


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
) -> None:
    """Writes a Hugging Face directory, whole or not at all.

    On several hosts every process must call it, since parameters are gathered; the first one writes.

    Args:
        directory: replaced if it is an export already.
        params: of a Scorer or a LanguageModel, sharded or not.
        hf_config: config.json of the model that the parameters came from; its other values are kept.
        config: of the model.
        dtype: of the weights on disk; a score head stays float32, rounding it would gain nothing.
        pad_token_id: the right-most token that is none of these is what transformers scores.
        architecture: which class of the family loads it, see heads.make.
        labels: names of the score head's outputs; None is LABEL_0, LABEL_1, ...
        problem_type: what a score head's outputs are to transformers: "regression", or
            "single_label_classification" for logits of exclusive classes.
        also: called with the directory before it gets its name, to write the tokenizer and whatever else.
        max_shard_bytes: size of the largest weight file, and so of the host memory that is needed.

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
        tensors[SCORE_BIAS] = Tensor(zero.nbytes, lambda: zero)
    with _atomic_directory(Path(directory)) as partial:
        _write_weights(partial, tensors, max_shard_bytes)
        if jax.process_index() == 0:
            (partial / "config.json").write_text(json.dumps(written, indent=2) + "\n")
            if also is not None:
                also(partial)


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
    rope = dict(hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {})
    rope["rope_type"] = config.rope.type
    rope.pop("type", None)  # the name that v4 used first; two names for one thing can disagree
    rope.pop("rope_theta", None)
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
        "architectures": [f"{CLASSES[config.family]}For{architecture}"],
        **({"tie_word_embeddings": config.tied} if architecture == "CausalLM" else head),
        "pad_token_id": pad_token_id,
        "dtype": jnp.dtype(dtype).name,
        "torch_dtype": jnp.dtype(dtype).name,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.type == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta},
    }


@contextlib.contextmanager
def _atomic_directory(directory: Path) -> Iterator[Path]:
    """A directory to write into that gets its name when all went well; only process 0 touches the disk."""
    partial = directory.with_name(f".{directory.name}.partial")
    if jax.process_index() != 0:
        yield partial
        return
    if directory.exists() and not (directory / "config.json").is_file() and any(directory.iterdir()):
        raise ValueError(f"{directory} is there and is not an export (no config.json); choose another directory")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if (partial / "config.json").is_file():  # safetensors gives its files to their owner alone
        for file in partial.iterdir():
            file.chmod((partial / "config.json").stat().st_mode)
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


class Tensor(NamedTuple):
    """A tensor to write: its size in bytes, and what brings it to the host."""

    size: int
    read: Callable[[], np.ndarray]


def _tensors(rows: Mapping[Row, Any], config: ModelConfig, dtype: np.dtype) -> dict[str, Tensor]:
    tensors = {}
    for row, leaf in rows.items():
        of_row = jnp.dtype("float32") if row.name == SCORE else dtype
        size = math.prod(row.shape(leaf)) * of_row.itemsize
        for layer, name in enumerate(row.names(config.layers)):
            tensors[name] = Tensor(size, functools.partial(_to_host, row, leaf, layer, of_row))
    return tensors


def _write_weights(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: float) -> None:
    """One file, or several numbered ones and an index; one of them at a time is on the host."""
    sizes = {name: tensor.size for name, tensor in tensors.items()}
    shards = _split(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: tensors[name].read() for name in names}
        weight_map |= dict.fromkeys(names, file)
        if jax.process_index() == 0:
            save_file(arrays, directory / file, metadata={"format": "pt"})
    if len(shards) > 1 and jax.process_index() == 0:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _split(sizes: Mapping[str, int], most: float) -> list[list[str]]:
    """Consecutive names whose sizes add up to at most `most`; a larger one stands alone.

    >>> _split({"a": 2, "b": 2, "c": 5}, 4)
    [['a', 'b'], ['c']]
    """
    shards: list[list[str]] = []
    filled = 0.0
    for name, size in sizes.items():
        if not shards or filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _to_host(row: Row, leaf: Any, layer: int, dtype: np.dtype) -> np.ndarray:
    """One tensor of the checkpoint, gathered from all devices, [out, in] and contiguous."""
    sharding = getattr(leaf, "sharding", None)
    everywhere = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
    shape = {"stacked": row.stacked, "transposed": row.transposed}
    tensor = _gather(leaf, layer, **shape, dtype=dtype, sharding=everywhere)
    return np.ascontiguousarray(tensor)


@functools.partial(jax.jit, static_argnames=("stacked", "transposed", "dtype", "sharding"))
def _gather(
    x: jax.Array,
    layer: int,
    *,
    stacked: bool,
    transposed: bool,
    dtype: np.dtype,
    sharding: NamedSharding | None,
) -> jax.Array:
    one = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) if stacked else x
    one = convert(one, transposed=transposed, dtype=dtype)
    return one if sharding is None else jax.lax.with_sharding_constraint(one, sharding)
