"""What a model card and a score contract say of a run, beside its metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rmjax.data import sources
from rmjax.models import hf


def all_estimates(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with intervals, by "validation/accuracy", as the contract keeps them."""
    parts = {**evaluation["sets"], **evaluation["benchmarks"]}
    return {f"{name}/{metric}": x for name, part in parts.items() for metric, x in part["metrics"].items()}


def base_model(config: ConfigDict) -> str:
    """The hub id that the run started from; "" where it was a directory, or from scratch."""
    base = str(config.model.init_from)
    return base if hf.is_hub_id(base) and not Path(base).is_dir() else ""


def public_config(config: ConfigDict) -> dict[str, Any]:
    """The config as an export may tell it: local data by its name, not by its place."""
    values = config.to_dict()
    for key in ("train", "validation"):
        items = sources.split_spec(values["data"][key]) if values["data"][key] else []
        values["data"][key] = ", ".join(item if "://" in item else Path(item).name for item in items)
    return values
