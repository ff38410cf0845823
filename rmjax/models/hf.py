"""Hugging Face checkpoints in; hf_export.py writes them.

Weights are read by memory map straight into shards (weight_files.py); the whole model is never on one host.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rmjax.models import weight_files
from rmjax.models.config import ModelConfig
from rmjax.models.families import FAMILIES
from rmjax.models.families.base import LM_HEAD, PART, SCORE, SCORE_BIAS, Row
from rmjax.models.hf_export import config_json, convert, expected_rows, save
from rmjax.models.weight_files import DTYPES, INDEX, WEIGHTS, Tensor
from rmjax.runtime import notes
from rmjax.sharding import path_name

__all__ = ["INDEX", "WEIGHTS", "check", "config_json", "expected_rows", "generation_stops"]
__all__ += ["load", "read_config", "resolve", "save"]

HEADS = (SCORE, SCORE_BIAS, LM_HEAD)  # of no use to a model without them
GENERATION_CONFIG = "generation_config.json"
# Names in multimodal checkpoints, as transformers v4 and v5 write them.
OTHER_SENSES = re.compile(r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
TEXT_MODEL = re.compile(r"^(model\.)?language_model\.")
# What a multimodal config.json says of its text model, too.
OF_BOTH = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype", "dtype")
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")


def head_outputs(directory: str | Path) -> int:
    """Outputs of a directory's score head, from the files' headers; 0 without one."""
    tensors = _tensors(directory)
    return tensors[SCORE].shape[0] if SCORE in tensors else 0


def is_hub_id(text: str | Path) -> bool:
    """Whether it has the form owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(text)) is not None


