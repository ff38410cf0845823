"""Hugging Face checkpoints in and out: one table of names per family, used in both directions.

Weights are read by memory map straight into shards and written tensor by tensor; the whole model is never on
one host. PyTorch stores a kernel as [out, in]; it is transposed on the device.
"""

import contextlib
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rmjax.models.config import ModelConfig
from rmjax.sharding import path_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORE = "score.weight"
IGNORED = re.compile(r"(model\.)?lm_head\.weight|.*\.rotary_emb\.inv_freq")  # known, and of no use to a scorer
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Row(NamedTuple):
    """One parameter: our path, its name in a checkpoint, and whether its last two axes swap places."""

    path: str
    name: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether our array holds all layers, which are one tensor each in the checkpoint."""
        return "{layer}" in self.name

    def names(self, layers: int) -> list[str]:
        """Its tensors in the checkpoint: one for each layer, or one."""
        return [self.name.format(layer=layer) for layer in range(layers if self.stacked else 1)]

    def shape(self, leaf: Any) -> tuple[int, ...]:
        """Shape of one of these tensors."""
        shape = tuple(leaf.shape[1:] if self.stacked else leaf.shape)
        return shape[::-1] if self.transposed else shape


def _projections(block: str, names: str) -> tuple[Row, ...]:
    rows = []
    for ours in names.split():
        theirs = f"model.layers.{{layer}}.{block}.{ours}_proj"
        rows.append(Row(f"decoder/layers/{ours}/kernel", f"{theirs}.weight", transposed=True))
        rows.append(Row(f"decoder/layers/{ours}/bias", f"{theirs}.bias"))
    return tuple(rows)


_LLAMA = (
    Row("decoder/embed/embedding", "model.embed_tokens.weight"),
    Row("decoder/layers/attention_norm/scale", "model.layers.{layer}.input_layernorm.weight"),
    *_projections("self_attn", "q k v o"),
    Row("decoder/layers/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight"),
    *_projections("mlp", "gate up down"),
    Row("decoder/norm/scale", "model.norm.weight"),
    Row("score/kernel", SCORE, transposed=True),
)
_QWEN3 = (
    *_LLAMA,
    Row("decoder/layers/q_norm/scale", "model.layers.{layer}.self_attn.q_norm.weight"),
    Row("decoder/layers/k_norm/scale", "model.layers.{layer}.self_attn.k_norm.weight"),
)
# A row counts where the model has its parameter: the config decides about biases.
TABLES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def resolve(path_or_id: str | Path) -> Path:
    """A local directory as it is, or the snapshot of a Hub repository, downloaded if need be.

    Raises:
        ValueError: it is neither.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise ValueError(f"{path_or_id}: no such directory, and not a Hub id of the form owner/name either")
    try:
        snapshot = huggingface_hub.snapshot_download(
            str(path_or_id),
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"],
            ignore_patterns=["*/*", "consolidated*"],  # second copies of the weights in other formats
        )
    except (
        OSError,
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.HFValidationError,
    ) as error:
        raise ValueError(
            f"{path_or_id}: no such directory here, and it could not be had from the Hub: {error}"
        ) from error
    return Path(snapshot)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; expected a Hugging Face model directory")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


