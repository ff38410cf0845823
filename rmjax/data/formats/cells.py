"""What the readers of all formats share: the columns any row may have, and how messages and scores are read.

Any format may carry these columns; a missing or null cell means that the row says nothing there:

    source, weight      name of the data set; weight in the loss
    system, tools       system message, where the conversation has none; tool descriptions, a list or JSON of one
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.kinds import Kind
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
class Reading:
    """What a reader needs besides the row."""

    source: str  # name of the source, where the row does not name one
    where: str  # where the row stands there
    keep: bool = False  # let defects that allow training (records.KEEPABLE) through
    by_place: bool = False  # `preference` is a place in [1, 2], not a probability in [0, 1]
    attributes: tuple[str, ...] = ()  # columns that are scores of the response, where the format has such
    # Takes the defects of parts that the row can be used without; None: the first such part makes the row a BadRow.
    defects: list[BadRow] | None = None


Reader = Callable[[Row, Reading], Record | Sequence[Record]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format on disk."""

    name: str  # for config.data.format
    columns: Mapping[str, Kind]  # that it must have
    read: Reader  # makes the record, or the records, of a row whose cells are of the right kinds
    agrees: Callable[[Row], bool]  # whether such a row can be this format, where others have the same columns
    optional: Mapping[str, Kind]  # further columns that it reads where they are
    scores: bool  # every other column of numbers is an attribute

    @property
    def means(self) -> str:
        """What a row is and what its labels mean: the first paragraph of the reader's docstring."""
        return " ".join((self.read.__doc__ or "").partition("\n\n")[0].split()).removesuffix(".")


def row_format(
    name: str,
    columns: Mapping[str, Kind],
    agrees: Callable[[Row], bool] = lambda row: True,
    *,
    optional: Mapping[str, Kind] = kinds.COMMON,
    scores: bool = False,
) -> Callable[[Reader], Format]:
    """Decorates the reader of a format; its docstring says what a row and its labels mean."""
    return lambda read: Format(name, columns, read, agrees, optional, scores)


def named_only(row: Row) -> bool:
    """For `agrees`: a format that is never detected, because its columns are those of another."""
    return False


def common(row: Row, reading: Reading) -> dict[str, Any]:
    """What any row may say, as keyword arguments of records.group and records.pair."""
    weight = kinds.NOT_NEGATIVE.optional(row, "weight")
    tools = kinds.TOOLS.optional(row, "tools")
    return {
        "weight": 1.0 if weight is None else float(weight),
        "tools": (json.loads(tools) if isinstance(tools, str) and tools else tools) or None,
        "source": kinds.TEXT.optional(row, "source") or reading.source,
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


def answered(row: Row, prompt: Any, texts: Sequence[Any]) -> list[list[Message]]:
    """A conversation for each text, which answers the prompt (a cell as `prompt_turns` takes it)."""
    turns = prompt_turns(row, prompt)
    return [[*turns, answer(text)] for text in texts]


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
    system = kinds.TEXT.optional(row, "system")
    if not system or (turns and turns[0].get("role") == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def answer(text: Any) -> Message:
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
        raise BadRow("wrong_type", f"a message's role is {kinds.show(role)}, expected one of {', '.join(ROLE_NAMES)}")
    content = message.get("content", message.get("value"))
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "from", "value") and v is not None}
    return {"role": ROLE_NAMES[role.lower()], **({} if content is None else {"content": content}), **rest}


def score(cell: Any, name: str) -> float:
    """A score; NaN where it is null or MISSING."""
    if kinds.is_null(cell) or cell == MISSING:
        return math.nan
    if not kinds.NUMBER.test(cell):
        raise kinds.NUMBER.wrong(name, cell)
    return float(cell)
