"""Training numbers kept in bfloat16 and stepped in float32: stochastic rounding, and moments in fewer bytes.

bfloat16 has 8 significant bits. An update below 1/512 of a number is lost when it is rounded to the nearest, so a
parameter at a small learning rate, or Adam's second moment (which moves by 1 - b2 of its distance), stands still.
Rounded up or down at random, with chances that make the mean right, it moves on average as it should: Gupta et al.
2015, arXiv:1502.02551; for bfloat16 parameters and Adam, Zamirai et al. 2020, arXiv:2010.06192.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from rmjax.sharding import path_name

PARAMS, NU = 0, 1  # what is rounded in a step; each has random numbers of its own


def seed_of(seed: int, step: jax.Array, what: int) -> jax.Array:
    """A random uint32 scalar for the rounding of a step, so that a resumed run rounds as an uninterrupted one."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), what)
    return jax.random.bits(key, (), jnp.uint32)


def mix(x: jax.Array) -> jax.Array:
    """A permutation of uint32 in which every bit depends on all: triple32 (Wellons 2018, "Prospecting for hash
    functions"). Two multiplications, as in MurmurHash3's finalizer, leave the upper byte of consecutive numbers uneven.
    """
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)


def random_words(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 numbers, each a function of `seed` and of its index alone, however the array is split.

    Twelve integer operations a number and no memory traffic, since they are computed where they are used. Threefry,
    jax.random's generator, takes over a hundred: with two roundings a parameter it would be the largest part of the
    optimizer. The numbers of the hardware generators (rbg) depend on the sharding. Indices repeat after 2**32.
    """
    index = jnp.broadcast_to(seed, shape)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return mix(index)


def round_stochastic(x: jax.Array, words: jax.Array) -> jax.Array:
    """Rounds to one of the two neighbours in bfloat16, so that the mean is `x`.

    16 random bits are added below those that are kept, and the sum is truncated: a number is moved away from zero with
    the chance that its lower 16 bits say, exactly. Numbers of bfloat16 stay, infinities and NaN too; what lies beyond
    the largest finite number becomes that.

    Args:
        x: float32.
        words: uint32 of the same shape; the upper half is used.

    Returns:
        bfloat16 of the same shape.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    raised = bits + (words >> 16)
    infinite = np.uint32(0x7F80_0000)  # its exponent
    kept = jnp.where((raised & infinite) == infinite, bits, raised) >> 16
    rounded = jax.lax.bitcast_convert_type(kept.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def round_as(new: Any, old: Any, seed: jax.Array) -> Any:
    """A float32 tree in the dtypes of another: stochastically rounded where that is bfloat16.

    Args:
        new: tree of float32 arrays.
        old: tree of the same structure and shapes, float32 or bfloat16.
        seed: uint32 scalar; each leaf's random numbers follow from it and from the leaf's path.
    """

    def one(path: tuple, x: jax.Array, like: jax.Array) -> jax.Array:
        if like.dtype == jnp.float32:
            return x
        own = mix(seed ^ np.uint32(zlib.crc32(path_name(path).encode())))
        return round_stochastic(x, random_words(own, x.shape))

    return jax.tree_util.tree_map_with_path(one, new, old)


def widen(tree: Any) -> Any:
    """The tree in float32; XLA converts where a number is used, so no copy is made."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def stored(
    transformation: optax.GradientTransformation, mu_dtype: DTypeLike, nu_dtype: DTypeLike, seed: int
) -> optax.GradientTransformation:
    """A transformation that computes in float32, with its moments kept in other dtypes between steps.

    The first moment is rounded to the nearest, because it moves by a tenth of its distance; the second
    stochastically. An update is computed from the moments before they are rounded. With float32 for both nothing is
    added to the transformation.

    Args:
        transformation: its state is a named tuple with `count`, `mu` and perhaps `nu`.
        mu_dtype: float32 or bfloat16.
        nu_dtype: the same.
    """
    dtypes = {"mu": mu_dtype, "nu": nu_dtype}
    fields = lambda state: [name for name in dtypes if name in state._fields]

    def init(params: Any) -> Any:
        state = transformation.init(params)
        cast = lambda name: jax.tree.map(lambda x: x.astype(dtypes[name]), getattr(state, name))
        return state._replace(**{name: cast(name) for name in fields(state)})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = state._replace(**{name: widen(getattr(state, name)) for name in fields(state)})
        updates, new = transformation.update(updates, wide, params)
        kept = {"mu": jax.tree.map(lambda x, old: x.astype(old.dtype), new.mu, state.mu)}
        if "nu" in new._fields:
            kept["nu"] = round_as(new.nu, state.nu, seed_of(seed, state.count, NU))
        return updates, new._replace(**kept)

    return optax.GradientTransformation(init, update)
