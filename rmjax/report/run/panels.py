"""The kinds of panels that a report has beside those of ../plots.py: curves, fans, reliability, intervals by name.

Each function returns what paints one axes. Names stand beside what they name, in its colour, instead of in a legend.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.report.plots import FAINT, INK, SOFT, Axes, Panel, percent, short, thousands

LONGEST = 30  # characters of a name beside a plot
APART = 0.09  # least distance of names at the right of an axes, as a share of its height
DASHES = (0, (4, 3))


@dataclasses.dataclass(frozen=True)
class Line:
    """A named line: points that are known, x ascending."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    marker: bool = True
    low: Sequence[float] = ()  # of an interval around each point, with `high`
    high: Sequence[float] = ()


def curves(
    lines: Sequence[Line], title: str, x: str = "step", share: bool = False, log: bool = False, zero: bool = False
) -> Panel:
    """Lines over x, their names at their ends.

    Args:
        lines: at least one.
        title: of the panel.
        x: what is on the x-axis.
        share: whether y is a share, shown as percent.
        log: whether x doubles from mark to mark.
        zero: whether y begins at 0.
    """

    def paint(axes: Axes) -> None:
        axes.set(title=title, xlabel=x)
        for line in lines:
            few = line.marker or len(line.x) == 1
            look = {"marker": "o", "markersize": 3.5, "linewidth": 1.6} if few else {"linewidth": 1.0}
            axes.plot(line.x, line.y, color=line.color, **look)
            if len(line.low):
                axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.18, linewidth=0)
        axes.margins(x=0.02, y=0.08)
        if zero:
            axes.set_ylim(0, 1.1 * max(max(line.y) for line in lines) or 1)
        percent(axes.yaxis) if share else thousands(axes.yaxis)
        if log:
            axes.set_xscale("log", base=2)
            ticks = lines[0].x
            axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
        else:
            thousands(axes.xaxis)
        _name_ends(axes, [(line.name, line.color, line.y[-1]) for line in lines])

    return paint


def fans(sides: Sequence[tuple[str, str, Mapping[int, Sequence[float]]]], steps: Sequence[int], title: str) -> Panel:
    """Quantiles over steps: the middle half and nine tenths as bands, the median as a line.

    Args:
        sides: name, colour, and by percent (5, 25, 50, 75, 95) a quantile at each step.
        steps: ascending.
        title: of the panel.
    """

    def paint(axes: Axes) -> None:
        axes.set(title=title, xlabel="step")
        for _, color, of in sides:
            axes.fill_between(steps, of[5], of[95], color=color, alpha=0.14, linewidth=0)
            axes.fill_between(steps, of[25], of[75], color=color, alpha=0.26, linewidth=0)
            axes.plot(steps, of[50], color=color, linewidth=1.8)
        axes.margins(x=0.02)
        thousands(axes.xaxis)
        thousands(axes.yaxis)
        _name_ends(axes, [(name, color, of[50][-1]) for name, color, of in sides])

    return paint


def overlaid(sides: Sequence[tuple[str, str, Mapping[str, Any]]], title: str, x: str, y: str) -> Panel:
    """Histograms over the same edges, or of the same few values, behind each other.

    Args:
        sides: name, colour and a histogram as of measure.histogram; in the order of their means.
        title: of the panel.
        x: what is on the x-axis.
        y: what is counted.
    """

    def paint(axes: Axes) -> None:
        axes.set(title=title, xlabel=x, ylabel=y)
        for i, (_, color, counts) in enumerate(sides):
            if "edges" in counts:
                axes.stairs(counts["counts"], counts["edges"], fill=True, color=color, alpha=0.3)
                axes.stairs(counts["counts"], counts["edges"], color=color, linewidth=1.3)
            else:
                width = 0.8 * min((b - a for a, b in itertools.pairwise(counts["values"])), default=1) / len(sides)
                at = np.array(counts["values"], float) + width * (i - (len(sides) - 1) / 2)
                axes.bar(at, counts["counts"], width, color=color, alpha=0.75)
        axes.set_ylim(0, 1.18 * max(max(counts["counts"]) for *_, counts in sides))  # room for the names
        for (name, color, _), place in zip(sides, ((0.01, "left"), (0.99, "right"))):
            axes.text(place[0], 0.97, name, color=color, ha=place[1], va="top", transform=axes.transAxes, weight="bold")
        thousands(axes.xaxis)
        thousands(axes.yaxis, integer=True)

    return paint


