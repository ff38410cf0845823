"""A reward model in the form that tunix's RL trainers take: an nnx module which scores every token.

    from rmjax import RewardModel
    from rmjax.inference.tunix import TunixReward

    reward = TunixReward(RewardModel.load("runs/tiny/export"))
    rl_cluster_lib.RLCluster(actor=..., reward=reward, ...)

tunix reads the score of one token, the last of the completion. That of a whole rendering is the reward, so the policy's
template must be the reward model's, and a completion must end as renderings do (`Frame` in rmjax/batches/frame.py).

Nothing of tunix is imported. The call is that of google-tunix 0.1.7 (tunix/rl/common.py: compute_score).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from rmjax.inference.reward_model import RewardModel
from rmjax.kernels.tree_attention import choose
from rmjax.models import heads


class TunixReward(nnx.Module):
    """Scores of tokens, with the parameters of a reward model, which it shares.

    Raises:
        ValueError: the model has another number of outputs than the one reward.
    """

    def __init__(self, model: RewardModel):
        if model.architecture != "SequenceClassification" or len(model.labels) != 1:
            raise ValueError(
                f"the model is a {model.architecture} with the outputs {', '.join(model.labels) or 'none'}; tunix "
                "takes one reward, as bradley_terry with one head exports it"
            )
        of = model.inference
        form, _ = choose("auto", model.mesh.devices.flat[0].platform, model.config.head_dim, model.dtype)
        graph, _ = heads.abstract(model.config, 1, model.dtype, model.dtype, attention=form, adapters=of.adapters)
        self.scorer = heads.merge(graph, model.params)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Scores tokens.

        Args:
            tokens: int32 [B, T], a prompt padded on the left, then its completion padded on the right.
            positions: int32 [B, T], from 0 at the first token that is no padding.
            cache: none is kept.
            attention_mask: bool [B, T, T], query by key: causal, without padding.
            segment_ids: int32 [B, T], 0 at padding; equal numbers in a row are one sequence, of which a row may have
                several. It counts where both are given; without either there is no padding.

        Returns:
            float32 [B, T, 1], and no cache. At padding the scores mean nothing.
        """
        del cache
        place_T = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        segment_BT = jnp.ones(tokens.shape, jnp.int32)
        if segment_ids is not None:
            segment_BT = segment_ids.astype(jnp.int32)
        elif attention_mask is not None:
            segment_BT = jnp.diagonal(attention_mask, axis1=-2, axis2=-1).astype(jnp.int32)
        begins_BT = jnp.diff(segment_BT, axis=1, prepend=-1) != 0  # a segment, or padding between two
        first_BT = jax.lax.cummax(jnp.where(begins_BT, place_T, 0), axis=1)
        ends_BT = jnp.diff(segment_BT, axis=1, append=-1) != 0
        until_BT = jax.lax.cummin(jnp.where(ends_BT, place_T + 1, tokens.shape[1]), axis=1, reverse=True)
        batch = {
            "tokens": tokens.astype(jnp.int32),
            "positions": positions.astype(jnp.int32),
            # Padding sees only itself, and nothing sees it.
            "visible_from": jnp.where(segment_BT > 0, first_BT, place_T),
            "visible_until": jnp.where(segment_BT > 0, until_BT, place_T + 1),
            "end": jnp.broadcast_to(place_T, tokens.shape),
        }
        return self.scorer(batch, remat="none"), None
