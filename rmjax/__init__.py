"""rmjax: train reward models in JAX/Flax, from a Hugging Face checkpoint to a Hugging Face checkpoint."""

import os
from typing import Any

# transformers would tell everyone without torch that models are not available; only its tokenizers are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["Ensemble", "RewardModel"]


def __getattr__(name: str) -> Any:
    """`rmjax.RewardModel` and `rmjax.Ensemble`, imported on first use so that `import rmjax` stays quick."""
    if name == "RewardModel":
        from rmjax.inference.reward_model import RewardModel

        return RewardModel
    if name == "Ensemble":
        from rmjax.inference.ensembles import Ensemble

        return Ensemble
    raise AttributeError(f"module 'rmjax' has no attribute {name!r}")
