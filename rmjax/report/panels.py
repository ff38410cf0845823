"""The kinds of panels: lines over something, histograms, reliability, intervals and counts by name.

Each function returns what paints one axes.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.report.drawing import FAINT, FILL, SOFT, VALIDATION, Axes, Panel

Values = Mapping[str, Any]
LONGEST = 30  # characters of a name beside a plot
PARTS = 1_000  # of a line that has more than twice as many points: more than a plot has dots across
DASHED: dict[str, Any] = {"color": SOFT, "linewidth": 0.9, "linestyle": (0, (4, 3))}  # what data is compared with
Mark = tuple[float, str]  # where a line across the panel stands, and its name


@dataclasses.dataclass(frozen=True)
class Line:
    """Points that are known, x ascending."""

    name: str  # in the legend; "" has no place there
    color: str | None  # None is that of a dashed line that data is compared with
    x: Sequence[float]
    y: Sequence[float]
    marker: bool = True  # whether the points are marked
    bands: Sequence[tuple[Sequence[float], Sequence[float], float]] = ()  # (low, high, opacity) at every point


def curves(
    lines: Sequence[Line],
    x: str = "step",
    y: str = "",
    share: bool = False,
    log: bool = False,
    zero: bool = False,
    mark: Mark | None = None,
) -> Panel:
    """Lines over x; y is named where the title does not say what it is.

    A share is shown as percent, with `log` x doubles from tick to tick, with `zero` y begins at 0.
    """

    def paint(axes: Axes) -> None:
        axes.set(xlabel=x, ylabel=y)
        for line in map(thinned, lines):
            for low, high, opacity in line.bands:
                axes.fill_between(line.x, low, high, color=line.color, alpha=opacity, linewidth=0)
            look: dict[str, Any] = {"color": line.color, "linewidth": 1.8 if line.bands else 1.0}
            if line.marker or len(line.x) == 1:
                look |= {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
            axes.plot(line.x, line.y, label=line.name, **(DASHED if line.color is None else look))
        _draw_mark(axes, mark)
        axes.margins(x=0.02, y=0.08)
        if zero:
            axes.set_ylim(0, 1.1 * max(max(line.y) for line in lines) or 1)
        _percent(axes.yaxis) if share else _thousands(axes.yaxis)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(lines[0].x, [f"{n:g}" for n in lines[0].x])
        else:
            _thousands(axes.xaxis)

    return paint


def thinned(line: Line) -> Line:
    """The line, or of a long one the lowest and the highest point of each of PARTS, so that pages do not grow."""
    if len(line.y) <= 2 * PARTS:
        return line
    y = np.array(line.y, float)
    parts = np.array_split(np.arange(len(y)), PARTS)
    kept = {0, len(y) - 1, *(int(part[pick(y[part])]) for part in parts for pick in (np.argmin, np.argmax))}
    of = lambda values: [values[i] for i in sorted(kept)]
    bands = [(of(low), of(high), opacity) for low, high, opacity in line.bands]
    return dataclasses.replace(line, x=of(line.x), y=of(line.y), bands=bands)


def histograms(sides: Sequence[tuple[str, str, Values]], x: str, y: str, mark: Mark | None = None) -> Panel:
    """Histograms (name, colour, counts) behind each other, as of measure.histogram: over the same edges, or of a few
    values. `y` is what is counted; one histogram alone needs no name."""
    values = [value for *_, counts in sides for value in counts.get("values", ())]
    distinct = sorted(set(values))
    beside = len(sides) if len(distinct) < len(values) else 1  # bars of the same value stand beside each other
    width = 0.8 * min((b - a for a, b in itertools.pairwise(distinct)), default=1) / beside

    def paint(axes: Axes) -> None:
        axes.set(xlabel=x, ylabel=y)
        for i, (name, color, counts) in enumerate(sides):
            if "edges" in counts:
                opacity = 0.35 if len(sides) > 1 else 1
                axes.stairs(counts["counts"], counts["edges"], fill=True, color=color, alpha=opacity, label=name)
                axes.stairs(counts["counts"], counts["edges"], color=color, linewidth=1.3)
            else:
                moved = width * (i - (beside - 1) / 2) if beside > 1 else 0
                axes.bar(np.array(counts["values"], float) + moved, counts["counts"], width, color=color, label=name)
        _draw_mark(axes, mark)
        axes.margins(y=0.05)
        if distinct and len(distinct) <= 8:
            axes.set_xticks(distinct, [f"{value:.3g}" for value in distinct])
        _thousands(axes.xaxis, integer=bool(distinct) and all(value == int(value) for value in distinct))
        _thousands(axes.yaxis, integer=True)

    return paint


def split_at_zero(counts: Values, names: tuple[str, str], colors: tuple[str, str]) -> list[tuple[str, str, Values]]:
    """The sides of a histogram that are below and above 0, for `histograms`; a value of 0 belongs to neither."""
    number = np.array(counts["counts"])
    if "edges" in counts:
        middle = (np.array(counts["edges"][:-1], float) + np.array(counts["edges"][1:], float)) / 2
        part = lambda here: {"edges": counts["edges"], "counts": np.where(here, number, 0).tolist()}
    else:
        middle = np.array(counts["values"], float)
        part = lambda here: {"values": middle[here].tolist(), "counts": number[here].tolist()}
    sides = [*zip(names, colors, (part(middle < 0), part(middle > 0))), ("", SOFT, part(middle == 0))]
    return [(name, color, side) for name, color, side in sides if name or sum(side["counts"])]


def reliability(bins: Values, x: str, y: str) -> Panel:
    """Stated probability `x` against the share `y` that is right; grey bars say how many are in each of the bins.

    `bins` has "edges", "counts", "predicted" and "observed"; the latter two are None in empty bins.
    """
    edges, counts = bins["edges"], np.array(bins["counts"], float)
    known = [(p, o) for p, o in zip(bins["predicted"], bins["observed"]) if p is not None and o is not None]

    def paint(axes: Axes) -> None:
        low = min([edges[0], *(math.floor(10 * o) / 10 for _, o in known)])
        axes.set(xlabel=x, ylabel=y, xlim=(edges[0], 1.005), ylim=(low, 1.02))
        tall = 0.2 * (1.02 - low) * counts / counts.max()
        axes.bar(edges[:-1], tall, np.diff(edges) * 0.92, bottom=low, align="edge", color=FAINT)
        axes.plot([edges[0], 1], [edges[0], 1], label="perfectly calibrated", **DASHED)
        axes.plot(*zip(*known), color=VALIDATION, marker="o", markersize=5, linewidth=1.6)
        _percent(axes.xaxis)
        _percent(axes.yaxis)

    return paint


def intervals(rows: Sequence[Values], mark: Mark | None) -> Panel:
    """Shares with their 95 % intervals, one row each, and what they are compared with.

    A row is {"name", "value", "low", "high"} and "count", how many are behind it, or None.
    """

    def paint(axes: Axes) -> None:
        _draw_mark(axes, mark)
        for place, row in enumerate(rows):
            if row["low"] is not None and row["high"] is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=VALIDATION, linewidth=1.6, alpha=0.55)
            axes.plot([row["value"]], [place], color=VALIDATION, marker="o", markersize=5)
        number = lambda row: "" if row.get("count") is None else f"  ({short(row['count'])})"
        axes.set_yticks(range(len(rows)), [cut(row["name"]) + number(row) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.06)
        _percent(axes.xaxis)

    return paint


def tall(rows: Sequence[Any]) -> float:
    """Inches that so many rows of `intervals` or `categories` need, with title and axis."""
    return 0.95 + 0.23 * len(rows)


def categories(counts: Mapping[str, int]) -> Panel:
    """Bars for named counts, each with its number; those of zero are left out."""
    shown = {name: n for name, n in counts.items() if n}

    def paint(axes: Axes) -> None:
        bars = axes.barh(list(shown), list(shown.values()), 0.6, color=FILL)
        axes.bar_label(bars, [short(n) for n in shown.values()], padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.3 * max(shown.values(), default=1))
        axes.set_xticks([])

    return paint


def cut(name: str, most: int = LONGEST) -> str:
    """A name on one line, with its middle left out where it is long: both ends of paths and names tell."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - most + most // 2 + 1 :]}"


def short(n: float) -> str:
    """1,234 -> "1,234"; 1234567 -> "1.23 M"."""
    return f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n:,.0f}"


def _draw_mark(axes: Axes, mark: Mark | None) -> None:
    if mark is not None:
        axes.axvline(mark[0], label=mark[1], **DASHED)


def _thousands(axis: Any, integer: bool = False) -> None:
    """Ticks as 20,000 and 2 M; few enough not to touch each other."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    if not isinstance(axis.get_major_locator(), FixedLocator):
        axis.set_major_locator(MaxNLocator(5, integer=integer, steps=[1, 2, 2.5, 5, 10]))
        number = lambda x, _: f"{x:,.6g}" if abs(x) < 1e4 else short(x)
        axis.set_major_formatter(FuncFormatter(number))


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g}%"))
