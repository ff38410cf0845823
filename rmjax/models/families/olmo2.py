"""OLMo 2: norms after both parts of a layer, and of the queries and keys of all heads together."""

from collections.abc import Collection
from typing import Any

from rmjax.models.families.base import NORMS_AFTER, QK_NORMS, WITHOUT_NORMS, Family, HfConfig, layer_names

DEFAULTS = {"rms_norm_eps": 1e-5}
TABLE = (*WITHOUT_NORMS, *NORMS_AFTER, *QK_NORMS)


def features(config: HfConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias"))
    return {"norms": "after", "qk_norm": "all", "qkv_bias": biased, "o_bias": biased}


def owns(names: Collection[str]) -> bool:
    has_before = any("input_layernorm" in name for name in names)
    return "q_norm.weight" in layer_names(names) and not has_before


OLMO2 = Family("olmo2", "Olmo2", DEFAULTS, features, TABLE, owns)
