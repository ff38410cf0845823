"""One decoder for every family: what differs between them is in ModelConfig.

Shape letters: B rows, T tokens, E scored tokens of a row, D width, F mlp width, N query heads, M key/value heads,
H head width, L layers. The parameters of all layers but the last are stacked on a leading axis L - 1 and applied by one
`lax.scan`. The last layer is by itself, because of it only scored tokens are asked for.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from rmjax.kernels.tree_attention import block_of, tree_attention
from rmjax.kernels.visible import NO_WINDOW, Visible, visible
from rmjax.models import quantized
from rmjax.models.config import ModelConfig
from rmjax.models.rope import rope_angles, rotate
from rmjax.sharding import BATCH, constrain

# Activations that a remat policy can save, and their names inside: the kernel names its output and the log-sum-exp that
# its backward needs.
SAVED: dict[str, tuple[str, ...]] = {name: (name,) for name in ("q", "k", "v", "attention", "mid", "gate", "up")}
SAVED["attention"] = ("attention", "lse")


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> nnx.Param:
    """A parameter drawn from N(0, std), as transformers draws embeddings, projections and score heads."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Embed(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.scale = config.embed_scale
        self.embedding = normal(rngs, (config.vocab, config.width), config.init_std, dtype)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """[B, T, D] in the parameter's dtype; NaN for an id outside the vocabulary, so that none can pass."""
        # Rows are split over fsdp too: a table split over it by columns would make XLA replicate what is looked up.
        table_VD = constrain(self.embedding[...], "tensor", None)
        return jnp.take(table_VD, tokens_BT, axis=0, mode="fill")

    def begin(self, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
        """What the first layer reads, [B, T, D] of this type."""
        x_BTD = self(tokens_BT).astype(dtype)
        return x_BTD if self.scale == 1 else x_BTD * jnp.asarray(self.scale, dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019); or times 1 + scale."""

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, *, dtype: DTypeLike):
        self.one_plus, self.eps = config.one_plus, config.norm_eps
        self.scale = nnx.Param((jnp.zeros if self.one_plus else jnp.ones)(shape, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * (self.scale[...].astype(jnp.float32) + float(self.one_plus))).astype(x.dtype)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel: [..., in] and [in, out] to [..., out].

    The kernel's gradient is computed with the narrower of its two factors first, the one that XLA transposes in memory
    on CPUs: with the wider one, and the activation that is fused into it, a step took 1.3 times as long (Qwen2 of
    width 256, mlp 1,024, 2 CPU cores, jax 0.10.2).
    """
    return x @ kernel


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dx = jnp.einsum("...o,io->...i", dy, kernel)
    if x.shape[-1] <= dy.shape[-1]:
        return dx, jnp.einsum("...i,...o->io", x, dy)
    return dx, jnp.einsum("...o,...i->oi", dy, x).T


product.defvjp(_product_forward, _product_backward)


class Quantized(nnx.Module):
    """A frozen kernel in the parts of `quantized.quantize`, by their names."""

    def __init__(self, parts: Mapping[str, jax.ShapeDtypeStruct]):
        self.names = tuple(parts)
        for name, part in parts.items():
            setattr(self, name, nnx.Param(jnp.zeros(part.shape, part.dtype)))

    def __call__(self, dtype: DTypeLike) -> jax.Array:
        """The kernel [in, out] in this dtype."""
        return quantized.dequantize({name: getattr(self, name)[...] for name in self.names}, dtype)


class Linear(nnx.Module):
    """x @ kernel + bias, both cast to the dtype of x; with an adapter (lora.py) also scale (x @ A) @ B."""

    def __init__(self, kernel: nnx.Param, bias: bool):
        self.kernel: nnx.Param | Quantized = nnx.data(kernel)
        self.bias = nnx.Param(jnp.zeros((*kernel.shape[:-2], kernel.shape[-1]), kernel.dtype)) if bias else None
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.scale = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel
        y = product(x, kernel(x.dtype) if isinstance(kernel, Quantized) else kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is None or self.lora_b is None:
            return y
        low = product(x, self.lora_a[...].astype(x.dtype))
        return y + self.scale * product(low, self.lora_b[...].astype(x.dtype))


class Layer(nnx.Module):
    """Attention and gated MLP, each after a norm, before one or between two, and added to the residual stream.

    Built with the parameters [n, ...] of a stack of layers, and then called only on one layer's slice of them; or with
    those of one layer.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, stack: int | None = None, attention: str = "xla"
    ):
        c, stacked = config, () if stack is None else (stack,)
        linear = lambda inputs, outputs, bias: Linear(
            normal(rngs, (*stacked, inputs, outputs), c.init_std, dtype), bias
        )
        norm = lambda width: RMSNorm((*stacked, width), c, dtype=dtype)
        around = lambda *where: norm(c.width) if c.norms in where else None
        self.head_dim, self.form, self.softcap, self.activation = c.head_dim, attention, c.softcap, c.activation
        # Attention divides logits by the root of H, whatever the model's scale is.
        self.q_factor = 1.0 if c.attention_scale is None else c.attention_scale * c.head_dim**0.5
        self.residual_scale = c.residual_scale
        self.attention_norm = around("before", "both")
        self.q = linear(c.width, c.heads * c.head_dim, c.qkv_bias)
        self.k = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.all_heads_norm = c.qk_norm == "all"
        widths = {"": (0, 0), "head": (c.head_dim,) * 2, "all": (c.heads * c.head_dim, c.kv_heads * c.head_dim)}
        self.q_norm, self.k_norm = (norm(width) if width else None for width in widths[c.qk_norm])
        self.o = linear(c.heads * c.head_dim, c.width, c.o_bias)
        self.attention_out_norm = around("after", "both")
        self.mlp_norm = around("before", "both")
        self.gate = linear(c.width, c.mlp, c.mlp_bias)
        self.up = linear(c.width, c.mlp, c.mlp_bias)
        self.down = linear(c.mlp, c.width, c.mlp_bias)
        self.mlp_out_norm = around("after", "both")

    def __call__(
        self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array], seen: Visible, at: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, D] to [B, T, D]; or to [B, E, D], only the tokens `at` (int32 [B, E] in [0, T)), the same numbers."""
        q_BENH, k_BTMH, v_BTMH = self.project(x_BTD, angles, at)
        return self.finish(_tokens(x_BTD, at), self.attend(q_BENH, k_BTMH, v_BTMH, seen, at))

    def finish(self, x_BED: jax.Array, attended_BEA: jax.Array) -> jax.Array:
        """The residual stream after the layer, from that before it and what was attended, [B, E, N * H]."""
        normed = lambda norm, x: x if norm is None else norm(x)
        added = lambda norm, x: normed(norm, x) if self.residual_scale == 1 else normed(norm, x) * self.residual_scale
        x_BED = constrain(x_BED + added(self.attention_out_norm, self.o(attended_BEA)), BATCH, None, None)
        x_BED = checkpoint_name(x_BED, "mid")
        y_BED = normed(self.mlp_norm, x_BED)
        gate_BEF = checkpoint_name(self.gate(y_BED), "gate")
        up_BEF = checkpoint_name(self.up(y_BED), "up")
        out_BED = self.down(ACTIVATIONS[self.activation](gate_BEF) * up_BEF)
        return constrain(x_BED + added(self.mlp_out_norm, out_BED), BATCH, None, None)

    def project(
        self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array], at: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries of the tokens `at`, or all, and every token's rotated keys and its values."""
        y_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)

        def heads(x: jax.Array, norm: RMSNorm | None = None) -> jax.Array:
            split = lambda x: x.reshape(*x.shape[:2], -1, self.head_dim)
            if norm is None:
                return split(x)
            return split(norm(x)) if self.all_heads_norm else norm(split(x))

        # Named before norm and rotation: saving them spares the products, and what follows is cheap to redo.
        q_BENH = heads(checkpoint_name(self.q(_tokens(y_BTD, at)), "q"), self.q_norm)
        k_BTMH = heads(checkpoint_name(self.k(y_BTD), "k"), self.k_norm)
        v_BTMH = heads(checkpoint_name(self.v(y_BTD), "v"))
        cos, sin = (_tokens(x, at) for x in angles)
        q_BENH = rotate(q_BENH, (cos, sin))
        return q_BENH if self.q_factor == 1 else q_BENH * self.q_factor, rotate(k_BTMH, angles), v_BTMH

    def attend(
        self, q_BENH: jax.Array, k_BTMH: jax.Array, v_BTMH: jax.Array, seen: Visible, at: jax.Array | None
    ) -> jax.Array:
        """What the queries of the tokens `at`, or all, take from the values they see: [B, E, N * H]."""
        q_BTNH = q_BENH
        if at is not None:
            # Queries that nobody reads are 0: attention is cheap beside the products they are spared.
            none_BTNH = jnp.zeros((*k_BTMH.shape[:2], *q_BENH.shape[2:]), q_BENH.dtype)
            q_BTNH = jax.vmap(lambda row, where, q: row.at[where].set(q))(none_BTNH, at, q_BENH)
        out_BTNH = tree_attention(q_BTNH, k_BTMH, v_BTMH, seen, form=self.form, softcap=self.softcap)
        return _tokens(out_BTNH.reshape(*k_BTMH.shape[:2], -1), at)


def _tokens(x_BT: jax.Array, at: jax.Array | None) -> jax.Array:
    """The tokens `at` (int32 [B, E]) of an array [B, T, ...], or all."""
    return x_BT if at is None else jax.vmap(lambda row, where: row[where])(x_BT, at)


class Decoder(nnx.Module):
    """Embedding, L layers, and the final norm, which the caller applies to the tokens that it needs."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
    ):
        self.config, self.compute_dtype, self.form = config, jnp.dtype(compute_dtype), attention
        layer = functools.partial(Layer, config, rngs=rngs, dtype=param_dtype, attention=attention)
        self.embed = Embed(config, rngs=rngs, dtype=param_dtype)
        self.layers = layer(stack=config.layers - 1) if config.layers > 1 else None
        self.last = layer()
        self.norm = RMSNorm((config.width,), config, dtype=param_dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        visible_from: jax.Array,
        visible_until: jax.Array,
        *,
        at: jax.Array | None = None,
        few: int = 0,
        remat: str = "full",
        scan: bool = True,
    ) -> jax.Array:
        """Runs the layers over rows of trees.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], along the path from the root of the token's tree.
            visible_from: int32 [B, T], first key that the token sees.
            visible_until: int32 [B, T], index after the last token that sees this one.
            at: int32 [B, E] in [0, T), the only tokens that are asked for, and -1 in unused places; None asks for all.
                After the last layer's keys and values nothing else is computed.
            few: computes only the first `few` places of `at` in batches where the others are unused; 0 always
                computes all, which gradients need.
            remat: what the backward pass recomputes: `none`, `full` (all of a layer but its input), or a
                comma separated list of the activations of SAVED that are kept.
            scan: False runs the layers one by one in Python, for debugging.

        Returns:
            The residual stream after the last layer, *before* the final norm: [B, T, D], or [B, E, D] of the tokens
            `at`, in the compute dtype. Unused places hold finite numbers without meaning.
        """
        windows = sorted(set(self.config.windows), key=lambda window: window or 0)
        block = block_of(self.form, tokens.shape[1], self.config.head_dim)
        find = functools.partial(visible, visible_from, visible_until, positions, block=block)
        # Layers are alike but for their window: what is seen is found once for each, and one program serves all.
        seen_by_window = [find(NO_WINDOW if w is None and len(windows) > 1 else w) for w in windows]
        ropes = list(dict.fromkeys(self.config.ropes))
        angles_by_rope = [rope_angles(rope, self.config.head_dim, positions) for rope in ropes]
        window_L = [windows.index(window) for window in self.config.windows]
        rope_L = [ropes.index(rope) for rope in self.config.ropes]

        # Inside a scan, XLA cannot undo the recomputation, so the barriers that would stop it only cost.
        wrapped = functools.partial(rematerialized, remat=remat, prevent_cse=not scan)
        x_BTD = constrain(self.embed.begin(tokens, self.compute_dtype), BATCH, None, None)
        if self.layers is not None:
            graphdef, layers = nnx.split(self.layers)
            stack = lambda found: jax.tree.map(lambda *x: jnp.stack(x), *found) if len(found) > 1 else found[0]
            seen_W, angles_R = stack(seen_by_window), stack(angles_by_rope)

            @wrapped
            def apply(x_BTD: jax.Array, layer: tuple[Any, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
                params, window, rope = layer
                pick = lambda found, which, several: jax.tree.map(lambda x: x[which], found) if several else found
                angles, seen = pick(angles_R, rope, len(ropes) > 1), pick(seen_W, window, len(windows) > 1)
                return nnx.merge(graphdef, params)(x_BTD, angles, seen), None

            xs = (nnx.to_pure_dict(layers), jnp.array(window_L[:-1]), jnp.array(rope_L[:-1]))
            if scan:
                x_BTD = jax.lax.scan(apply, x_BTD, xs)[0]
            else:
                for index in range(self.config.layers - 1):
                    x_BTD, _ = apply(x_BTD, jax.tree.map(lambda leaf, index=index: leaf[index], xs))
        graphdef_last, last = nnx.split(self.last)
        of_last = angles_by_rope[rope_L[-1]], seen_by_window[window_L[-1]]
        apply_last = lambda params, x_BTD, at: nnx.merge(graphdef_last, params)(x_BTD, *of_last, at)
        apply_last = rematerialized(apply_last, remat=remat, prevent_cse=True)
        run_last = functools.partial(apply_last, nnx.to_pure_dict(last), x_BTD)
        if at is None:
            return run_last(None)
        unused, at = at < 0, jnp.maximum(at, 0)
        if not 0 < few < at.shape[1]:
            return run_last(at)
        padded = lambda x_BED: jnp.pad(x_BED, ((0, 0), (0, at.shape[1] - few), (0, 0)))
        return jax.lax.cond(unused[:, few:].all(), lambda at: padded(run_last(at[:, :few])), run_last, at)


def saved_names(remat: str) -> tuple[str, ...]:
    """The names that a remat policy saves, as they are in the layers; an unknown activation is a ValueError."""
    if remat in ("none", "full"):
        return ()
    names = [name.strip() for name in remat.split(",")]
    if unknown := [name for name in names if name not in SAVED]:
        raise ValueError(
            f"remat {remat!r} names {', '.join(map(repr, unknown))}; "
            f"expected 'none', 'full' or a comma separated list of {', '.join(SAVED)}"
        )
    return tuple(saved for name in names for saved in SAVED[name])


def rematerialized(function: Any, *, remat: str, prevent_cse: bool) -> Any:
    """Wraps a layer so that its backward recomputes what `remat` (see Decoder.__call__) does not save."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*saved_names(remat))
    return jax.checkpoint(function, policy=policy if remat != "full" else None, prevent_cse=prevent_cse)
