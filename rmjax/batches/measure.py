"""What an audit measures of tokenized groups, as plain values for JSON: the page and the terminal show the same.

Shape letters: K responses in a group, A attributes, E scored tokens. A histogram is {"edges": [b + 1], "counts": [b]},
or {"values": [b], "counts": [b]} where there are few different values.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rmjax import statistics
from rmjax.batches.groups import Groups
from rmjax.batches.packing import Plan
from rmjax.data import ledger
from rmjax.statistics import first_where

VERSION = 1  # of the layout of the values
BINS = 40
FEW = 20  # different values that are counted one by one
EXAMPLES = 5
SAMPLE = 2000  # groups whose labels of tokens are looked at


def report(
    sets: Mapping[str, Groups],
    *,
    plans: Mapping[str, Mapping[str, Any]] | None = None,
    names: Sequence[str] = (),
    unit: str = "tokens",
) -> dict[str, Any]:
    """Measures one or several sets of groups; the first is the one trained on.

    Args:
        sets: by the name they are shown under.
        plans: `filling` of the sets that have a plan.
        names: of the attributes, where the labels are such.

    Returns:
        "reading": what became of the rows, once where sets share it; "sets": see `measure`; "shared": for each set
        after the first the prompts that it has in common with the first.
    """
    first = next(iter(sets.values()))
    distinct = {name: g.audit for name, g in sets.items() if g is first or g.audit is not first.audit}
    return {
        "version": VERSION,
        "unit": unit,
        "reading": {name: _reading(audit) for name, audit in distinct.items()},
        "sets": {name: measure(groups, (plans or {}).get(name), names) for name, groups in sets.items()},
        "shared": {name: _shared(first, groups) for name, groups in list(sets.items())[1:]},
    }


def _reading(audit: ledger.Audit) -> dict[str, Any]:
    reasons = sorted(audit.reasons.items(), key=lambda item: -item[1].rows)
    return {
        "rows": audit.rows,
        "unusable": audit.unusable(),
        "sources": audit.sources,
        "reasons": {name: {"meaning": ledger.REASONS[name], **vars(count)} for name, count in reasons},
        "augmented": audit.augmented,
        "unread": audit.unread,
    }


def measure(groups: Groups, plan: Mapping[str, Any] | None = None, names: Sequence[str] = ()) -> dict[str, Any]:
    tokens, unshared = int(groups.lengths.sum()), int(groups.unshared.sum())
    repeated, contradicting = ledger.repeats(groups)
    per_source = np.bincount(groups.source, minlength=len(groups.sources))
    kind = label_kind(groups)
    return {
        "groups": len(groups),
        "prompts": len(np.unique(groups.prompt_ids)),
        "sources": {name: int(n) for name, n in zip(groups.sources, per_source) if n},
        "repeated": {"groups": repeated, "examples": _repeats(groups, contradicting=False)},
        "contradicting": {"sets": contradicting, "examples": _repeats(groups, contradicting=True)},
        "responses": histogram(groups.responses),
        "trees": {**quantiles(groups.lengths), **histogram(groups.lengths, few=0)},
        "conversations": {**quantiles(groups.longest), **histogram(groups.longest, few=0)},
        "sharing": {"tokens": tokens, "unshared": unshared, "saved": 1 - tokens / unshared},
        "plan": plan,
        "labels": {"kind": kind, **LABELS[kind](groups, names)},
        "length": _pairs_by_length(groups) if kind in ("preferences", "verdicts") else _scores_by_length(groups, names),
    }


def _shared(first: Groups, second: Groups) -> dict[str, Any]:
    prompts, *pairs = np.intersect1d(*first.prompts_beside(second), return_indices=True)
    examples = [[first.id(i), second.id(j)] for i, j in np.transpose(pairs)[:EXAMPLES].tolist()]
    return {"prompts": len(prompts), "of": len(np.unique(second.prompt_ids)), "examples": examples}


def label_kind(groups: Groups) -> str:
    """What the labels are, by the fields of the task: a name in LABELS."""
    axes = {name: axes[0] for name, axes in groups.fields.items()}
    if "T" in axes.values():
        return "tokens"
    if "wins" in axes:
        return "preferences"
    if "verdict" in axes:
        return "verdicts"
    return "attributes" if axes["value"] == "G" else "steps"


# Numbers


def quantiles(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("median", "p90", "p99", "most"), np.quantile(values, [0.5, 0.9, 0.99, 1.0]).tolist()))


def histogram(values: np.ndarray, few: int = FEW) -> dict[str, list[Any]]:
    """Counts of the values if at most `few` differ, else of equally wide bins."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= few:
        return {"values": [round(x, 6) for x in distinct.tolist()], "counts": counts.tolist()}
    bins, low, high = BINS, values.min(), values.max()
    if np.issubdtype(values.dtype, np.integer):  # bins of whole numbers, so that none holds more of them than another
        width = max(1, -(-int(high + 1) // BINS))
        bins = -(-int(high + 1) // width)
        low, high = 0, width * bins
    counts, edges = np.histogram(values, bins, (low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _by_quantile(x: np.ndarray, y: np.ndarray, most: int = 8, least: int = 20) -> dict[str, list[float]]:
    """Mean of y, its standard error and the median of x, in up to `most` bins of x with about equally many."""
    bins = min(most, max(1, len(x) // least))
    edges = np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)))
    bin_of = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0))
    parts = [(x[bin_of == b], y[bin_of == b]) for b in np.unique(bin_of)]
    return {
        "x": [float(np.median(a)) for a, _ in parts],
        "mean": [float(b.mean()) for _, b in parts],
        "error": [float(b.std() / len(b) ** 0.5) for _, b in parts],
        "counts": [len(b) for _, b in parts],
    }


# Groups


def _repeats(groups: Groups, contradicting: bool) -> list[list[str]]:
    """Rows of a few sets of conversations that stand there more than once, labelled alike or not."""
    order = np.argsort(groups.response_sets, kind="stable")
    sets, labels = groups.response_sets[order], groups.label_ids[order]
    again = np.flatnonzero((sets[1:] == sets[:-1]) & ((labels[1:] != labels[:-1]) if contradicting else True))
    return [[groups.id(int(order[i])), groups.id(int(order[i + 1]))] for i in again[:EXAMPLES].tolist()]


def filling(groups: Groups, plan: Plan) -> dict[str, Any]:
    """How full the rows of a plan's first epoch are, of the groups it was made for."""
    rows = int(plan.step_start[plan.epoch_steps[0]])
    members = plan.groups[: plan.row_start[rows]]
    tokens = np.add.reduceat(groups.lengths[members].astype(np.int64), plan.row_start[:rows])
    counts, edges = np.histogram(tokens / plan.row_tokens, 50, (0, 1))
    return {
        "row_tokens": plan.row_tokens,
        "rows": rows,
        "groups": len(members),
        "tokens": int(tokens.sum()),
        "unshared": int(groups.unshared[members].sum()),
        "rows_per_step": plan.rows_per_step,
        "steps": plan.epoch_steps[0],
        "groups_per_row": len(members) / rows,
        "fill": float(tokens.sum() / (rows * plan.row_tokens)),
        "row_fill": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _by_size(groups: Groups, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields a field of axes G, K, K for the groups of each size K: their numbers, and float32 [n, K, K]."""
    flat, start = groups.column(f"label/{name}")
    for k in np.unique(groups.responses).tolist():
        chosen = np.flatnonzero(groups.responses == k)
        yield chosen, flat[start[chosen][:, None] + np.arange(k * k)].reshape(-1, k, k)


def response_tokens(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each conversation up to each scored token, int64 [sum E], and int64 [n + 1] where each group's begin"""
    scored, scored_at = groups.column("scored")  # (end, end_slot)
    runs, runs_at = groups.column("runs")  # (start, position, visible_until)
    ends, starts = scored.reshape(-1, 2)[:, 0].astype(np.int64), runs.reshape(-1, 3).astype(np.int64)
    number = np.arange(len(groups), dtype=np.int64) * (int(groups.lengths.max()) + 1)
    keys = np.repeat(number, np.diff(runs_at) // 3) + starts[:, 0]  # ascending, as runs are within their tree
    run = np.searchsorted(keys, np.repeat(number, np.diff(scored_at) // 2) + ends, side="right") - 1
    return starts[run, 1] + ends - starts[run, 0] + 1, scored_at // 2


# Labels: a function for each kind, of the groups and the names of the attributes


def _preferences(groups: Groups, _: Sequence[str]) -> dict[str, Any]:
    """Comparisons by kind, margins, how soft the soft ones are, and the agreement of annotators."""
    counts = dict.fromkeys(("preferred", "soft", "tie", "not compared"), 0)
    soft, margins = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for (_, wins), (_, ties), (_, margin) in zip(*(_by_size(groups, name) for name in ("wins", "ties", "margin"))):
        upper = np.triu_indices(wins.shape[1], 1)
        said = np.stack([wins[:, *upper], wins.transpose(0, 2, 1)[:, *upper], ties[:, *upper]])
        different = (said > 0).sum(0)  # things that are said of a pair
        tied = (different == 1) & (said[2] > 0)
        for kind, here in zip(counts, ((different == 1) & ~tied, different > 1, tied, different == 0)):
            counts[kind] += int(here.sum())
        soft.append((said.max(0) / np.maximum(said.sum(0), 1e-9))[different > 1])
        margins.append(margin[margin > 0])
    agreement = groups.agreements[~np.isnan(groups.agreements)]
    return {
        "comparisons": counts,
        **_histograms(margins=np.concatenate(margins), soft=np.concatenate(soft), agreement=agreement),
    }


def _histograms(**values: np.ndarray) -> dict[str, Any]:
    return {name: histogram(np.round(x, 4)) for name, x in values.items() if len(x)}


def _verdicts(groups: Groups, _: Sequence[str]) -> dict[str, Any]:
    flat, start = groups.column("label/verdict")
    classes = int(groups.fields["verdict"][-1])
    first = flat[start[:-1][:, None] + np.arange(classes)]
    likeliest = np.bincount(first.argmax(1), minlength=classes).tolist()
    strength = groups.column("label/strength")[0] if "strength" in groups.fields else np.zeros(0)
    soft = first.max(1)[first.max(1) < 1]
    comparisons = dict(zip(("A", "B", "tie"), likeliest))
    return {"comparisons": comparisons, **_histograms(margins=strength[strength > 0], soft=soft)}


def _attributes(groups: Groups, names: Sequence[str]) -> dict[str, Any]:
    attributes = {}
    for name, value, given in _columns(groups, names):
        x = value[given].astype(np.float64)
        numbers = {"mean": x.mean(), "sd": x.std(), "min": x.min(), "max": x.max()} if len(x) else {}
        rounded = {key: round(float(number), 6) for key, number in numbers.items()}
        attributes[name] = {"given": len(x), "missing": len(given) - len(x), **rounded, **histogram(np.round(x, 4))}
    return {"attributes": attributes}


def _columns(groups: Groups, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields name, values and mask [sum K] of each attribute."""
    a = int(groups.fields["value"][-1])
    value, mask = (groups.column(f"label/{field}")[0].reshape(-1, a) for field in ("value", "mask"))
    for i in range(a):
        yield (names[i] if i < len(names) else f"attribute {i}"), value[:, i], mask[:, i] > 0


def _steps(groups: Groups, _: Sequence[str]) -> dict[str, Any]:
    ((_, value, judged),) = _columns(groups, ())
    steps, first_error = _first_errors(groups)
    return {
        "judged": int(judged.sum()),
        "not_judged": int((~judged).sum()),
        "right": float((value[judged] >= 0.5).mean()),
        "steps": histogram(steps),
        "first_error": histogram(first_error),
        "without_error": float((first_error == 0).mean()),
    }


def _first_errors(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Of each response, int64 [sum K]: its steps, and which of them is the first wrong one, counted from 1; 0: none."""
    ((_, value, judged),) = _columns(groups, ())
    scored, at = groups.column("scored")
    group = np.repeat(np.arange(len(groups), dtype=np.int64), np.diff(at) // 2)
    key = group * int(groups.responses.max()) + scored.reshape(-1, 2)[:, 1]
    _, first, response, steps = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    error = first_where(judged & (value < 0.5), response, len(steps))
    return steps, np.where(error < len(value), error - first + 1, 0)


def _tokens(groups: Groups, _: Sequence[str]) -> dict[str, Any]:
    """Share of the tokens that have a label, in groups drawn at random."""
    drawn = groups.sample(SAMPLE, 0)
    names = [name for name, axes in groups.fields.items() if axes[0] == "T"]
    labels = (drawn.group(i).labels for i in range(len(drawn)))
    shares = np.array([[np.mean(x[name] > 0) for name in names] for x in labels])
    totals = drawn.lengths @ shares / drawn.lengths.sum()
    columns = zip(names, totals, shares.T)
    fields = {name: {"share": float(total), **histogram(x, few=0)} for name, total, x in columns if total}
    return {"drawn": len(drawn), "fields": fields}


LABELS = {
    "preferences": _preferences,
    "verdicts": _verdicts,
    "attributes": _attributes,
    "steps": _steps,
    "tokens": _tokens,
}


# Length against label


def _pairs_by_length(groups: Groups) -> dict[str, Any]:
    """How often the longer response is preferred, overall and by how much longer it is."""
    measured: dict[str, Any] = {"comparisons": int(groups.comparisons.sum()), "auc": ledger.length_auc(groups)}
    if measured["comparisons"]:
        preferences = label_kind(groups) == "preferences"
        measured["unit"] = "tokens" if preferences else "characters"
        more = longer_by_tokens(groups) if preferences else _longer_by_characters(groups)
        if len(more):
            measured["curve"] = _by_quantile(np.abs(more), (1 + np.sign(more)) / 2)
    return measured


def longer_by_tokens(groups: Groups) -> np.ndarray:
    """By how much the preferred response is longer than the other, int64, for every comparison."""
    tokens, start = response_tokens(groups)
    more = []
    for chosen, wins in _by_size(groups, "wins"):
        size = tokens[start[chosen][:, None] + np.arange(wins.shape[1])]
        which, i, j = np.nonzero(wins > wins.transpose(0, 2, 1))
        more.append(size[which, i] - size[which, j])
    return np.concatenate(more)


def _longer_by_characters(groups: Groups) -> np.ndarray:
    """The same for verdicts, of records with two responses; both stand in every sequence, so tokens do not tell."""
    flat, start = groups.column("label/verdict")
    characters, at = groups.column("characters")
    sign = np.sign(flat[start[:-1]] - flat[start[:-1] + 1])  # A - B in the first order
    here = (np.diff(at) == 2) & (sign != 0) & (groups.responses > 1)  # of one order alone it is not known which
    size = characters[at[:-1][here][:, None] + np.arange(2)].astype(np.int64)
    return ((size[:, 0] - size[:, 1]) * sign[here]).astype(np.int64)


def _scores_by_length(groups: Groups, names: Sequence[str]) -> dict[str, Any]:
    """How the attributes, or whether all steps are right, go with the characters of the response."""
    kind, characters = label_kind(groups), groups.column("characters")[0]
    columns: list[tuple[str, np.ndarray, np.ndarray]] = []
    if kind == "attributes":
        columns = list(_columns(groups, names)) if groups.responses.sum() == len(characters) else []
    elif kind == "steps":
        right = _first_errors(groups)[1] == 0
        columns = [("all steps right", right, np.ones(len(right), bool))] if len(right) == len(characters) else []
    measured = {}
    for name, value, given in columns:
        x, y = characters[given].astype(np.float64), value[given].astype(np.float64)
        if len(np.unique(x)) > 1 and len(np.unique(y)) > 1:
            measured[name] = {"responses": len(x), "spearman": statistics.spearman(x, y), "curve": _by_quantile(x, y)}
    return {"unit": "characters", "attributes": measured} if measured else {}
