"""Brings the labels of groups and responses to their scored tokens.

Shape letters: B rows, G groups in a row, E scored tokens in a row.
"""

import jax
import jax.numpy as jnp


def at_ends(labels: jax.Array, *indices: jax.Array) -> jax.Array:
    """Looks up a label for each scored token.

    Args:
        labels: [B, G, ...]: of groups, or [B, G, K, ...] of responses.
        indices: int32 [B, E] each: `end_group`, and for labels of responses `end_slot`; -1 absent.

    Returns:
        [B, E, ...]; 0 where there is no scored token.

    Raises:
        ValueError: the shapes do not agree.
    """
    if any(i.shape != indices[0].shape for i in indices) or labels.shape[0] != indices[0].shape[0]:
        raise ValueError(f"labels {labels.shape} and indices {[i.shape for i in indices]}: not [B, G, ...] and [B, E]")
    pick = lambda x, *at: x[tuple(jnp.maximum(i, 0) for i in at)]
    picked = jax.vmap(pick)(labels, *indices)
    here = (indices[0] >= 0).reshape(indices[0].shape + (1,) * (picked.ndim - 2))
    return jnp.where(here, picked, 0)
