"""Bradley-Terry: the difference of two rewards is the log-odds that the first is preferred.

    loss(i beats j) = softplus(-(s_i - s_j - margin_ij))

Sources: Bradley and Terry 1952; as a reward-model loss Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margins Touvron
et al. 2023, arXiv:2307.09288, eq. 2; centring Eisenstein et al. 2023, arXiv:2312.09244; label smoothing as in cDPO,
Mitchell 2023.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.data.tasks import Preferences
from rmjax.objectives.base import Batch, Objective, Params
from rmjax.objectives.sums import Sums, fraction, ratios


def gather_groups(scores_BE: jax.Array, end_group: jax.Array, end_slot: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Puts flat scores where their group and response are.

    Args:
        scores_BE: float32 [B, E] scores of the scored tokens.
        end_group: int32 [B, E] group of each; -1 absent.
        end_slot: int32 [B, E] response of each; -1 absent.
        shape: (G, K).

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


@dataclasses.dataclass(frozen=True)
class BradleyTerry(Objective):
    """The objective; every field is a key of `config.objective` with the same name.

    Attributes:
        label_smoothing: probability that a label is the wrong way round.
        margin_scale: the reward difference is asked to exceed margin_scale * margin.
        center: weight of (s_i + s_j)^2 over the preferred pairs, which keeps rewards near zero.
        ties: "skip" pairs judged equal, or train them as "half" a win each way.
    """

    label_smoothing: float = 0.0
    margin_scale: float = 0.0
    center: float = 0.0
    ties: str = "skip"

    def __post_init__(self) -> None:
        if self.ties not in ("skip", "half"):
            raise ValueError(f"config.objective.ties={self.ties!r} is none of skip, half")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"config.objective.label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        for name in ("margin_scale", "center"):
            if getattr(self, name) < 0:
                raise ValueError(f"config.objective.{name}={getattr(self, name)} must not be negative")

    @property
    def task(self) -> Preferences:
        """Preferences; groups without a winner only if ties are trained on."""
        return Preferences("skip" if self.ties == "skip" else "keep")

    def sums(self, scores_BEA: jax.Array, batch: Batch, params: Params) -> Sums:
        """Loss and metrics of a batch as sums over its preferred pairs.

        Args:
            scores_BEA: float32 [B, E, 1].
            batch: `end_group`, `end_slot` [B, E], `weight` [B, G], `wins`, `ties`, `margin` [B, G, K, K].
            params: none.

        Returns:
            loss, accuracy (equal rewards count half), tie_rate, margin, rewards of the chosen and the rejected, the
            number of pairs, and over all responses the rewards' mean, square, maximum and minimum. The denominator of
            the loss and of every pair metric is the summed weight of the pairs.
        """
        wins, weight = batch["wins"], batch["weight"]
        b, g, k, k2 = wins.shape
        if k != k2 or weight.shape != (b, g) or batch["margin"].shape != wins.shape:
            raise ValueError(f"wins {wins.shape}, weight {weight.shape}, margin {batch['margin'].shape}: not [B,G,K,K]")
        if self.ties == "half":
            wins = wins + 0.5 * batch["ties"]
        s_BGK = gather_groups(scores_BEA[..., 0], batch["end_group"], batch["end_slot"], (g, k))
        difference = s_BGK[..., :, None] - s_BGK[..., None, :]  # [B, G, K, K]: i - j
        asked = difference - self.margin_scale * batch["margin"]
        smooth = self.label_smoothing
        loss = (1 - smooth) * jax.nn.softplus(-asked) + smooth * jax.nn.softplus(asked)
        if self.center:
            loss = loss + self.center * (s_BGK[..., :, None] + s_BGK[..., None, :]) ** 2
        pairs = wins * weight[..., None, None]
        # Metrics ask who is preferred, so a soft label counts once, for its likelier side.
        decided = jnp.where(wins > jnp.swapaxes(wins, -1, -2), weight[..., None, None], 0.0)
        correct = jnp.where(difference > 0, 1.0, jnp.where(difference == 0, 0.5, 0.0))
        n = decided.sum()
        return {
            "loss": fraction((pairs * loss).sum(), pairs.sum()),
            "accuracy": fraction((decided * correct).sum(), n),
            "tie_rate": fraction((decided * (difference == 0)).sum(), n),
            "margin": fraction((decided * difference).sum(), n),
            "chosen": fraction((decided * s_BGK[..., :, None]).sum(), n),
            "rejected": fraction((decided * s_BGK[..., None, :]).sum(), n),
            "pairs_count": fraction((decided > 0).sum()),
            **reward_sums(scores_BEA[..., 0], batch["end"]),
        }

    def summary(
        self, sums: Mapping[str, np.ndarray], outcomes: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, float]:
        """Metrics of host sums: the ratios, with the rewards' standard deviation and the number of pairs."""
        values = ratios(sums)
        square, mean = values.pop("reward_square", None), values.get("reward_mean")
        if square is not None and mean is not None:
            values["reward_std"] = max(square - mean**2, 0.0) ** 0.5
        values["pairs"] = values.pop("pairs_count")
        return values


def reward_sums(scores_BE: jax.Array, end_BE: jax.Array) -> Sums:
    """Mean, square, minimum and maximum of the rewards of all responses, as sums."""
    here = end_BE >= 0
    n = here.sum()
    of = lambda x: fraction(jnp.where(here, x, 0.0).sum(), n)
    most = jnp.where(here, scores_BE, -jnp.inf).max()
    least = jnp.where(here, scores_BE, jnp.inf).min()
    extremes = {"reward_max": fraction(most, most), "reward_min": fraction(least, least)}
    return {"reward_mean": of(scores_BE), "reward_square": of(scores_BE**2), **extremes}