def resolve(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """A local directory as it is, or a downloaded snapshot of a Hub repository; a ValueError if it is neither."""
    if Path(path_or_id).is_dir():
        return _whole_model(Path(path_or_id), path_or_id)
    if Path(path_or_id).is_file():
        raise ValueError(
            f"{path_or_id} is a file, expected a Hugging Face directory: {weight_files.advice([str(path_or_id)])}"
        )
    if not is_hub_id(path_or_id):
        raise ValueError(f"{path_or_id}: no such directory, and not a Hub id of the form owner/name either")
    try:
        snapshot = huggingface_hub.snapshot_download(
            str(path_or_id),
            allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", *["*.safetensors"] * weights],
            ignore_patterns=["*/*", "consolidated*"],  # second copies of the weights in other formats
        )
    except (
        Exception
    ) as error:  # among them those of the HTTP library, which is another one in each version of the hub's
        raise ValueError(f"{path_or_id}: no such directory here, and the Hub did not give it: {error}") from error
    return _whole_model(Path(snapshot), path_or_id)


def _whole_model(directory: Path, path_or_id: str | Path) -> Path:
    """The directory; a ValueError if it is an adapter, or, without a config.json, anything but a model's."""
    names = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    if directory != Path(path_or_id) and "config.json" not in names:
        with contextlib.suppress(Exception):  # files of other kinds are not downloaded
            names = huggingface_hub.list_repo_files(str(path_or_id))
    if "adapter_config.json" in names:
        beside = f"; or delete adapter_config.json if {WEIGHTS} is the merged model" if WEIGHTS in names else ""
        raise ValueError(f"{path_or_id}: {weight_files.advice(names, _base_of(directory))}{beside}")
    if "config.json" not in names and (advice := weight_files.advice(names)) != weight_files.advice([]):
        raise ValueError(f"{path_or_id} has no config.json but {', '.join(names[:8])}: {advice}")
    return directory


def _base_of(directory: Path) -> str:
    """The base model of an adapter, as its adapter_config.json names it."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads((directory / "adapter_config.json").read_bytes())["base_model_name_or_path"])
    return "a base model"


def read_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory; a ValueError if there is none, or it is not JSON."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json; expected a Hugging Face model directory")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return _text_config(values)


def _text_config(values: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model where a config.json is that of a multimodal one, else the same."""
    family = next((x for x in FAMILIES.values() if x.multimodal and x.multimodal == values.get("model_type")), None)
    text = values.get("text_config")
    if family is None or not isinstance(text, dict):
        return values
    outer = {name: values[name] for name in OF_BOTH if name in values}
    return {**family.defaults, **outer, **text, "model_type": family.model_type}


def generation_stops(directory: Path | None, values: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a response by generation_config.json, else by these values of config.json.

    Raises:
        ValueError: generation_config.json is not JSON, or these are no ids.
    """
    path = directory / GENERATION_CONFIG if directory else None
    try:
        said = json.loads(path.read_text()) if path and path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    ids = said.get("eos_token_id") if isinstance(said, dict) else None
    ids = values.get("eos_token_id") if ids is None else ids
    ids = [ids] if isinstance(ids, int) else ids or []
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{path or 'config.json'}: eos_token_id is {ids!r}, expected a token id or a list of them")
    return tuple(ids)


def _tensors(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a directory by name; names always start with `model.`, those of heads apart."""
    tensors = weight_files.open_tensors(Path(directory))
    if others := [name for name in tensors if OTHER_SENSES.match(name)]:
        notes.tell(f"{directory} is multimodal: its text model is loaded, {len(others)} tensors of others are not")
        text = {TEXT_MODEL.sub("", name, count=1): x for name, x in tensors.items() if name not in others}
        bare = ("lm_head.", "model.", "score.")
        tensors = {name if name.startswith(bare) else f"model.{name}": tensor for name, tensor in text.items()}
    if not any(name.startswith("model.") for name in tensors):  # saved from the bare decoder
        tensors = {name if name in HEADS else f"model.{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}


def load(
    directory: str | Path, abstract: Any, config: ModelConfig, *, seed: int, require_head: bool = False
) -> tuple[dict[str, Any], str]:
    """Loads a checkpoint into the shape, dtype and sharding of every leaf of `abstract`.

    Args:
        directory: Hugging Face directory: safetensors in one file or several with an index, float32, bfloat16
            or float16, saved from any class of the family.
        abstract: nested dict of jax.ShapeDtypeStruct, with or without sharding.

    Returns:
        Parameters like `abstract`; and "kept" if the head is the checkpoint's, "new" if it has no score head
        with this number of labels and N(0, config.init_std) was drawn, as transformers does. The output embedding
        of a language model is always the checkpoint's.

    Raises:
        ValueError: unreadable or missing files; a score head with a bias that is not 0; or all unknown, missing and
            mis-shaped names in one message.
    """
    tensors, rows, head = _open(directory, abstract, config, require_head)
    leaves = {}
    if head == "new":
        row = next(row for row in rows if row.name == SCORE)
        leaves[row.path] = _new_head(rows.pop(row), config, seed)
    leaves |= {row.path: _read(tensors, row, leaf, config) for row, leaf in rows.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], abstract), head


def check(directory: str | Path, abstract: Any, config: ModelConfig) -> str:
    """Refuses what `load` would refuse, from the files' headers alone; returns what it says of the score head."""
    return _open(directory, abstract, config, require_head=False)[2]


def _open(
    directory: str | Path, abstract: Any, config: ModelConfig, require_head: bool
) -> tuple[dict[str, Tensor], dict[Row, Any], str]:
    """The checkpoint's tensors, the rows of the model's parameters, and "kept" or "new" for the score head."""
    rows = expected_rows(abstract, config)
    tensors = _in_parts(_tensors(directory), rows, config)
    score = next((row for row in rows if row.name == SCORE), None)
    head = _score_head(directory, tensors, rows[score].shape[-1], require_head) if score else "kept"
    wanted = {row: leaf for row, leaf in rows.items() if row != score or head == "kept"}
    for name in HEADS:
        if name not in {row.name for row in wanted}:
            tensors.pop(name, None)
    _check(directory, tensors, wanted, config)
    return tensors, rows, head


def _in_parts(tensors: dict[str, Tensor], rows: Mapping[Row, Any], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors with fused ones as their parts; what does not have the parts' size together stays as it is."""
    parts: dict[str, list[tuple[str, int]]] = {}
    for row, leaf in rows.items():
        for name in row.names(config.layers):
            if PART in name:
                parts.setdefault(name.partition(PART)[0], []).append((name, row.shape(leaf)[0]))
    for whole, of_one in parts.items():
        tensor = tensors.get(whole)
        if tensor is None or not tensor.shape or tensor.shape[0] != sum(size for _, size in of_one):
            continue
        del tensors[whole]
        start, row_bytes = 0, len(tensor.data) // tensor.shape[0]
        for name, size in of_one:
            data = tensor.data[start * row_bytes : (start + size) * row_bytes]
            tensors[name] = Tensor(tensor.dtype, (size, *tensor.shape[1:]), data)
            start += size
    return tensors


def _score_head(directory: str | Path, tensors: Mapping[str, Tensor], wanted: int, require: bool) -> str:
    """Whether the checkpoint's score head is "kept", or a "new" one is needed for `wanted` labels."""
    labels = tensors[SCORE].shape[0] if SCORE in tensors else 0
    head = f"{SCORE} of {labels} labels{f' and {SCORE_BIAS}' if SCORE_BIAS in tensors else ''}"
    if labels != wanted and require:
        others = [f"; {file.name} is {weight_files.VALUE_HEAD}" for file in Path(directory).glob("value_head.*")]
        strange = [name for name in tensors if name not in HEADS and not _of_decoder([name])]
        others += [f"; {', '.join(strange[:4])} is a head of another kind, which is not read"] * bool(strange)
        raise ValueError(
            f"{directory} has no score head: {head if labels else f'no {SCORE}'} in its weights, expected {wanted} "
            f"label(s){''.join(others)}. Give a reward model, or train one first"
        )
    if labels != wanted:
        if labels:
            notes.tell(
                f"{directory} has a head of another kind, {head}, which is not used: {wanted} label(s) are expected, "
                "and a new head is drawn; to go on with that head, give an objective of as many labels"
            )
        return "new"
    if SCORE_BIAS in tensors:  # transformers' token classifiers have one
        bias = tensors[SCORE_BIAS].array().astype(np.float32)
        if bias.any():
            raise ValueError(
                f"{directory} has a {SCORE_BIAS} of up to {np.abs(bias).max():.4g}, and score heads here have none, so "
                f"its scores would change. To train a new head, remove {SCORE} and {SCORE_BIAS} from its weights"
            )
    return "kept"


def _of_decoder(names: Iterable[str]) -> bool:
    return any(name.startswith("model.") for name in names)


def _check(directory: str | Path, tensors: Mapping[str, Tensor], rows: Mapping[Row, Any], config: ModelConfig) -> None:
    expected = {name: row.shape(leaf) for row, leaf in rows.items() for name in row.names(config.layers)}
    both = {name: (tensors[name], shape) for name, shape in expected.items() if name in tensors}
    problems = {
        "unknown": [f"{name} {list(tensors[name].shape)}" for name in tensors if name not in expected],
        "missing": [f"{name} {list(shape)}" for name, shape in expected.items() if name not in tensors],
        "mis-shaped": [
            f"{name} {list(x.shape)}, expected {list(shape)}" for name, (x, shape) in both.items() if x.shape != shape
        ],
        "of an unsupported dtype": [
            f"{name} {x.dtype}, expected one of {', '.join(DTYPES)}"
            for name, (x, _) in both.items()
            if x.dtype not in DTYPES
        ],
    }
    if not any(problems.values()):
        return
    lines = [f"the weights in {directory} do not fit its config ({config.family}, {config.layers} layers):"]
    for problem, names in problems.items():
        if names:
            lines += [f"  {len(names)} {problem}:", *(f"    {name}" for name in sorted(names)[:8])]
            lines += [f"    and {len(names) - 8} more"] * (len(names) > 8)
    owners = [name for name, family in FAMILIES.items() if family.owns(tensors)]
    strange = [name for name in tensors if name not in expected]
    if any("lora_" in name or ".base_layer." in name for name in strange):
        lines.append("They hold a PEFT adapter: merge it with PeftModel.merge_and_unload, and save_pretrained that.")
    elif [problem for problem, names in problems.items() if names] == ["unknown"] and not _of_decoder(strange):
        lines.append(
            "All others fit, so this is a head of another kind, which is not read: if it is one row without a bias, "
            f"call it {SCORE}; or remove it, to train a new one."
        )
    elif config.family not in owners:
        alike = " or ".join(owners) or "none of the supported families"
        lines.append(f"The names look like {alike}: check model_type in config.json.")
    else:
        lines.append("Check that config.json and the weights are of the same model and the download is whole.")
    raise ValueError("\n".join(lines))


def _read(tensors: Mapping[str, Tensor], row: Row, leaf: Any, config: ModelConfig) -> jax.Array:
    """One parameter: each device's part is read in the checkpoint's layout and dtype, and converted on the device."""
    chosen = [tensors[name] for name in row.names(config.layers)]
    shape = ((len(chosen),) if row.stacked else ()) + row.shape(leaf)
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    part = lambda index: weight_files.read(chosen, index, row.stacked)
    dtype = weight_files.common_dtype(chosen)
    raw = jax.make_array_from_callback(shape, exchanged(sharding, len(shape), row), part, dtype=dtype)
    # Waiting lets this parameter's host copy go while the next is read, and no later.
    return jax.block_until_ready(_converter(row.transposed, leaf.dtype, sharding)(raw))


@functools.lru_cache(maxsize=64)
def _converter(transposed: bool, dtype: Any, sharding: Sharding) -> Any:
    """One function for all parameters alike, so that equal shapes are compiled once."""
    return jax.jit(functools.partial(convert, transposed=transposed, dtype=dtype), out_shardings=sharding)


def exchanged(sharding: Sharding, ndim: int, row: Row) -> Sharding:
    """How the checkpoint's layout is sharded so that transposing it moves nothing between devices."""
    if not isinstance(sharding, NamedSharding) or not row.transposed:
        return sharding
    spec = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, P(*spec[:-2], spec[-1], spec[-2]))


def _new_head(leaf: Any, config: ModelConfig, seed: int) -> jax.Array:
    draw = lambda: (config.init_std * jax.random.normal(jax.random.key(seed), leaf.shape)).astype(leaf.dtype)
    return jax.jit(draw, out_shardings=getattr(leaf, "sharding", None))()
