"""How a run measures its model on a set of groups: by a pass over all of them, or, of a judge, by what it writes."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax import sharding
from rmjax.batches import loader
from rmjax.batches.chat import Chat
from rmjax.batches.groups import Groups
from rmjax.batches.prepare import Split
from rmjax.batches.tasks import Task
from rmjax.evaluate import evaluating, sampled
from rmjax.evaluate import outcomes as outcomes_lib
from rmjax.inference import engines, runs
from rmjax.inference.generation import GenerativeModel
from rmjax.inference.judgements import Judge
from rmjax.inference.parameters import AbstractModel
from rmjax.inference.reward_model import RewardModel
from rmjax.inference.sampler import Drawing
from rmjax.judging.asked import Questions
from rmjax.train.step import Program


class Evaluation(Protocol):
    """See the module."""

    @property
    def groups(self) -> Groups: ...

    def metrics(self, program: Program, params: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics by name; None if `stop` is true before all are computed."""
        ...

    def measured(self, model: RewardModel) -> dict[str, Any]:
        """The same of the finished model, with intervals, as evaluation.json has them (evaluate/measures.py)."""
        ...


@dataclasses.dataclass(frozen=True)
class Pass:
    """Every group goes through the model exactly once."""

    split: Split
    task: Task
    mesh: jax.sharding.Mesh

    @property
    def groups(self) -> Groups:
        return self.split.groups

    def metrics(self, program: Program, params: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        split = self.split
        loss, outcomes = np.zeros(2), []
        for batch in loader.batches(split.groups, split.plan, split.shape, sharding.named(self.mesh, sharding.BATCH)):
            if stop():
                return None
            batch_loss, batch_outcomes = jax.device_get(program.evaluate(params, batch))
            loss += batch_loss
            outcomes.append(batch_outcomes)
        joined = {name: np.concatenate([batch[name] for batch in outcomes]) for name in outcomes[0]}
        return outcomes_lib.evaluation_metrics(self.task, joined, loss)

    def measured(self, model: RewardModel) -> dict[str, Any]:
        return evaluating.measured(model, self.split.groups, self.task)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A judge writes its verdicts, `config.eval.samples` on each question."""

    groups: Groups
    task: Questions
    model: AbstractModel
    chat: Chat
    config: ConfigDict

    def metrics(self, program: Program, params: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        with jax.transfer_guard("allow"):
            model = runs.reward_model(self.model, self.chat, params, self.config.model.compute_dtype)
            found = sampled.of_groups(self._judge(model), self.groups, stop)
        if found is None:
            return None
        return {name: x["value"] for name, x in found["metrics"].items() if x["value"] is not None}

    def measured(self, model: RewardModel) -> dict[str, Any]:
        return sampled.beside_greedy(
            self._judge(model), lambda judge, name: sampled.of_groups(judge, self.groups) or {}
        )

    def _judge(self, model: RewardModel) -> Judge:
        most = config_lib.answer_tokens(self.config)
        drawing = Drawing(responses=self.config.eval.samples, max_tokens=most, seed=self.config.seed)
        model = engines.on_this_process(model)
        return Judge(GenerativeModel.of(model), self.task.writing, drawing, shared=True)
