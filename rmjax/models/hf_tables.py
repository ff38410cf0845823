"""The names of every parameter in a Hugging Face checkpoint: one table per family, used in both directions.

PyTorch stores a kernel as [out, in]; it is transposed on the device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rmjax.models.config import ModelConfig
from rmjax.sharding import path_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORE, SCORE_BIAS = "score.weight", "score.bias"
LM_HEAD = "lm_head.weight"


class Row(NamedTuple):
    """One parameter: our path, its name in a checkpoint, and whether its last two axes swap places."""

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


def _in_layers(ours: str, theirs: str, transposed: bool = False) -> tuple[Row, Row]:
    """A parameter of every layer: those of the stack, and the last one's."""
    name = f"model.layers.{{layer}}.{theirs}"
    return Row(f"decoder/layers/{ours}", name, transposed), Row(f"decoder/last/{ours}", name, transposed)


def _projections(block: str, names: str) -> tuple[Row, ...]:
    rows: list[Row] = []
    for ours in names.split():
        rows += _in_layers(f"{ours}/kernel", f"{block}.{ours}_proj.weight", transposed=True)
        rows += _in_layers(f"{ours}/bias", f"{block}.{ours}_proj.bias")
    return tuple(rows)


_LLAMA = (
    Row("decoder/embed/embedding", "model.embed_tokens.weight"),
    *_in_layers("attention_norm/scale", "input_layernorm.weight"),
    *_projections("self_attn", "q k v o"),
    *_in_layers("mlp_norm/scale", "post_attention_layernorm.weight"),
    *_projections("mlp", "gate up down"),
    Row("decoder/norm/scale", "model.norm.weight"),
    Row("score/kernel", SCORE, transposed=True),
    Row("lm_head/embedding", LM_HEAD),
)
_QWEN3 = (
    *_LLAMA,
    *_in_layers("q_norm/scale", "self_attn.q_norm.weight"),
    *_in_layers("k_norm/scale", "self_attn.k_norm.weight"),
)
# A row counts where the model has its parameter: the config decides about biases.
TABLES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def expected_rows(params: Any, config: ModelConfig) -> dict[Row, Any]:
    """Each row of the family's table that the model has, with its leaf of `params`."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    rows = {row: leaves.pop(row.path) for row in TABLES[config.family] if row.path in leaves}
    if leaves:
        raise ValueError(f"the table of {config.family} has no row for {', '.join(leaves)}")
    return rows


def convert(x: jax.Array, *, transposed: bool, dtype: DTypeLike) -> jax.Array:
    """A tensor of one layout in the other, in this dtype."""
    return (jnp.swapaxes(x, -1, -2) if transposed else x).astype(dtype)
