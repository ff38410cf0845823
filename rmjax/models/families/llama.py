"""Llama 2, 3, 3.1, 3.2 and 3.3, and models of their shape: SmolLM2, TinyLlama."""

from typing import Any

from rmjax.models.families.base import LLAMA_TABLE, Family, HfConfig, is_llama_like


def _features(config: HfConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias"))
    return {"qkv_bias": biased, "o_bias": biased, "mlp_bias": bool(config.get("mlp_bias"))}


LLAMA = Family("llama", "Llama", {}, _features, LLAMA_TABLE, is_llama_like)
