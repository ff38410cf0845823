"""What a document is made of, however it is shown: sections with words, tables, plots and code.

A document is a list of sections, made from JSON-like values; `show` renders it as text, Markdown or HTML. A part is a
`str`, which is a paragraph, one of the classes here, or a list of plots or of pairs.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from rmjax.report import drawing


class Good(str):
    """Words or a cell that are good news."""


class Bad(str):
    """Words or a cell that are bad news."""


class Markdown(str):
    """Words or a cell with `code` and [links](...) that are meant so; others are shown character by character."""


class Caption(str):
    """Words about plots; only a page shows them."""


Cell: TypeAlias = str | tuple[str, str]  # the second of a pair is less important, as an interval after its value


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, all equally many; without rows it is left out."""

    rows: Sequence[Sequence[Cell]]
    head: Sequence[str] = ()  # names of the columns, or none
    numbers: Sequence[int] = ()  # columns that are aligned on the right
    title: str = ""
    quiet: Sequence[int] = ()  # explaining columns, which a phone and a terminal have no room for
    large: Sequence[int] = ()  # rows whose second cell a page shows large above the table

    def __bool__(self) -> bool:
        return bool(self.rows)


@dataclasses.dataclass(frozen=True)
class Plot:
    """One panel; a page shows it drawn, text and Markdown show its table."""

    name: str  # of its PNG file, without the ending; unique in a document
    title: str
    panel: drawing.Panel
    alt: str  # what is to be seen, for those who cannot; unique in a document
    high: float = drawing.HIGH  # inches
    table: Table | None = None  # the same as numbers, if these are to be read


@dataclasses.dataclass(frozen=True)
class Code:
    """A block of code; the language is as Markdown names it."""

    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list with a bullet for each line."""

    lines: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.lines)


Run: TypeAlias = tuple[bool, str]  # whether it stands in both texts, and the text


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, with the words that differ; only a page has room for them."""

    heading: str
    place: str
    prompt: str
    preferred: Sequence[Run]
    rejected: Sequence[Run]


@dataclasses.dataclass(frozen=True)
class Folded:
    """Parts that a page shows on request."""

    title: str
    parts: Sequence[Any]

    def __bool__(self) -> bool:
        return any(self.parts)


Part: TypeAlias = str | Table | Code | Items | Folded | Sequence[Plot] | Sequence[Pair]


class Section:
    """Parts under a heading of level 2 or 3; without a title they belong to the document's beginning."""

    def __init__(self, title: str, *parts: Part, level: int = 2):
        self.title, self.level = title, level
        self.parts: list[Part] = [part for part in parts if part]

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def anchor(self) -> str:
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())

    @property
    def plots(self) -> Iterator[Plot]:
        for part in self.parts:
            if isinstance(part, list):
                yield from (x for x in part if isinstance(x, Plot))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
