"""Adapters in the format of PEFT: a directory with adapter_config.json and adapter_model.safetensors, in and out.

The file of weights holds lora_A [rank, in] and lora_B [out, rank] of each adapted module, and whole what was trained
beside them (`modules_to_save`). Where PEFT sees one linear layer and rmjax several (`PART`: Phi's fused projections),
A is shared by its parts on the way in; on the way out the adapters of the parts stand in one of their ranks' sum.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rmjax.models import weight_files
from rmjax.models.families.base import PART, SCORE, SCORE_BIAS, Row
from rmjax.models.lora import A, B, Lora
from rmjax.models.weight_files import DTYPES, Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEADS = (SCORE, SCORE_BIAS)
TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "CausalLM": "CAUSAL_LM",
}
# What changes a base's own weights, or is no sum of a base and a product of two matrices.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ASKED: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "layer_replication": None,
    "lora_bias": False,
}
ASKED |= {"use_qalora": False, "alora_invocation_tokens": None}


class Factors(NamedTuple):
    """The adapter of one of our kernels, float32; 0 in layers that have none."""

    a: np.ndarray  # [..., in, rank]
    b: np.ndarray  # [..., rank, out]
    scale: np.ndarray  # [...] of their product; 0 in layers that have none
    ranks: np.ndarray  # int [...], of each layer


def is_adapter(directory: Path) -> bool:
    """Whether a directory is an adapter's."""
    return (Path(directory) / CONFIG).is_file()


def read_config(directory: Path) -> dict[str, Any]:
    """The values of adapter_config.json.

    Raises:
        ValueError: they are no object, or of an adapter that is not read.
    """
    path = Path(directory) / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{directory} is a PEFT adapter of peft_type {kind!r}; only LORA is read. {MERGE}")
    wrong = [f"{key}={values[key]!r}" for key, plain in ASKED.items() if values.get(key, plain) not in (plain, None)]
    if str(values.get("init_lora_weights", True)).lower().startswith(CHANGES_BASE):
        wrong.append(f"init_lora_weights={values['init_lora_weights']!r}, which changes the base")
    if wrong:
        raise ValueError(f"{directory} is a LoRA adapter with {', '.join(wrong)}, which is not read. {MERGE}")
    rank = values.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{path}: r is {rank!r}, expected a rank of at least 1")
    pattern = values.get("alpha_pattern") or {}
    for alpha in (values.get("lora_alpha", 8), *pattern.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"{path}: lora_alpha or alpha_pattern has {alpha!r}, expected a number")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{path}: alpha_pattern has {key!r}, which is no regex: {error}") from None
    return values


MERGE = "Merge it into its base with PeftModel.merge_and_unload, save_pretrained that, and give the merged model"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that was read.

    Attributes:
        directory: of it.
        config: values of adapter_config.json.
        head: tensors of a score head, as in a model's files; {} if it has none.
        pairs: A [rank, in] and B [out, rank] of each module, "model.layers.0.self_attn.q_proj".
    """

    directory: Path
    config: Mapping[str, Any]
    head: Mapping[str, Tensor]
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    def scale(self, module: str) -> float:
        """Of the product of a module's matrices."""
        rank = self.pairs[module][0].shape[0]
        alpha = _of_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def factors(self, rows: Sequence[Row], shapes: Mapping[str, Sequence[int]], layers: int) -> dict[str, Factors]:
        """The adapters by the paths of our kernels.

        Args:
            rows: of the model's parameters, in the family's order.
            shapes: by path, of those parameters.

        Raises:
            ValueError: adapters that belong to no kernel of the model, or have other sizes.
        """
        found, used, begins = {}, set(), dict.fromkeys(self.pairs, 0)
        wrong: list[str] = []
        for row in rows:
            if not row.path.endswith("/kernel") or row.name == SCORE:
                continue
            *_, inputs, outputs = shapes[row.path]
            of_layers: list[tuple[np.ndarray, np.ndarray, float] | None] = []
            for name in row.names(layers):
                module = name.partition(PART)[0].removesuffix(".weight")
                if module not in self.pairs:
                    of_layers.append(None)
                    continue
                used.add(module)
                a, b = self.pairs[module]
                begin = begins[module]
                begins[module] += outputs
                fits = a.shape[1:] == (inputs,) and b.shape[1:] == a.shape[:1]
                if not fits or b.shape[0] < begin + outputs or (PART not in name and b.shape[0] != outputs):
                    wrong.append(f"{module}: {list(a.shape)} and {list(b.shape)}, the kernel is [{outputs}, {inputs}]")
                    of_layers.append(None)
                    continue
                of_layers.append((_wide(a).T, _wide(b)[begin : begin + outputs].T, self.scale(module)))
            if any(of_layers):
                found[row.path] = _stacked(of_layers, inputs, outputs, row.stacked)
        if strange := sorted(set(self.pairs) - used):
            wrong += [f"{module}: the base has no such linear layer here" for module in strange]
        if wrong:
            more = [f"and {len(wrong) - 6} more"] * (len(wrong) > 6)
            raise ValueError(
                f"the adapter in {self.directory} does not fit its base: {'; '.join([*wrong[:6], *more])}. Is it an "
                "adapter of another base? config.model.base names the right one"
            )
        return found


