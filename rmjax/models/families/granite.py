"""Granite 3 (dense): Llama with four multipliers."""

from typing import Any

from rmjax.models.families.base import LLAMA_TABLE, Family, HfConfig, is_llama_like

DEFAULTS = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0)


def _features(config: HfConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias"))
    return {
        "embed_scale": float(config["embedding_multiplier"]),
        "attention_scale": float(config["attention_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "output_scale": 1 / config["logits_scaling"],
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": bool(config.get("mlp_bias")),
    }


GRANITE = Family("granite", "Granite", DEFAULTS, _features, LLAMA_TABLE, is_llama_like)
