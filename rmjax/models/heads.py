"""What stands on the decoder: a score of some tokens, or a language model; parameters are a plain nested dict.

Shape letters: B rows, T tokens, E scored tokens in a row, A outputs, D width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rmjax.kernels.cross_entropy import cross_entropy
from rmjax.models import lora
from rmjax.models.config import ModelConfig
from rmjax.models.decoder import Decoder, Embed, normal
from rmjax.models.lora import Lora

Params = dict[str, Any]  # plain nested dict of arrays, or of jax.ShapeDtypeStruct
WHERE = ("tokens", "positions", "visible_from", "visible_until")  # what the decoder reads of a batch


class ScoreHead(nnx.Module):
    """hidden @ kernel without bias, float32 whatever the model's dtypes are.

    bfloat16 scores would be spaced 0.03 apart at 4 to 8, and tie.
    """

    def __init__(self, config: ModelConfig, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (config.width, outputs), config.init_std, jnp.float32)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        # HIGHEST: the default rounds float32 products to TF32 or bfloat16 on accelerators.
        return jnp.matmul(hidden.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class Scorer(nnx.Module):
    """Rows of trees in, scores of their scored tokens out."""

    def __init__(
        self, config: ModelConfig, outputs: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32, **options: Any
    ):
        self.decoder = Decoder(config, rngs=rngs, param_dtype=param_dtype, **options)
        self.score = ScoreHead(config, outputs, rngs=rngs)

    def __call__(
        self, batch: Mapping[str, jax.Array], *, few: int = 0, remat: str = "full", scan: bool = True
    ) -> jax.Array:
        """Scores a batch; `few`, `remat` and `scan` as in `Decoder.__call__`.

        Args:
            batch: int32 `tokens`, `positions`, `visible_from`, `visible_until` [B, T] and `end` [B, E], the
                index in the row of each scored token, -1 where there is none; other entries are not read.

        Returns:
            float32 [B, E, A]; 0 where `end` is -1, and no gradient from there.
        """
        x_BED = self.decoder(*(batch[name] for name in WHERE), at=batch["end"], few=few, remat=remat, scan=scan)
        return jnp.where(batch["end"][..., None] >= 0, self.score(self.decoder.norm(x_BED)), 0.0)


class LanguageModel(nnx.Module):
    """Rows of trees in, how likely their next tokens are out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32, **options: Any):
        self.decoder = Decoder(config, rngs=rngs, param_dtype=param_dtype, **options)
        self.lm_head = None if config.tied else Embed(config, rngs=rngs, dtype=param_dtype)

    def __call__(
        self, batch: Mapping[str, jax.Array], *, remat: str = "full", scan: bool = True
    ) -> dict[str, jax.Array]:
        """Compares each token's prediction with the token at the next index, its target in a tree (batches/trees.py).

        Args:
            batch: int32 `tokens`, `positions`, `visible_from`, `visible_until` [B, T], and `loss_weight` [B, T]: 0
                where nothing is asked for, so nothing is computed. The last token of a tree has no target of its own,
                so its weight must be 0.

        Returns:
            `nll`, `correct`: float32 [B, T], see `cross_entropy`.
        """
        x_BTD = self.decoder(*(batch[name] for name in WHERE), remat=remat, scan=scan)
        targets_BT = jnp.roll(batch["tokens"], -1, axis=1)
        table_VD = (self.lm_head or self.decoder.embed).embedding[...]
        config, hidden_BTD = self.decoder.config, self.decoder.norm(x_BTD)
        nll_BT, correct_BT = cross_entropy(
            *(scaled(hidden_BTD, config), table_VD, targets_BT, batch["loss_weight"]), softcap=config.logit_softcap
        )
        return {"nll": nll_BT, "correct": correct_BT}


def scaled(hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """Normed hidden states whose products with the output embedding are a language model's logits."""
    return hidden if config.output_scale == 1 else hidden * config.output_scale


def inference_outputs(model: Scorer | LanguageModel, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The outputs that matter outside of training: float32 [B, E, A], the scores of the scored tokens.

    Of a language model it is the negative log-likelihood of the token after each, [B, T]; 0 where a sequence ends.
    """
    if isinstance(model, Scorer):
        # A batch has room for a scored token in every two (engine.py), of which most use few.
        return model(batch, few=batch["end"].shape[1] // 8, remat="none")
    last = jnp.arange(batch["tokens"].shape[1]) + 1 >= batch["visible_until"]  # what stands next is no successor
    return model({**batch, "loss_weight": jnp.where(last, 0.0, 1.0)}, remat="none")["nll"]


def compute_dtype(dtype: str, platform: str = "") -> str:
    """What `auto` stands for on this platform, or here: float32 on CPUs and bfloat16 elsewhere."""
    automatic = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return automatic if dtype == "auto" else dtype


def make(config: ModelConfig, outputs: int, architecture: str, **options: Any) -> Scorer | LanguageModel:
    """A new Scorer or LanguageModel; the architecture is named as in transformers."""
    if architecture == "CausalLM":
        return LanguageModel(config, **options)
    if architecture in ("SequenceClassification", "TokenClassification"):
        return Scorer(config, outputs, **options)
    raise ValueError(f"architecture {architecture!r} is none of SequenceClassification, TokenClassification, CausalLM")


def abstract(
    config: ModelConfig,
    outputs: int,
    param_dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike = jnp.float32,
    architecture: str = "SequenceClassification",
    attention: str = "xla",
    adapters: Lora | None = None,
) -> tuple[Any, Params]:
    """The graphdef for `merge` and the parameters as a nested dict of jax.ShapeDtypeStruct; nothing is allocated."""
    dtypes = {"param_dtype": param_dtype, "compute_dtype": compute_dtype}

    def build() -> Scorer | LanguageModel:
        model = make(config, outputs, architecture, rngs=nnx.Rngs(0), attention=attention, **dtypes)
        return lora.adapt(model, adapters) if adapters else model

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, nnx.to_pure_dict(state)


def init(
    config: ModelConfig,
    outputs: int,
    param_dtype: DTypeLike = jnp.float32,
    *,
    seed: int = 0,
    architecture: str = "SequenceClassification",
) -> Params:
    """New parameters; call it under `jax.jit(..., out_shardings=...)` so that none is ever unsharded."""
    model = make(config, outputs, architecture, rngs=nnx.Rngs(seed), param_dtype=param_dtype)
    return nnx.to_pure_dict(nnx.split(model)[1])


def merge(graphdef: Any, params: Params) -> Any:
    """The Scorer or LanguageModel with these parameters; cheap, to be called inside differentiated functions."""
    return nnx.merge(graphdef, params)
