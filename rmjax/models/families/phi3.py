"""Phi-3 and Phi-4: Llama with fused tensors, and a part of each head rotated where a config says so."""

import dataclasses
from collections.abc import Collection
from typing import Any

from rmjax.models.families.base import LLAMA_TABLE, PART, Family, HfConfig, Row, layer_names
from rmjax.models.rope import rope_from_hf

DEFAULTS = {"rms_norm_eps": 1e-5}
FUSED = {
    **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}


def _fused(row: Row) -> Row:
    """The row of a parameter that is a part of a fused tensor here."""
    ours = row.path.split("/")[-2]
    if ours not in FUSED or not row.path.endswith("/kernel"):
        return row
    return row._replace(name=f"model.layers.{{layer}}.{FUSED[ours]}.weight{PART}{ours}")


def _features(config: HfConfig) -> dict[str, Any]:
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if (given.get("rope_type") or given.get("type")) in ("su", "yarn"):
        given = {**given, "rope_type": "longrope"}  # as transformers reads them, so that it is refused by that name
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    plain = {key: value for key, value in given.items() if key != "partial_rotary_factor"}
    whole = {**config, "partial_rotary_factor": None, "rope_scaling": None, "rope_parameters": plain}
    rope, layers = dataclasses.replace(rope_from_hf(whole), partial=float(partial)), config["num_hidden_layers"]
    return {"windows": (config.get("sliding_window"),) * layers, "ropes": (rope,) * layers}


def _owns(names: Collection[str]) -> bool:
    return "qkv_proj.weight" in layer_names(names)


PHI3 = Family("phi3", "Phi3", DEFAULTS, _features, tuple(map(_fused, LLAMA_TABLE)), _owns)
