"""Process rewards: whether each step of a solution is right, at the step's last token.

    loss = - y log p - (1 - y) log(1 - p),   p = softmax(outputs)[correct]

y is the label of the step, from 0 (wrong) to 1 (right); between them it is soft, the share of continuations from there
that reach the right answer for example.

Sources: Lightman et al. 2023, arXiv:2305.20050; soft labels Wang et al. 2023 (Math-Shepherd), arXiv:2312.08935, eq. 3;
first errors Zheng et al. 2024 (ProcessBench), arXiv:2412.06559. Two classes for each token are how TRL trains and
transformers' TokenClassification serves it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.batches.tasks import Steps
from rmjax.objectives.base import Batch, Objective, Outcomes, Params
from rmjax.objectives.gather import at_ends


@dataclasses.dataclass(frozen=True)
class ProcessReward(Objective):
    """The objective; it has no keys of its own in `config.objective`."""

    architecture, problem_type = "TokenClassification", "single_label_classification"
    labels = ("incorrect", "correct")
    decoding = "softmax over the labels; the score of a step is the probability of `correct`"
    shown = ("loss", "accuracy", "first_error_accuracy")

    @property
    def task(self) -> Steps:
        return Steps()

    def loss_sums(self, outputs_BE2: jax.Array, batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss as numerator and denominator, which is the weight of the judged steps.

        Args:
            outputs_BE2: float32 [B, E, 2].
            batch: `end`, `end_group`, `end_slot` [B, E], those of a response side by side and in order; `weight`
                [B, G]; `value`, `mask` [B, E, 1].
        """
        label, weight = _labels(outputs_BE2, batch)
        log_p = jax.nn.log_softmax(outputs_BE2)
        return (weight * (-(1 - label) * log_p[..., 0] - label * log_p[..., 1])).sum(), weight.sum()

    def outcomes(self, outputs_BE2: jax.Array, batch: Batch, params: Params) -> Outcomes:
        """Of each step, [B, E]: `p`, `label`, `weight` (0 where it was not judged), `present`, and whether it `starts`
        a response."""
        label, weight = _labels(outputs_BE2, batch)
        group, slot = batch["end_group"], batch["end_slot"]
        starts = (jnp.diff(group, axis=1, prepend=-2) != 0) | (jnp.diff(slot, axis=1, prepend=-2) != 0)
        present = {"starts": starts.astype(jnp.float32), "present": (batch["end"] >= 0).astype(jnp.float32)}
        p = jax.nn.sigmoid(outputs_BE2[..., 1] - outputs_BE2[..., 0])
        return {"p": p, "label": label, "weight": weight, **present}

    def decode(self, outputs: np.ndarray, params: Params) -> dict[str, np.ndarray]:
        difference = outputs[:, 1] - outputs[:, 0]
        return {"score": 0.5 + 0.5 * np.tanh(difference / 2)}  # a sigmoid that cannot overflow


def _labels(outputs_BE2: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Label and weight [B, E] of each step; both are 0 where it was not judged."""
    value, mask, group = batch["value"], batch["mask"], batch["end_group"]
    if value.shape != (*group.shape, 1) or mask.shape != value.shape or outputs_BE2.shape[-1:] != (2,):
        raise ValueError(
            f"value {value.shape}, mask {mask.shape}, outputs {outputs_BE2.shape}: not [B,E,1] and [B,E,2]"
        )
    weight = jnp.where(mask[..., 0] > 0, at_ends(batch["weight"], group), 0.0)
    return jnp.where(weight > 0, value[..., 0], 0.0), weight
