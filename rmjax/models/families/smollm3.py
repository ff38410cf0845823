"""SmolLM3: Llama without rotary embedding in every fourth layer."""

from typing import Any

from rmjax.models.families.base import LLAMA_TABLE, Family, HfConfig, is_llama_like, windows_of
from rmjax.models.rope import NONE, Rope, rope_from_hf

DEFAULTS = {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True}


def _features(config: HfConfig) -> dict[str, Any]:
    layers, window, interval = config["num_hidden_layers"], None, config.get("no_rope_layer_interval") or 4
    rotates = config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(rotates) != layers:
        raise ValueError(f"no_rope_layers has {len(rotates)} entries; expected one for each of the {layers} layers")
    if config.get("use_sliding_window"):
        window = config.get("sliding_window")
    types = config.get("layer_types") or [
        "sliding_attention" if window and not rotated else "full_attention" for rotated in rotates
    ]
    biased, rope = bool(config.get("attention_bias")), rope_from_hf(config)
    return {
        "windows": windows_of(types, layers, window),
        "ropes": tuple(rope if rotated else Rope(NONE) for rotated in rotates),
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": bool(config.get("mlp_bias")),
    }


SMOLLM3 = Family("smollm3", "SmolLM3", DEFAULTS, _features, LLAMA_TABLE, is_llama_like)
