"""Everything that is measured of a model's answers, as plain values for JSON: one function for each kind of label.

Each gives a dict with "kind", "groups", "prompts", "metrics" by name, and what plots and error analysis need. Every
metric is {"value", "low", "high"}: a 95 % interval by the bootstrap over prompts, None where one is not defined. All
are written as functions of sums (see estimates.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax import statistics
from rmjax.batches import measure
from rmjax.evaluate import best_of_n, calibration, judges, moments, pairs
from rmjax.evaluate.estimates import Estimates, constant, ratio
from rmjax.evaluate.moments import edges_of, over
from rmjax.evaluate.pairs import Pairs
from rmjax.evaluate.ratings import attributes
from rmjax.evaluate.scored import Scored, Stack, stacks
from rmjax.objectives.sums import LARGEST_LOSS

__all__ = ["attributes", "preferences", "steps", "tokens"]

LEAST_PROBABILITY = 1e-7  # of a label, for its logarithm
WORST = 20


# ----------------------------------------------------------------------------------------------------
# Preferences
# ----------------------------------------------------------------------------------------------------


def preferences(groups: Sequence[Scored], worst: int = WORST) -> dict[str, Any]:
    """Measures a model that scores, or a judge, on groups with preferences.

    Accuracy and what belongs to it count the pairs of which one side is labelled better: a soft label once, for its
    likelier side, with the weight of its group. Pairs that a judge was not asked count nowhere.

    Metrics: accuracy (found equal: a half); nll, nats a label: the mean of -q log p over all labels, soft ones by their
    shares q, ties as half a preference each way; ece, of the probability of the side that the model prefers;
    tie_rate, found equal; longer_is_better and coin, two baselines; top1_accuracy with more than two responses. Of
    rewards also margin, mean, standard deviation and correlation with the length, over all responses. Of judges
    consistency, conflict_rate and cycle_rate (see judges.py).

    Args:
        groups: of one model.
        worst: how many of the most confidently wrong pairs are listed.

    Returns:
        Values of kind "preferences": also "pairs", "reliability", "margins", "chosen", "rejected" (not of judges),
        "slices", "failing", "best_of_n", "worst".

    Raises:
        ValueError: no group has a weight, models that score and judges are mixed, or a score is not finite.
    """
    parts = list(stacks(groups))
    compared = pairs.joined([pairs.of_stack(part) for part in parts])
    found, tables = Estimates(np.array([g.prompt for g in groups])), pairs.slices(compared, groups)
    judge = parts[0].scores is None
    add_pairs(found, compared)
    found.share("longer_is_better", compared.group, compared.longer_right, compared.weight)
    _add_nll(found, parts)
    if any(best_of_n.top1(part)[1].any() for part in parts):
        best_of_n.add_top1(found, parts)
    if judge:
        judges.add(found, parts)
    else:
        _add_rewards(found, parts, compared)
    metrics, curve = [*found.keys, "coin"], best_of_n.curve(found, parts)
    pairs.add_slices(found, compared, tables)
    made = found.all() | {"coin": constant(0.5)}
    rows = pairs.with_estimates(tables, made)
    return {
        "kind": "preferences",
        "groups": len(groups),
        "prompts": found.prompts,
        "pairs": len(compared),
        "metrics": {str(name): made[name] for name in metrics},
        "reliability": calibration.reliability(*_confidence(compared), compared.weight, 0.5),
        **({} if judge else _histograms(compared)),
        "slices": rows,
        "failing": pairs.failing(rows, made["accuracy"]),
        "best_of_n": best_of_n.with_estimates(curve, made),
        "worst": pairs.worst(compared, groups, worst),
    }


def add_pairs(found: Estimates, of: Pairs) -> None:
    """Adds accuracy, ece and tie_rate."""
    found.share("accuracy", of.group, of.right, of.weight)
    add_pair_ece(found, of)
    found.share("tie_rate", of.group, of.right == 0.5, of.weight)


def add_pair_ece(found: Estimates, of: Pairs) -> None:
    """Adds ece, of the probability of the side that the model prefers."""
    calibration.add_ece(found, of.group, *_confidence(of), of.weight, 0.5)


def _confidence(of: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """[P] twice: the probability of the side that the model holds likelier, and whether it is the labelled one."""
    apart = of.probability - 0.5
    return 0.5 + np.abs(apart), 0.5 + 0.5 * np.sign(apart)


def _add_nll(found: Estimates, parts: Sequence[Stack]) -> None:
    """Adds nll: a tie stands at [i, j] and at [j, i], so each of them has half of it."""
    sums = []
    for s in parts:
        label = np.where(np.isnan(s.verdicts), 0.0, s.wins + 0.5 * s.ties)
        if s.scores is None:
            nats = -np.log(np.clip(np.nan_to_num(s.preference, nan=1.0), LEAST_PROBABILITY, 1 - LEAST_PROBABILITY))
        else:
            nats = np.logaddexp(0.0, -s.log_odds * s.difference)
        sums.append(np.stack([s.weight * (label * nats).sum((1, 2)), s.weight * label.sum((1, 2))]))
    at, (nll, labels) = np.concatenate([s.at for s in parts]), np.concatenate(sums, 1)
    found.add("nll", ratio, found.per_prompt(at, nll), found.per_prompt(at, labels))


def _add_rewards(found: Estimates, parts: Sequence[Stack], of: Pairs) -> None:
    """Adds margin, and of all responses, whatever their weight, mean, deviation and correlation with the length."""
    found.mean("margin", of.group, of.chosen - of.beaten, of.weight)
    at = np.concatenate([np.repeat(s.at, s.tokens.shape[1]) for s in parts])
    reward, tokens = (np.concatenate([getattr(s, name).ravel() for s in parts]) for name in ("scores", "tokens"))
    moments.add_correlation(found, "reward_length_correlation", at, reward, tokens)
    found.mean("reward_mean", at, reward, np.ones(len(at)))
    moments.add_deviation(found, "reward_std", at, reward)


def _histograms(of: Pairs) -> dict[str, Any]:
    """Reward differences, and the rewards of both sides over the same edges."""
    edges, margins = edges_of(of.chosen, of.beaten), of.chosen - of.beaten
    return {
        "margins": over(edges_of(margins), margins),
        "chosen": over(edges, of.chosen),
        "rejected": over(edges, of.beaten),
    }


# ----------------------------------------------------------------------------------------------------
# Steps
# ----------------------------------------------------------------------------------------------------


def steps(
    p: np.ndarray, label: np.ndarray, response: np.ndarray, prompt: np.ndarray, weight: np.ndarray | None = None
) -> dict[str, Any]:
    """Measures the probabilities that steps are right; only of steps that were judged.

    Metrics: accuracy, of all steps and of those labelled wrong or right alone (from 0.5 on a step is right);
    first_error_accuracy, the share of responses whose first wrong step, or that there is none, is the one predicted;
    nll, nats a step, with soft labels; ece of p; auc, the area under the ROC curve, right against wrong steps, each of
    which counts once. Its interval resamples each step's share of the other side that it stands right of: DeLong et
    al. 1988, with clusters as Obuchowski 1997.

    Args:
        p: float [n].
        label: float [n], from 0 (wrong) to 1 (right).
        response: int [n], whose step it is; those of a response in order.
        prompt: [n].
        weight: float [n]; None is 1 each.

    Returns:
        Values of kind "steps", where "groups" are responses: also "reliability" of p, from 0 to 1, and "scores".

    Raises:
        ValueError: arrays of other shapes, or no steps.
    """
    shapes = [np.shape(x) for x in (p, label, response, prompt)]
    if not len(p) or len(set(shapes)) > 1:
        raise ValueError(f"p, label, response and prompt are {shapes}: expected [n] four times, of at least one step")
    found, at, right = Estimates(prompt), np.arange(len(p)), label >= 0.5
    weight = np.ones(len(p)) if weight is None else weight
    first = add_steps(found, p, right, response, weight)
    sure = np.clip(p, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    found.mean("nll", at, -label * np.log(sure) - (1 - label) * np.log1p(-sure), weight)
    calibration.add_ece(found, at, p, right, weight, 0.0)
    _add_auc(found, at, p, right)
    made = found.all()
    edges = np.linspace(0, 1, measure.BINS + 1)
    return {
        "kind": "steps",
        "groups": len(first),
        "prompts": found.prompts,
        "metrics": made,
        "reliability": calibration.reliability(p, right, weight, 0.0),
        "scores": {"correct": over(edges, p[right]), "incorrect": over(edges, p[~right])},
    }


def add_steps(
    found: Estimates, p: np.ndarray, right: np.ndarray, response: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Adds the accuracies of steps, all [n], and first_error_accuracy; returns the first step of each response."""
    at, said = np.arange(len(p)), p >= 0.5
    found.share("accuracy", at, right == said, weight)
    found.share("accuracy_incorrect", at, ~said, ~right * weight)
    found.share("accuracy_correct", at, said, right * weight)
    first, hit = _first_errors(said, right, response)
    found.share("first_error_accuracy", first, hit, weight[first])
    return first


