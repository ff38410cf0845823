"""A proxy's rewards against a gold model's scores of the same responses: does it order them alike, and tell them apart?

The setting is that of Gao et al. 2022, arXiv:2210.10760: a gold model labels, a proxy learns from its labels, and is
then asked about responses that gold has scored. Scales of rewards mean nothing; what is compared is free of them.

Separation is the mean |difference| of two responses of a prompt over the standard deviation of all responses. It is
2 / sqrt(pi) = 1.13 for normal rewards that do not depend on the prompt, and falls as rewards depend on it more, or as
few responses stand far apart from a crowd. A proxy whose separation is under COMPRESSED of gold's is called compressed:
within a prompt it uses too little of its range, so that a policy that learns from it hears of the prompt alone.
Factors and offsets of rewards change nothing, and noise compresses nothing, which the match rate tells.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rmjax import statistics
from rmjax.evaluate import moments
from rmjax.evaluate.estimates import Estimates
from rmjax.evaluate.scored import Scored
from rmjax.report import show
from rmjax.report.naming import number, value_and_interval
from rmjax.report.section import Cell, Section, Table, capital

Sides = list[tuple[np.ndarray, np.ndarray]]  # the proxy's and gold's scores of the responses of each group
COMPRESSED = 1 / 3  # of gold's separation
FITTED = 0.75  # accuracy in training that shows a fitted training set: what the gate asks of validation, and 0.05 more
GAP = 0.1  # between the accuracies of a fitted and a carried over one, as the gate has it


def compare(
    groups: Sequence[Scored],
    gold: Sequence[np.ndarray],
    train_accuracy: float | None = None,
    test_accuracy: float | None = None,
    resolution: float = 0.0,
) -> dict[str, Any]:
    """Compares a proxy with a gold model.

    Metrics: match_rate, the share of pairs of a prompt that both order alike, where gold ties are left out and proxy
    ties count half; tie_rate of the proxy among them; spearman_within and kendall_within (tau-b), the means over the
    groups in which gold varies, 0 where the proxy does not; spearman and kendall (tau-b) of all responses, the first
    with an interval from ranks that are computed once, the second without; separation_proxy and separation_gold (see
    the module), and cohens_d, the proxy's mean of preferred minus others over their pooled standard deviation.

    Args:
        groups: with the proxy's scores, K of each.
        gold: float [K] of each group; NaN where gold has no score.
        train_accuracy: of the proxy on what it was trained on; None where it is not known.
        test_accuracy: of the proxy on held-out data.
        resolution: up to which two scores of the proxy are equal (RewardModel.resolution).

    Returns:
        {"groups", "responses", "without_gold", "pairs", "gold_ties", "metrics", "proxy" and "gold": {"min", "max",
        "range", "mean", "std"}, "compressed": bool or None, "compression": in words, "fitted": {"train_accuracy",
        "test_accuracy", "fitted": bool or None, "text"}}.

    Raises:
        ValueError: a judge's groups, other numbers of scores, scores that are not finite, or nothing to compare.
    """
    from scipy.stats import kendalltau  # takes a second to import

    sides = _scored_by_both(groups, gold)
    at = np.repeat(np.arange(len(sides)), [len(x) for x, _ in sides])
    proxy, true = (np.concatenate(x) for x in zip(*sides))
    estimates = Estimates(np.array([g.prompt for g in groups]))
    pairs, ties = _add_pairs(estimates, sides, at, proxy, true, resolution)
    _add_ranks(estimates, sides)
    moments.add_correlation(estimates, "spearman", at, statistics.ranks(proxy), statistics.ranks(true))
    metrics: dict[Any, Any] = estimates.all()
    varies = np.ptp(proxy) > 0 and np.ptp(true) > 0
    kendall = float(kendalltau(proxy, true).statistic) if varies else None
    metrics["kendall"] = {"value": kendall, "low": None, "high": None}
    compressed, why = _compression(metrics["separation_proxy"]["value"], metrics["separation_gold"]["value"])
    return {
        "groups": len(groups),
        "responses": len(at),
        "without_gold": sum(len(g.tokens) for g in groups) - len(at),
        "pairs": pairs,
        "gold_ties": ties,
        "metrics": metrics,
        "proxy": _spread(proxy),
        "gold": _spread(true),
        "compressed": compressed,
        "compression": why,
        "fitted": {
            "train_accuracy": train_accuracy,
            "test_accuracy": test_accuracy,
            "fitted": None if train_accuracy is None else train_accuracy >= FITTED,
            "text": _fitted_text(train_accuracy, test_accuracy),
        },
    }


def _scored_by_both(groups: Sequence[Scored], gold: Sequence[np.ndarray]) -> Sides:
    if len(groups) != len(gold):
        raise ValueError(f"{len(groups)} groups, but gold scores of {len(gold)}")
    sides = []
    for group, true in zip(groups, gold):
        if group.scores is None:
            raise ValueError(f"{group.id}: a judge has no scores to compare with gold's; its accuracy says how it does")
        mine, true = np.asarray(group.scores, np.float64), np.asarray(true, np.float64)
        if mine.shape != true.shape:
            raise ValueError(f"{group.id}: {len(mine)} responses, but gold scores {true.shape}")
        if not np.isfinite(mine).all() or np.isinf(true).any():
            raise ValueError(f"{group.id}: scores {mine.tolist()} or gold scores {true.tolist()} are not finite")
        sides.append((mine[~np.isnan(true)], true[~np.isnan(true)]))
    if not any(len(x) > 1 for x, _ in sides):
        raise ValueError(f"none of {len(groups)} prompts has two responses with gold scores: nothing can be compared")
    return sides


def _stacks(sides: Sides) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields groups with the same number of responses: int64 [N], where they are, and float64 [N, K] of each side."""
    sizes = np.array([len(x) for x, _ in sides])
    for k in np.unique(sizes[sizes > 1]).tolist():
        at = np.flatnonzero(sizes == k)
        proxy, true = (np.stack(scores) for scores in zip(*(sides[n] for n in at.tolist())))
        yield at, proxy, true


