"""The parameters of a model and their names in a Hugging Face checkpoint, by its family's table."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rmjax.models.config import ModelConfig
from rmjax.models.families import FAMILIES
from rmjax.models.families.base import Row
from rmjax.sharding import path_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def expected_rows(params: Any, config: ModelConfig) -> dict[Row, Any]:
    """Each row of the family's table that the model has, with its leaf of `params`."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    rows = {row: leaves.pop(row.path) for row in FAMILIES[config.family].table if row.path in leaves}
    if leaves:
        raise ValueError(f"the table of {config.family} has no row for {', '.join(leaves)}")
    return rows


def convert(x: jax.Array, *, transposed: bool, dtype: DTypeLike) -> jax.Array:
    """A tensor of one layout in the other, in this dtype."""
    return (jnp.swapaxes(x, -1, -2) if transposed else x).astype(dtype)
