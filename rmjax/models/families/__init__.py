"""The families of models, a file each with all that belongs to it; a new one is its file and its name here."""

from rmjax.models.families.base import Family
from rmjax.models.families.llama import LLAMA
from rmjax.models.families.mistral import MISTRAL
from rmjax.models.families.qwen2 import QWEN2
from rmjax.models.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN2, QWEN3, LLAMA, MISTRAL)}

__all__ = ["FAMILIES", "Family"]
