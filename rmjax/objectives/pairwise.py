"""Pairwise judging: the model reads both responses in one context and decides A, B or tie.

    loss = - sum over c of q_c * log softmax(z)_c

for each of the two orders in which a pair is shown: softmax cross-entropy with (soft) labels q.

Sources: reading both responses at once Jiang et al. 2023 (PairRM), arXiv:2306.02561; A, B and tie, and swapped orders,
Wang et al. 2023 (PandaLM), arXiv:2306.05087; order consistency Zheng et al. 2023, arXiv:2306.05685; the strength of
preference as weight, there of Bradley-Terry, Wang et al. 2024 (HelpSteer2-Preference), arXiv:2410.01257; label
smoothing Szegedy et al. 2015, arXiv:1512.00567, section 7. The map from strength to soft label is ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.judging.verdicts import SWAPPED, VERDICTS, Judgements, load_template
from rmjax.objectives.base import Batch, Objective, Outcomes, Params
from rmjax.objectives.gather import gather_groups
from rmjax.statistics import softmax


def average_orders(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Averages the probabilities of A, B (and tie) [..., C] of a pair in its two orders, in the first order's names."""
    if first.shape != second.shape or first.shape[-1] not in (2, 3):
        raise ValueError(f"probabilities {first.shape} and {second.shape}: expected twice [..., 2] or [..., 3]")
    return (first + second[..., list(SWAPPED[: first.shape[-1]])]) / 2


@dataclasses.dataclass(frozen=True)
class Pairwise(Objective):
    """The objective; every field is a key of `config.objective` with the same name."""

    classes: int = 3  # 3 (A, B, tie) or 2 (A, B)
    # Jinja2 file that states the judging question (judging/verdicts.py), or its text; "" is the packaged
    template: str = ""
    # With 2 classes, "skip" pairs judged equal (counted), or train them as "half" a verdict each way
    ties: str = "skip"
    # What the strength of a preference does: "none"; "weight" multiplies the pair's weight in the loss; "soft" makes
    # the label soft: a strength s is the log-odds of the label, which keeps sigmoid(s), and the rest goes to the
    # verdict beside it: tie with 3 classes, the other response with 2. Where no strength is known, and for ties, the
    # weight and the label stay as they are.
    strength: str = "none"
    # Strengths are multiplied by it first. At 1, HelpSteer3's 1, 2 and 3 keep 0.73, 0.88, 0.95.
    strength_scale: float = 1.0
    label_smoothing: float = 0.0  # share of each label that is spread evenly over all classes

    decoding = (
        "softmax over the labels; ask with the template in both orders, exchange A and B in the second, and average"
    )
    problem_type = "single_label_classification"
    shown = ("loss", "accuracy", "accuracy_averaged", "consistency")

    def __post_init__(self) -> None:
        self._require("classes", self.classes in (2, 3), "is none of 2 (A, B) and 3 (A, B, tie)")
        self._require("ties", self.ties in ("skip", "half"), "is none of skip, half")
        self._require("strength", self.strength in ("none", "weight", "soft"), "is none of none, weight, soft")
        self._require("strength_scale", self.strength_scale > 0, "must be above 0")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "must be in [0, 1)")
        try:  # once, so that a run is exported with the template it was trained with
            object.__setattr__(self, "template", load_template(self.template, "pairwise"))
        except (ValueError, OSError) as error:
            raise ValueError(f"config.objective.template: {error}") from None

    @property
    def labels(self) -> tuple[str, ...]:
        return VERDICTS[: self.classes]

    @property
    def task(self) -> Judgements:
        return Judgements(self.template, self.classes, self.ties)

    def loss_sums(self, outputs: jax.Array, batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss as numerator and denominator, which is the weight of both orders of all pairs.

        Args:
            outputs: float32 [B, E, C].
            batch: `end_group`, `end_slot` [B, E], `weight` [B, G], `verdict` [B, G, 2, C], `strength` [B, G, 1].
        """
        logp_BGKC = self._log_probabilities(outputs, batch)
        q_BGKC, weight_BG = self._targets(batch["verdict"], batch["strength"], batch["weight"])
        return (weight_BG * -(q_BGKC * logp_BGKC).sum((-1, -2))).sum(), 2 * weight_BG.sum()

    def outcomes(self, outputs: jax.Array, batch: Batch, params: Params) -> Outcomes:
        """`probabilities` of the verdicts and the labels `verdict`, both [B, G, 2, C], and `weight` [B, G]."""
        probabilities = jnp.exp(self._log_probabilities(outputs, batch))
        return {"probabilities": probabilities, "verdict": batch["verdict"], "weight": batch["weight"]}

    def _log_probabilities(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """[B, G, 2, C]: of the verdicts on both orders of each pair."""
        verdict, strength = batch["verdict"], batch["strength"]
        b, g, k, c = verdict.shape
        if (k, c) != (2, self.classes) or outputs.shape[-1] != c or strength.shape != (b, g, 1):
            raise ValueError(
                f"outputs {outputs.shape}, verdict {verdict.shape}, strength {strength.shape}: "
                f"not [B,E,{self.classes}], [B,G,2,{self.classes}] and [B,G,1]"
            )
        gather = lambda one: gather_groups(one, batch["end_group"], batch["end_slot"], (g, k))
        return jax.nn.log_softmax(jax.vmap(gather, -1, -1)(outputs))

    def _targets(self, verdict: jax.Array, strength: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Labels q [B, G, 2, C] and weights [B, G] of the loss."""
        s_BG1 = self.strength_scale * strength
        unknown = jnp.isnan(strength)
        if self.strength == "weight":
            weight = weight * jnp.where(unknown, 1.0, s_BG1)[..., 0]
        if self.strength == "soft":
            keep = jnp.where(unknown, 1.0, jax.nn.sigmoid(s_BG1))[..., None]
            beside = verdict[..., [1, 0]]
            if self.classes == 3:
                beside = jnp.zeros_like(verdict).at[..., 2].set(1.0)
            verdict = keep * verdict + (1 - keep) * beside
        return (1 - self.label_smoothing) * verdict + self.label_smoothing / self.classes, weight

    def decode(self, outputs: np.ndarray, params: Params) -> dict[str, np.ndarray]:
        """Probabilities of the verdicts of single orders; `average_orders` joins two."""
        p = softmax(outputs).astype(np.float32)
        return {name: p[:, c] for c, name in enumerate(self.labels)}
