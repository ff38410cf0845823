"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and a window on some layers."""

from collections.abc import Collection
from typing import Any

from rmjax.models.families.base import LLAMA_TABLE, Family, HfConfig, layer_names, windows_by_type

DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}


def _features(config: HfConfig) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": windows_by_type(config)}


def _owns(names: Collection[str]) -> bool:
    parts = layer_names(names)
    return "q_proj.bias" in parts and "o_proj.bias" not in parts and "q_norm.weight" not in parts


QWEN2 = Family("qwen2", "Qwen2", DEFAULTS, _features, LLAMA_TABLE, _owns)