def _add_pairs(
    estimates: Estimates, sides: Sides, at: np.ndarray, proxy: np.ndarray, true: np.ndarray, resolution: float
) -> tuple[int, int]:
    """Adds match_rate, tie_rate, both separations and cohens_d; returns how many pairs gold orders and how many not."""
    pairs = []  # flat: the group of each pair of responses, the proxy's scores of both, and gold's
    for where, *stacked in _stacks(sides):
        i, j = np.triu_indices(stacked[0].shape[1], 1)
        pairs.append([np.repeat(where, len(i)), *(side[:, pick].ravel() for side in stacked for pick in (i, j))])
    group, mine, other, gold_one, gold_other = (np.concatenate(x) for x in zip(*pairs))
    said = np.where(np.abs(mine - other) <= resolution, 0.0, np.sign(mine - other))
    labelled = np.sign(gold_one - gold_other)
    ordered = labelled != 0
    ones = np.ones(int(ordered.sum()))
    estimates.share("match_rate", group[ordered], 0.5 + 0.5 * (said * labelled)[ordered], ones)
    estimates.share("tie_rate", group[ordered], said[ordered] == 0, ones)
    for name, distance, scores in (("proxy", mine - other, proxy), ("gold", gold_one - gold_other, true)):
        _add_separation(estimates, f"separation_{name}", group, np.abs(distance), at, scores)
    better = np.where(labelled > 0, mine, other)[ordered]
    _add_cohens_d(estimates, group[ordered], better, np.where(labelled > 0, other, mine)[ordered])
    return int(ordered.sum()), int((~ordered).sum())


