"""Which tokens of a row see which, and the blocks of queries and keys that must meet because some of their tokens do.

Shape letters: B rows, T tokens, X blocks of a row, I query tokens of a block, J key tokens of a block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NO_WINDOW = np.iinfo(np.int32).max  # the window of a layer that has none, among layers that have


class Visits(NamedTuple):
    """For each block of one side, the blocks of the other side that it must meet, whole ones first.

    After the last of them its number is repeated, so that a copy made ahead of its use copies nothing new.
    """

    order: jax.Array  # int32 [B, X, X], their numbers
    whole: jax.Array  # int32 [B, X], how many of them need no mask: every query sees every key
    total: jax.Array  # int32 [B, X]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("first", "until", "position", "window", "by_query", "by_key"),
    meta_fields=("block", "windowed"),
)
@dataclasses.dataclass(frozen=True)
class Visible:
    """A batch's rows as `tree_attention` needs them; made once by `visible` and used in every layer."""

    first: jax.Array  # int32 [B, T], like the next two; T is padded to whole blocks by tokens that see only themselves
    until: jax.Array
    position: jax.Array
    window: jax.Array  # int32 scalar, keys a query sees along its path; NO_WINDOW is all
    by_query: Visits  # for each block of queries the blocks of keys; the diagonal one stands last
    by_key: Visits  # for each block of keys the blocks of queries
    block: int  # tokens
    windowed: bool  # whether `window` may be less than NO_WINDOW; static, so that nothing is computed for it otherwise


def visible(
    visible_from: jax.Array,
    visible_until: jax.Array,
    positions: jax.Array,
    window: int | jax.Array | None = None,
    *,
    block: int,
) -> Visible:
    """Finds the blocks that must meet. Query i of a row sees key j exactly where

        visible_from[i] <= j <= i  and  i < visible_until[j]  [and positions[i] - positions[j] < window]

    and two blocks meet exactly where a query of one sees a key of the other, so that other trees, sibling branches
    and what lies out of a window cost nothing.

    Args:
        visible_from: int32 [B, T] index in the row of the first key each query may see.
        visible_until: int32 [B, T] index after the last query that may see each key. Every token must see
            itself; a token of padding sees, and is seen by, nothing else.
        positions: int32 [B, T] distance of each token from its root, along its path.
        window: number of keys a query sees along its path, itself included; an int or a scalar array, which
            may be traced. None: all.
        block: tokens of a block.

    Raises:
        ValueError: the shapes differ, or they are not [B, T].
    """
    shapes = {"visible_from": visible_from, "visible_until": visible_until, "positions": positions}
    for name, x in shapes.items():
        if x.ndim != 2 or x.shape != visible_from.shape:
            raise ValueError(f"{name} has shape {x.shape}, expected [B, T] = {visible_from.shape}")
    length = visible_from.shape[1]
    padding = -length % block
    itself = jnp.broadcast_to(length + jnp.arange(padding, dtype=jnp.int32), (len(visible_from), padding))
    first, until = (jnp.concatenate([x, itself + n], 1) for n, x in enumerate((visible_from, visible_until)))
    position = jnp.pad(positions, ((0, 0), (0, padding)))
    width = jnp.asarray(NO_WINDOW if window is None else window, jnp.int32)
    meet, whole = _meetings(first, until, position, None if window is None else width, block)
    by_query, by_key = _visits(meet, whole), _visits(meet.swapaxes(1, 2), whole.swapaxes(1, 2))
    return Visible(first, until, position, width, by_query, by_key, block, window is not None)


def _meetings(
    first: jax.Array, until: jax.Array, position: jax.Array, window: jax.Array | None, block: int
) -> tuple[jax.Array, jax.Array]:
    """bool [B, X, X], queries before keys: does any query see any key, and does every query see every key?

    Rows are laid depth first, so of the keys before a block, those that some query of it sees are those that its
    first query sees (a key's queries are contiguous); each of these is seen by the block's queries before the key's
    `until`, of which the one nearest to the root is also nearest to the key.
    """
    b, length = first.shape
    blocks = length // block
    start_X = jnp.arange(blocks, dtype=jnp.int32) * block
    cut = lambda x: x.reshape(b, blocks, block)
    diagonal, below = jnp.eye(blocks, dtype=bool), start_X[:, None] > start_X
    if window is None:
        seen_BXX = cut(until).max(-1)[:, None, :] > start_X[:, None]
    else:
        nearest_BXI = jax.lax.cummin(cut(position), axis=2)
        reach_BXT = jnp.clip(until[:, None] - start_X[:, None], 0, block)  # queries of the block that see the key
        nearest_BXT = jnp.take_along_axis(nearest_BXI, jnp.maximum(reach_BXT - 1, 0), axis=2)
        seen_BXT = (reach_BXT > 0) & (nearest_BXT - position[:, None] < window)
        seen_BXX = seen_BXT.reshape(b, blocks, blocks, block).any(-1)
    meet = below & seen_BXX | diagonal
    whole = (
        below & (cut(first).max(-1)[:, :, None] <= start_X) & (cut(until).min(-1)[:, None] >= start_X[:, None] + block)
    )
    if window is not None:
        whole &= cut(position).max(-1)[:, :, None] - cut(position).min(-1)[:, None] < window
    return meet, whole


def _visits(meet: jax.Array, whole: jax.Array) -> Visits:
    """The lists of `meet` [B, X, X], for each entry of its axis 1."""
    blocks = meet.shape[-1]
    index = jnp.arange(blocks, dtype=jnp.int32)
    key = index + blocks * jnp.where(meet, jnp.where(whole, 0, 1), 2)
    order = jnp.sort(key, axis=-1) % blocks
    total = meet.sum(-1, dtype=jnp.int32)
    last = jnp.take_along_axis(order, total[..., None] - 1, axis=-1)
    return Visits(jnp.where(index < total[..., None], order, last), whole.sum(-1, dtype=jnp.int32), total)
