"""What the readers of all formats share: kinds of cells, the columns any row may have, and how messages are read.

Any format may carry these columns; a missing or null cell means that the row says nothing there:

    source, weight      name of the data set; weight in the loss
    system, tools       system message, where the conversation has none; tool descriptions, a list or JSON of one
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmjax.data.records import BadRow, Message, Record

Row = Mapping[str, Any]

TURN_MARK = "<extra_id_1>"  # before each turn of a text, in NeMo's data and in HelpSteer2's prompts
MISSING = -100  # a score that was not given, as NeMo's data writes it
ROLE_NAMES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the cells of a column must be."""

    words: str
    test: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reader is told besides the row.

    Attributes:
        source: name of the source.
        where: where the row stands there.
        keep: let defects that allow training (records.KEEPABLE) through.
        by_place: `preference` is a place in [1, 2], not a probability in [0, 1].
        attributes: columns that are scores of the response, where the format has such.
        defects: takes what is wrong with parts of the row that the rest can be used without; None: the first such
            part makes the whole row a BadRow.
    """

    source: str
    where: str
    keep: bool = False
    by_place: bool = False
    attributes: tuple[str, ...] = ()
    defects: list[BadRow] | None = None

    def leave_out(self, bad: BadRow) -> None:
        """Goes on without a part of the row.

        Raises:
            BadRow: nobody counts such parts.
        """
        if self.defects is None:
            raise bad
        self.defects.append(bad)


@dataclasses.dataclass(frozen=True)
class Format:
    """A format on disk.

    Attributes:
        name: its name, for config.data.format.
        columns: the columns it must have, and what is in them.
        read: makes the record, or the records, of a row whose cells are of the right kinds.
        agrees: whether a row (with cells of the right kinds) can be this format, where others have the same columns.
        optional: further columns that it reads where they are.
        scores: attribute columns are looked for: every other column of numbers is one.
        means: what a row is and what its labels mean, for people, in a sentence.
    """

    name: str
    columns: Mapping[str, Kind]
    read: Callable[[Row, Reading], Record | Sequence[Record]]
    agrees: Callable[[Row], bool] = lambda row: True
    optional: Mapping[str, Kind] = dataclasses.field(default_factory=lambda: COMMON)
    scores: bool = False
    means: str = ""


def show(cell: Any) -> str:
    """A cell in a few words, with its type."""
    text = repr(cell)
    return f"{type(cell).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def wrong(column: str, cell: Any, kind: Kind) -> BadRow:
    """The defect of a cell of another kind than its column's."""
    return BadRow("wrong_type", f"{column} is {show(cell)}, expected {kind.words}")


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
TEXTS = list_of(TEXT, "texts")
NUMBERS = Kind(
    "a list of numbers or nulls",
    lambda c: isinstance(c, list) and bool(c) and all(is_null(x) or NUMBER.test(x) for x in c),
)

COMMON: Mapping[str, Kind] = {
    "source": TEXT,
    "weight": NOT_NEGATIVE,
    "system": TEXT,
    "tools": Kind("a list, or JSON of one", _is_tools),
}


def optional(row: Row, column: str, kind: Kind) -> Any:
    """The cell of an optional column; None where it says nothing.

    Raises:
        BadRow: `wrong_type`.
    """
    cell = row.get(column)
    if is_null(cell):
        return None
    if not kind.test(cell):
        raise wrong(column, cell, kind)
    return cell


def common(row: Row, reading: Reading) -> dict[str, Any]:
    """What any row may say, as keyword arguments of records.group and records.pair."""
    weight = optional(row, "weight", COMMON["weight"])
    tools = optional(row, "tools", COMMON["tools"])
    return {
        "weight": 1.0 if weight is None else float(weight),
        "tools": (json.loads(tools) if isinstance(tools, str) and tools else tools) or None,
        "source": optional(row, "source", TEXT) or reading.source,
        "row": reading.where,
        "keep": reading.keep,
        "defects": reading.defects,
    }


def prompt_turns(row: Row, cell: Any) -> list[Message]:
    """The turns before the response: the `system` column, where `cell` brings no such message, and `cell`.

    >>> prompt_turns({"system": "be kind"}, "hi")
    [{'role': 'system', 'content': 'be kind'}, {'role': 'user', 'content': 'hi'}]
    """
    marked = isinstance(cell, str) and f"\n{TURN_MARK}Assistant\n" in cell
    return with_system(row, marked_turns(cell) if marked else messages(cell, "user"))


def marked_turns(text: str) -> list[Message]:
    r"""Reads "<extra_id_0>System\nbe kind\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\nyo\n<extra_id_2>".

    A text that begins without a mark begins with a user's turn. The newline before a mark is layout; <extra_id_2> and
    what follows it, attributes as text, are no part of the turn; an empty system message is none.

    >>> marked_turns("hi\n<extra_id_1>Assistant\nyo\n<extra_id_1>User\nbye")[1:]
    [{'role': 'assistant', 'content': 'yo'}, {'role': 'user', 'content': 'bye'}]
    """
    first, *pieces = text.replace("<extra_id_0>", TURN_MARK).split(TURN_MARK)
    turns = [("User", first)] if first else []
    turns += [(name, words) for name, _, words in (piece.partition("\n") for piece in pieces)]
    contents = [(name, words.partition("<extra_id_2>")[0].removesuffix("\n")) for name, words in turns]
    read = [_message({"role": name, "content": words}) for name, words in contents]
    return read[1:] if read and read[0] == {"role": "system", "content": ""} else read


def with_system(row: Row, turns: list[Message]) -> list[Message]:
    """Puts the `system` column before a conversation that has no system message of its own."""
    system = optional(row, "system", TEXT)
    if not system or (turns and turns[0].get("role") == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def answer(text: Any) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


def messages(cell: Any, last_role: str = "assistant") -> list[Message]:
    """Reads a cell of messages, in either naming; text alone is one turn of `last_role`.

    >>> messages([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}])
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    """
    if isinstance(cell, str):
        return [{"role": last_role, "content": cell}]
    return [_message(m) for m in ([cell] if isinstance(cell, Mapping) else cell)]


def _message(message: Any) -> Message:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
        raise BadRow("wrong_type", f"a message's role is {show(role)}, expected one of {', '.join(ROLE_NAMES)}")
    content = message.get("content", message.get("value"))
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "from", "value") and v is not None}
    return {"role": ROLE_NAMES[role.lower()], **({} if content is None else {"content": content}), **rest}


def score(cell: Any, name: str) -> float:
    """A score; NaN where it is null or MISSING.

    Raises:
        BadRow: `wrong_type`.
    """
    if is_null(cell) or cell == MISSING:
        return math.nan
    if not NUMBER.test(cell):
        raise wrong(name, cell, NUMBER)
    return float(cell)
