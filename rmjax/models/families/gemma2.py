"""Gemma 2: norms before and after both parts of a layer, soft-capped logits, a window in every second layer."""

from collections.abc import Collection
from typing import Any

from rmjax.models.families.base import (
    NORMS_AFTER,
    WITHOUT_NORMS,
    Family,
    HfConfig,
    every,
    in_layers,
    layer_names,
    windows_of,
)

DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
TABLE = (
    *WITHOUT_NORMS,
    *in_layers("attention_norm/scale", "input_layernorm.weight"),
    *in_layers("mlp_norm/scale", "pre_feedforward_layernorm.weight"),
    *NORMS_AFTER,
)


def features(config: HfConfig, full_layer: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; every so many layers one has no window, where `layer_types` does not say it."""
    if config.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is not supported: tokens of a tree see what stands before them")
    layers, biased = config["num_hidden_layers"], bool(config.get("attention_bias"))
    return {
        "norms": "both",
        "one_plus": True,
        "embed_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "softcap": config.get("attn_logit_softcapping") or None,
        "logit_softcap": config.get("final_logit_softcapping") or None,
        "windows": windows_of(config.get("layer_types") or every(full_layer, layers), layers, config["sliding_window"]),
        "qkv_bias": biased,
        "o_bias": biased,
    }


def _owns(names: Collection[str]) -> bool:
    return any("pre_feedforward_layernorm" in name for name in names) and "q_norm.weight" not in layer_names(names)


GEMMA2 = Family("gemma2", "Gemma2", DEFAULTS | CAPS, lambda config: features(config, 2), TABLE, _owns)
