"""A language model that writes: prompts become keys and values, and each slot one more token.

Layers are apart here, not stacked: a step reads every weight once, and a slice of a stack would be copied first.

Shape letters: P prompts, K slots of a prompt, S = P * K slots, T tokens of a prompt, C tokens of a slot, D width, M
key/value heads, H head width, L layers, V vocabulary, E tokens that a slot writes between two calls of `merged`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rmjax.kernels.cross_entropy import soft_capped
from rmjax.kernels.decode import decode_attention
from rmjax.kernels.tree_attention import block_of
from rmjax.kernels.visible import NO_WINDOW, visible
from rmjax.models import heads
from rmjax.models.config import ModelConfig
from rmjax.models.decoder import Embed, Layer, RMSNorm
from rmjax.models.heads import Params
from rmjax.models.rope import rope_angles

KeysValues = tuple[jax.Array, jax.Array]


def layers_apart(params: Params, layers: int) -> Params:
    """The parameters of a language model with a list of its L layers, `decoder/each`, in place of the stack."""
    decoder = dict(params["decoder"])
    stack, last = decoder.pop("layers", None), decoder.pop("last")
    each = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(layers - 1)]
    return {**params, "decoder": {**decoder, "each": [*each, last]}}


@dataclasses.dataclass(frozen=True)
class Writer:
    """What a language model computes to write, as functions of its parameters (`layers_apart`).

    Attributes:
        dtype: of the computation.
        attention: the form of `tree_attention`, for prompts.
    """

    config: ModelConfig
    dtype: str
    attention: str = "xla"

    @functools.cached_property
    def _graphs(self) -> tuple[Any, Any, Any]:
        """Of the embedding, a layer and the last norm."""
        c, dtype = self.config, self.dtype
        makes = (
            lambda: Embed(c, rngs=nnx.Rngs(0), dtype=dtype),
            lambda: Layer(c, rngs=nnx.Rngs(0), dtype=dtype, attention=self.attention),
            lambda: RMSNorm((c.width,), c, dtype=dtype),
        )
        embed, layer, norm = (nnx.split(nnx.eval_shape(make))[0] for make in makes)
        return embed, layer, norm

    def _angles(self, positions: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """The rotary embedding's angles for each layer."""
        c = self.config
        angles = {rope: rope_angles(rope, c.head_dim, positions) for rope in set(c.ropes)}
        return [angles[rope] for rope in c.ropes]

    def read_prompts(self, params: Params, tokens: jax.Array, lengths: jax.Array) -> list[KeysValues]:
        """Keys and values [P, M, T, H] of each layer; what stands after the lengths [P] of tokens [P, T] is no token's.

        No logits are computed: the last token of a prompt is for `step`.
        """
        embed, graph, _ = self._graphs
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        inside = index < lengths[:, None]
        positions = jnp.where(inside, index, 0)
        first, until = jnp.where(inside, 0, index), jnp.where(inside, lengths[:, None], index + 1)
        block = block_of(self.attention, tokens.shape[1], self.config.head_dim)
        seen = {
            window: visible(first, until, positions, NO_WINDOW if window is None else window, block=block)
            for window in set(self.config.windows)
        }
        angles = self._angles(positions)
        x_PTD = nnx.merge(embed, params["decoder"]["embed"]).begin(tokens, self.dtype)
        found = []
        for each, window, rotated in zip(params["decoder"]["each"], self.config.windows, angles):
            layer = nnx.merge(graph, each)
            q, k, v = layer.project(x_PTD, rotated)
            found.append((jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)))
            if len(found) < self.config.layers:  # of the last layer nobody reads more
                x_PTD = layer.finish(x_PTD, layer.attend(q, k, v, seen[window], None))
        return found

    def step(
        self,
        params: Params,
        tokens: jax.Array,
        prompt: Sequence[KeysValues],
        prompt_keys: jax.Array,
        own: Sequence[KeysValues],
        own_keys: jax.Array,
        new: Sequence[KeysValues],
        new_keys: jax.Array,
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Reads one token of each slot.

        What is new has arrays of its own, so that a step writes at one place of small ones: XLA keeps large ones that
        are written at a place for each slot in another order, and copies all of them first.

        Args:
            params: see `layers_apart`.
            tokens: int32 [S].
            prompt: keys and values [P, M, T, H] of each layer.
            prompt_keys: int32 [P], how many of them are there.
            own: keys and values [S, M, C, H] of each layer.
            own_keys: int32 [S] in [0, C], how many of them are there.
            new: keys and values [S, M, E, H] of each layer, of the tokens after those.
            new_keys: int32 in [0, E), how many of them are there.

        Returns:
            float32 [S, V], logits of the next token; and `new` with those of this one.
        """
        embed, graph, norm = self._graphs
        slots = len(tokens)
        positions = jnp.repeat(prompt_keys, slots // len(prompt_keys)) + own_keys + new_keys
        angles = self._angles(positions[:, None])
        x_S1D = nnx.merge(embed, params["decoder"]["embed"]).begin(tokens[:, None], self.dtype)
        grown = []
        put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, jnp.moveaxis(y, 1, 2), new_keys, axis=2)
        layers = zip(params["decoder"]["each"], self.config.windows, angles, prompt, own, new)
        for each, window, rotated, of_prompt, of_own, (keys, values) in layers:
            layer = nnx.merge(graph, each)
            q, k, v = layer.project(x_S1D, rotated)
            grown.append((put(keys, k), put(values, v)))
            parts = of_prompt, prompt_keys, of_own, own_keys, grown[-1], new_keys + 1
            attended = decode_attention(q[:, 0], *parts, window=window, softcap=self.config.softcap)
            x_S1D = layer.finish(x_S1D, attended.reshape(slots, 1, -1))
        hidden_SD = heads.scaled(nnx.merge(norm, params["decoder"]["norm"])(x_S1D[:, 0]), self.config)
        table_VD = params.get("lm_head", params["decoder"]["embed"])["embedding"]
        logits = jnp.einsum("sd,vd->sv", hidden_SD, table_VD.astype(self.dtype), preferred_element_type=jnp.float32)
        return soft_capped(logits, self.config.logit_softcap), grown


def merged(own: Sequence[KeysValues], own_keys: jax.Array, new: Sequence[KeysValues]) -> list[KeysValues]:
    """`own` [S, M, C, H] of each layer with `new` [S, M, E, H] behind the `own_keys` [S]; beyond C they are dropped."""
    slots, length = new[0][0].shape[0], new[0][0].shape[2]
    where = jnp.arange(slots)[:, None], slice(None), own_keys[:, None] + jnp.arange(length)
    put = lambda x, y: x.at[where].set(jnp.moveaxis(y, 1, 2), mode="drop")
    return jax.tree.map(put, list(own), list(new))
