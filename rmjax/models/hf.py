"""Hugging Face checkpoints in; hf_export.py writes them.

Weights are read by memory map straight into shards (weight_files.py); the whole model is never on one host.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rmjax.models import lora, peft, weight_files
from rmjax.models.config import ModelConfig
from rmjax.models.families import FAMILIES
from rmjax.models.families.base import LM_HEAD, PART, SCORE, SCORE_BIAS, Row
from rmjax.models.hf_export import config_json, convert, expected_rows, save, save_adapter
from rmjax.models.weight_files import DTYPES, INDEX, WEIGHTS, Tensor
from rmjax.runtime import notes
from rmjax.sharding import path_name

__all__ = ["INDEX", "WEIGHTS", "adapters_of", "base_of", "check", "config_json", "expected_rows", "generation_stops"]
__all__ += ["load", "read_config", "resolve", "save", "save_adapter", "tokenizer_of"]

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
    """The directory; a ValueError where it is both a model's and an adapter's, or, without a config.json, neither's."""
    names = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    if directory != Path(path_or_id) and "config.json" not in names:
        with contextlib.suppress(Exception):  # files of other kinds are not downloaded
            names = [*{*names, *huggingface_hub.list_repo_files(str(path_or_id))}]
    if peft.CONFIG in names and WEIGHTS in names:
        raise ValueError(
            f"{path_or_id} has {peft.CONFIG} and {WEIGHTS}: delete {peft.CONFIG} if {WEIGHTS} is the merged model, or "
            f"{WEIGHTS} if it is an adapter"
        )
    advice = weight_files.advice(names)
    if not {"config.json", peft.CONFIG} & {*names} and advice != weight_files.advice([]):
        raise ValueError(f"{path_or_id} has no config.json but {', '.join(names[:8])}: {advice}")
    return directory


def tokenizer_of(directory: str | Path, base: str = "") -> Path:
    """Where the tokenizer of a directory is: of an adapter that has none, with its base."""
    directory = Path(directory)
    has_own = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return directory if has_own or not peft.is_adapter(directory) else base_of(directory, base)


def base_of(directory: str | Path, base: str = "") -> Path:
    """The directory itself; of a PEFT adapter that of its base.

    Args:
        base: directory or hub id of it; "" is what adapter_config.json names.

    Raises:
        ValueError: an adapter that is not read, a base that is not there, or one for a model that is no adapter.
    """
    directory = Path(directory)
    if not peft.is_adapter(directory):
        if base:
            raise ValueError(f"config.model.base={base!r} is for adapters, and {directory} has no {peft.CONFIG}")
        return directory
    named = base or peft.read_config(directory).get("base_model_name_or_path")
    try:
        found = resolve(named or "")
    except ValueError as error:
        raise ValueError(
            f"{directory} is an adapter of {named!r}, which cannot be had: {error}. "
            f"base_model_name_or_path in its {peft.CONFIG} names the base; in training config.model.base does, too"
        ) from None
    if peft.is_adapter(found):
        raise ValueError(f"the base of {directory} is {found}, an adapter itself. {peft.MERGE}")
    return found


def read_config(directory: str | Path, base: str = "") -> dict[str, Any]:
    """The config.json of a checkpoint directory, or of an adapter's base (see `base_of`), with the labels of its head.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    if (found := base_of(directory, base)) != Path(directory):
        return _with_head_of(Path(directory), read_config(found))
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


def _with_head_of(adapter: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a base's config.json as the class and the head of its adapter want them."""
    kind = next((kind for kind, task in peft.TASKS.items() if task == peft.read_config(adapter).get("task_type")), "")
    family = FAMILIES.get(str(values.get("model_type")))
    head = peft.read(adapter).head
    if kind and family:
        values = {**values, "architectures": [family.architecture(kind)]}
    if SCORE in head and len(values.get("id2label") or ()) != (labels := head[SCORE].shape[0]):
        plain = {name: x for name, x in values.items() if name not in ("id2label", "label2id")}
        values = {**plain, "num_labels": labels}
    return values


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


