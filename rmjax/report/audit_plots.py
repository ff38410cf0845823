"""The plots of an audit, from the values that `measure.measure` gives for a set of groups called `name`."""

from collections.abc import Mapping
from typing import Any

from rmjax.report import panels
from rmjax.report.drawing import FILL, VALIDATION
from rmjax.report.panels import Line, Mark
from rmjax.report.section import Plot, capital

Values = Mapping[str, Any]
PREFERENCES = {  # by their key among the labels: title, axes
    "margins": ("Margins above 0", "margin", "comparisons"),
    "soft": ("Soft labels", "share of the likelier", "comparisons"),
    "agreement": ("Agreement", "share of the annotators", "groups"),
}


def of_set(name: str, measured: Values, unit: str) -> list[Plot]:
    """All plots of a set: lengths, fill and sharing, labels, and length against label."""
    by_length = _length_against_label(name, measured)
    return _lengths(name, measured, unit) + _filling(name, measured, unit) + _labels(name, measured) + by_length


def _lengths(name: str, measured: Values, unit: str) -> list[Plot]:
    """How long trees and the longest conversations of groups are, and where a row ends."""
    shown = {"trees": "Tree of a group", "conversations": "Longest conversation of a group"}
    if measured["trees"] == measured["conversations"]:
        del shown["conversations"]
    plots, plan = [], measured["plan"]
    for key, title in shown.items():
        near = plan and measured[key]["most"] >= 0.8 * plan["row_tokens"]
        mark = (plan["row_tokens"], "row") if near else None
        plots.append(_histogram(name, title, measured[key], unit, "groups", mark))
    return plots


def _filling(name: str, measured: Values, unit: str) -> list[Plot]:
    """How full the rows are, and what sharing saves and padding costs."""
    plan, plots = measured["plan"], []
    sharing = plan or measured["sharing"]  # the same, of the groups that fit a row
    counts = {"each alone": sharing["unshared"], "as trees": sharing["tokens"]}
    if plan:
        counts["rows"] = plan["rows"] * plan["row_tokens"]
        percent = {**plan["row_fill"], "edges": [100 * x for x in plan["row_fill"]["edges"]]}
        plots.append(_histogram(name, f"Fill of {plan['rows']:,} rows", percent, "% of a row", "rows"))
    return [*plots, _categories(name, f"{unit.capitalize()} to compute", counts)]


def _labels(name: str, measured: Values) -> list[Plot]:
    """How the labels are distributed."""
    of = measured["labels"]
    plots = [_categories(name, "Comparisons", of["comparisons"])] if "comparisons" in of else []
    plots += [_histogram(name, title, of[key], x, y) for key, (title, x, y) in PREFERENCES.items() if key in of]
    for attribute, values in of.get("attributes", {}).items():
        plots += [_histogram(name, attribute, values, "value", "responses")] if values["given"] else []
    if of["kind"] == "steps":
        plots.append(_histogram(name, "Steps of a response", of["steps"], "steps", "responses"))
        plots.append(_histogram(name, "First wrong step", of["first_error"], "step (0: none)", "responses"))
    fields = of.get("fields", {}).items()
    return plots + [_histogram(name, "Share of tokens trained", values, field, "groups") for field, values in fields]


def _length_against_label(name: str, measured: Values) -> list[Plot]:
    """Means by length with twice their standard error, and where length would have no effect."""
    of, plots = measured["length"], []
    if "curve" in of:
        title, x = "Is the longer one preferred?", f"{of['unit']} that one is longer"
        plots.append(_means(name, title, of["curve"], x, "share", level=0.5))
    for attribute, values in of.get("attributes", {}).items():
        plots.append(_means(name, attribute, values["curve"], f"{of['unit']} of the response", "mean"))
    return plots


def _histogram(name: str, title: str, counts: Values, x: str, y: str, mark: Mark | None = None) -> Plot:
    panel = panels.histograms([("", FILL, counts)], x, y, mark)
    return Plot(title, capital(panels.cut(title, 50)), panel, f"{name}: histogram, {title}, by {x}")


def _categories(name: str, title: str, counts: Mapping[str, int]) -> Plot:
    shown = [n for n in counts.values() if n]
    return Plot(title, title, panels.categories(counts), f"{name}: bars, {title}", panels.tall(shown))


def _means(name: str, title: str, points: Values, x: str, y: str, level: float | None = None) -> Plot:
    low, high = ([m + sign * e for m, e in zip(points["mean"], points["error"])] for sign in (-2, 2))
    lines = [Line("", VALIDATION, points["x"], points["mean"], bands=[(low, high, 0.18)])]
    lines += [] if level is None else [Line("", None, points["x"], [level] * len(points["x"]))]
    return Plot(title, panels.cut(title, 50), panels.curves(lines, x, y), f"{name}: {title}, {y} by {x}")