def _stacked(of_layers: Sequence[Any], inputs: int, outputs: int, stacked: bool) -> Factors:
    ranks = np.array([0 if x is None else x[0].shape[1] for x in of_layers])
    most = int(ranks.max())
    a = np.zeros((len(of_layers), inputs, most), np.float32)
    b = np.zeros((len(of_layers), most, outputs), np.float32)
    scale = np.zeros(len(of_layers), np.float32)
    for i, x in enumerate(of_layers):
        if x is not None:
            a[i, :, : ranks[i]], b[i, : ranks[i]], scale[i] = x
    whole = Factors(a, b, scale, ranks)
    return whole if stacked else Factors(*(x[0] for x in whole))


def _wide(tensor: Tensor) -> np.ndarray:
    return tensor.array().astype(np.float32)


def _of_pattern(pattern: Any, module: str, default: Any) -> Any:
    """The value of the first key that is the module's name or its end, as PEFT matches them."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read(directory: Path) -> Adapter:
    """Opens an adapter; weights are read when they are asked for.

    Raises:
        ValueError: it is of a kind that is not read, or its files are not whole.
    """
    directory = Path(directory)
    config = read_config(directory)
    if not (directory / WEIGHTS).is_file():
        found = ", ".join(sorted(file.name for file in directory.iterdir()))
        raise ValueError(f"{directory} has {CONFIG} but no {WEIGHTS}; there is {found}. Is it a whole download?")
    head: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in weight_files.open_file(directory / WEIGHTS).items():
        plain = name.removeprefix(PREFIX).replace("modules_to_save.default.", "").replace("modules_to_save.", "")
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", plain)
        if match:
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif plain in HEADS:
            head[plain] = tensor
        else:
            strange.append(name)
        if tensor.dtype not in DTYPES:
            strange.append(f"{name} of dtype {tensor.dtype}")
    strange += [f"one half of the adapter of {module}" for module, x in halves.items() if len(x) < 2]
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        raise ValueError(
            f"{directory / WEIGHTS} holds {', '.join(strange[:4])}{more}, which is not read: adapters of linear layers "
            f"and a {SCORE} are. {MERGE}"
        )
    return Adapter(directory, config, head, {module: (x["A"], x["B"]) for module, x in halves.items()})


def adapter_config(
    lora: Lora, rows: Sequence[Row], layers: int, *, alpha: float, root_scale: bool, base: str, architecture: str
) -> dict[str, Any]:
    """adapter_config.json of an adapter on these rows (kernels that have one)."""
    parts: dict[str, int] = {}
    for row in rows:
        for name in row.names(layers):
            module = name.partition(PART)[0].removesuffix(".weight")
            parts[module] = parts.get(module, 0) + 1
    short = {module.rpartition(".")[2] for module in parts}
    every = {name: sum(module.endswith(f".{name}") for module in parts) for name in short}
    modules = sorted(short) if all(count == layers for count in every.values()) else sorted(parts)
    fused = {module.rpartition(".")[2]: count for module, count in parts.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": TASKS[architecture],
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "use_rslora": root_scale,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        "modules_to_save": None if architecture == "CausalLM" else ["score"],
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {name: alpha * (count**0.5 if root_scale else count) for name, count in fused.items()},
    }


def adapted_rows(rows: Sequence[Row], leaves: Mapping[str, Any]) -> list[Row]:
    """The rows of kernels that have an adapter among these parameters by path."""
    return [row for row in rows if row.path.endswith("/kernel") and row.path.removesuffix("kernel") + A in leaves]


def tensor_rows(rows: Sequence[Row], leaves: Mapping[str, Any]) -> Iterator[tuple[Row, Any]]:
    """The rows of the tensors of adapters and head, with their arrays; those of fused parts are as wide as their sum.

    Args:
        rows: of the model's parameters, in the family's order.
        leaves: the parameters by path, among them lora_a and lora_b beside kernels.
    """
    widths: dict[tuple[bool, str], int] = {}
    adapted = adapted_rows(rows, leaves)
    for row in adapted:
        fused = row.stacked, row.name.partition(PART)[0]
        widths[fused] = widths.get(fused, 0) + leaves[row.path.removesuffix("kernel") + A].shape[-1]
    begins = dict.fromkeys(widths, 0)
    shapes = {path.rpartition("/")[0] if "/kernel/" in path else path: x.shape for path, x in leaves.items()}
    yield from ((Row(x.path, PREFIX + SCORE, x.transposed), leaves[x.path]) for x in rows if x.name == SCORE)
    for row in (row for row in rows if row.path.endswith("/kernel")):
        beside = row.path.removesuffix("kernel")
        whole, _, part = row.name.partition(PART)
        if (row.stacked, whole) not in widths:
            continue
        module = PREFIX + whole.removesuffix(".weight")
        ending = f"{PART}{part}" * bool(part)
        if row not in adapted:  # a part of a fused layer, to which the adapters of the others add nothing
            *stack, _, outputs = shapes[row.path]
            nothing = jnp.zeros((*stack, widths[row.stacked, whole], outputs))
            yield Row(beside + B, f"{module}.lora_B.weight{ending}", True), nothing
            continue
        a, b = leaves[beside + A], leaves[beside + B]
        begin, rank = begins[row.stacked, whole], a.shape[-1]
        begins[row.stacked, whole] += rank
        if part:
            around = [(0, 0)] * (b.ndim - 2) + [(begin, widths[row.stacked, whole] - begin - rank), (0, 0)]
            b = jnp.pad(b, around)
        yield Row(beside + A, f"{module}.lora_A.weight{ending}", True), a
        yield Row(beside + B, f"{module}.lora_B.weight{ending}", True), b
