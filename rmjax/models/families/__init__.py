"""The families of models, a file each with all that belongs to it; a new one is its file and its name here."""

from collections.abc import Mapping
from typing import Any

from rmjax.models.families.base import Family
from rmjax.models.families.gemma2 import GEMMA2
from rmjax.models.families.gemma3 import GEMMA3
from rmjax.models.families.granite import GRANITE
from rmjax.models.families.llama import LLAMA
from rmjax.models.families.mistral import MISTRAL
from rmjax.models.families.olmo2 import OLMO2
from rmjax.models.families.olmo3 import OLMO3
from rmjax.models.families.phi3 import PHI3
from rmjax.models.families.qwen2 import QWEN2
from rmjax.models.families.qwen3 import QWEN3
from rmjax.models.families.smollm3 import SMOLLM3

ALL = (QWEN2, QWEN3, LLAMA, MISTRAL, GEMMA2, GEMMA3, OLMO2, OLMO3, PHI3, SMOLLM3, GRANITE)
FAMILIES: dict[str, Family] = {family.model_type: family for family in ALL}


def vllm_overrides(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """What vLLM has to be told (`--hf-overrides`) of an export with this config.json; {} where it finds its class."""
    named, family = config["architectures"][0], FAMILIES.get(config.get("model_type", ""))
    wanted = family.vllm_architecture(named.rpartition("For")[2]) if family else named
    return {} if wanted == named else {"architectures": [wanted]}


__all__ = ["FAMILIES", "Family", "vllm_overrides"]
