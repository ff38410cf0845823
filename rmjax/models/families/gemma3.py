"""Gemma 3, its text model: Gemma 2 without soft-caps, with normalised queries and keys, and two rotary embeddings."""

from collections.abc import Collection
from typing import Any

from rmjax.models.families import gemma2
from rmjax.models.families.base import QK_NORMS, Family, HfConfig, layer_names, ropes_by_type

DEFAULTS = {  # config.json of the multimodal models leaves most out
    **gemma2.DEFAULTS,
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "max_position_embeddings": 131_072,
}
TABLE = (*gemma2.TABLE, *QK_NORMS)


def _features(config: HfConfig) -> dict[str, Any]:
    shared = gemma2.features(config, config.get("sliding_window_pattern") or 6)
    ropes = ropes_by_type(config, shared["windows"], theta=1e6, local_theta=config.get("rope_local_base_freq") or 1e4)
    return {**shared, "qk_norm": "head", "ropes": ropes}


def _owns(names: Collection[str]) -> bool:
    return any("pre_feedforward_layernorm" in name for name in names) and "q_norm.weight" in layer_names(names)


GEMMA3 = Family(
    "gemma3_text", "Gemma3Text", DEFAULTS, _features, TABLE, _owns, writer_prefix="Gemma3", multimodal="gemma3"
)
