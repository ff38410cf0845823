"""Process rewards: whether each step of a solution is right, at the step's last token.

    loss = - y log p - (1 - y) log(1 - p),   p = softmax(outputs)[correct]

y is the label of the step, from 0 (wrong) to 1 (right); between them it is soft, the share of continuations from there
that reach the right answer for example.

Sources: Lightman et al. 2023, arXiv:2305.20050; soft labels Wang et al. 2023 (Math-Shepherd), arXiv:2312.08935, eq. 3;
first errors Zheng et al. 2024 (ProcessBench), arXiv:2412.06559. Two classes for each token are how TRL trains and
transformers' TokenClassification serves it.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.batches.tasks import Steps
from rmjax.objectives.base import Batch, Objective, Params
from rmjax.objectives.bradley_terry import reward_sums
from rmjax.objectives.gather import at_ends
from rmjax.objectives.sums import Sums, fraction, ratios, with_reward_std
from rmjax.statistics import calibration_error


@dataclasses.dataclass(frozen=True)
class ProcessReward(Objective):
    """The objective; it has no keys of its own in `config.objective`."""

    architecture, problem_type = "TokenClassification", "single_label_classification"
    labels = ("incorrect", "correct")
    decoding = "softmax over the labels; the score of a step is the probability of `correct`"
    shown = ("loss", "accuracy", "first_error_accuracy")

    @property
    def task(self) -> Steps:
        """Judged steps."""
        return Steps()

    def sums(self, outputs_BE2: jax.Array, batch: Batch, params: Params) -> Sums:
        """Loss and metrics of a batch as sums.

        A step is labelled right from 0.5 on, and predicted right from p = 0.5 on. Steps that were not judged count
        nowhere: first errors are looked for among the judged ones, as if there were no others.

        Args:
            outputs_BE2: float32 [B, E, 2].
            batch: `end`, `end_group`, `end_slot` [B, E], those of a response side by side and in order; `weight`
                [B, G]; `value`, `mask` [B, E, 1].
            params: none.

        Returns:
            loss; accuracy of all judged steps and of the `incorrect` and the `correct` ones alone, by their label;
            first_error_accuracy, the share of responses whose first wrong step is the one predicted, "none" being an
            answer too; over all steps p's mean, square, maximum and minimum; the numbers of steps and of responses.

        Raises:
            ValueError: labels or outputs of other shapes.
        """
        value, group = batch["value"], batch["end_group"]
        if value.shape != (*group.shape, 1) or batch["mask"].shape != value.shape or outputs_BE2.shape[-1:] != (2,):
            raise ValueError(
                f"value {value.shape}, mask {batch['mask'].shape}, outputs {outputs_BE2.shape}: not [B,E,1] and [B,E,2]"
            )
        of_group = at_ends(batch["weight"], group)
        weight = jnp.where(batch["mask"][..., 0] > 0, of_group, 0.0)
        label = jnp.where(weight > 0, value[..., 0], 0.0)
        log_p = jax.nn.log_softmax(outputs_BE2)
        right, predicted = label >= 0.5, outputs_BE2[..., 1] >= outputs_BE2[..., 0]
        share = lambda hit, weight: fraction((weight * hit).sum(), weight.sum())
        hit, judged = first_errors(predicted, right, weight > 0, group, batch["end_slot"])
        return {
            "loss": share(-(1 - label) * log_p[..., 0] - label * log_p[..., 1], weight),
            "accuracy": share(predicted == right, weight),
            "accuracy_incorrect": share(~predicted, jnp.where(right, 0.0, weight)),
            "accuracy_correct": share(predicted, jnp.where(right, weight, 0.0)),
            "first_error_accuracy": share(hit, jnp.where(judged, of_group, 0.0)),
            "steps_count": fraction((weight > 0).sum()),
            "responses_count": fraction((judged & (of_group > 0)).sum()),
            **reward_sums(jnp.exp(log_p[..., 1]), batch["end"]),
        }

    def outcomes(self, outputs_BE2: jax.Array, batch: Batch, params: Params) -> dict[str, jax.Array]:
        """`confidence` (p), `right` (whether the label is), `weight`, [B E], of judged steps."""
        weight = jnp.where(batch["mask"][..., 0] > 0, at_ends(batch["weight"], batch["end_group"]), 0.0)
        found = {
            "confidence": jax.nn.softmax(outputs_BE2)[..., 1],
            "right": (batch["value"][..., 0] >= 0.5).astype(jnp.float32),
            "weight": weight,
        }
        return {name: jnp.where(weight > 0, x, jnp.nan).ravel() for name, x in found.items()}

    def summary(
        self, sums: Mapping[str, np.ndarray], outcomes: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, float]:
        """Metrics of host sums: the ratios, with p's standard deviation and the numbers of steps and responses; in
        evaluation also `ece`, of p itself."""
        values = with_reward_std(ratios(sums))
        values |= {name: values.pop(f"{name}_count") for name in ("steps", "responses")}
        return values | (calibration_error(outcomes, least=0.0) if outcomes else {})

    def decode(self, outputs: np.ndarray, params: Params) -> dict[str, np.ndarray]:
        """`score`, the probability [n] that the step is right."""
        difference = outputs[:, 1] - outputs[:, 0]
        return {"score": 0.5 + 0.5 * np.tanh(difference / 2)}  # the sigmoid, which cannot overflow so


def first_errors(
    predicted: jax.Array, right: jax.Array, judged: jax.Array, group: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether the first wrong step of each response is the one predicted.

    Args:
        predicted: bool [B, E] whether a step is predicted right.
        right: bool [B, E] whether it is labelled right.
        judged: bool [B, E] whether it is labelled at all.
        group: int32 [B, E] its group; -1 absent. Steps of a response stand side by side, in order.
        slot: int32 [B, E] its response.

    Returns:
        Two bool [B, E], true at most at the first step of each response: the first wrong step among the judged ones, or
        that there is none, is predicted; and a step is judged.
    """
    starts = (jnp.diff(group, axis=1, prepend=-2) != 0) | (jnp.diff(slot, axis=1, prepend=-2) != 0)
    at = jnp.arange(group.shape[1])

    def of_row(starts: jax.Array, wrong: jax.Array) -> jax.Array:
        """The first of the row's places that is wrong, of each response, at its first token."""
        response = jnp.cumsum(starts) - 1
        first = jax.ops.segment_min(jnp.where(wrong, at, len(at)), response, num_segments=len(at))
        return first[response]

    first = [jax.vmap(of_row)(starts, judged & wrong) for wrong in (~predicted, ~right)]
    some = jax.vmap(of_row)(starts, judged) < len(at)
    here = starts & some & (group >= 0)
    return here & (first[0] == first[1]), here
