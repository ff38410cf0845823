"""Evaluations as text for a terminal: one set or benchmark, and several models side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.report import evaluation, show
from rmjax.report.naming import metric, number, value_and_interval
from rmjax.report.section import Section, Table

Values = Mapping[str, Any]
LOWER = ("nll", "ece", "mse", "mae", "loss", "perplexity", "conflict_rate", "cycle_rate")  # is better
# Neither is better: of baselines, and of what depends on the scale of rewards.
NEITHER = ("coin", "longer_is_better", "margin", "tie_rate", "reward_mean", "reward_std", "reward_length_correlation")
BEST = "*"


def lines(measured: Values) -> list[str]:
    """One set (values of a kind in measures.py) or one benchmark, as the report of a run shows it."""
    if "kind" not in measured:
        return show.to_text([Section("", *evaluation.benchmark("", measured).parts)])
    sets = {"": measured}
    parts = (evaluation.key_numbers(sets), evaluation.calibration(sets), evaluation.slices(sets))
    return show.to_text([Section("", *(part for section in parts for part in section.parts))])


def side_by_side(models: Mapping[str, Mapping[str, Values]]) -> list[str]:
    """Models by name in one table for each set or benchmark: a column for each model, a row for each metric.

    The best of a row is marked, unless all are equal or only one is known. Differences within the intervals are not
    told from others: with each value stands half the width of its interval.
    """
    names = dict.fromkeys(name for parts in models.values() for name in parts)
    table = lambda measured: Table(_rows(measured), ["", *models], range(1, 1 + len(models)))
    sections = [Section(name, table([parts.get(name, {}) for parts in models.values()])) for name in names]
    return show.to_text([*sections, Section("", f"{BEST} the best of its row; ± half the 95 % interval")])


def _rows(measured: Sequence[Values]) -> list[list[str]]:
    """A set or benchmark of every model; a metric that nobody has is left out."""
    rows = []
    for name in dict.fromkeys(name for x in measured for name in x.get("metrics", {})):
        estimates = [x.get("metrics", {}).get(name) for x in measured]
        known = [x for x in estimates if x is not None and x["value"] is not None]
        if not known:
            continue
        values, base = [x["value"] for x in known], name.partition("/")[0]
        best = min(values) if base in LOWER else max(values)
        marked = base not in NEITHER and len(set(values)) > 1
        shown = metric(name, next(x.get("kind", "") for x, y in zip(measured, estimates) if y in known), known[0])
        cells = [_cell(x, shown.percent, marked and x["value"] == best) if x else "–" for x in estimates]
        rows.append([shown.title, *cells])
    return rows


def _cell(estimate: Values, percent: bool, best: bool) -> str:
    """A value with half its interval's width, both with the same unit; a star or a space behind."""
    value, ends = value_and_interval(estimate, percent)
    half = (estimate["high"] - estimate["low"]) / 2 if ends else 0
    width = f" ±{100 * half:.1f}" if percent else f" ±{number(half)}"
    return f"{value}{width if ends else ''}{BEST if best else ' '}"
