"""Qwen3 (dense): Llama with queries and keys that are normalised per head."""

from collections.abc import Collection
from typing import Any

from rmjax.models.families.base import LLAMA_TABLE, QK_NORMS, Family, HfConfig, layer_names, windows_by_type

DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}
TABLE = (*LLAMA_TABLE, *QK_NORMS)


def _features(config: HfConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias"))
    return {"qkv_bias": biased, "o_bias": biased, "qk_norm": "head", "windows": windows_by_type(config)}


def _owns(names: Collection[str]) -> bool:
    before = any("input_layernorm" in name for name in names)
    after = any("post_feedforward_layernorm" in name for name in names)
    return {"q_proj.weight", "q_norm.weight"} <= layer_names(names) and before and not after


QWEN3 = Family("qwen3", "Qwen3", DEFAULTS, _features, TABLE, _owns)
