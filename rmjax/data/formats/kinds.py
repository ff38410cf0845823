"""Kinds of cells: what a column must hold, in words and as a test."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from rmjax.data.records import BadRow


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the cells of a column must be."""

    words: str
    test: Callable[[Any], bool]

    def wrong(self, column: str, cell: Any) -> BadRow:
        """The defect of a cell of another kind."""
        return BadRow("wrong_type", f"{column} is {show(cell)}, expected {self.words}")

    def optional(self, row: Mapping[str, Any], column: str) -> Any:
        """The cell of an optional column; None where it says nothing, BadRow (`wrong_type`) where it is wrong."""
        cell = row.get(column)
        if is_null(cell):
            return None
        if not self.test(cell):
            raise self.wrong(column, cell)
        return cell


def show(cell: Any) -> str:
    """A cell in a few words, with its type."""
    text = repr(cell)
    return f"{type(cell).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def is_null(cell: Any) -> bool:
    """Null, or NaN, which is how pandas writes null."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def is_number(cell: Any) -> bool:
    """A number, finite or not, that a float can hold; true and false are none."""
    return isinstance(cell, float) or (isinstance(cell, int) and not isinstance(cell, bool) and abs(cell) < 2**1023)


def _is_messages(cell: Any) -> bool:
    return isinstance(cell, list) and bool(cell) and all(isinstance(m, Mapping) for m in cell)


def _is_tools(cell: Any) -> bool:
    try:
        return isinstance(json.loads(cell) if isinstance(cell, str) else cell, list)
    except json.JSONDecodeError:
        return cell == ""


def list_of(kind: Kind, words: str) -> Kind:
    """A list, not empty, of cells of a kind."""
    return Kind(f"a list of {words}", lambda c: isinstance(c, list) and bool(c) and all(map(kind.test, c)))


def one_of(*values: Any) -> Kind:
    """One of some values; 1 and 1.0 are the same, 1 and true are not."""
    equal = lambda cell, value: cell == value and isinstance(cell, bool) == isinstance(value, bool)
    return Kind("one of " + ", ".join(map(repr, values)), lambda cell: any(equal(cell, v) for v in values))


TEXT = Kind("text", lambda cell: isinstance(cell, str))
MESSAGES = Kind("a list of messages", _is_messages)
TURN = Kind("text, a message, or a list of messages", lambda c: isinstance(c, str | Mapping) or _is_messages(c))
PROMPT = Kind("text or a list of messages", lambda c: isinstance(c, str) or _is_messages(c))
NUMBER = Kind("a finite number", lambda cell: is_number(cell) and math.isfinite(cell))
NOT_NEGATIVE = Kind("a number >= 0", lambda cell: NUMBER.test(cell) and cell >= 0)
BOOLEAN = Kind("true or false, or 1 or 0", lambda cell: isinstance(cell, bool | int) and cell in (0, 1))
OBJECT = Kind("an object", lambda cell: isinstance(cell, Mapping))
LIST = Kind("a list", lambda cell: isinstance(cell, list))
TOOLS = Kind("a list, or JSON of one", _is_tools)
VOTE = one_of(0, 1, 2)  # 1 and 2 are the better response, 0 a tie
TEXTS = list_of(TEXT, "texts")
NUMBERS = list_of(Kind("a number or null", lambda cell: is_null(cell) or NUMBER.test(cell)), "numbers or nulls")
PRINCIPLE = Kind("text or a list of texts", lambda cell: TEXT.test(cell) or TEXTS.test(cell))
# Columns that any row may have.
COMMON = {"source": TEXT, "weight": NOT_NEGATIVE, "system": TEXT, "tools": TOOLS, "principle": PRINCIPLE}
