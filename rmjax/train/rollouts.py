"""Steps of reinforcement learning: a judge answers questions, is rewarded for its verdicts, and learns from them.

    questions of a step -> engine -> answers -> verdicts -> rewards -> advantages -> trees -> batch

A step is drawn with the parameters that it changes, so nothing is stale, and what is drawn depends on these, the seed
and the step alone: a run that was killed draws the same again. The samples of each step are in
WORKDIR/rollouts/STEP.jsonl.

Shape letters: M micro-batches, B rows of one, T tokens, Q prompts of a step, K samples of a prompt.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rmjax import sharding
from rmjax.batches import actions, loader, packing
from rmjax.batches.actions import Sample
from rmjax.batches.chat import Chat
from rmjax.batches.groups import Group
from rmjax.batches.prepare import Split
from rmjax.inference import engines, parameters
from rmjax.inference.engines import Engine, Recorded
from rmjax.inference.parameters import AbstractModel
from rmjax.inference.sampler import LENGTH, Prompt, Response
from rmjax.judging import asked, rewards, verdicts
from rmjax.judging.rewards import Answer
from rmjax.models import heads
from rmjax.objectives.grpo import GRPO, advantages
from rmjax.objectives.sums import Sums
from rmjax.runtime import files, processes

DRAWS = 3  # how often the samples of a question that teaches nothing are drawn with config.rollout.dead="resample"


class Judging:
    """What answers say, and what they are worth."""

    def __init__(self, config: ConfigDict, objective: GRPO, chat: Chat):
        self.config, self.objective, self.chat = config, objective, chat
        self.task = objective.task
        self._reward = rewards.named(objective.reward, objective.target)

    def answers(self, group: Group, responses: Sequence[Sequence[Response]]) -> list[list[Answer]]:
        """What the answers to the prompts of a question say: for each prompt K of them."""
        writing, decode = self.task.writing, self.chat.tokenizer.decode
        found: list[list[Answer]] = []
        for prompt, label, of_prompt in zip(group.tree.sequences(), asked.labels_of(group.labels), responses):
            question = decode(prompt.tolist())
            thinking = verdicts.opens_thought(question)
            texts = [decode(response.tokens.tolist()) for response in of_prompt]
            found.append(
                [
                    Answer(
                        id=group.id,
                        question=question,
                        text=text,
                        verdict=asked.read(text, writing, thinking=thinking),
                        label=asked.in_words(label, writing),
                        strength=float(group.labels["strength"][0]) if "strength" in group.labels else math.nan,
                        scale=writing.scale,
                        tokens=len(response.tokens),
                        finish=response.finish,
                        other=None,
                        columns=group.columns,
                    )
                    for text, response in zip(texts, of_prompt)
                ]
            )
        if len(found) == 2:
            found = [
                [one._replace(other=other.verdict) for one, other in zip(these, those)]
                for these, those in (found, found[::-1])
            ]
        return found

    def reward(self, answer: Answer) -> float:
        """NaN for what is not to be trained on."""
        if answer.finish == LENGTH:
            return math.nan if self.config.rollout.truncated == "drop" else self.objective.unreadable
        if answer.verdict.kind == "unparseable":
            return self.objective.unreadable
        return rewards.of(self._reward, answer)


class Rollouts:
    """The batches of a run that draws its own (`loader.BatchSource`)."""

    def __init__(
        self,
        config: ConfigDict,
        objective: GRPO,
        chat: Chat,
        train: Split,
        rows: jax.sharding.NamedSharding,
        engine: Engine,
        directory: Path,
        reference: Callable[[Any], jax.Array] | None = None,
    ):
        """Draws nothing yet.

        Args:
            train: the questions, their plan, and the shape of a batch.
            rows: how rows [B] are split over the devices.
            engine: answers prompts.
            directory: for STEP.jsonl.
            reference: log-probabilities [M, B, T] of the next tokens of a batch by the model that the run started with,
                where the objective wants them.
        """
        self._reference = reference
        self.steps = train.plan.steps
        self._config, self._objective, self._groups, self._plan = config, objective, train.groups, train.plan
        self._shape, self._rows, self._engine, self._directory = train.shape, rows, engine, directory
        self._judging = Judging(config, objective, chat)
        self._sums: dict[int, Sums] = {}
        self._last = -1  # the step whose batch was asked for last
        self._batch: dict[str, jax.Array] = {}  # of that

    def digest(self, steps: int) -> str:
        return self._plan.digest(steps)

    def names(self, step: int) -> list[str]:
        return [self._groups.id(int(i)) for row in self._plan.rows(step) for i in row]

    def sums(self, step: int) -> Sums:
        """What was measured of the samples of a step, once."""
        return self._sums.pop(step)

    def batch(self, step: int, params: Any) -> dict[str, jax.Array]:
        first = step - step % self._objective.updates
        with jax.transfer_guard("allow"):
            if step == first or step != self._last + 1:
                self._batch = {}  # its room is free before the next one is drawn
                questions = [self._groups.group(int(i)) for row in self._plan.rows(step) for i in row]
                engine = self._engine
                if step > first:  # a run that goes on within a rollout: its samples are of parameters that are gone
                    engine = Recorded(self._file(first))
                engine.load(params)
                self._batch = self._lay(first, questions, *self._draw(first, questions, engine))
            self._last, self._sums[step] = step, self._measured
            return self._batch

    def _file(self, step: int) -> Path:
        return self._directory / f"{step}.jsonl"

    def _draw(
        self, step: int, questions: Sequence[Group], engine: Engine
    ) -> tuple[list[list[list[Response]]], list[list[list[Answer]]], list[np.ndarray], float]:
        """For each question its prompts' responses, answers, rewards [prompts, K]; and what samples that were drawn
        beside these add to what the loss is divided by."""
        rollout, number = self._config.rollout, len(questions)
        responses: list[Any] = [None] * number
        answered: list[Any] = [None] * number
        worth: list[Any] = [None] * number
        open_, beside = list(range(number)), 0.0
        for draw in range(DRAWS if rollout.dead == "resample" else 1):
            prompts: list[Prompt] = []
            places: list[int] = []
            for i in open_:
                for order, sequence in enumerate(questions[i].tree.sequences()):
                    row = ((step * DRAWS + draw) * number + i) * self._objective.task.orders + order
                    prompts.append(Prompt(sequence.tolist(), row % 2**32))
                    places.append(i)
            said = engines.answers(engine, prompts, rollout.samples, rollout.max_tokens)
            for i in open_:
                beside += self._weight(questions[i], responses[i], worth[i]) if draw else 0.0
                responses[i] = [of_prompt for place, of_prompt in zip(places, said) if place == i]
                answered[i] = self._judging.answers(questions[i], responses[i])
                worth[i] = np.array([[self._judging.reward(answer) for answer in one] for one in answered[i]])
            open_ = [i for i in open_ if not self._advantages(worth[i]).any()]
            if not open_:
                break
        return responses, answered, worth, beside

    def _weight(self, question: Group, responses: Sequence[Sequence[Response]], worth: np.ndarray) -> float:
        """What the samples of a question that have a reward add to what the loss is divided by."""
        per_token = self._objective.per == "token"
        sizes = [[len(response.tokens) if per_token else 1 for response in of_prompt] for of_prompt in responses]
        return float(question.weight * np.array(sizes)[~np.isnan(worth)].sum())

    def _advantages(self, worth: np.ndarray) -> np.ndarray:
        return advantages(worth.ravel(), self._objective.baseline).reshape(worth.shape)

    def _lay(
        self,
        step: int,
        questions: Sequence[Group],
        responses: Sequence[Sequence[Sequence[Response]]],
        answered: Sequence[Sequence[Sequence[Answer]]],
        worth: Sequence[np.ndarray],
        beside: float,
    ) -> dict[str, jax.Array]:
        """The batch; writes the samples and measures them."""
        found: list[Group] = []
        lines, idle = [], beside
        for question, said, read, reward in zip(questions, responses, answered, worth):
            advantage = self._advantages(reward)
            prompts = question.tree.sequences()
            samples = [
                Sample(prompt, response.tokens, response.log_probs, float(a))
                for prompt, of_prompt, line in zip(prompts, said, advantage)
                for response, a in zip(of_prompt, line)
            ]
            drawn = self._weight(question, said, reward)
            lines += [_line(question, prompt, *parts) for prompt, *parts in zip(prompts, said, read, reward, advantage)]
            if not advantage.any() and not self._objective.kl:  # it teaches nothing, but was drawn
                idle += drawn
                continue
            learnt = [sample for sample, r in zip(samples, reward.ravel()) if not math.isnan(r)]
            found += actions.groups(learnt, question.weight, drawn, self._config.plan.row_tokens, question.id)
        if found:
            first = found[0]
            labels = {**first.labels, "drawn": first.labels["drawn"] + np.float32(idle)}
            found[0] = dataclasses.replace(first, labels=labels)
        if processes.is_first():
            self._directory.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps({"step": step, **line}, ensure_ascii=False) + "\n" for line in lines)
            files.write_whole(self._file(step), text)
        self._measured = measured(questions, answered, worth, self._objective, found, responses)
        lengths = np.array([len(group.tree) for group in found], np.int64)
        rows = packing.pack(lengths, self._config.plan.row_tokens) if found else []
        batch = loader.placed(rows, _Listed(found), self._shape, self._rows)
        return batch if self._reference is None else {**batch, "reference": self._reference(batch)}

    def check(self, step: int, sums: Sums) -> None:
        """Makes sure that what trains a step's samples is what drew them.

        Args:
            sums: of the step.

        Raises:
            SamplerMismatch: it is not, by config.rollout.most_mismatch.
        """
        total, tokens = sums["mismatch"]
        most = self._config.rollout.most_mismatch
        if step % self._objective.updates or not tokens or total / tokens <= most:
            return
        raise SamplerMismatch(
            f"step {step}: training and sampler differ by {total / tokens:.3g} nats a token, at most {most:g} is asked "
            "(config.rollout.most_mismatch). The probabilities with which the answers were drawn are not those of the "
            "model: are config.rollout.source's answers of other weights, or is config.model.compute_dtype too coarse? "
            "float32 brings it to 1e-5"
        )


class SamplerMismatch(RuntimeError):
    """Answers were drawn with other probabilities than those of the model that is trained."""


def reference_log_probs(config: ConfigDict, model: AbstractModel) -> Callable[[Any], jax.Array]:
    """Log-probabilities [M, B, T] of the next tokens of a batch by the model that a run starts with.

    Its parameters are held beside those that are trained, in the dtype of the computation.
    """
    dtype = heads.compute_dtype(config.model.compute_dtype, model.mesh.devices.flat[0].platform)
    params, _ = parameters.init_params(config, model)
    cast = jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), params))
    first = cast(parameters.model_params(model.merged(params, dtype)))

    def log_probs(params: Any, batch: Any) -> jax.Array:
        one = lambda micro: -heads.merge(model.plain.graph, params)(micro, remat="none")["nll"]
        return jax.lax.map(one, batch)

    compiled = jax.jit(log_probs, out_shardings=sharding.named(model.mesh, None, sharding.BATCH))
    return lambda batch: compiled(first, batch)


class _Listed:
    """Groups in a list, as the loader reads them."""

    def __init__(self, groups: Sequence[Group]):
        self.group = groups.__getitem__


def _line(
    question: Group,
    prompt: np.ndarray,
    responses: Sequence[Response],
    answers: Sequence[Answer],
    reward: np.ndarray,
    advantage: np.ndarray,
) -> dict[str, Any]:
    """A line of STEP.jsonl, of one prompt; see `engines.Recorded`, which reads it."""
    number = lambda x: None if math.isnan(x) else float(x)
    return {
        "id": question.id,
        "question": answers[0].question,
        "label": answers[0].label,
        "prompt": prompt.tolist(),
        "responses": [
            {
                "text": answer.text,
                "verdict": answer.verdict.value,
                "readable": answer.verdict.kind != "unparseable",
                "reward": number(r),
                "advantage": float(a),
                "finish": response.finish,
                "tokens": response.tokens.tolist(),
                "log_probs": [number(x) for x in response.log_probs],
            }
            for response, answer, r, a in zip(responses, answers, reward, advantage)
        ],
    }


def measured(
    questions: Sequence[Group],
    answered: Sequence[Sequence[Sequence[Answer]]],
    worth: Sequence[np.ndarray],
    objective: GRPO,
    found: Sequence[Group],
    responses: Sequence[Sequence[Sequence[Response]]],
) -> Sums:
    """The samples of a step as sums, float64 [2] each (objectives/sums.py).

    reward_mean, reward_square: of the samples that have one; dead: questions whose samples teach nothing; unreadable,
    cut_off, answer_tokens, accuracy: of samples; entropy: nats a token, of what was drawn; first_position: share of A
    among A and B; tie_rate: of ties among what can be read; shared: tokens that the trees spare.
    """
    flat = [answer for question in answered for order in question for answer in order]
    reward = np.concatenate([x.ravel() for x in worth])
    reward = reward[~np.isnan(reward)]
    readable = [answer for answer in flat if answer.verdict.kind != "unparseable"]
    sided = [answer for answer in readable if answer.verdict.value in ("A", "B")]
    dead = [not advantages(x.ravel(), objective.baseline).any() for x in worth]
    learnt = {group.id for group in found}
    whole = sum(
        len(prompt) + len(response.tokens)
        for question, said in zip(questions, responses)
        if question.id in learnt
        for prompt, of_prompt in zip(question.tree.sequences(), said)
        for response in of_prompt
    )
    pairs = objective.target == "pair"
    drawn = [response.log_probs for said in responses for of_prompt in said for response in of_prompt]
    known = np.concatenate(drawn).astype(np.float64)
    known = known[~np.isnan(known)]
    share = lambda hits, cases: np.array([float(hits), float(cases)])
    return {
        "reward_mean": share(reward.sum(), len(reward)),
        "reward_square": share((reward**2).sum(), len(reward)),
        "dead": share(sum(dead), len(dead)),
        "accuracy": share(sum(answer.verdict.value == answer.label for answer in readable), len(flat)),
        "unreadable": share(len(flat) - len(readable), len(flat)),
        "cut_off": share(sum(answer.finish == LENGTH for answer in flat), len(flat)),
        "entropy": share(-known.sum(), len(known)),
        "answer_tokens": share(sum(answer.tokens for answer in flat), len(flat)),
        "first_position": share(sum(answer.verdict.value == "A" for answer in sided), len(sided)),
        "tie_rate": share(sum(answer.verdict.value == "tie" for answer in readable), len(readable) * pairs),
        "shared": share(whole - sum(len(group.tree) for group in found), whole),
    }
