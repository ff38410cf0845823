"""How all plots look, and how they become SVG for a page and PNG for a file: one style for audits and reports.

matplotlib is imported when something is drawn: it takes half a second, which most commands need not wait for.
"""

import contextlib
import html
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Of text and lines on white, all at 4.5 : 1 or more (WCAG 2.2, 1.4.3), and told apart with red-green blindness.
INK, SOFT, FAINT, FILL, LINE = "#1f2933", "#52606d", "#d5dae0", "#8fb3d9", "#b4552d"
TRAIN, VALIDATION = "#b3591a", "#1c5d99"
CHOSEN, REJECTED = "#007a5e", "#75309a"
DATA = (FILL, LINE, TRAIN, VALIDATION, CHOSEN, REJECTED)  # what is drawn in these was measured
STYLE: Any = {  # a dict with keys of matplotlib.rcParams
    "svg.fonttype": "none",  # text stays text, in the page's typeface
    "text.parse_math": False,  # names of data may have dollar signs
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
DOTS = 200  # an inch, of a PNG
NAMED = r' id="(figure|axes|patch|matplotlib|xtick|ytick|text|line2d|legend|[A-Z]\w*Collection|[A-Z])[\w.]*"'

Axes = Any  # of matplotlib
Panel = Callable[[Axes], None]


# ----------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------


def draw(panels: Sequence[Panel], says: str, high: float = HIGH, wide: float = WIDE) -> str:
    """Draws panels side by side, three in a row; returns an <svg> element that refers to nothing outside it.

    Args:
        panels: each paints one axes.
        says: what is to be seen, for those who cannot; every figure of a page needs its own.
        high: inches of a row of panels.
        wide: inches of a row of panels.
    """
    with _figure(panels, says, high, wide) as figure:
        return _svg(figure, says)


def draw_both(panels: Sequence[Panel], says: str, high: float = HIGH, wide: float = WIDE) -> tuple[str, bytes]:
    """The same as `draw`, and as a PNG file."""
    with _figure(panels, says, high, wide) as figure:
        svg = _svg(figure, says)
        figure.set_layout_engine("none")  # keeps what was laid out, which takes longer than drawing
        return svg, _png(figure)


@contextlib.contextmanager
def _figure(panels: Sequence[Panel], says: str, high: float, wide: float) -> Iterator[Any]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": says}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a page shows every script, a PNG boxes for some
        figure = Figure(figsize=(wide, high * down), layout=ConstrainedLayoutEngine(hspace=0.06, wspace=0.04))
        FigureCanvasSVG(figure)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, panel in zip(grid, panels):
            panel(axes)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        yield figure


def _svg(figure: Any, says: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(NAMED, "", re.sub(r" font-family: [^;]*;", "", svg))
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(says)}"', 1)


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DOTS, metadata={"Software": None})
    return data.getvalue()


# ----------------------------------------------------------------------------------------------------
# Panels
# ----------------------------------------------------------------------------------------------------


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
        thousands(axes.yaxis, integer=True)
        thousands(axes.xaxis, integer=all(x == int(x) for x in counts.get("values", (0.5,))))

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
            axes.annotate(short(n), (n, at), (4, 0), textcoords="offset points", va="center", fontsize=9)

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
        thousands(axes.xaxis)

    return paint


def short(n: float) -> str:
    """1,234 -> "1,234"; 1234567 -> "1.23 M"."""
    return f"{n / 1e6:.3g} M" if n >= 1e6 else f"{n:,.0f}"


def thousands(axis: Any, integer: bool = False) -> None:
    """Ticks as 20,000 and 2 M; few enough not to touch each other."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    if not isinstance(axis.get_major_locator(), FixedLocator):
        axis.set_major_locator(MaxNLocator(5, integer=integer, steps=[1, 2, 2.5, 5, 10]))
        number = lambda x, _: f"{x:,.6g}" if abs(x) < 1e4 else short(x)
        axis.set_major_formatter(FuncFormatter(number))


def percent(axis: Any) -> None:
    """Ticks of shares as 20 % and 80 %."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g}%"))
