"""One decoder for every family: what differs between them is in ModelConfig.

Shape letters: B rows, T tokens, D width, F mlp width, N query heads, M key/value heads, H head width,
L layers. The parameters of all layers are stacked on a leading axis L and applied by one `lax.scan`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from rmjax.kernels.tree_attention import tree_attention
from rmjax.models.config import ModelConfig
from rmjax.models.rope import rope_angles, rotate
from rmjax.sharding import BATCH, constrain

# Activations that a remat policy can save, and the names they go by inside. The kernel names its own output
# and the log-sum-exp that its backward needs with it.
SAVED = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "attention": ("attention", "lse"),
    "mid": ("mid",),
    "gate": ("gate",),
    "up": ("up",),
}
NO_WINDOW = np.iinfo(np.int32).max  # in a stack of layers of which only some have a window


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> nnx.Param:
    """A parameter drawn from N(0, std), as transformers draws embeddings, projections and score heads."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype))


class Embed(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.embedding = normal(rngs, (config.vocab, config.width), config.init_std, dtype)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """[B, T, D] in the parameter's dtype; NaN for an id outside the vocabulary, so that none can pass."""
        # Rows are split over fsdp too: a table split over it by columns would make XLA replicate what is looked up.
        table_VD = constrain(self.embedding[...], "tensor", None)
        return jnp.take(table_VD, tokens_BT, axis=0, mode="fill")


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, shape: tuple[int, ...], eps: float, *, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """The same shape and dtype as `x`."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel + bias, both cast to the dtype of x."""

    def __init__(self, kernel: nnx.Param, bias: bool):
        self.kernel = kernel
        self.bias = nnx.Param(jnp.zeros((*kernel.shape[:-2], kernel.shape[-1]), kernel.dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] to [..., out]."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Layer(nnx.Module):
    """Attention and gated MLP, each after a norm and added to the residual stream.

    Built with parameters [L, ...] for all layers; called only on one layer's slice of them.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c, stack = config, config.layers

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(normal(rngs, (stack, inputs, outputs), c.init_std, dtype), bias)

        def norm(width: int) -> RMSNorm:
            return RMSNorm((stack, width), c.norm_eps, dtype=dtype)

        self.head_dim = c.head_dim
        self.attention_norm = norm(c.width)
        self.q = linear(c.width, c.heads * c.head_dim, c.qkv_bias)
        self.k = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.q_norm = norm(c.head_dim) if c.qk_norm else None
        self.k_norm = norm(c.head_dim) if c.qk_norm else None
        self.o = linear(c.heads * c.head_dim, c.width, c.o_bias)
        self.mlp_norm = norm(c.width)
        self.gate = linear(c.width, c.mlp, c.mlp_bias)
        self.up = linear(c.width, c.mlp, c.mlp_bias)
        self.down = linear(c.mlp, c.width, c.mlp_bias)

    def __call__(self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array], *where: Any) -> jax.Array:
        """[B, T, D] to [B, T, D]; `where` is what `tree_attention` takes after q, k and v."""
        x_BTD = constrain(x_BTD + self._attention(self.attention_norm(x_BTD), angles, where), BATCH, None, None)
        x_BTD = checkpoint_name(x_BTD, "mid")
        y_BTD = self.mlp_norm(x_BTD)
        gate_BTF = checkpoint_name(self.gate(y_BTD), "gate")
        up_BTF = checkpoint_name(self.up(y_BTD), "up")
        return constrain(x_BTD + self.down(jax.nn.silu(gate_BTF) * up_BTF), BATCH, None, None)

    def _attention(self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array], where: tuple[Any, ...]) -> jax.Array:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        # Named before norm and rotation: saving them spares the products, and what follows is cheap to redo.
        q_BTNH = checkpoint_name(self.q(x_BTD), "q").reshape(heads)
        k_BTMH = checkpoint_name(self.k(x_BTD), "k").reshape(heads)
        v_BTMH = checkpoint_name(self.v(x_BTD), "v").reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTMH = self.q_norm(q_BTNH), self.k_norm(k_BTMH)
        out_BTNH = tree_attention(rotate(q_BTNH, angles), rotate(k_BTMH, angles), v_BTMH, *where)
        return self.o(out_BTNH.reshape(*x_BTD.shape[:2], -1))


class Decoder(nnx.Module):
    """Embedding, L layers, and the final norm, which the caller applies to the tokens that it needs.

    Attributes:
        embed: Embed.
        layers: one Layer whose parameters have a leading axis L.
        norm: the final RMSNorm.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
    ):
        self.config, self.compute_dtype = config, jnp.dtype(compute_dtype)
        self.embed = Embed(config, rngs=rngs, dtype=param_dtype)
        self.layers = Layer(config, rngs=rngs, dtype=param_dtype)
        self.norm = RMSNorm((config.width,), config.norm_eps, dtype=param_dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        visible_from: jax.Array,
        visible_until: jax.Array,
        *,
        remat: str = "full",
        scan: bool = True,
    ) -> jax.Array:
        """Runs the layers over rows of trees.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], along the path from the root of the token's tree.
            visible_from: int32 [B, T], first key that the token sees.
            visible_until: int32 [B, T], index after the last token that sees this one.
            remat: what the backward pass recomputes: `none`, `full` (all of a layer but its input), or a
                comma separated list of the activations of SAVED that are kept.
            scan: False runs the layers one by one in Python, for debugging.

        Returns:
            The residual stream after the last layer, *before* the final norm: [B, T, D] in the compute dtype.

        Raises:
            ValueError: `remat` names an unknown activation.
        """
        angles = rope_angles(self.config.rope, self.config.head_dim, positions)
        graphdef, layers = nnx.split(self.layers)
        static_window, windows_L = self._layer_windows()

        def apply(x_BTD: jax.Array, layer_and_window: tuple[Any, Any]) -> tuple[jax.Array, None]:
            params, window = layer_and_window
            window = static_window if window is None else window
            layer = nnx.merge(graphdef, params)
            return layer(x_BTD, angles, visible_from, visible_until, positions, window), None

        # Inside a scan, XLA cannot undo the recomputation, so the barriers that would stop it only cost.
        apply = rematerialized(apply, remat, prevent_cse=not scan)
        x_BTD = constrain(self.embed(tokens).astype(self.compute_dtype), BATCH, None, None)
        xs = (nnx.to_pure_dict(layers), windows_L)
        if scan:
            return jax.lax.scan(apply, x_BTD, xs)[0]
        for index in range(self.config.layers):
            x_BTD, _ = apply(x_BTD, jax.tree.map(lambda leaf, index=index: leaf[index], xs))
        return x_BTD

    def _layer_windows(self) -> tuple[int | None, jax.Array | None]:
        """The window of all layers and None where it is the same, else None and int32 [L] to scan."""
        windows = self.config.windows
        if len(set(windows)) == 1:
            return windows[0], None
        return None, jnp.array([NO_WINDOW if window is None else window for window in windows], jnp.int32)


def saved_names(remat: str) -> tuple[str, ...]:
    """The names that a remat policy saves, as they are in the layers; none for `none` and `full`.

    Raises:
        ValueError: `remat` names an unknown activation.
    """
    if remat in ("none", "full"):
        return ()
    names = [name.strip() for name in remat.split(",")]
    if unknown := [name for name in names if name not in SAVED]:
        raise ValueError(
            f"remat {remat!r} names {', '.join(map(repr, unknown))}; "
            f"expected 'none', 'full' or a comma separated list of {', '.join(SAVED)}"
        )
    return tuple(saved for name in names for saved in SAVED[name])


def rematerialized(function: Any, remat: str, *, prevent_cse: bool) -> Any:
    """Wraps a layer so that its backward recomputes what `remat` (see Decoder.__call__) does not save.

    Raises:
        ValueError: `remat` names an unknown activation.
    """
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*saved_names(remat))
    return jax.checkpoint(function, policy=policy if remat != "full" else None, prevent_cse=prevent_cse)
