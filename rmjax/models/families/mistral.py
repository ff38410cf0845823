"""Mistral 7B: Llama with a sliding window in every layer."""

from typing import Any

from rmjax.models.families.base import LLAMA_TABLE, Family, HfConfig, is_llama_like

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def _features(config: HfConfig) -> dict[str, Any]:
    return {"windows": (config.get("sliding_window"),) * config["num_hidden_layers"]}


MISTRAL = Family("mistral", "Mistral", DEFAULTS, _features, LLAMA_TABLE, is_llama_like)