class _Checkpoint:
    """The tensors of a directory by name, as memory-mapped slices; names always start with `model.`."""

    def __init__(self, directory: Path):
        self.slices: dict[str, Any] = {}
        for path in _weight_files(directory):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read ({error}); is it a whole download?") from error
            self.slices.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
        if not any(name.startswith("model.") for name in self.slices):  # saved from the bare decoder
            add = lambda name: name if name == SCORE else f"model.{name}"
            self.slices = {add(name): tensor for name, tensor in self.slices.items()}
        self.slices = {name: tensor for name, tensor in self.slices.items() if not IGNORED.fullmatch(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slices[name].get_shape())

    def dtype(self, name: str) -> str:
        return self.slices[name].get_dtype()


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{directory} lacks {', '.join(missing)}, which its {INDEX} names")
        return files
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    found = sorted(file.name for file in directory.iterdir())
    advice = "expected safetensors"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        advice = "pickled weights are not read; load it in transformers and save_pretrained it as safetensors"
    elif "adapter_config.json" in found:
        advice = "it is an adapter; merge it into its base model and save that"
    raise ValueError(f"{directory} has neither {WEIGHTS} nor {INDEX} but {', '.join(found)}: {advice}")


def expected_rows(params: Any, config: ModelConfig) -> dict[Row, Any]:
    """Each row of the family's table that the model has, with its leaf of `params`."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    rows = {row: leaves.pop(row.path) for row in TABLES[config.family] if row.path in leaves}
    if leaves:
        raise ValueError(f"the table of {config.family} has no row for {', '.join(leaves)}")
    return rows


def load(
    directory: str | Path,
    abstract: Any,
    config: ModelConfig,
    *,
    seed: int,
    require_head: bool = False,
) -> tuple[dict[str, Any], str]:
    """Loads a checkpoint into the shape, dtype and sharding of every leaf of `abstract`.

    Args:
        directory: Hugging Face directory: safetensors in one file or several with an index, float32, bfloat16
            or float16, saved from any class of the family.
        abstract: nested dict of jax.ShapeDtypeStruct, with or without sharding.
        config: of the model.
        seed: of a new score head.
        require_head: a missing score head is an error.

    Returns:
        Parameters like `abstract`; and "kept" if the score head is the checkpoint's, "new" if it has none
        with this number of labels and N(0, config.init_std) was drawn, as transformers does.

    Raises:
        ValueError: unreadable or missing files; or all unknown, missing and mis-shaped names in one message.
    """
    checkpoint, rows, head = _open(directory, abstract, config, require_head)
    leaves = {}
    if head == "new":
        row = next(row for row in rows if row.name == SCORE)
        leaves[row.path] = _new_head(rows.pop(row), config, seed)
    leaves |= {row.path: _read(checkpoint, row, leaf, config) for row, leaf in rows.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], abstract), head


def check(directory: str | Path, abstract: Any, config: ModelConfig) -> str:
    """Refuses what `load` would refuse, from the files' headers alone; returns what it says of the score head."""
    return _open(directory, abstract, config, require_head=False)[2]


def _open(
    directory: str | Path, abstract: Any, config: ModelConfig, require_head: bool
) -> tuple[_Checkpoint, dict[Row, Any], str]:
    """The checkpoint, the rows of the model's parameters, and "kept" or "new" for the score head."""
    checkpoint = _Checkpoint(Path(directory))
    rows = expected_rows(abstract, config)
    score = next(row for row in rows if row.name == SCORE)
    labels = checkpoint.shape(SCORE)[0] if SCORE in checkpoint.slices else 0
    wanted = rows[score].shape[-1]
    head = "kept" if labels == wanted else "new"
    if require_head and head == "new":
        found = f"{SCORE} of {labels} labels" if labels else f"no {SCORE}"
        raise ValueError(
            f"{directory} has no score head: {found} in its weights, expected {wanted} label(s). "
            "Give a reward model, or train one first"
        )
    if head == "new":
        checkpoint.slices.pop(SCORE, None)
    _check(directory, checkpoint, {row: leaf for row, leaf in rows.items() if row != score or head == "kept"}, config)
    return checkpoint, rows, head


def _check(directory: str | Path, checkpoint: _Checkpoint, rows: Mapping[Row, Any], config: ModelConfig) -> None:
    expected = {name: row.shape(leaf) for row, leaf in rows.items() for name in row.names(config.layers)}
    found = checkpoint.slices
    problems = {
        "unknown": [f"{name} {list(checkpoint.shape(name))}" for name in found if name not in expected],
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found],
        "mis-shaped": [
            f"{name} {list(checkpoint.shape(name))}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and checkpoint.shape(name) != shape
        ],
        "of an unsupported dtype": [
            f"{name} {checkpoint.dtype(name)}, expected one of {', '.join(DTYPES)}"
            for name in expected
            if name in found and checkpoint.dtype(name) not in DTYPES
        ],
    }
    if not any(problems.values()):
        return
    lines = [f"the weights in {directory} do not fit its config ({config.family}, {config.layers} layers):"]
    for what, names in problems.items():
        if names:
            more = f"\n    and {len(names) - 8} more" if len(names) > 8 else ""
            lines.append(f"  {len(names)} {what}:\n    " + "\n    ".join(sorted(names)[:8]) + more)
    family = _looks_like(found)
    if config.family not in family:
        lines.append(f"The names look like {' or '.join(family)}: check model_type in config.json.")
    else:
        lines.append("Check that config.json and the weights are of the same model and the download is whole.")
    raise ValueError("\n".join(lines))


def _looks_like(names: Any) -> tuple[str, ...]:
    """The families that a checkpoint's names speak for."""
    layer = "model.layers.0.self_attn."
    if f"{layer}q_proj.weight" not in names:
        return ("none of the supported families",)
    if f"{layer}q_norm.weight" in names:
        return ("qwen3",)
    if f"{layer}q_proj.bias" in names and f"{layer}o_proj.bias" not in names:
        return ("qwen2",)
    return ("llama", "mistral")


