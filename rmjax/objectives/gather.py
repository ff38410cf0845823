"""Between scored tokens and their groups: scores brought to the groups, or labels to the scored tokens.

Shape letters: B rows, G groups in a row, K responses in a group, E scored tokens in a row.
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
    """
    if any(i.shape != indices[0].shape for i in indices) or labels.shape[0] != indices[0].shape[0]:
        raise ValueError(f"labels {labels.shape} and indices {[i.shape for i in indices]}: not [B, G, ...] and [B, E]")
    pick = lambda x, *at: x[tuple(jnp.maximum(i, 0) for i in at)]
    picked = jax.vmap(pick)(labels, *indices)
    present = (indices[0] >= 0).reshape(indices[0].shape + (1,) * (picked.ndim - 2))
    return jnp.where(present, picked, 0)


def gather_groups(scores_BE: jax.Array, end_group: jax.Array, end_slot: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Puts flat scores where their group and response are.

    Args:
        scores_BE: float32 [B, E] scores of the scored tokens.
        end_group: int32 [B, E] group of each; -1 absent.
        end_slot: int32 [B, E] response of each; -1 absent.

    Returns:
        float32 [B, G, K]; 0 where there is no response.
    """
    if scores_BE.shape != end_group.shape or scores_BE.shape != end_slot.shape:
        raise ValueError(
            f"scores {scores_BE.shape}, end_group {end_group.shape} and end_slot {end_slot.shape} must agree"
        )
    g, k = shape
    flat = jnp.where(end_group >= 0, end_group * k + end_slot, g * k)  # absent ends go to a slot that is cut off
    put = lambda s, at: jnp.zeros(g * k + 1, s.dtype).at[at].add(s)
    return jax.vmap(put)(scores_BE, flat)[:, :-1].reshape(-1, g, k)
