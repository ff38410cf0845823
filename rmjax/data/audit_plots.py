"""The plots of an audit as SVG text, drawn from the values of `measure.py`."""

import html
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INK, FAINT, FILL, LINE = "#1f2933", "#d5dae0", "#8fb3d9", "#b4552d"
STYLE: Any = {  # a dict with keys of matplotlib.rcParams
    "svg.fonttype": "none",  # text stays text, in the page's typeface
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
WIDE, HIGH, FLAT = 9.4, 2.7, 1.6  # inches of a row of panels; of bars that lie, alone in their row
NAMED = r' id="(figure|axes|patch|matplotlib|xtick|ytick|text|line2d|legend|LineCollection|[A-Z])[\w.]*"'

Axes = Any  # of matplotlib, which is imported when something is drawn
Panel = Callable[[Axes], None]


def draw(panels: Sequence[Panel], says: str, high: float = HIGH) -> str:
    """Draws panels side by side, three in a row; returns an <svg> element that refers to nothing outside it.

    Args:
        panels: each paints one axes.
        says: what is to be seen, for those who cannot; every figure of a page needs its own.
        high: inches of a row of panels.
    """
    import matplotlib  # takes half a second, which most commands need not wait for
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": says}):
        figure = Figure(figsize=(WIDE, high * down), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))
        FigureCanvasSVG(figure)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, panel in zip(grid, panels):
            panel(axes)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(NAMED, "", re.sub(r" font-family: [^;]*;", "", svg))
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(says)}"', 1)


def bars(counts: Mapping[str, Any], title: str, x: str, y: str = "groups", color: str = FILL) -> Panel:
    """A histogram of measure.histogram: bins, or a bar for each value."""

    def paint(axes: Axes) -> None:
        axes.set(title=title, xlabel=x, ylabel=y)
        if "edges" in counts:
            axes.stairs(counts["counts"], counts["edges"], fill=True, color=color)
        else:
            values = counts["values"]
            steps = [b - a for a, b in itertools.pairwise(values)]
            axes.bar(values, counts["counts"], 0.8 * min(steps, default=1), color=color)
            if len(values) <= 8:
                axes.set_xticks(values, [f"{v:.3g}" for v in values])
        _thousands(axes.yaxis, integer=True)
        _thousands(axes.xaxis, integer=all(x == int(x) for x in counts.get("values", (0.5,))))

    return paint


def categories(counts: Mapping[str, int], title: str) -> Panel:
    """Bars for named counts, each with its number; those of zero are left out."""
    shown = {name: n for name, n in counts.items() if n}

    def paint(axes: Axes) -> None:
        axes.set(title=title)
        places = range(len(shown))
        axes.barh(places, list(shown.values()), 0.6, color=FILL)
        axes.set_yticks(places, list(shown))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.3 * max(shown.values(), default=1))
        axes.set_xticks([])
        for at, n in zip(places, shown.values()):
            axes.annotate(_short(n), (n, at), (4, 0), textcoords="offset points", va="center", fontsize=9)

    return paint


def curve(points: Mapping[str, Any], title: str, x: str, y: str, level: float | None = None) -> Panel:
    """Means with twice their standard error, and a line where there would be no effect."""

    def paint(axes: Axes) -> None:
        axes.set(title=title, xlabel=x, ylabel=y)
        if level is not None:
            axes.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        error = [2 * e for e in points["error"]]
        axes.errorbar(points["x"], points["mean"], error, color=LINE, marker="o", markersize=4, linewidth=1.2)
        axes.margins(0.08)
        _thousands(axes.xaxis)

    return paint


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


def _short(n: float) -> str:
    """1,234 -> "1,234"; 1234567 -> "1.23 M"."""
    return f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n:,.0f}"


def _thousands(axis: Any, integer: bool = False) -> None:
    """Ticks as 20,000 and 2 M; few enough not to touch each other."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    if not isinstance(axis.get_major_locator(), FixedLocator):
        axis.set_major_locator(MaxNLocator(5, integer=integer, steps=[1, 2, 2.5, 5, 10]))
        number = lambda x, _: f"{x:,.6g}" if abs(x) < 1e4 else _short(x)
        axis.set_major_formatter(FuncFormatter(number))
