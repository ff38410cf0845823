"""Evaluations as text for a terminal: one set or benchmark as an aligned block, several models side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.evaluate import naming
from rmjax.evaluate.naming import METRICS, interval, number, with_interval

Values = Mapping[str, Any]
LOWER = ("nll", "ece", "mse", "mae", "loss", "perplexity", "conflict_rate", "cycle_rate")  # is better
NEITHER = (  # is better: baselines, and what depends on the scale of rewards
    *("coin", "longer_is_better", "margin", "tie_rate", "reward_mean", "reward_std", "reward_length_correlation"),
)
BEST = "*"


def lines(measured: Values) -> list[str]:
    """What a person reads of one set or one benchmark: a row for each metric, then slices or subsets, then words.

    Args:
        measured: values of a kind in measures.py, or of a benchmark.
    """
    kind = measured.get("kind", "")
    found = [_head(measured)]
    rows = [(*_named(name, estimate, kind), "") for name, estimate in measured["metrics"].items()]
    found += _block([row for row in rows if row[1] != number(None)])
    for table, slices in (measured.get("slices") or {}).items():
        found += [f"accuracy by {table}", *_block([_slice(row, row["pairs"], "pairs") for row in slices])]
    if subsets := measured.get("subsets"):
        of = [_slice({"name": name, **row}, row["count"], "groups") for name, row in subsets.items()]
        found += ["subsets", *_block(of)]
    if curve := measured.get("best_of_n"):
        found += ["gold rank of the best of n by the model (0.5: any)", *_block(_curve(curve))]
    return found + _words(measured)


def _head(measured: Values) -> str:
    counts = [(measured.get(name), name) for name in ("pairs", "groups", "prompts")]
    return ", ".join(f"{n:,} {name}" for n, name in counts if n is not None)


def _named(name: str, estimate: Values, kind: str = "") -> tuple[str, str, str]:
    """A metric's title, value and interval."""
    ours = bool(kind) or name.partition("/")[0] in METRICS
    percent = naming.metric(name, kind).percent if ours else _is_share(estimate)
    title = naming.metric(name, kind).title if ours else name
    return title, number(estimate["value"], percent), interval(estimate, percent)


def _is_share(estimate: Values) -> bool:
    """Whether a benchmark's number is shown as percent; theirs are shares, if they are not ours by name."""
    return estimate["value"] is not None and 0 <= estimate["value"] <= 1


def _slice(row: Values, count: int, unit: str) -> tuple[str, str, str, str]:
    share = _is_share(row)
    return str(row["name"]), number(row["value"], share), interval(row, share), f"{count:,} {unit}"


def _curve(curve: Values) -> list[tuple[str, str, str, str]]:
    return [
        (f"n = {n}", number(model["value"]), interval(model), f"at best {number(oracle)}")
        for n, model, oracle in zip(curve["n"], curve["model"], curve["oracle"])
    ]


def _block(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Rows with their columns under each other: name, value, interval, and a note."""
    wide = [max(map(len, column)) for column in zip(*rows)]
    return [
        f"  {name:<{wide[0]}}  {value:>{wide[1]}}  {ends:<{wide[2]}}  {note:>{wide[3]}}".rstrip()
        for name, value, ends, note in rows
    ]


def _words(measured: Values) -> list[str]:
    """What fails, what is missing, and notes, in sentences."""
    found = []
    if failing := measured.get("failing"):
        named = [f"{row['name']} ({row['table']}): {with_interval(row, True)}" for row in failing]
        found.append(f"Worse than all pairs together: {'; '.join(named)}.")
    if missing := measured.get("missing"):
        found.append(f"The data lacks {', '.join(missing)}.")
    return found + [f"{note[:1].upper()}{note[1:]}." for note in measured.get("notes") or ()]


def side_by_side(models: Mapping[str, Mapping[str, Values]]) -> list[str]:
    """Several models in one table: a column for each, a row for each metric of each set or benchmark.

    The best of a row is marked, unless all are equal or only one is known. Differences within the intervals are not
    told from others: with each value stands half the width of its interval.

    Args:
        models: by name, sets and benchmarks by name.
    """
    parts = list(dict.fromkeys(part for of in models.values() for part in of))
    rows: list[list[str]] = [["", *models]]
    for part in parts:
        of = [model.get(part, {}) for model in models.values()]
        names = dict.fromkeys(name for x in of for name in x.get("metrics", {}))
        body = [_row(name, of) for name in names]
        rows += [[part, *[""] * len(models)], *(row for row in body if row is not None)]
    wide = [max(map(len, column)) for column in zip(*rows)]
    aligned = ["  ".join([row[0].ljust(wide[0]), *(x.rjust(n) for x, n in zip(row[1:], wide[1:]))]) for row in rows]
    return [line.rstrip() for line in aligned] + [f"{BEST} the best of its row; ± half the 95 % interval"]


def _row(name: str, of: Sequence[Values]) -> list[str] | None:
    """A metric of every model; None where nobody has it."""
    estimates = [x.get("metrics", {}).get(name) for x in of]
    values = [None if x is None else x["value"] for x in estimates]
    known = [x for x in values if x is not None]
    if not known:
        return None
    base = name.partition("/")[0]
    best = min(known) if base in LOWER else max(known)
    marked = base not in NEITHER and len(set(known)) > 1
    kind = next(x.get("kind", "") for x, value in zip(of, values) if value is not None)
    first = next(x for x in estimates if x is not None and x["value"] is not None)
    title = _named(name, first, kind)[0]
    return [f"  {title}", *(_cell(name, x, kind, marked and x["value"] == best) if x else "–" for x in estimates)]


def _cell(name: str, estimate: Values, kind: str, best: bool) -> str:
    """A value with half its interval's width, both with the same unit; a star or a space behind."""
    _, value, ends = _named(name, estimate, kind)
    half = ""
    if ends:
        width = (estimate["high"] - estimate["low"]) / 2
        half = f" ±{100 * width:.1f}" if value.endswith("%") else f" ±{number(width)}"
    return f"{value}{half}{BEST if best else ' '}"
