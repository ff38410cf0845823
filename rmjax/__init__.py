"""rmjax: train reward models in JAX/Flax, from a Hugging Face checkpoint to a Hugging Face checkpoint."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["RewardModel"]


def __getattr__(name: str) -> Any:
    """`rmjax.RewardModel`, imported on first use so that `import rmjax` stays quick."""
    if name == "RewardModel":
        from rmjax.reward_model import RewardModel

        return RewardModel
    raise AttributeError(f"module 'rmjax' has no attribute {name!r}")
