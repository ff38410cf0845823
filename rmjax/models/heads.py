"""The scorer: a decoder and a linear head on the scored tokens, and its parameters as a plain nested dict.

Shape letters: B rows, T tokens, E scored tokens in a row, A attributes, D width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rmjax.models.config import ModelConfig
from rmjax.models.decoder import Decoder, normal

Params = dict[str, Any]  # plain nested dict of arrays, or of jax.ShapeDtypeStruct


class ScoreHead(nnx.Module):
    """hidden @ kernel without bias, float32 whatever the model's dtypes are.

    bfloat16 scores would be spaced 0.03 apart at 4 to 8, and tie.
    """

    def __init__(self, config: ModelConfig, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (config.width, outputs), config.init_std, jnp.float32)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., D] of any dtype to float32 [..., A]."""
        # HIGHEST: the default rounds float32 products to TF32 or bfloat16 on accelerators.
        return jnp.matmul(hidden.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class Scorer(nnx.Module):
    """Rows of trees in, scores of their scored tokens out.

    Attributes:
        decoder: Decoder.
        score: ScoreHead.
    """

    def __init__(
        self,
        config: ModelConfig,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        compute_dtype: DTypeLike = jnp.float32,
    ):
        self.decoder = Decoder(config, rngs=rngs, param_dtype=param_dtype, compute_dtype=compute_dtype)
        self.score = ScoreHead(config, outputs, rngs=rngs)

    def __call__(self, batch: Mapping[str, jax.Array], *, remat: str = "full", scan: bool = True) -> jax.Array:
        """Scores a batch.

        Args:
            batch: int32 `tokens`, `positions`, `visible_from`, `visible_until` [B, T] and `end` [B, E], the
                index in the row of each scored token, -1 where there is none; other entries are not read.
            remat: see Decoder.__call__.
            scan: see Decoder.__call__.

        Returns:
            float32 [B, E, A]; 0 where `end` is -1, and no gradient from there.
        """
        where = (batch[name] for name in ("tokens", "positions", "visible_from", "visible_until"))
        x_BTD = self.decoder(*where, remat=remat, scan=scan)
        end_BE1 = batch["end"][..., None]
        # The final norm sees only the tokens that are scored.
        x_BED = jnp.take_along_axis(x_BTD, jnp.maximum(end_BE1, 0), axis=1)
        return jnp.where(end_BE1 >= 0, self.score(self.decoder.norm(x_BED)), 0.0)


def compute_dtype(dtype: str) -> str:
    """What `auto` stands for here: float32 on CPUs and bfloat16 elsewhere."""
    automatic = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return automatic if dtype == "auto" else dtype


def abstract(
    config: ModelConfig,
    outputs: int,
    param_dtype: DTypeLike = jnp.float32,
    compute_dtype: DTypeLike = jnp.float32,
) -> tuple[Any, Params]:
    """The scorer's structure and the shapes of its parameters, nothing allocated.

    Returns:
        The graphdef for `merge`, and a nested dict of jax.ShapeDtypeStruct.
    """
    build = lambda: Scorer(config, outputs, rngs=nnx.Rngs(0), param_dtype=param_dtype, compute_dtype=compute_dtype)
    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, nnx.to_pure_dict(state)


def init(config: ModelConfig, outputs: int, param_dtype: DTypeLike = jnp.float32, *, seed: int = 0) -> Params:
    """New parameters; call it under `jax.jit(..., out_shardings=...)` so that none is ever unsharded."""
    scorer = Scorer(config, outputs, rngs=nnx.Rngs(seed), param_dtype=param_dtype)
    return nnx.to_pure_dict(nnx.split(scorer)[1])


def merge(graphdef: Any, params: Params) -> Scorer:
    """The scorer with these parameters; cheap, to be called inside the function that is differentiated."""
    return nnx.merge(graphdef, params)
