"""What a run measures of its own steps and evaluations: outcomes of batches, by the measures of every evaluation.

    objective.outcomes, arrays [rows, ...] by name -> `step_sums` of a step, `evaluation_metrics` of a whole set

Shape letters: B rows, G groups in a row, K responses in a group, E scored tokens in a row, A attributes, C verdicts;
n groups, responses, steps or conversations that are there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rmjax.batches.tasks import Attributes, Preferences, Steps, Task
from rmjax.evaluate import best_of_n, judges, measures, moments, pairs, ratings
from rmjax.evaluate.estimates import Estimates, ratio
from rmjax.evaluate.scored import Stack
from rmjax.judging.asked import Questions
from rmjax.judging.verdicts import Judgements
from rmjax.judging.writing import Writing
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.sums import Sums
from rmjax.statistics import spread

Outcomes = Mapping[str, np.ndarray]
Measured = tuple[Estimates, Sums, dict[str, float]]  # statistics; counts and extremes; quantiles of a whole set


def step_sums(task: Task, outcomes: Outcomes) -> Sums:
    """Metrics of a step as sums: float64 [2] by name, which add over steps (objectives/sums.py)."""
    estimates, counts, _ = _measure(task, outcomes)
    return {**estimates.sums(), **counts}


def evaluation_metrics(task: Task, outcomes: Outcomes, loss: np.ndarray) -> dict[str, float]:
    """Metrics of a whole set by name, from the outcomes of all batches, joined, and the loss [2] (numerator and
    denominator); what is not defined is left out."""
    estimates, counts, quantiles = _measure(task, outcomes)
    sums = {**estimates.sums(), **counts, "loss": loss}
    return {**sums_lib.to_metrics(sums), **estimates.others(), **quantiles}


@np.errstate(invalid="ignore")  # a model that diverged has rewards that are not finite
def _measure(task: Task, outcomes: Outcomes) -> Measured:
    return MEASURES[type(task)](task, {name: np.asarray(x, np.float64) for name, x in outcomes.items()})


def _without_intervals(n: int) -> Estimates:
    """Estimates of n rows without intervals, so that one prompt is enough."""
    return Estimates(np.zeros(n, np.int64))


def _reward_sums(estimates: Estimates, at: np.ndarray, rewards: np.ndarray) -> Sums:
    """Adds the mean and the mean square of rewards [n]; returns the extremes, which combine by maximum and minimum."""
    for name, values in (("reward_mean", rewards), ("reward_square", rewards**2)):
        estimates.mean(name, at, values, np.ones(len(at)))
    most, least = rewards.max(initial=-np.inf), rewards.min(initial=np.inf)
    return {"reward_max": np.array([most, most]), "reward_min": np.array([least, least])}


def _count(n: float) -> np.ndarray:
    return np.array([float(n), 0.0])


def _preferences(task: Preferences, outcomes: Outcomes) -> Measured:
    here = outcomes["weight"] > 0
    scores, wins, weight, ties = (outcomes[name][here] for name in ("scores", "wins", "weight", "ties"))
    members = outcomes["members"][here] if "members" in outcomes else None
    stack = _stack(wins, ties, weight, scores=scores, members=members)
    compared, estimates = pairs.of_stack(stack), _without_intervals(len(scores))
    measures.add_pairs(estimates, compared)
    chosen, rejected = compared.chosen, compared.beaten
    for name, values in (("margin", chosen - rejected), ("chosen", chosen), ("rejected", rejected)):
        estimates.mean(name, compared.group, values, compared.weight)
    if scores.shape[1] > 2:
        best_of_n.add_top1(estimates, [stack])
    at, slot = np.nonzero(outcomes["present"][here])
    if members is not None:
        measures.add_members(estimates, compared, at, members[at, slot])
    counts = {"pairs_count": _count(len(compared)), **_reward_sums(estimates, at, scores[at, slot])}
    if "tied" in outcomes:
        labelled = wins + 0.5 * ties
        for name, values in (("ties_labelled", 0.5 * ties), ("ties_predicted", labelled * outcomes["tied"][here])):
            sums = (estimates.per_prompt(stack.at, weight * x.sum((1, 2))) for x in (values, labelled))
            estimates.add(name, ratio, *sums)
    for name in ("rao_kupper_theta", "davidson_nu"):
        if name in outcomes:
            counts[name] = np.array([outcomes[name].sum(), outcomes[name].size])
    known = lambda x: x[~np.isnan(x)]
    return estimates, counts, spread("chosen", known(chosen)) | spread("rejected", known(rejected))


def _verdicts(task: Judgements, outcomes: Outcomes) -> Measured:
    here = outcomes["weight"] > 0
    p, verdict, weight = (outcomes[name][here] for name in ("probabilities", "verdict", "weight"))
    estimates, stack = _without_intervals(len(weight)), _stack_of_orders(p, verdict, weight)
    measures.add_pair_ece(estimates, pairs.of_stack(stack))
    judges.add_orders(estimates, [stack], ("consistency",))
    counts = judges.add_verdicts(estimates, p, verdict, weight)
    return estimates, {"pairs_count": _count(len(weight)), **counts}, {}


def _stack_of_orders(p: np.ndarray, verdict: np.ndarray, weight: np.ndarray) -> Stack:
    """Pairs as a stack: probabilities and labels [n, 2, C] of both orders, in which A is each response once."""
    n, _, c = p.shape
    orders, wins, ties = np.full((n, 2, 2, c), np.nan), np.zeros((n, 2, 2)), np.zeros((n, 2, 2))
    orders[:, 0, 1], orders[:, 1, 0] = p[:, 0], p[:, 1]
    wins[:, 0, 1], wins[:, 1, 0] = verdict[:, 0, 0], verdict[:, 0, 1]
    if c == 3:
        ties[:, 0, 1] = ties[:, 1, 0] = verdict[:, 0, 2]
    return _stack(wins, ties, weight, orders=orders)


def _stack(wins: np.ndarray, ties: np.ndarray, weight: np.ndarray, **said: Any) -> Stack:
    return Stack(np.arange(len(wins)), wins, ties, np.zeros_like(wins), np.zeros(wins.shape[:2]), weight, **said)


def _attributes(task: Attributes, outcomes: Outcomes) -> Measured:
    here = outcomes["present"] > 0
    score, label, weight, reward = (outcomes[name][here] for name in ("score", "label", "weight", "reward"))
    estimates, known = _without_intervals(len(reward)), weight > 0
    label, weight = np.where(known, label, np.nan), weight.max(-1)
    ratings.add_ratings(estimates, score, label, weight, task.names, task.scales)
    low, high = zip(*task.scales)
    distance = np.abs(ratings.rating(score, low, high) - ratings.rating(label, low, high))
    ratings.add_means(estimates, "within_1", distance <= 1, known, weight, task.names)
    ratings.add_means(estimates, "loss", outcomes["loss"][here], known, weight, task.names)
    counts = {"labels_count": _count(known.sum()), **_reward_sums(estimates, np.arange(len(reward)), reward)}
    return estimates, counts, {}


def _steps(task: Steps, outcomes: Outcomes) -> Measured:
    here = outcomes["present"] > 0
    p, label, weight, starts = (outcomes[name][here] for name in ("p", "label", "weight", "starts"))
    estimates, at = _without_intervals(len(p)), np.flatnonzero(weight > 0)
    response, right = np.cumsum(starts)[at], label[at] >= 0.5
    first = measures.add_steps(estimates, p[at], right, response, weight[at])
    moments.add_ece(estimates, at, p[at], right, weight[at], 0.0)
    counts = {"steps_count": _count(len(at)), "responses_count": _count(len(first))}
    return estimates, {**counts, **_reward_sums(estimates, np.arange(len(p)), p)}, {}


def _tokens(task: Writing, outcomes: Outcomes) -> Measured:
    written = conversation_outcomes(outcomes)
    estimates = _without_intervals(len(written["count"]))
    measures.add_tokens(estimates, written["correct"], written["count"])
    measures.add_verdicts(estimates, written["verdict"], written["verdict_weight"])
    return estimates, {"tokens_count": _count(written["tokens"].sum())}, {}


def _drawn(task: Questions, outcomes: Outcomes) -> Measured:
    estimates = _without_intervals(1)
    for name in DRAWN:
        estimates.add(name, ratio, *(np.array([[outcomes[x].sum()]]) for x in (name, "tokens")))
    most = outcomes["ratio"].max(initial=0.0)
    return estimates, {"ratio_max": np.array([most, most])}, {}


DRAWN = ("mismatch", "clipped")  # of a token
MEASURES: dict[type, Callable[[Any, Outcomes], Measured]] = {
    Preferences: _preferences,
    Judgements: _verdicts,
    Attributes: _attributes,
    Steps: _steps,
    Writing: _tokens,
    Questions: _drawn,
}


def conversation_outcomes(outcomes: Outcomes) -> dict[str, np.ndarray]:
    """Outcomes of an `sft` objective, [n] each: of the conversations that have a learnt token; with `verdict`, 1 where
    all its verdicts are the likeliest, 0 where not, NaN where there is none."""
    here = outcomes["count"] > 0
    written = {name: x[here] for name, x in outcomes.items()}
    right = (written["verdict_errors"] == 0).astype(np.float64)
    return {**written, "verdict": np.where(written["verdict_weight"] > 0, right, np.nan)}