def _tensors(directory: str | Path, base: str = "") -> dict[str, Tensor]:
    """The tensors of a directory by name; names always start with `model.`, those of heads apart.

    Of an adapter those of its base, with its own head.
    """
    if peft.is_adapter(Path(directory)):
        head = peft.read(Path(directory)).head
        return {**_tensors(base_of(directory, base)), **head}
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
    directory: str | Path,
    abstract: Any,
    config: ModelConfig,
    *,
    seed: int,
    require_head: bool = False,
    base: str = "",
    merges: bool = True,
    kept: Callable[[str, jax.Array], Any] = lambda path, x: x,
) -> tuple[dict[str, Any], str]:
    """Loads a checkpoint into the shape, dtype and sharding of every leaf of `abstract`.

    Args:
        directory: Hugging Face directory: safetensors in one file or several with an index, float32, bfloat16
            or float16, saved from any class of the family.
        abstract: nested dict of jax.ShapeDtypeStruct, with or without sharding.
        base: of an adapter, see `base_of`.
        merges: whether an adapter is merged into its base, in float32, or only its head is taken.
        kept: what is kept of each parameter of the base, by its path, before the next one is read.

    Returns:
        Parameters like `abstract`; and "kept" if the head is the checkpoint's, "new" if it has no score head
        with this number of labels and N(0, config.init_std) was drawn, as transformers does. The output embedding
        of a language model is always the checkpoint's.

    Raises:
        ValueError: unreadable or missing files; a score head with a bias that is not 0; or all unknown, missing and
            mis-shaped names in one message.
    """
    tensors, rows, head = _open(directory, abstract, config, require_head, base)
    adapters = adapters_of(directory, rows, config) if merges else {}
    leaves = {}
    if head == "new":
        row = next(row for row in rows if row.name == SCORE)
        leaves[row.path] = _new_head(rows.pop(row), config, seed)
    for row, leaf in rows.items():
        leaves[row.path] = kept(row.path, _read(tensors, row, leaf, config))
        if row.path in adapters:
            leaves[row.path] = _merged(leaves[row.path], adapters[row.path])
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], abstract), head


def adapters_of(directory: str | Path, rows: Mapping[Row, Any], config: ModelConfig) -> dict[str, peft.Factors]:
    """The adapters of a directory by the paths of kernels; {} of one that is no adapter's."""
    if not peft.is_adapter(Path(directory)):
        return {}
    shapes = {row.path: leaf.shape for row, leaf in rows.items()}
    return peft.read(Path(directory)).factors(list(rows), shapes, config.layers)


def _merged(kernel: jax.Array, adapter: peft.Factors) -> jax.Array:
    """A kernel with its adapter, computed in float32."""
    parts = {"kernel": kernel, lora.A: adapter.a, lora.B: adapter.b * adapter.scale[..., None, None]}
    one = functools.partial(lora.merged_kernel, scale=1.0, dtype=kernel.dtype)
    merge = jax.jit(functools.partial(lora.by_layer, one), out_shardings=kernel.sharding)
    return jax.block_until_ready(merge(parts))


def check(directory: str | Path, abstract: Any, config: ModelConfig, base: str = "") -> str:
    """Refuses what `load` would refuse, from the files' headers alone; returns what it says of the score head."""
    _, rows, head = _open(directory, abstract, config, require_head=False, base=base)
    adapters_of(directory, rows, config)
    return head


def _open(
    directory: str | Path, abstract: Any, config: ModelConfig, require_head: bool, base: str
) -> tuple[dict[str, Tensor], dict[Row, Any], str]:
    """The checkpoint's tensors, the rows of the model's parameters, and "kept" or "new" for the score head."""
    rows = expected_rows(abstract, config)
    tensors = _in_parts(_tensors(directory, base), rows, config)
    score = next((row for row in rows if row.name == SCORE), None)
    head = _score_head(directory, tensors, rows[score].shape[-1], require_head) if score else "kept"
    if head == "new" and peft.is_adapter(Path(directory)):
        task = peft.read_config(Path(directory)).get("task_type")
        if task in (peft.TASKS["SequenceClassification"], peft.TASKS["TokenClassification"]):
            raise ValueError(
                f"{directory} is a {task} adapter without a head of this many labels: no {SCORE} in its "
                f"{peft.WEIGHTS}, so what was trained beside it is lost. Train it with modules_to_save=['score'], or "
                "give a base and train anew"
            )
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
        lines.append(f"They hold a PEFT adapter in a file of its base's. {peft.MERGE}.")
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