def split(counts: Mapping[str, Any], colors: tuple[str, str], names: tuple[str, str], title: str, x: str) -> Panel:
    """A histogram whose parts below and above 0 have a colour and a name each; a value of 0 belongs to neither."""
    wrong, right = colors

    def paint(axes: Axes) -> None:
        axes.set(title=title, xlabel=x, ylabel="pairs")
        if "edges" in counts:
            edges = np.array(counts["edges"], float)
            middle, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
        else:
            middle = np.array(counts["values"], float)
            width = np.full(len(middle), 0.8 * min(np.diff(middle), default=1.0))
        shade = np.where(middle < 0, wrong, np.where(middle > 0, right, SOFT))
        axes.bar(middle, counts["counts"], width, color=shade.tolist(), alpha=0.75, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_ylim(0, 1.18 * max(counts["counts"]))
        place: dict[str, Any] = {"va": "top", "transform": axes.transAxes, "weight": "bold"}
        axes.text(0.01, 0.97, names[0], color=wrong, ha="left", **place)
        axes.text(0.99, 0.97, names[1], color=right, ha="right", **place)
        thousands(axes.xaxis)
        thousands(axes.yaxis, integer=True)

    return paint


def reliability(bins: Mapping[str, Any], title: str, x: str, y: str, color: str) -> Panel:
    """Stated probability against the share that is right, with the diagonal; grey bars say how many are in a bin.

    Args:
        bins: "edges", "counts", "predicted" and "observed"; the latter two are None in empty bins.
        title: of the panel.
        x: whose probability.
        y: share of what.
        color: of the points.
    """
    edges, counts = bins["edges"], np.array(bins["counts"], float)
    known = [(p, o) for p, o in zip(bins["predicted"], bins["observed"]) if p is not None and o is not None]

    def paint(axes: Axes) -> None:
        low = min([edges[0], *(math.floor(10 * o) / 10 for _, o in known)])
        axes.set(title=title, xlabel=x, ylabel=y, xlim=(edges[0], 1.005), ylim=(low, 1.02))
        tall = 0.2 * (1.02 - low) * counts / counts.max()
        axes.bar(edges[:-1], tall, np.diff(edges) * 0.92, bottom=low, align="edge", color=FAINT)
        axes.plot([edges[0], 1], [edges[0], 1], color=SOFT, linewidth=0.9, linestyle=DASHES)
        at = 0.3 * edges[0] + 0.7
        axes.annotate("perfectly calibrated", (at, at), (-6, 4), textcoords="offset points", ha="right", color=SOFT,
                      fontsize=8.5)  # fmt: skip
        axes.plot(*zip(*known), color=color, marker="o", markersize=5, linewidth=1.6)
        percent(axes.xaxis)
        percent(axes.yaxis)

    return paint


def intervals(rows: Sequence[Mapping[str, Any]], title: str, color: str, level: tuple[str, float] | None) -> Panel:
    """Shares with their 95 % intervals, one row each, and a line for what they are compared with.

    Args:
        rows: {"name", "value", "low", "high"} and "count", how many are behind it, or None.
        title: of the panel.
        color: of the points.
        level: name and value of the line.
    """

    def paint(axes: Axes) -> None:
        axes.set(title=title)
        if level is not None:
            axes.axvline(level[1], color=SOFT, linewidth=0.9, linestyle=DASHES)
            axes.annotate(level[0], (level[1], 1), (0, 1), xycoords=("data", "axes fraction"), color=SOFT, fontsize=8.5,
                          textcoords="offset points", va="bottom", ha="center")  # fmt: skip
        for at, row in enumerate(rows):
            if row["low"] is not None and row["high"] is not None:
                axes.plot([row["low"], row["high"]], [at, at], color=color, linewidth=1.6, alpha=0.55)
            axes.plot([row["value"]], [at], color=color, marker="o", markersize=5)
        names = [
            cut(row["name"]) + (f"  ({short(row['count'])})" if row.get("count") is not None else "") for row in rows
        ]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.06)
        percent(axes.xaxis)

    return paint


def against_diagonal(points: Mapping[str, Any], title: str, color: str) -> Panel:
    """Mean score of each label with one standard deviation, and where it would equal the label.

    Args:
        points: "label", "mean", "sd" and "counts".
        title: of the panel.
        color: of the scores.
    """
    known = [(x, m, s or 0.0) for x, m, s in zip(*(points[key] for key in ("label", "mean", "sd"))) if m is not None]

    def paint(axes: Axes) -> None:
        x, mean, sd = map(np.array, zip(*known))
        axes.set(title=title, xlabel="label", ylabel="score")
        axes.plot([x.min(), x.max()], [x.min(), x.max()], color=SOFT, linewidth=0.9, linestyle=DASHES)
        axes.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=color, marker="o", markersize=4.5, linewidth=1.6)
        thousands(axes.xaxis)
        thousands(axes.yaxis)

    return paint


def marked(panel: Panel, x: float, name: str) -> Panel:
    """The panel with a named vertical line, as of the step that was exported."""

    def paint(axes: Axes) -> None:
        panel(axes)
        axes.axvline(x, color=SOFT, linewidth=0.9, linestyle=DASHES)
        axes.annotate(name, (x, 1), (0, 1), xycoords=("data", "axes fraction"), textcoords="offset points", color=SOFT,
                      fontsize=8.5, ha="center", va="bottom")  # fmt: skip

    return paint


def cut(name: str, most: int = LONGEST) -> str:
    """A name on one line, with its middle left out where it is long: both ends of paths and names tell."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - most + most // 2 + 1 :]}"


def _name_ends(axes: Axes, names: Sequence[tuple[str, str, float]]) -> None:
    """Writes names at the right of the axes, at the heights of values, moved until none covers another."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ordered = sorted(names, key=lambda x: x[2])
    heights = spread([(y - low) / (high - low) for *_, y in ordered])
    for (name, color, _), at in zip(ordered, heights):
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (1, at), (5, 0), color=color, annotation_clip=False, **place)


def spread(heights: Sequence[float], apart: float = APART) -> list[float]:
    """Ascending numbers moved as little as need be to be `apart` or more from each other.

    Names that touch are joined to a block around their mean, and blocks that touch again, until none does.

    >>> [round(x, 2) for x in spread([0.5, 0.5, 0.9], 0.1)]
    [0.45, 0.55, 0.9]
    """
    blocks: list[list[float]] = []
    place = lambda block: sum(block) / len(block) - apart * (len(block) - 1) / 2
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and place(blocks[-1]) < place(blocks[-2]) + apart * len(blocks[-2]) - 1e-9:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [place(block) + apart * i for block in blocks for i in range(len(block))]