def _read(checkpoint: _Checkpoint, row: Row, leaf: Any, config: ModelConfig) -> jax.Array:
    """One parameter: each device's part is sliced from the memory map, transposed and cast on the device."""
    names = row.names(config.layers)
    shape = ((config.layers,) if row.stacked else ()) + row.shape(leaf)
    dtypes = {checkpoint.dtype(name) for name in names}
    dtype = jnp.dtype(DTYPES[dtypes.pop()] if len(dtypes) == 1 else "float32")

    def part(index: Any) -> np.ndarray:
        if not row.stacked:
            return np.asarray(checkpoint.slices[names[0]][index], dtype)
        chosen = names[index[0]]
        return np.stack([np.asarray(checkpoint.slices[name][index[1:]], dtype) for name in chosen])

    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    raw = jax.make_array_from_callback(shape, exchanged(sharding, len(shape), row), part, dtype=dtype)
    convert = functools.partial(_convert, transposed=row.transposed, dtype=leaf.dtype)
    # Waiting frees this parameter's host copy before the next is read.
    return jax.block_until_ready(jax.jit(convert, out_shardings=sharding)(raw))


def exchanged(sharding: Sharding, ndim: int, row: Row) -> Sharding:
    """How the checkpoint's layout is sharded so that transposing it moves nothing between devices."""
    if not isinstance(sharding, NamedSharding) or not row.transposed:
        return sharding
    spec = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, P(*spec[:-2], spec[-1], spec[-2]))


def _convert(x: jax.Array, *, transposed: bool, dtype: DTypeLike) -> jax.Array:
    return (jnp.swapaxes(x, -1, -2) if transposed else x).astype(dtype)


def _new_head(leaf: Any, config: ModelConfig, seed: int) -> jax.Array:
    draw = lambda: (config.init_std * jax.random.normal(jax.random.key(seed), leaf.shape)).astype(leaf.dtype)
    return jax.jit(draw, out_shardings=getattr(leaf, "sharding", None))()


def save(
    directory: str | Path,
    params: Any,
    hf_config: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    pad_token_id: int,
    updates: Mapping[str, Any] | None = None,
    also: Callable[[Path], None] | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a Hugging Face sequence-classification directory, whole or not at all.

    On several hosts every process must call it, since parameters are gathered; the first one writes.

    Args:
        directory: replaced if it is an export already.
        params: of a Scorer, sharded or not.
        hf_config: config.json of the model that the parameters came from; its other values are kept.
        config: of the model.
        dtype: of the weights on disk; the score head stays float32, rounding it would gain nothing.
        pad_token_id: the right-most token that is none of these is what transformers scores.
        updates: further values of config.json.
        also: called with the directory before it gets its name, to write the tokenizer and whatever else.
        max_shard_bytes: size of the largest weight file, and so of the host memory that is needed.

    Raises:
        ValueError: `directory` holds something else than an export.
        OSError: it cannot be written; nothing is left and an export that was there stays.
    """
    rows = expected_rows(params, config)
    labels = next(leaf.shape[-1] for row, leaf in rows.items() if row.name == SCORE)
    written = scorer_config(hf_config, config, labels=labels, dtype=dtype, pad_token_id=pad_token_id)
    with _atomic_directory(Path(directory)) as partial:
        _write_weights(partial, rows, config, jnp.dtype(dtype), max_shard_bytes)
        if jax.process_index() == 0:
            (partial / "config.json").write_text(json.dumps({**written, **(updates or {})}, indent=2) + "\n")
            if also is not None:
                also(partial)


def scorer_config(
    hf_config: Mapping[str, Any], config: ModelConfig, *, labels: int, dtype: DTypeLike, pad_token_id: int
) -> dict[str, Any]:
    """The config.json of a scorer, for transformers v4 and v5 and the servers that read the older form."""
    rope = dict(hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {})
    rope["rope_type"] = config.rope.type
    rope.pop("type", None)  # the name that v4 used first; two names for one thing can disagree
    rope.pop("rope_theta", None)
    names = [f"LABEL_{label}" for label in range(labels)]
    return {
        **hf_config,
        "architectures": [f"{CLASSES[config.family]}ForSequenceClassification"],
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "num_labels": labels,
        "problem_type": "regression",
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


def _write_weights(
    directory: Path, rows: Mapping[Row, Any], config: ModelConfig, dtype: Any, max_shard_bytes: float
) -> None:
    """One file, or several numbered ones and an index; one of them at a time is on the host."""
    row_of = {name: (row, layer) for row in rows for layer, name in enumerate(row.names(config.layers))}
    dtypes = {row: jnp.dtype("float32" if row.name == SCORE else dtype) for row in rows}
    sizes = {name: math.prod(row.shape(rows[row])) * dtypes[row].itemsize for name, (row, _) in row_of.items()}
    shards = _split(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            row, layer = row_of[name]
            tensors[name] = _to_host(row, rows[row], layer, dtypes[row])
            weight_map[name] = file
        if jax.process_index() == 0:
            save_file(tensors, directory / file, metadata={"format": "pt"})
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
    one = _convert(one, transposed=transposed, dtype=dtype)
    return one if sharding is None else jax.lax.with_sharding_constraint(one, sharding)
