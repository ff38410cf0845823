"""The plots of an audit as SVG text, drawn from the values of `measure.py`."""

from collections.abc import Mapping
from typing import Any

from rmjax.report.plots import FILL, FLAT, HIGH, LINE, Axes, Panel, bars, categories, curve, draw

__all__ = ["FILL", "LINE", "filling", "labels", "length_against_label", "lengths"]


def lengths(measured: Mapping[str, Any], unit: str) -> str:
    """How long trees and the longest conversations of groups are."""
    trees = bars(measured["trees"], "Tree of a group", unit)
    whole = bars(measured["conversations"], "Longest conversation of a group", unit)
    panels = [trees, whole] if measured["trees"] != measured["conversations"] else [trees]
    plan = measured["plan"]

    def marked(panel: Panel) -> Panel:
        def paint(axes: Axes) -> None:
            panel(axes)
            if plan and axes.get_xlim()[1] >= 0.8 * plan["row_tokens"]:
                axes.axvline(plan["row_tokens"], color=LINE, linewidth=1.2)
                place = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
                paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axes.annotate("row", (plan["row_tokens"], 0.95), ha="right", bbox=paper, **place)

        return paint

    return draw([marked(panel) for panel in panels], f"Histogram of lengths in {unit}")


def filling(measured: Mapping[str, Any], unit: str) -> str:
    """How full the rows are, and what sharing saves and padding costs."""
    plan = measured["plan"]
    sharing = plan or measured["sharing"]  # the same, of the groups that fit a row
    counts = {"each alone": sharing["unshared"], "as trees": sharing["tokens"]}
    panels = []
    if plan:
        counts["rows"] = plan["rows"] * plan["row_tokens"]
        row_fill = {**plan["row_fill"], "edges": [100 * x for x in plan["row_fill"]["edges"]]}
        panels = [bars(row_fill, f"Fill of {plan['rows']:,} rows", "% of a row", "rows")]
    panels.append(categories(counts, f"{unit.capitalize()} to compute"))
    return draw(panels, "Fill of rows, and sharing", HIGH if plan else FLAT)


def labels(measured: Mapping[str, Any]) -> str:
    """How the labels are distributed; "" where there are none."""
    found = measured["labels"]
    panels = []
    if "comparisons" in found:
        panels.append(categories(found["comparisons"], "Comparisons"))
    for name, (title, x) in _PREFERENCE_PANELS.items():
        if name in found:
            panels.append(bars(found[name], title, x, "groups" if name == "agreement" else "comparisons"))
    for name, values in found.get("attributes", {}).items():
        if values["given"]:
            panels.append(bars(values, name, "value", "responses"))
    if found["kind"] == "steps":
        panels.append(bars(found["steps"], "Steps of a response", "steps", "responses"))
        panels.append(bars(found["first_error"], "First wrong step", "step (0: none)", "responses"))
    for name, values in found.get("fields", {}).items():
        panels.append(bars(values, "Share of tokens trained", name))
    flat = len(panels) == 1 and "comparisons" in found
    return draw(panels, "Distribution of the labels", FLAT if flat else HIGH) if panels else ""


_PREFERENCE_PANELS = {
    "margins": ("Margins above 0", "margin"),
    "soft": ("Soft labels", "share of the likelier"),
    "agreement": ("Agreement", "share of the annotators"),
}


def length_against_label(measured: Mapping[str, Any]) -> str:
    """How much the lengths tell of the labels; "" where nothing can be compared."""
    found = measured["length"]
    panels = []
    if "curve" in found:
        more = f"{found['unit']} that one is longer"
        panels = [curve(found["curve"], "Is the longer one preferred?", more, "share", 0.5)]
    for name, values in found.get("attributes", {}).items():
        panels.append(curve(values["curve"], name, f"{found['unit']} of the response", "mean"))
    return draw(panels, "Length against label") if panels else ""
