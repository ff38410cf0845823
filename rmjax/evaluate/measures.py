"""Everything that is measured of a model's answers, as plain values for JSON: one function for each kind of label.

Each gives a dict with "kind", "groups" and "prompts" (those of weight 0 count nowhere), "metrics" by name, and what
plots and error analysis need. Every
metric is {"value", "low", "high"}: a 95 % interval by the bootstrap over prompts, None where one is not defined. All
are written as functions of sums (see estimates.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax import statistics
from rmjax.batches import measure
from rmjax.evaluate import best_of_n, judges, moments, pairs
from rmjax.evaluate.estimates import Estimates, ratio
from rmjax.evaluate.moments import edges_of, over
from rmjax.evaluate.pairs import Pairs
from rmjax.evaluate.ratings import attributes
from rmjax.evaluate.scored import Scored, Stack, stacks
from rmjax.objectives.sums import LARGEST_LOSS

__all__ = ["attributes", "preferences", "steps", "tokens"]

LEAST_PROBABILITY = 1e-7  # of a label, for its logarithm
WORST = 20


def preferences(groups: Sequence[Scored], worst: int = WORST) -> dict[str, Any]:
    """Measures a model that scores, or a judge, on groups with preferences.

    Accuracy and what belongs to it count the pairs of which one side is labelled better: a soft label once, for its
    likelier side, with the weight of its group. Pairs that a judge was not asked count nowhere.

    Metrics: accuracy (found equal: a half); nll, nats a label: the mean of -q log p over all labels, soft ones by their
    shares q, ties as half a preference each way; ece, of the probability of the side that the model prefers;
    tie_rate, found equal; longer_is_better and coin, two baselines; top1_accuracy with more than two responses. Of
    rewards also margin, mean, standard deviation and correlation with the length, over all responses. Of an ensemble
    or of several heads what `add_members` adds. Of judges consistency, conflict_rate and cycle_rate (see judges.py).

    Returns:
        Values of kind "preferences": also "pairs", "reliability", "margins", "chosen", "rejected" (not of judges),
        "slices", "failing", "best_of_n", "worst", at most `worst` of the most confidently wrong pairs.

    Raises:
        ValueError: no group has a weight, models that score and judges are mixed, or a score is not finite.
    """
    groups = [g for g in groups if g.weight > 0] or groups
    parts = list(stacks(groups))
    judge, compared = parts[0].scores is None, pairs.joined([pairs.of_stack(part) for part in parts])
    estimates = Estimates(np.array([g.prompt for g in groups]))
    add_pairs(estimates, compared)
    estimates.share("longer_is_better", compared.group, compared.longer_right, compared.weight)
    _add_nll(estimates, parts)
    if any(best_of_n.top1(part)[1].any() for part in parts):
        best_of_n.add_top1(estimates, parts)
    if judge:
        judges.add_self_agreement(estimates, parts)
    else:
        _add_rewards(estimates, parts, compared)
    if parts[0].members is not None:
        members = [s.members for s in parts if s.members is not None]
        at = np.concatenate([np.repeat(s.at, s.tokens.shape[1]) for s in parts])
        add_members(estimates, compared, at, np.concatenate([x.reshape(-1, x.shape[-1]) for x in members]))
    names = estimates.keys
    curve, slices = best_of_n.add_curve(estimates, parts), pairs.add_slices(estimates, compared, groups)
    measured = estimates.all()
    tables = slices(measured)
    return {
        "kind": "preferences",
        "groups": len(groups),
        "prompts": estimates.prompts,
        "pairs": len(compared),
        "metrics": {str(name): measured[name] for name in names} | {"coin": {"value": 0.5, "low": 0.5, "high": 0.5}},
        "reliability": moments.reliability(*_confidence(compared), compared.weight, 0.5),
        **({} if judge else _histograms(compared)),
        "slices": tables,
        "failing": pairs.failing(tables, measured["accuracy"]),
        "best_of_n": curve(measured),
        "worst": pairs.worst(compared, groups, worst),
    }


def add_pairs(estimates: Estimates, compared: Pairs) -> None:
    estimates.share("accuracy", compared.group, compared.right, compared.weight)
    add_pair_ece(estimates, compared)
    estimates.share("tie_rate", compared.group, compared.right == 0.5, compared.weight)


def add_pair_ece(estimates: Estimates, compared: Pairs) -> None:
    """Adds ece, of the probability of the side that the model prefers."""
    moments.add_ece(estimates, compared.group, *_confidence(compared), compared.weight, 0.5)


def _confidence(compared: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """[P] twice: the probability of the side that the model holds likelier, and whether it is the labelled one."""
    above = compared.probability - 0.5
    return 0.5 + np.abs(above), 0.5 + 0.5 * np.sign(above)


def _add_nll(estimates: Estimates, parts: Sequence[Stack]) -> None:
    """Adds nll: a tie stands at [i, j] and at [j, i], so each of them has half of it."""
    sums = []
    for s in parts:
        label = np.where(np.isnan(s.verdicts), 0.0, s.wins + 0.5 * s.ties)
        if s.scores is None:
            nats = -np.log(np.clip(np.nan_to_num(s.preference, nan=1.0), LEAST_PROBABILITY, 1 - LEAST_PROBABILITY))
        else:
            nats = np.logaddexp(0.0, -s.log_odds * s.difference)
        sums.append(np.stack([s.weight * (label * nats).sum((1, 2)), s.weight * label.sum((1, 2))]))
    at = np.concatenate([s.at for s in parts])
    estimates.add("nll", ratio, *(estimates.per_prompt(at, x) for x in np.concatenate(sums, 1)))


def _add_rewards(estimates: Estimates, parts: Sequence[Stack], compared: Pairs) -> None:
    estimates.mean("margin", compared.group, compared.chosen - compared.beaten, compared.weight)
    at = np.concatenate([np.repeat(s.at, s.tokens.shape[1]) for s in parts])
    reward, tokens = (np.concatenate([getattr(s, name).ravel() for s in parts]) for name in ("scores", "tokens"))
    moments.add_correlation(estimates, "reward_length_correlation", at, reward, tokens)
    estimates.mean("reward_mean", at, reward, np.ones(len(at)))
    moments.add_deviation(estimates, "reward_std", at, reward)


def add_members(estimates: Estimates, compared: Pairs, at: np.ndarray, rewards: np.ndarray) -> None:
    """Adds what several members (models, or heads of one) are worth: reward_spread, the mean over responses of the
    standard deviation of their rewards; members_accuracy and members_ece, of a member drawn for each pair, to compare
    the whole with; and what tells wrong pairs from right ones (error_auc_*).

    `rewards` [n, M] are those of all responses, of the groups `at` [n].
    """
    estimates.mean("reward_spread", at, rewards.std(1), np.ones(len(at)))
    m = compared.by_member.shape[1]
    above = compared.by_member.ravel() - 0.5
    group, right = np.repeat(compared.group, m), 0.5 + 0.5 * np.sign(above)
    weight = np.repeat(compared.weight, m) / m
    estimates.share("members_accuracy", group, right, weight)
    moments.add_ece(estimates, group, 0.5 + np.abs(above), right, weight, 0.5, "members_ece")
    _add_errors_told(estimates, compared)


def _add_errors_told(estimates: Estimates, compared: Pairs) -> None:
    """Adds what tells an ensemble's wrong pairs from its right ones, as areas under the ROC curve; those it finds equal
    are left out. A small margin tells errors of any model, so a spread is worth its members where it tells more."""
    at = np.flatnonzero(compared.right != 0.5)
    signs = {
        "margin": -np.abs(compared.chosen - compared.beaten),
        "spread": compared.spread,
        "margin_spread": compared.margin_spread,
    }
    for name, sign in signs.items():
        _add_auc(estimates, compared.group[at], sign[at], compared.right[at] < 0.5, f"error_auc_{name}")


def _histograms(compared: Pairs) -> dict[str, Any]:
    chosen, beaten = compared.chosen, compared.beaten
    edges, margins = edges_of(chosen, beaten), chosen - beaten
    return {"margins": over(edges_of(margins), margins), "chosen": over(edges, chosen), "rejected": over(edges, beaten)}


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
        p, label, weight: float [n]; labels are from 0 (wrong) to 1 (right), no weight is 1 each.
        response, prompt: int [n], whose step it is; those of a response in order.

    Returns:
        Values of kind "steps", where "groups" are responses: also "reliability" of p, from 0 to 1, and "scores".

    Raises:
        ValueError: arrays of other shapes, or no steps.
    """
    shapes = [np.shape(x) for x in (p, label, response, prompt)]
    if not len(p) or len(set(shapes)) > 1:
        raise ValueError(f"p, label, response and prompt are {shapes}: expected [n] four times, of at least one step")
    if weight is not None:
        p, label, response, prompt, weight = (x[weight > 0] for x in (p, label, response, prompt, weight))
    estimates, at, right = Estimates(prompt), np.arange(len(p)), label >= 0.5
    weight = np.ones(len(p)) if weight is None else weight
    first = add_steps(estimates, p, right, response, weight)
    sure = np.clip(p, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    estimates.mean("nll", at, -label * np.log(sure) - (1 - label) * np.log1p(-sure), weight)
    moments.add_ece(estimates, at, p, right, weight, 0.0)
    _add_auc(estimates, at, p, right)
    edges = np.linspace(0, 1, measure.BINS + 1)
    return {
        "kind": "steps",
        "groups": len(first),
        "prompts": estimates.prompts,
        "metrics": estimates.all(),
        "reliability": moments.reliability(p, right, weight, 0.0),
        "scores": {"correct": over(edges, p[right]), "incorrect": over(edges, p[~right])},
    }


def add_steps(
    estimates: Estimates, p: np.ndarray, right: np.ndarray, response: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Adds the accuracies of steps, all [n], and first_error_accuracy; returns the first step of each response."""
    at, said = np.arange(len(p)), p >= 0.5
    estimates.share("accuracy", at, right == said, weight)
    estimates.share("accuracy_incorrect", at, ~said, ~right * weight)
    estimates.share("accuracy_correct", at, said, right * weight)
    _, first, index = np.unique(response, return_index=True, return_inverse=True)
    predicted, true = (statistics.first_where(~side, index, len(first)) for side in (said, right))
    estimates.share("first_error_accuracy", first, predicted == true, weight[first])
    return first


def _add_auc(estimates: Estimates, at: np.ndarray, p: np.ndarray, right: np.ndarray, key: str = "auc") -> None:
    """Adds the area as the sum of both sides' means of their placements, minus the area of all, which each is."""
    all_ranks, own = statistics.ranks(p), np.zeros(len(p))
    for side in (right, ~right):
        own[side] = statistics.ranks(p[side])
    n = right.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        placed = (all_ranks - own) / np.where(right, len(p) - n, n)  # share of the other side below, ties a half
    placed = np.where(right, placed, 1 - placed)
    area = placed[right].mean() if n else np.nan
    sums = [estimates.per_prompt(at[side], x) for side in (right, ~right) for x in (placed[side], np.ones(side.sum()))]
    estimates.add(key, lambda t: t[..., 0] / t[..., 1] + t[..., 2] / t[..., 3] - area, *sums, shares=2)


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
        nll, count, correct: float [n], of each conversation: summed -log p of its learnt tokens, how many these are,
            and how many are the likeliest.
        verdict: float [n], 1 where all its verdicts are the likeliest, 0 where not, NaN where it has none.
        prompt, verdict_weight: [n]; no weight is 1 each.

    Returns:
        Values of kind "tokens", where "groups" are conversations: also "losses", of conversations.

    Raises:
        ValueError: arrays of other shapes, or none with a learnt token.
    """
    shapes = [np.shape(x) for x in (nll, count, correct, verdict, prompt)]
    if len(set(shapes)) > 1 or not np.any(count > 0):
        what = "nll, count, correct, verdict, prompt"
        raise ValueError(f"{what} are {shapes}: expected [n] five times, some count above 0")
    weight = np.ones(len(nll)) if verdict_weight is None else verdict_weight
    here = count > 0
    nll, count, correct, verdict, prompt, weight = (x[here] for x in (nll, count, correct, verdict, prompt, weight))
    estimates = Estimates(prompt)
    estimates.mean("loss", np.arange(len(nll)), nll / count, count)
    estimates.combine("perplexity", ["loss"], lambda x: np.exp(np.minimum(x[..., 0], LARGEST_LOSS)))
    add_tokens(estimates, correct, count)
    if not np.isnan(verdict).all():
        add_verdicts(estimates, verdict, weight)
    return {
        "kind": "tokens",
        "groups": len(nll),
        "prompts": estimates.prompts,
        "metrics": estimates.all(),
        "losses": measure.histogram(nll / count, few=0),
    }


def add_tokens(estimates: Estimates, correct: np.ndarray, count: np.ndarray) -> None:
    """Adds accuracy, of tokens that are the likeliest: `correct` of `count` in each conversation."""
    estimates.share("accuracy", np.arange(len(count)), correct / count, count)


def add_verdicts(estimates: Estimates, verdict: np.ndarray, weight: np.ndarray) -> None:
    """Adds verdict_accuracy of the conversations that have a verdict."""
    judged = np.flatnonzero(~np.isnan(verdict))
    estimates.share("verdict_accuracy", judged, verdict[judged], weight[judged])
