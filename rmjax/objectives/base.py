"""What an objective is: the one interface between what is learnt and everything else.

    records -> task (batches/tasks.py) -> batches -> model -> outputs -> loss
                                                                -> outcomes -> metrics (evaluate/outcomes.py)

An objective is a frozen dataclass; its fields are the keys of `config.objective` with the same names, and what it
is given wrong it refuses in `__post_init__` with a ValueError that names the key. It knows no models.

Shape letters: B rows, G groups in a row, K responses in a group, E scored tokens in a row, A outputs, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rmjax.batches.groups import Groups
from rmjax.batches.tasks import Task

Batch = Mapping[str, jax.Array]  # see batches/loader.py: Shape.fields
Outcomes = dict[str, jax.Array]
Params = Mapping[str, Any]  # the objective's own parameters, float32; {} for most
SPREAD = "spread"  # what `decode` calls the standard deviation of the rewards that a score is the mean of


class Objective:
    """See the module. What has no body here must be defined; the rest has a default.

    Attributes:
        architecture: of the export: "SequenceClassification", "TokenClassification" or "CausalLM". The last has a
            language model head and no `labels`; its outputs are not scores (models/heads.py).
        problem_type: of the export's config.json: "regression" for scores as they are, "single_label_classification"
            for logits of exclusive classes; servers take it as a hint whether to apply a softmax.
        shown: the metrics that progress lines show.
        heads: score heads that learn apart, of which the score is the mean; see BradleyTerry.
        draws: whether a step learns from what the model itself writes (train/rollouts.py). Then `task` makes questions,
            and the fields of a step's batch are not those of the task.
    """

    architecture: str = "SequenceClassification"
    problem_type: str = "regression"
    shown: tuple[str, ...] = ("loss", "accuracy")
    heads: int = 1
    draws: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's outputs, A of them, for the export's id2label."""
        return ("LABEL_0",)

    @property
    def decoding(self) -> str:
        return "the output is the reward"

    @property
    def task(self) -> Task:
        raise NotImplementedError

    @property
    def exported(self) -> "Objective":
        """The objective of what a run leaves: how its export is asked, and how its answers are read."""
        return self

    def params(self) -> dict[str, np.ndarray]:
        """First values of what the objective itself learns (a tie parameter, cut points), float32."""
        return {}

    def fitted(self, groups: Groups) -> "Objective":
        """The objective with what it takes from the training groups before the first step; most take nothing."""
        del groups
        return self

    @property
    def found(self) -> str:
        """What `fitted` found, as a line; "" where it takes nothing."""
        return ""

    def loss_sums(self, outputs: Any, batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss of a batch as numerator and denominator, in the precision of the outputs.

        Args:
            outputs: of the model: float32 [B, E, A], scores of the scored tokens; 0 where `end` is -1.
            batch: see batches/loader.py.
            params: see `params`.

        Raises:
            ValueError: outputs or labels of other shapes.
        """
        raise NotImplementedError

    def outcomes(self, outputs: Any, batch: Batch, params: Params) -> Outcomes:
        """Each response's outcome beside its label, from which evaluate/outcomes.py computes every metric on the host.

        Rows are the first axis of every array, so that outcomes of several batches can be joined.
        """
        raise NotImplementedError

    def _require(self, key: str, allowed: bool, expected: str) -> None:
        if not allowed:
            raise ValueError(f"config.objective.{key}={getattr(self, key)!r} {expected}")

    def terms(self) -> dict[str, Any]:
        """Its keys and values, from which `objectives.make` builds it again wherever the export goes."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def decode(self, outputs: np.ndarray, params: Params) -> dict[str, np.ndarray]:
        """What the head's outputs, float32 [n, A], mean: arrays [n] by name, of which `score` is the scalar reward."""
        return {"score": outputs[:, 0]}
