"""How all plots look, and how they become SVG for a page and PNG for a file.

matplotlib is imported when something is drawn: it takes half a second, which most commands need not wait for.
"""

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

# Of text and lines on white, all at 4.5 : 1 or more (WCAG 2.2, 1.4.3), and told apart with red-green blindness.
INK, SOFT, FAINT, FILL = "#1f2933", "#52606d", "#d5dae0", "#8fb3d9"
TRAIN, VALIDATION = "#b3591a", "#1c5d99"
CHOSEN, REJECTED = "#007a5e", "#75309a"
DATA = (FILL, TRAIN, VALIDATION, CHOSEN, REJECTED)  # what is drawn in these was measured
STYLE: Any = {  # a dict with keys of matplotlib.rcParams
    "svg.fonttype": "none",  # text stays text, in the page's typeface
    "text.parse_math": False,  # names of data may have dollar signs
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), FAINT),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
    "axes.grid.axis": "y",
    "grid.linewidth": 0.6,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.borderpad": 0,
}
WIDE, HIGH = 4.7, 2.75  # inches; two stand beside each other on a desk, one on a phone
DOTS = 200  # an inch, of a PNG
NAMED = r' id="(figure|axes|patch|matplotlib|xtick|ytick|text|line2d|legend|[A-Z]\w*Collection|[A-Z])[\w.]*"'

Axes = Any  # of matplotlib
Panel = Callable[[Axes], None]


def draw(panel: Panel, title: str, alt: str, high: float = HIGH, png: bool = False) -> tuple[str, bytes]:
    """Draws a panel under its title, `high` inches; every figure of a page needs an `alt` text of its own.

    Returns:
        An <svg> element that refers to nothing outside it, and with `png` a PNG file, else b"".
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": alt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a page shows every script, a PNG boxes for some
        figure = Figure(figsize=(WIDE, high), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        panel(axes)
        if axes.get_legend_handles_labels()[0]:  # above the panel, where it covers no data
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10, weight="bold")
        text, data = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        if png:
            figure.set_layout_engine("none")  # keeps what was laid out, which takes longer than drawing
            figure.savefig(data, format="png", dpi=DOTS, metadata={"Software": None})
    return _inline(text.getvalue(), alt), data.getvalue()


def _inline(svg: str, alt: str) -> str:
    """The <svg> element of a file, without what only a file needs."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(NAMED, "", re.sub(r" font-family: [^;]*;", "", svg))
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