def _first_errors(said: np.ndarray, right: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first step of each response [R], and whether its first wrong one [R] is where it was predicted."""
    _, start, of = np.unique(response, return_index=True, return_inverse=True)
    first = [statistics.first_where(~side, of, len(start)) for side in (said, right)]
    return start, first[0] == first[1]


def _add_auc(found: Estimates, at: np.ndarray, p: np.ndarray, right: np.ndarray) -> None:
    """Adds auc as the sum of both sides' means of their placements, minus the area of all, which each of them is."""
    all_ranks, own = statistics.ranks(p), np.zeros(len(p))
    for side in (right, ~right):
        own[side] = statistics.ranks(p[side])
    n = right.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        placed = (all_ranks - own) / np.where(right, len(p) - n, n)  # share of the other side below, ties a half
    placed = np.where(right, placed, 1 - placed)
    area = placed[right].mean() if n else np.nan
    sums = [found.per_prompt(at[side], x) for side in (right, ~right) for x in (placed[side], np.ones(side.sum()))]
    found.add("auc", lambda t: t[..., 0] / t[..., 1] + t[..., 2] / t[..., 3] - area, *sums)


# ----------------------------------------------------------------------------------------------------
# Tokens
# ----------------------------------------------------------------------------------------------------


def tokens(
    nll: np.ndarray,
    count: np.ndarray,
    correct: np.ndarray,
    verdict: np.ndarray,
    prompt: np.ndarray,
    verdict_weight: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measures a language model on what it should write.

    Metrics: loss, nats a token; perplexity, its exponential; accuracy, tokens that are the likeliest; verdict_accuracy,
    conversations whose verdicts are the likeliest throughout, where there are such.

    Args:
        nll: float [n], of each conversation: summed -log p of its learnt tokens.
        count: float [n], how many these are.
        correct: float [n], how many are the likeliest.
        verdict: float [n], 1 where all its verdicts are the likeliest, 0 where not, NaN where it has none.
        prompt: [n].
        verdict_weight: float [n]; None is 1 each.

    Returns:
        Values of kind "tokens", where "groups" are conversations: also "losses", of conversations.

    Raises:
        ValueError: arrays of other shapes, or none with a learnt token.
    """
    shapes = [np.shape(x) for x in (nll, count, correct, verdict, prompt)]
    if len(set(shapes)) > 1 or not np.any(count > 0):
        raise ValueError(
            f"nll, count, correct, verdict, prompt are {shapes}: expected [n] five times, some count above 0"
        )
    verdict_weight = np.ones(len(nll)) if verdict_weight is None else verdict_weight
    every, here = (nll, count, correct, verdict, prompt, verdict_weight), count > 0
    nll, count, correct, verdict, prompt, verdict_weight = (np.asarray(x)[here] for x in every)
    found = Estimates(prompt)
    found.mean("loss", np.arange(len(nll)), nll / count, count)
    found.combine("perplexity", ["loss"], lambda x: np.exp(np.minimum(x[..., 0], LARGEST_LOSS)))
    add_tokens(found, correct, count)
    if not np.isnan(verdict).all():
        add_verdicts(found, verdict, verdict_weight)
    return {
        "kind": "tokens",
        "groups": len(nll),
        "prompts": found.prompts,
        "metrics": found.all(),
        "losses": measure.histogram(nll / count, few=0),
    }


def add_tokens(found: Estimates, correct: np.ndarray, count: np.ndarray) -> None:
    """Adds accuracy, of tokens that are the likeliest: `correct` of `count` in each conversation."""
    found.share("accuracy", np.arange(len(count)), correct / count, count)


def add_verdicts(found: Estimates, verdict: np.ndarray, weight: np.ndarray) -> None:
    """Adds verdict_accuracy of the conversations that have a verdict."""
    judged = np.flatnonzero(~np.isnan(verdict))
    found.share("verdict_accuracy", judged, verdict[judged], weight[judged])
