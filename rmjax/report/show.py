"""Renders sections as lines of text, as Markdown, and as one HTML page that loads nothing."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence

import jinja2
import jinja2.sandbox

from rmjax.report import drawing
from rmjax.report.html_page import PAGE
from rmjax.report.section import Bad, Caption, Cell, Code, Folded, Good, Items, Markdown, Part, Plot, Section, Table

WIDTH = 110  # characters of a table in text
NARROW = 12  # characters that a column keeps where a table is too wide


def to_text(sections: Sequence[Section]) -> list[str]:
    """Lines for a terminal: sections of level 2 with a line between them, tables aligned, plots as their tables."""
    lines: list[str] = []
    for section in sections:
        lines += [""] * bool(lines and section.level == 2) + [section.title] * bool(section.title)
        lines += [line for part in section.parts for line in _text(part)]
    return lines


def _text(part: Part) -> list[str]:
    match part:
        case Table():
            return [part.title] * bool(part.title) + _aligned(part)
        case Folded():
            return [part.title, *(line for inner in part.parts for line in _text(inner))]
        case Items():
            return [f"  - {line}" for line in part.lines]
        case Code():
            return textwrap.indent(part.text, "    ").splitlines()
        case Caption():
            return []
        case str():
            return [part]
        case _:
            return [line for table in _tables(part) for line in _text(table)]


def _tables(parts: Sequence[object]) -> list[Table]:
    return [plot.table for plot in parts if isinstance(plot, Plot) and plot.table]


def _aligned(table: Table) -> list[str]:
    """The columns of a table beside each other; the long ones are wrapped where it is too wide."""
    rows = [[*table.head]] * any(table.head) + [*map(list, table.rows)]
    columns = [column for i, cells in enumerate(zip(*rows)) if i not in table.quiet
               for column in _split(cells, right=i in table.numbers)]  # fmt: skip
    width = [max(len(line) for cell in cells for line in cell.split("\n")) for cells, _ in columns]
    while 2 * len(width) + sum(width) > WIDTH and max(width) > NARROW:
        width[width.index(max(width))] -= 1
    lines = []
    for row in zip(*(cells for cells, _ in columns)):
        wrapped = [_wrapped(cell, n) for cell, n in zip(row, width)]
        for texts in itertools.zip_longest(*wrapped, fillvalue=""):
            cells = (text.rjust(n) if right else text.ljust(n) for text, n, (_, right) in zip(texts, width, columns))
            lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def _split(cells: Sequence[Cell], right: bool) -> Iterator[tuple[list[str], bool]]:
    """A column, with whether it is aligned on the right; the second of pairs is a column too, or in lines below."""
    pairs = [(cell, "") if isinstance(cell, str) else cell for cell in cells]
    first, second = ([text.replace("\n", " ") for text in column] for column in zip(*pairs))
    if right and any(second):
        yield from ((first, True), (second, False))
    else:
        yield [f"{a}\n{b}" if b else a for a, b in zip(first, second)], right


def _wrapped(cell: str, width: int) -> list[str]:
    """Lines of a cell; names of files and the like stay whole."""
    if len(cell) <= width and "\n" not in cell:
        return [cell]
    fold = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return [part for line in cell.split("\n") for part in fold.wrap(line)]


def to_markdown(sections: Sequence[Section]) -> str:
    blocks = []
    for section in sections:
        blocks += [f"{'#' * section.level} {_plain(section.title)}"] * bool(section.title)
        blocks += [block for part in section.parts for block in _markdown(part)]
    return "\n\n".join(blocks) + "\n"


def _markdown(part: Part) -> list[str]:
    match part:
        case Table():
            head = [part.head or [""] * len(part.rows[0])]
            rows = [[_markdown_cell(cell) for cell in row] for row in [*head, *part.rows]]
            rows.insert(1, ["---"] * len(rows[0]))
            return [f"**{_plain(part.title)}**"] * bool(part.title) + ["\n".join(f"| {' | '.join(x)} |" for x in rows)]
        case Folded():
            inner = "\n\n".join(block for inner in part.parts for block in _markdown(inner))
            return [f"<details><summary>{_plain(part.title)}</summary>\n\n{inner}\n\n</details>"]
        case Items():
            return ["\n".join(f"- {_plain(line)}" for line in part.lines)]
        case Code():
            return [f"```{part.language}\n{part.text}\n```"]
        case Caption():
            return []
        case str():
            return [f"**{_plain(part)}**" if isinstance(part, Good | Bad) else _plain(part)]
        case _:
            return [block for table in _tables(part) for block in _markdown(table)]


def _markdown_cell(cell: Cell) -> str:
    first, second = (cell, "") if isinstance(cell, str) else cell
    return (_plain(first) + (f" ({_plain(second)})" if second else "")).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text on one line, which is no markup unless it is meant so: names in data are written by others."""
    if isinstance(text, Markdown):
        return text
    escaped = "".join(f"\\{c}" if c in "\\`*[" else c for c in " ".join(text.split()))
    return escaped.replace("<", "&lt;")


def to_html(
    title: str, sections: Sequence[Section], *, kind: str, notes: Sequence[str] = (), png: bool = False
) -> tuple[str, dict[str, bytes]]:
    """Renders a page with nothing that is loaded from elsewhere; `kind` stands above the title, `notes` below it.

    Returns:
        The page; and with `png` files of the plots by a file name that is unique in the page.
    """
    plots = [plot for section in sections for plot in section.plots]
    drawn = {x.alt: drawing.draw(x.panel, x.title, x.alt, x.high, png) for x in plots}
    environment = jinja2.sandbox.SandboxedEnvironment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = lambda x: type(x[0] if isinstance(x, list) else x).__name__
    environment.filters["look"] = lambda x: type(x).__name__ if isinstance(x, Good | Bad) else ""
    svg = {alt: text for alt, (text, _) in drawn.items()}
    values = {"title": title, "sections": sections, "eyebrow": kind, "notes": notes, "svg": svg}
    files = {f"{name}.png": drawn[plot.alt][1] for name, plot in zip(_file_names(plots), plots)} if png else {}
    return environment.from_string(PAGE).render(values), files


def _file_names(plots: Sequence[Plot]) -> Iterator[str]:
    """Names of plots with nothing but letters, digits and underscores, and none twice."""
    taken: set[str] = set()
    for plot in plots:
        name = "".join(c if c.isalnum() and c.isascii() else "_" for c in plot.name)[:80]
        free = next(x for i in itertools.count(1) if (x := name if i == 1 else f"{name}_{i}") not in taken)
        taken.add(free)
        yield free
