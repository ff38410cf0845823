"""The pairs of which one side is labelled better, flat, with what the model said: accuracy, slices, the worst of them.

Shape letters: P pairs, M members of an ensemble.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rmjax.evaluate.estimates import Estimate, Estimates
from rmjax.evaluate.scored import Scored, Stack, sigmoid

FEW = 5  # different gold margins that are slices of their own
SOURCES = 20  # sources that are slices of their own, the largest ones
LEAST = 20  # pairs of a slice that may be said to fail

Slices = dict[str, list[tuple[str, np.ndarray]]]  # by table: names, with bool [P] of the pairs in each
SliceTables = dict[str, list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """P pairs; every field but `by_member` is [P], those of rewards are NaN of a judge."""

    group: np.ndarray  # int64, where the pair's group is in all groups
    preferred: np.ndarray  # int64, the response that is labelled better
    rejected: np.ndarray  # int64, the other one
    weight: np.ndarray  # float64, of the group
    right: np.ndarray  # float64, 1 where the model prefers the same, 0 the other one, 0.5 where it finds them equal
    probability: np.ndarray  # float64, the model's that the preferred one is better
    chosen: np.ndarray  # float64, reward of the preferred response
    beaten: np.ndarray  # float64, reward of the other one
    margin: np.ndarray  # float64, the label's, in the source's units; NaN where it is not known
    longer: np.ndarray  # int64, tokens of the preferred response minus those of the other
    # float64, of an ensemble's members, NaN of one model: the mean of both responses' spreads; and the spread of what
    # each member finds between them, in which members' offsets cancel.
    spread: np.ndarray
    margin_spread: np.ndarray
    by_member: np.ndarray  # float64 [P, M], each member's probability that the preferred one is better

    def __len__(self) -> int:
        return len(self.group)

    @property
    def longer_right(self) -> np.ndarray:
        """float64 [P]: 1 where the longer response is the preferred one, 0.5 where both are as long."""
        return 0.5 + 0.5 * np.sign(self.longer)


def of_stack(stack: Stack) -> Pairs:
    """The labelled pairs of a stack; those that a judge was not asked are left out."""
    asked = np.isfinite(stack.verdicts) if stack.scores is None else True
    n, i, j = np.nonzero(stack.decided & asked)
    scores = np.full(stack.tokens.shape, np.nan) if stack.scores is None else stack.scores
    first, second = np.full((2, len(n), 1), np.nan) if stack.members is None else stack.members[n, [i, j]]
    return Pairs(
        group=stack.at[n],
        preferred=i,
        rejected=j,
        weight=stack.weight[n],
        right=np.nan_to_num(stack.verdicts[n, i, j]),  # a reward that is not a number is wrong
        probability=stack.preference[n, i, j],
        chosen=scores[n, i],
        beaten=scores[n, j],
        margin=stack.margin[n, i, j],
        longer=stack.tokens[n, i] - stack.tokens[n, j],
        spread=(first.std(1) + second.std(1)) / 2,
        margin_spread=(first - second).std(1),
        by_member=sigmoid(stack.log_odds * (first - second)),
    )


def joined(parts: Sequence[Pairs]) -> Pairs:
    names = [field.name for field in dataclasses.fields(Pairs)]
    whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    order = np.lexsort((whole["rejected"], whole["preferred"], whole["group"]))
    return Pairs(**{name: values[order] for name, values in whole.items()})


def slices(pairs: Pairs, groups: Sequence[Scored]) -> Slices:
    """Divides pairs by gold margin, by how much longer the preferred one is, and by source; several slices each."""
    tables = {
        "gold margin": _by_margin(pairs.margin),
        "length difference": _by_length(pairs.longer),
        "source": _by_source(np.array([g.source for g in groups])[pairs.group] if len(pairs) else np.array([])),
    }
    filled = {name: [(label, here) for label, here in rows if here.any()] for name, rows in tables.items()}
    return {name: rows for name, rows in filled.items() if len(rows) > 1}


def _by_margin(margin: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each of a few margins, or four parts with about equally many; pairs of unknown margin are in none."""
    known = margin[~np.isnan(margin)]
    distinct = np.unique(known)
    if len(distinct) <= FEW:
        yield from ((f"{value:g}", margin == value) for value in distinct)
        return
    edges = np.unique([-np.inf, *np.quantile(known, [0.25, 0.5, 0.75]), np.inf])
    for low, high in itertools.pairwise(edges):
        name = (
            f"over {low:.3g}"
            if np.isinf(high)
            else f"up to {high:.3g}"
            if np.isinf(low)
            else f"{low:.3g} to {high:.3g}"
        )
        yield name, (margin > low) & (margin <= high)


def _by_length(longer: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Whether the preferred one is shorter or longer, by up to or over the median of the differences."""
    apart = np.abs(longer[longer != 0])
    middle = int(np.median(apart)) if len(apart) else 0
    yield f"preferred over {middle} shorter", longer < -middle
    yield f"preferred up to {middle} shorter", (longer < 0) & (longer >= -middle)
    yield "as long", longer == 0
    yield f"preferred up to {middle} longer", (longer > 0) & (longer <= middle)
    yield f"preferred over {middle} longer", longer > middle


def _by_source(source: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The largest sources first, then all others together."""
    names, index, counts = np.unique(source, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    own = order if len(names) <= SOURCES else order[: SOURCES - 1]
    yield from ((str(names[n]), index == n) for n in own)
    if len(own) < len(names):
        yield f"{len(names) - len(own)} others", ~np.isin(index, own)


def failing(tables: SliceTables, overall: Estimate) -> list[dict[str, Any]]:
    """Slices that are surely worse than all pairs: their interval ends below. With under LEAST pairs one is not judged.

    Of 40 slices no worse than the others one is expected here, since the intervals are 95 %.
    """
    rows = [{"table": table, **row} for table, slices in tables.items() for row in slices if row["pairs"] >= LEAST]
    least = overall["value"]
    return [row for row in rows if least is not None and row["high"] is not None and row["high"] < least]


def add_slices(
    estimates: Estimates, pairs: Pairs, groups: Sequence[Scored]
) -> Callable[[dict[Any, Estimate]], SliceTables]:
    """Adds the accuracy of each slice under the key (table, name).

    Returns:
        A function that makes the tables of all estimates, for JSON: {"name", "pairs"} and the estimate of the accuracy.
    """
    tables = slices(pairs, groups)
    for table, rows in tables.items():
        for name, here in rows:
            estimates.share((table, name), pairs.group[here], pairs.right[here], pairs.weight[here])
    return lambda measured: {
        table: [{"name": name, "pairs": int(here.sum()), **measured[table, name]} for name, here in rows]
        for table, rows in tables.items()
    }


def worst(pairs: Pairs, groups: Sequence[Scored], most: int) -> list[dict[str, Any]]:
    """The pairs that the model is most confidently wrong about, at most `most`, the worst first."""
    wrong = np.flatnonzero(pairs.probability < 0.5)
    difference = pairs.chosen - pairs.beaten  # tells more where probabilities are 0 for all digits
    order = wrong[np.lexsort((difference[wrong], pairs.probability[wrong]))][:most]
    return [
        {
            "id": groups[pairs.group[p]].id,
            "source": groups[pairs.group[p]].source,
            "preferred": int(pairs.preferred[p]),
            "rejected": int(pairs.rejected[p]),
            "probability": float(pairs.probability[p]),
            "difference": None if np.isnan(difference[p]) else float(difference[p]),
            "margin": None if np.isnan(pairs.margin[p]) else float(pairs.margin[p]),
        }
        for p in order
    ]
