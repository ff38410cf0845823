"""Group relative policy optimization: a judge writes several answers to a question, and learns from the better ones.

    loss = - sum over drawn tokens t of (up_t min(r_t, 1 + high) + down_t max(r_t, 1 - low)) / samples
    r_t  = p(t | tokens before) / p_old(t | tokens before)

`up_t` and `down_t` are the sums of the positive and of the negative advantages of all samples that draw t there:
samples of one question are a tree (batches/actions.py), and what several begin with is computed once. That is exact:
the clipped objective of a token with advantage a is a min(r, 1 + high) for a > 0 and a max(r, 1 - low) for a < 0, so it
depends on the advantages by these two sums alone. The advantage of a sample is its reward less the mean reward of the
*other* samples of its question.

Sources: the group as baseline Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300; the mean of the others Kool et al.
2019 (RLOO) and Ahmadian et al. 2024, arXiv:2402.14740; neither a division by the deviation nor by the length Liu et al.
2025 (Dr. GRPO), arXiv:2503.20783; the clip Schulman et al. 2017 (PPO), arXiv:1707.06347, with two ends Yu et al. 2025
(DAPO), arXiv:2503.14476; the divergence of each token's distribution, given those before it, by the estimate whose
gradient is right arXiv:2510.01555.

Shape letters: B rows, T tokens, G groups in a row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.batches.tasks import Axes
from rmjax.judging import rewards
from rmjax.judging.asked import Questions
from rmjax.objectives.base import Batch, Objective, Outcomes, Params
from rmjax.objectives.sft import SFT


@dataclasses.dataclass(frozen=True)
class GRPO(Objective):
    """The objective; every field is a key of `config.objective` with the same name."""

    target: str = "pair"  # what is judged: "pair" or "score"
    template: str = ""  # Jinja2 file with the judging question, or its text; see judging/verdicts.load_template
    attributes: tuple[str, ...] = ()  # of "score": the one that is rated; () is the only one that a record has
    scale: tuple[float, float] = (1.0, 5.0)  # of "score"
    ties: bool = True  # of "pair": whether a verdict may be "tie"
    both_orders: bool = True  # of "pair": both orders are one group of samples
    reward: str = ""  # a name in judging/rewards.py; "" is "better" of pairs, "closeness" of scores
    unreadable: float = 0.0  # reward of an answer without a verdict
    baseline: str = "others"  # the mean reward of the "others", or of the whole "group"
    per: str = "sample"  # the loss is divided by the number of samples, or of tokens ("token")
    clip: tuple[float, float] = (0.2, 0.28)  # how far a ratio may fall below 1, and rise above it
    kl: float = 0.0  # weight of the divergence from the model that the run started with
    updates: int = 1  # optimizer steps on the samples of a step

    architecture = "CausalLM"
    shown = ("reward_mean", "accuracy", "unreadable")
    draws = True

    def __post_init__(self) -> None:
        self._require("target", self.target in ("pair", "score"), "is none of pair, score")
        self._require("baseline", self.baseline in ("others", "group"), "is none of others, group")
        self._require("per", self.per in ("sample", "token"), "is none of sample, token")
        self._require("attributes", len(self.attributes) <= 1, "must be one name, or none")
        self._require("kl", self.kl >= 0, "must not be negative")
        self._require("updates", self.updates >= 1, "must be at least 1")
        low_and_high = len(self.clip) == 2 and 0 < self.clip[0] <= 1 and self.clip[1] > 0
        self._require("clip", low_and_high, "must be two numbers above 0, the first at most 1")
        object.__setattr__(self, "template", self.exported.template)  # its text, with which the run is exported

    @property
    def exported(self) -> SFT:
        """A judge that writes, as `sft` leaves one."""
        keys = ("target", "template", "attributes", "scale", "ties")
        return SFT(**{key: getattr(self, key) for key in keys}, both_orders=self.both_orders and self.target == "pair")

    @property
    def labels(self) -> tuple[str, ...]:
        return ()

    @property
    def decoding(self) -> str:
        return self.exported.decoding

    @property
    def task(self) -> Questions:
        """ValueError where there is no such reward: what a run has trained is opened without the reward of its own."""
        return Questions(self.exported.task, rewards.columns_of(self.reward, self.target))

    @property
    def fields(self) -> Mapping[str, Axes]:
        """What stands beside the trees of a step's samples.

        loss_weight: how many samples draw the next token, 0 where none does.
        up, down: the sums of their positive and of their negative advantages.
        old: the log-probability with which it was drawn, in nats; NaN where it is not known.
        reference: the log-probability by the model that the run started with, with `kl`.
        drawn: what the group adds to what the loss is divided by.
        """
        tokens = ("loss_weight", "up", "down", "old", *(["reference"] if self.kl else []))
        return {**dict.fromkeys(tokens, ("T",)), "drawn": ("G", 1)}

    def loss_sums(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss as numerator and denominator.

        Args:
            outputs: `nll` float32 [B, T] of the next token; read where `loss_weight` is not 0.
            batch: see `fields`.
        """
        log_prob, apart = self._apart(outputs, batch)
        ratio, (low, high) = jnp.exp(apart), self.clip
        gain = batch["up"] * jnp.minimum(ratio, 1 + high) + batch["down"] * jnp.maximum(ratio, 1 - low)
        loss = -jnp.where(batch["loss_weight"] > 0, gain, 0.0).sum()
        if self.kl:
            moved = jnp.where(batch["loss_weight"] > 0, log_prob - batch["reference"], 0.0)
            loss += self.kl * (batch["loss_weight"] * 0.5 * moved**2).sum()
        return loss, batch["drawn"].sum()

    def outcomes(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> Outcomes:
        """Of each row [B], over its drawn tokens: `tokens`, how many; `mismatch`, exp(d) - 1 - d for
        d = log r, an estimate of the divergence of the sampler (Schulman 2020) that is never negative; `clipped`, how
        many have no gradient; `ratio`, the largest r or 1 / r."""
        weight = batch["loss_weight"]
        _, d = self._apart(outputs, batch)
        ratio, (low, high) = jnp.exp(d), self.clip
        clipped = jnp.where(ratio > 1 + high, batch["up"] > 0, (ratio < 1 - low) & (batch["down"] < 0))
        of_rows = {
            "tokens": weight,
            "mismatch": weight * (jnp.expm1(d) - d),
            "clipped": weight * clipped,
        }
        return {**{name: x.sum(1) for name, x in of_rows.items()}, "ratio": jnp.exp(jnp.abs(d)).max(1)}

    def _apart(self, outputs: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Log-probability of the next token, and log r; 0 where nothing is drawn, or the sampler's is not known."""
        if (shape := outputs["nll"].shape) != batch["old"].shape:
            raise ValueError(f"nll is {shape} and old {batch['old'].shape}: not both [B, T]")
        log_prob, drawn = -outputs["nll"], batch["loss_weight"] > 0
        old = jnp.where(jnp.isnan(batch["old"]), jax.lax.stop_gradient(log_prob), batch["old"])
        return log_prob, jnp.where(drawn, log_prob - old, 0.0)


def advantages(rewards_of: np.ndarray, baseline: str) -> np.ndarray:
    """float64 [n]: rewards less what was to be expected of a question's samples; 0 for those with a reward of NaN.

    Args:
        rewards_of: float [n], NaN for samples that do not count.
        baseline: "others", the mean reward of the other samples that count, or "group", that of all.
    """
    counts = ~np.isnan(rewards_of)
    n = int(counts.sum())
    if n < 2:
        return np.zeros(len(rewards_of))
    above = np.where(counts, rewards_of - np.nanmean(rewards_of), 0.0)
    if np.ptp(rewards_of[counts]) == 0:  # exactly, so that no rounding teaches anything
        return np.zeros(len(rewards_of))
    return above * n / (n - 1) if baseline == "others" else above