def _over_deviation(difference: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return np.where(variance > moments.NOTHING, difference / np.sqrt(np.maximum(variance, 0)), np.nan)


def _add_separation(
    estimates: Estimates, key: str, pair_at: np.ndarray, distance: np.ndarray, at: np.ndarray, values: np.ndarray
) -> None:
    x = statistics.standardized(values)
    scale = values.std() if np.ptp(values) > 0 else 1.0

    def separation(t: np.ndarray) -> np.ndarray:
        variance = t[..., 4] / t[..., 2] - (t[..., 3] / t[..., 2]) ** 2
        return _over_deviation(t[..., 0] / t[..., 1], variance)

    pairs = [estimates.per_prompt(pair_at, v) for v in (distance / scale, np.ones(len(distance)))]
    estimates.add(key, separation, *pairs, *(estimates.per_prompt(at, x**power) for power in range(3)))


def _add_cohens_d(estimates: Estimates, where: np.ndarray, better: np.ndarray, other: np.ndarray) -> None:
    """Adds Cohen's d (1988) of two equally large samples: both variances weigh the same."""
    every = np.concatenate([better, other])
    middle, scale = (every.mean(), every.std() or 1.0) if len(every) else (0.0, 1.0)

    def cohens_d(t: np.ndarray) -> np.ndarray:
        n, a, b, aa, bb = (t[..., i] for i in range(5))
        variance = (aa + bb) / (2 * n) - ((a / n) ** 2 + (b / n) ** 2) / 2
        return _over_deviation((a - b) / n, variance)

    a, b = ((side - middle) / scale for side in (better, other))
    estimates.add(
        "cohens_d", cohens_d, *(estimates.per_prompt(where, v) for v in (np.ones(len(a)), a, b, a * a, b * b))
    )


def _compression(proxy: float | None, gold: float | None) -> tuple[bool | None, str]:
    """Whether the rule of the module calls the proxy compressed, and why."""
    if gold is None:
        return None, "gold does not tell the responses apart, so compression cannot be judged"
    if not gold:
        return None, "gold finds all responses of a prompt equal, so compression cannot be judged"
    share = (proxy or 0.0) / gold
    rule = f"{share:.0%} of gold's; under {COMPRESSED:.0%} counts as compressed"
    if share < COMPRESSED:
        return True, f"compressed: two responses of a prompt stand {number(proxy or 0.0)} deviations apart, {rule}"
    return False, f"not compressed: two responses of a prompt stand {number(proxy)} deviations apart, {rule}"


def _add_ranks(estimates: Estimates, sides: Sides) -> None:
    parts = [(where, *_rank_correlations(x, y)) for where, x, y in _stacks(sides)]
    where, spearman, kendall = (np.concatenate(x) for x in zip(*parts))
    for name, values in (("spearman_within", spearman), ("kendall_within", kendall)):
        known = ~np.isnan(values)
        estimates.mean(name, where[known], values[known], np.ones(int(known.sum())))


def _rank_correlations(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's rho and Kendall's tau-b (1945) of each row of [N, K], float64 [N] each.

    NaN where y does not vary; 0 where only x does not, which tells nothing about y. Both come from the signs of
    differences: the sum of a row of signs is twice the rank, up to a constant.
    """
    sign_x, sign_y = (np.sign(side[:, :, None] - side[:, None, :]) for side in (x, y))
    correlations = []
    for a, b, axes in ((sign_x.sum(-1), sign_y.sum(-1), -1), (sign_x, sign_y, (-1, -2))):
        both, square, known = (a * b).sum(axes), (a * a).sum(axes) * (b * b).sum(axes), (b * b).sum(axes) > 0
        correlations.append(np.where(known, both / np.sqrt(np.where(square > 0, square, 1.0)), np.nan))
    return correlations[0], correlations[1]


def _spread(x: np.ndarray) -> dict[str, float]:
    low, high = float(x.min()), float(x.max())
    return {"min": low, "max": high, "range": high - low, "mean": float(x.mean()), "std": float(x.std())}


def _fitted_text(train: float | None, test: float | None) -> str:
    held_out = "" if test is None else f"; on held-out data it is {test:.1%}"
    if train is None:
        return f"whether the training set is fitted is not known: its accuracy was not measured{held_out}"
    said = f"accuracy in training is {train:.1%}"
    if train < FITTED:
        return (
            f"the training set itself is not fitted: {said}, under {FITTED:.0%}{held_out}. Train longer, with a higher "
            "learning rate or a stronger base, or look for contradicting labels, before blaming the amount of data"
        )
    if test is None:
        return f"the training set is fitted: {said}; whether that carries over was not measured"
    if train - test >= GAP:
        return (
            f"the training set is fitted but does not carry over: {said}{held_out}. More data, or fewer passes over it"
        )
    return f"the training set is fitted, and it carries over: {said}{held_out}"


METRICS = {  # how they are shown: title, whether a share
    "match_rate": ("Ordered as gold does", True),
    "tie_rate": ("Ties of the proxy", True),
    "spearman_within": ("Spearman within prompts", False),
    "kendall_within": ("Kendall within prompts", False),
    "spearman": ("Spearman, all responses", False),
    "kendall": ("Kendall, all responses", False),
    "separation_proxy": ("Separation, proxy", False),
    "separation_gold": ("Separation, gold", False),
    "cohens_d": ("Cohen's d", False),
}


def lines(compared: dict[str, Any]) -> list[str]:
    ties, missing = compared["gold_ties"], compared["without_gold"]
    head = f"{compared['pairs']:,} pairs of {compared['responses']:,} responses to {compared['groups']:,} prompts"
    head += f"; {ties:,} pairs that gold finds equal left out" if ties else ""
    head += f"; {missing:,} responses without a gold score left out" if missing else ""
    metrics = compared["metrics"]
    rows: list[list[Cell]] = [
        [title, value_and_interval(metrics[name], share)] for name, (title, share) in METRICS.items()
    ]
    for name in ("proxy", "gold"):
        low, high, deviation = (number(compared[name][key]) for key in ("min", "max", "std"))
        ends = f"{low} to {high}, standard deviation {deviation}"
        rows.append([f"Range, {name}", (number(compared[name]["range"]), ends)])
    words = (f"{capital(compared['compression'])}.", f"{capital(compared['fitted']['text'])}.")
    return show.to_text([Section("", head, Table(rows, numbers=(1,)), *words)])
