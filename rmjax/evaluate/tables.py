"""Evaluations as text for a terminal: one set or benchmark, and several models side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.report import evaluation, show
from rmjax.report.naming import metric, number, value_and_interval
from rmjax.report.section import Section, Table

Values = Mapping[str, Any]
LOWER = ("nll", "ece", "mse", "mae", "loss", "perplexity", "conflict_rate", "cycle_rate")  # is better
NEITHER = (  # is better: baselines, and what depends on the scale of rewards
    *("coin", "longer_is_better", "margin", "tie_rate", "reward_mean", "reward_std", "reward_length_correlation"),
)
BEST = "*"


def lines(measured: Values) -> list[str]:
    """What a person reads of one set or one benchmark, as the report of a run shows it.

    Args:
        measured: values of a kind in measures.py, or of a benchmark.
    """
    if "kind" not in measured:
        return show.to_text([Section("", *evaluation.benchmark("", measured).parts)])
    sets = {"": measured}
    parts = (evaluation.key_numbers(sets), evaluation.calibration(sets), evaluation.slices(sets))
    return show.to_text([Section("", *(part for section in parts for part in section.parts))])


def side_by_side(models: Mapping[str, Mapping[str, Values]]) -> list[str]:
    """Several models in one table for each set or benchmark: a column for each model, a row for each metric.

    The best of a row is marked, unless all are equal or only one is known. Differences within the intervals are not
    told from others: with each value stands half the width of its interval.

    Args:
        models: by name, sets and benchmarks by name.
    """
    numbers = range(1, 1 + len(models))
    tables = {
        part: Table(_rows([of.get(part, {}) for of in models.values()]), ["", *models], numbers)
        for part in dict.fromkeys(part for of in models.values() for part in of)
    }
    sections = [Section(part, table) for part, table in tables.items()]
    return show.to_text([*sections, Section("", f"{BEST} the best of its row; ± half the 95 % interval")])


def _rows(of: Sequence[Values]) -> list[list[str]]:
    """A set or benchmark of every model; a metric that nobody has is left out."""
    rows = [_row(name, of) for name in dict.fromkeys(name for x in of for name in x.get("metrics", {}))]
    return [row for row in rows if row]


def _row(name: str, of: Sequence[Values]) -> list[str]:
    estimates = [x.get("metrics", {}).get(name) for x in of]
    known = [x for x in estimates if x is not None and x["value"] is not None]
    if not known:
        return []
    values, base = [x["value"] for x in known], name.partition("/")[0]
    best = min(values) if base in LOWER else max(values)
    marked = base not in NEITHER and len(set(values)) > 1
    shown = metric(name, next(x.get("kind", "") for x, y in zip(of, estimates) if y in known), known[0])
    return [shown.title, *(_cell(x, shown.percent, marked and x["value"] == best) if x else "–" for x in estimates)]


def _cell(estimate: Values, percent: bool, best: bool) -> str:
    """A value with half its interval's width, both with the same unit; a star or a space behind."""
    value, ends = value_and_interval(estimate, percent)
    half = (estimate["high"] - estimate["low"]) / 2 if ends else 0
    width = f" ±{100 * half:.1f}" if percent else f" ±{number(half)}"
    return f"{value}{width if ends else ''}{BEST if best else ' '}"
