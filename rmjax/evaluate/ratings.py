"""Scores of attributes against their labels: errors, correlations, agreement beyond chance, and how both are spread.

Spearman's correlation resamples ranks that are computed once, of all labels. Of 150 normal pairs such intervals held
the true value in 91 to 97 % of 400 simulations, by its size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax import statistics
from rmjax.batches import measure
from rmjax.evaluate import moments
from rmjax.evaluate.estimates import Estimates
from rmjax.evaluate.moments import edges_of, over

AGREEMENT = ("pearson", "spearman", "kappa")
WORST = 20
LABELS = 10  # bins of labels, where more than measure.FEW differ


def attributes(
    scores: np.ndarray,
    labels: np.ndarray,
    prompt: np.ndarray,
    ids: Sequence[str],
    tokens: np.ndarray,
    rewards: np.ndarray,
    names: Sequence[str],
    limits: Sequence[tuple[float, float]] = (),
    weight: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measures scores of attributes against their labels.

    Metrics of each attribute, as "mse/NAME", and without a name of all: see `add_ratings`. reward_length_correlation is
    of all responses.

    Args:
        scores, labels: float [n, A], on the attributes' scales; NaN where a label is missing.
        prompt, tokens, rewards, weight: [n], of each response; no weight is 1 each.
        ids: n, the row of each response; those of one group share it.
        names: A.
        limits: lowest and highest score of each attribute; () is without limits.

    Returns:
        Values of kind "attributes": also "attributes", by name histograms and the scores by label, and "worst", the
        scores farthest from their labels, by the share of the labels' range.

    Raises:
        ValueError: arrays of other shapes, or no rows with a weight.
    """
    n, a = len(scores), len(names)
    shapes = [np.shape(x) for x in (scores, labels, prompt, ids, tokens, rewards)]
    weight = np.ones(n) if weight is None else weight
    if not weight.any() or shapes != [(n, a)] * 2 + [(n,)] * 4 or len(limits) not in (0, a):
        raise ValueError(f"arrays {shapes} and {len(limits)} limits: expected [n, {a}] twice, [n] and {a} or no limits")
    here = np.flatnonzero(weight > 0)
    scores, labels, prompt, tokens, rewards, weight = (
        x[here] for x in (scores, labels, prompt, tokens, rewards, weight)
    )
    ids = [ids[i] for i in here.tolist()]
    estimates = Estimates(prompt)
    add_ratings(estimates, scores, labels, weight, names, limits)
    moments.add_correlation(estimates, "reward_length_correlation", np.arange(len(here)), rewards, tokens)
    measured = {str(key): estimate for key, estimate in estimates.all().items()}
    return {
        "kind": "attributes",
        "groups": len(set(ids)),
        "prompts": estimates.prompts,
        "metrics": {key: measured[key] for key in sorted(measured, key=lambda key: "/" in key)},
        "attributes": {name: _distribution(scores[:, i], labels[:, i]) for i, name in enumerate(names)},
        "worst": _farthest(scores, labels, ids, names),
    }


def add_ratings(
    estimates: Estimates,
    scores: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
    names: Sequence[str],
    limits: Sequence[tuple[float, float]],
) -> None:
    """Adds errors and correlations of each attribute, as "mse/NAME", and of all together; arguments as `attributes`.

    mse and mae are of all labels by their weight. pearson, spearman and kappa, Cohen's with quadratic weights of
    ratings, count every label once; without a name they are the mean over the attributes for which they are defined.
    """
    known, error = ~np.isnan(labels), scores - labels
    add_means(estimates, "mse", error**2, known, weight, names)
    add_means(estimates, "mae", np.abs(error), known, weight, names)
    for i, name in enumerate(names):
        at = np.flatnonzero(known[:, i])
        x, y = scores[at, i], labels[at, i]
        moments.add_correlation(estimates, f"pearson/{name}", at, x, y)
        moments.add_correlation(estimates, f"spearman/{name}", at, statistics.ranks(x), statistics.ranks(y))
        rated = (rating(side, *(limits[i] if limits else (-np.inf, np.inf))) for side in (x, y))
        estimates.add(f"kappa/{name}", moments.kappa, moments.second(estimates, at, *rated))
    for metric in AGREEMENT:
        estimates.combine(metric, [f"{metric}/{name}" for name in names], mean_of_known)


def add_means(
    estimates: Estimates, metric: str, values: np.ndarray, known: np.ndarray, weight: np.ndarray, names: Sequence[str]
) -> None:
    """Adds the mean of values [n, A] over the known ones, and that of each attribute; `weight` is [n]."""
    n, i = np.nonzero(known)
    estimates.mean(metric, n, values[n, i], weight[n])
    for a, name in enumerate(names):
        estimates.mean(f"{metric}/{name}", n[i == a], values[n, i][i == a], weight[n[i == a]])


def rating(scores: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """The whole numbers of a scale that are nearest to scores."""
    return np.clip(np.floor(scores + 0.5), np.ceil(low), np.floor(high))


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """The mean [...] of those of [..., q] that are finite; NaN of none."""
    known = np.isfinite(values)
    return np.where(known, values, 0.0).sum(-1) / known.sum(-1)


def _distribution(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Labels and scores over the same edges, and the scores by label: of each label, or of LABELS bins of labels."""
    here = ~np.isnan(labels)
    scores, labels = scores[here], labels[here]
    edges = edges_of(scores, labels, whole=bool((labels == np.floor(labels)).all()))
    distinct, index = np.unique(labels, return_inverse=True)
    if len(distinct) > measure.FEW:
        cuts = np.linspace(labels.min(), labels.max(), LABELS + 1)
        distinct = (cuts[:-1] + cuts[1:]) / 2
        index = np.clip(np.searchsorted(cuts, labels, "right") - 1, 0, LABELS - 1)
    parts = [scores[index == i] for i in range(len(distinct))]
    curve = {
        "label": distinct.tolist(),
        "mean": [float(x.mean()) if len(x) else None for x in parts],
        "sd": [float(x.std()) if len(x) else None for x in parts],
        "counts": [len(x) for x in parts],
    }
    return {"labels": over(edges, labels), "scores": over(edges, scores), "curve": curve}


def _farthest(scores: np.ndarray, labels: np.ndarray, ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """At most WORST labels with their scores, the farthest first."""
    known = ~np.isnan(labels)
    wide = np.array([np.ptp(y[here]) if here.any() else 0.0 for y, here in zip(labels.T, known.T)])
    distance = np.where(known, np.abs(scores - labels), -1.0) / np.where(wide > 0, wide, 1.0)
    order = np.argsort(-distance, axis=None, kind="stable")[:WORST]
    return [
        {"id": ids[n], "attribute": names[i], "score": float(scores[n, i]), "label": float(labels[n, i])}
        for n, i in zip(*np.unravel_index(order, distance.shape))
        if distance[n, i] > 0
    ]
