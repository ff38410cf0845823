"""What a family of models is made of: its defaults, what its config.json decides, and its weights' names."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rmjax.models.rope import Rope, rope_from_hf

SCORE, SCORE_BIAS = "score.weight", "score.bias"
LM_HEAD = "lm_head.weight"
HfConfig = Mapping[str, Any]  # values of a config.json


PART = "#"  # between the name of a fused tensor and that of a part of it, "qkv_proj.weight#q"


class Row(NamedTuple):
    """One parameter: our path, its name in a checkpoint, and whether its last two axes swap places.

    PyTorch stores a kernel as [out, in]; it is transposed on the device. Parts of a fused tensor stand in the table in
    the order in which the tensor has them along its first axis.
    """

    path: str
    name: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether our array holds all layers but the last, which are one tensor each in the checkpoint."""
        return self.path.startswith("decoder/layers/")

    def names(self, layers: int) -> list[str]:
        """Its tensors in the checkpoint: one for each layer of a stack, or one."""
        return [self.name.format(layer=layer) for layer in (range(layers - 1) if self.stacked else [layers - 1])]

    def shape(self, leaf: Any) -> tuple[int, ...]:
        """Shape of one of these tensors."""
        shape = tuple(leaf.shape[1:] if self.stacked else leaf.shape)
        return shape[::-1] if self.transposed else shape


@dataclasses.dataclass(frozen=True)
class Family:
    """All that a family of models is; one file each."""

    model_type: str  # its name in config.json
    class_prefix: str  # of transformers' classes, as "Qwen2" in Qwen2ForSequenceClassification
    defaults: HfConfig  # what transformers assumes where a config.json leaves a key out
    # The fields of ModelConfig that a config.json decides in the family's own way (see `ModelConfig`)
    features: Callable[[HfConfig], dict[str, Any]]
    # A row for every parameter that a model of the family can have; a row counts where the model has it
    table: tuple[Row, ...]
    owns: Callable[[Collection[str]], bool]  # whether the names of a checkpoint's tensors can be the family's
    writer_prefix: str = ""  # of the class for causal language models, where it is another one
    multimodal: str = ""  # `model_type` of models whose `text_config` is of this family
    ropes_by_type: bool = False  # whether layers with a window have a rotary embedding of their own in config.json

    def architecture(self, kind: str) -> str:
        """The class of transformers for "SequenceClassification", "TokenClassification" or "CausalLM"."""
        return f"{(self.writer_prefix if kind == 'CausalLM' else '') or self.class_prefix}For{kind}"

    def vllm_architecture(self, kind: str) -> str:
        """The name under which vLLM finds its class: it makes classifiers from those for causal language models."""
        return f"{self.writer_prefix or self.class_prefix}For{kind}"


def in_layers(ours: str, theirs: str, transposed: bool = False) -> tuple[Row, Row]:
    """A parameter of every layer: those of the stack, and the last one's."""
    name = f"model.layers.{{layer}}.{theirs}"
    return Row(f"decoder/layers/{ours}", name, transposed), Row(f"decoder/last/{ours}", name, transposed)


def projections(block: str, names: str) -> tuple[Row, ...]:
    """Kernels and biases of linear layers "q k v o" of a block, "self_attn"."""
    rows: list[Row] = []
    for ours in names.split():
        rows += in_layers(f"{ours}/kernel", f"{block}.{ours}_proj.weight", transposed=True)
        rows += in_layers(f"{ours}/bias", f"{block}.{ours}_proj.bias")
    return tuple(rows)


# The parameters that most families share, and those of Llama.
WITHOUT_NORMS = (
    Row("decoder/embed/embedding", "model.embed_tokens.weight"),
    *projections("self_attn", "q k v o"),
    *projections("mlp", "gate up down"),
    Row("decoder/norm/scale", "model.norm.weight"),
    Row("score/kernel", SCORE, transposed=True),
    Row("lm_head/embedding", LM_HEAD),
)
LLAMA_TABLE = (
    *WITHOUT_NORMS,
    *in_layers("attention_norm/scale", "input_layernorm.weight"),
    *in_layers("mlp_norm/scale", "post_attention_layernorm.weight"),
)
# Those of families whose norms stand after the two parts of a layer, before they are added.
NORMS_AFTER = (
    *in_layers("attention_out_norm/scale", "post_attention_layernorm.weight"),
    *in_layers("mlp_out_norm/scale", "post_feedforward_layernorm.weight"),
)
QK_NORMS = (
    *in_layers("q_norm/scale", "self_attn.q_norm.weight"),
    *in_layers("k_norm/scale", "self_attn.k_norm.weight"),
)


def layer_names(names: Collection[str]) -> set[str]:
    """What the names of layer 0's attention end with, such as "q_proj.bias"."""
    layer = "model.layers.0.self_attn."
    return {name.removeprefix(layer) for name in names if name.startswith(layer)}


def is_llama_like(names: Collection[str]) -> bool:
    """Whether layer 0 has what Llama's has: no norms of queries, and either both attention biases or none."""
    parts = layer_names(names)
    biased = "q_proj.bias" in parts and "o_proj.bias" not in parts
    return "q_proj.weight" in parts and "q_norm.weight" not in parts and not biased


def every(n: int, layers: int) -> list[str]:
    """Types of layers of which every n-th has no window."""
    return ["full_attention" if (layer + 1) % n == 0 else "sliding_attention" for layer in range(layers)]


def windows_by_type(config: HfConfig) -> tuple[int | None, ...]:
    """Each layer's window by `layer_types`, or by `max_window_layers`, as transformers 5 decides it for Qwen."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not config.get("use_sliding_window"):
        window = None
    types = config.get("layer_types")
    if types is None:
        return tuple(window if layer >= config["max_window_layers"] else None for layer in range(layers))
    return windows_of(types, layers, window)


def windows_of(types: Sequence[str], layers: int, window: int | None) -> tuple[int | None, ...]:
    """Each layer's window by its type; ValueError for other types, another number of them, or no window."""
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types has {len(types)} entries of {sorted(set(types))}; expected one of full_attention, "
            f"sliding_attention for each of the {layers} layers"
        )
    if window is None and "sliding_attention" in types:
        raise ValueError("layer_types names sliding_attention, but use_sliding_window or sliding_window is unset")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def ropes_by_type(
    config: HfConfig, windows: Sequence[int | None], theta: float, local_theta: float
) -> tuple[Rope, ...]:
    """The rotary embedding of each layer: one of layers without a window, one of those with it, as in transformers 5.

    v5 gives `rope_parameters` by the type of layer; in v4 `rope_scaling` is of layers without a window alone.

    Args:
        theta, local_theta: of the two, where `rope_parameters`, and for the first `rope_theta`, say none.
    """
    given = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        parts = [given.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
    else:
        scaling = config.get("rope_scaling") or given
        parts = [{"rope_theta": config.get("rope_theta"), **scaling}, {}]
    plain = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    of = lambda part, base: rope_from_hf(
        {**plain, "rope_parameters": {**part, "rope_theta": part.get("rope_theta") or base}}
    )
    full, local = of(parts[0], theta), of(parts[1], local_theta)
    return tuple(full if window is None else local for window in windows)
