r"""What the columns of a row mean: one line of `FORMATS` per format, read into records.

A format is recognised by its columns and, where columns overlap, by the first rows (`LOOK`), all of which
must agree. A column that is wrong in all of them is an error; a cell that is wrong is a BadRow, which the
audit counts.

Any pair format may carry these columns; a missing or null cell means that the row says nothing there:

    source, weight, system, tools     name of the data set; weight in the loss; system message; JSON or a list
    margin                            by how much the better one is better, >= 0
    preference_strength               the same; read where there is no margin
    chosen_score, rejected_score      their difference is the margin; contradicting the label makes a bad row
    preference                        either the probability in [0, 1] that `chosen` is better, or the place in
                                      [1, 2] of the better one, 1 for `chosen`; 1 means the same in both
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmjax.data.records import BadRow, Message, Record, pair

Row = Mapping[str, Any]
Turns = tuple[list[Message], list[Message]]

LOOK = 1000  # rows that decide the format
TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLE_NAMES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"},
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the cells of a column must be."""

    words: str
    test: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format on disk.

    Attributes:
        name: its name, for config.data.format.
        columns: the columns it must have, and what is in them.
        agrees: whether a row (with cells of the right kinds) can be this format, where others have the same
            columns.
        read: makes the record, or the records, of a row whose cells are of the right kinds; arguments as Layout.read, and
            `by_place`.
    """

    name: str
    columns: Mapping[str, Kind]
    agrees: Callable[[Row], bool]
    read: Callable[..., Record | Sequence[Record]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of one source are read.

    Attributes:
        name: the format, a name in FORMATS.
        by_place: `preference` is a place in [1, 2], not a probability in [0, 1].
    """

    name: str
    by_place: bool = False

    def read(self, row: Row, *, source: str, where: str, keep: bool = False) -> Sequence[Record]:
        """Reads the records of one row; with `keep`, defects that allow training (records.KEEPABLE) are let through.

        Raises:
            BadRow: the row cannot be used.
        """
        for column, kind in FORMATS[self.name].columns.items():
            if not kind.test(row.get(column)):
                raise _wrong(column, row.get(column), kind)
        made = FORMATS[self.name].read(row, by_place=self.by_place, source=source, where=where, keep=keep)
        return [made] if isinstance(made, Record) else made


def detect(rows: Sequence[Row], name: str = "auto") -> Layout:
    """Finds the format of a source from its first rows, or checks the one that is named.

    Raises:
        ValueError: no format fits or several do, or a column is wrong throughout; lists what was seen and
            what is known.
    """
    if name != "auto" and name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown data format {name!r}; known: {', '.join(FORMATS)}{hint}")
    if not rows:
        raise ValueError("there are no rows to see a format in")
    columns = dict.fromkeys(column for row in rows for column in row)
    seen = {column: [row[column] for row in rows if not _is_null(row.get(column))] for column in columns}
    if name == "auto":
        found = [f for f in FORMATS.values() if _fits(f, rows)]
        if len(found) != 1:
            raise ValueError(_unclear(found, rows, seen))
        form = found[0]
    else:
        form = FORMATS[name]
    for column, kind in (*form.columns.items(), *OPTIONAL.items()):
        cells = seen.get(column, [])
        if not (cells or column in OPTIONAL):
            raise ValueError(f"{form.name} needs a column {column!r} ({kind.words}); found {_columns(seen)}")
        if cells and not any(map(kind.test, cells)):
            raise ValueError(
                f"column {column!r} is wrong throughout: {kind.words} was expected, the first row has {_show(cells[0])}"
            )
    return Layout(form.name, _by_place(seen.get("preference", [])))


def _fits(form: Format, rows: Sequence[Row]) -> bool:
    """Whether some row has every cell of the right kind, and all such rows agree."""
    usable = [row for row in rows if all(kind.test(row.get(c)) for c, kind in form.columns.items())]
    return bool(usable) and all(map(form.agrees, usable))


def _unclear(found: Sequence[Format], rows: Sequence[Row], seen: Mapping[str, list[Any]]) -> str:
    what = f"{len(rows)} rows with the columns {_columns(seen)}"
    known = "; ".join(
        f"{f.name}: {', '.join(f'{c} ({k.words})' for c, k in f.columns.items())}" for f in FORMATS.values()
    )
    if found:
        names = ", ".join(f.name for f in found)
        return f"ambiguous data format: {what} fit {names}; name one with config.data.format"
    shared = lambda f: sum(c in seen and any(map(k.test, seen[c])) for c, k in f.columns.items()) / len(f.columns)
    closest = max(FORMATS.values(), key=shared)
    mixed = [f.name for f in FORMATS.values() if any(_fits(f, [row]) for row in rows)]
    why = f"the rows do not agree (some are {', some '.join(mixed)})" if mixed else f"closest is {closest.name}"
    return f"unknown data format: {what}; {why}. Known: {known}. Name one with config.data.format, or rename columns"


def _columns(seen: Mapping[str, list[Any]]) -> str:
    return ", ".join(f"{c} ({type(v[0]).__name__ if v else 'null'})" for c, v in seen.items()) or "none"


def _show(cell: Any) -> str:
    text = repr(cell)
    return f"{type(cell).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _wrong(column: str, cell: Any, kind: Kind) -> BadRow:
    return BadRow("wrong_type", f"{column} is {_show(cell)}, expected {kind.words}")


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _is_messages(cell: Any) -> bool:
    return isinstance(cell, list) and bool(cell) and all(isinstance(m, Mapping) for m in cell)


def _is_tools(cell: Any) -> bool:
    try:
        return isinstance(json.loads(cell) if isinstance(cell, str) else cell, list)
    except json.JSONDecodeError:
        return cell == ""


TEXT = Kind("text", lambda cell: isinstance(cell, str))
MESSAGES = Kind("a list of messages", _is_messages)
TURN = Kind("text, a message, or a list of messages", lambda c: isinstance(c, str | Mapping) or _is_messages(c))
NUMBER = Kind("a finite number", lambda cell: _is_number(cell) and math.isfinite(cell))
NOT_NEGATIVE = Kind("a number >= 0", lambda cell: NUMBER.test(cell) and cell >= 0)

OPTIONAL: dict[str, Kind] = {
    "source": TEXT,
    "weight": NOT_NEGATIVE,
    "system": TEXT,
    "tools": Kind("a list, or JSON of one", _is_tools),
    "margin": NUMBER,
    "preference_strength": NUMBER,
    "chosen_score": NUMBER,
    "rejected_score": NUMBER,
    "preference": NUMBER,
}


def _is_null(cell: Any) -> bool:
    """Null, or NaN, which is how pandas writes null."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _optional(row: Row, column: str) -> Any:
    """The cell of an optional column; None where it says nothing."""
    cell = row.get(column)
    if _is_null(cell):
        return None
    if not OPTIONAL[column].test(cell):
        raise _wrong(column, cell, OPTIONAL[column])
    return cell


def _by_place(cells: Sequence[Any]) -> bool:
    """Whether `preference` is in [1, 2].

    Sets that write a tie as 0 (or -1) beside 1 and 2 are refused, not guessed.
    """
    values = [cell for cell in cells if NUMBER.test(cell)]
    if any(v > 1 for v in values) and any(v < 1 for v in values):
        raise ValueError(
            f"preference runs from {min(values)} to {max(values)}; expected a probability in [0, 1] that `chosen` is "
            "better, or the place of the better one in [1, 2] (1 is `chosen`); a tie is 0.5 or 1.5"
        )
    return any(v > 1 for v in values)


def _label(row: Row, by_place: bool) -> tuple[float, float]:
    """Probability that `chosen` is better (1 if the row does not say), and the margin of the better one."""
    value = _optional(row, "preference")
    preference = 1.0 if value is None else float(2 - value if by_place else value)
    if not 0 <= preference <= 1:
        raise BadRow("conflicting_label", f"preference {value} is outside {'[1, 2]' if by_place else '[0, 1]'}")
    chosen, rejected = _optional(row, "chosen_score"), _optional(row, "rejected_score")
    difference = 0.0 if chosen is None or rejected is None else float(chosen - rejected)
    if difference * (preference - 0.5) < 0:
        raise BadRow(
            "conflicting_label",
            f"chosen_score {chosen}, rejected_score {rejected}, preference {preference:g}",
        )
    given = [_optional(row, column) for column in ("margin", "preference_strength")]
    margin = next((float(m) for m in given if m is not None), abs(difference))
    if margin < 0:
        raise BadRow("conflicting_label", f"margin {margin:g} is below 0: the other response would be better")
    return preference, margin


def _tools(row: Row) -> list[Any] | None:
    cell = _optional(row, "tools")
    return (json.loads(cell) if isinstance(cell, str) and cell else cell) or None


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Puts the `system` column before a conversation that has no system message of its own."""
    if not system or (messages and messages[0].get("role") == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _messages(cell: Any, last_role: str = "assistant") -> list[Message]:
    """Reads a cell of messages, in either naming; text alone is one turn of `last_role`.

    >>> _messages([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}])
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    """
    if isinstance(cell, str):
        return [{"role": last_role, "content": cell}]
    return [_message(m) for m in ([cell] if isinstance(cell, Mapping) else cell)]


def _message(message: Any) -> Message:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
        raise BadRow("wrong_type", f"a message's role is {_show(role)}, expected one of {', '.join(ROLE_NAMES)}")
    content = message.get("content", message.get("value"))
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "from", "value") and v is not None}
    return {"role": ROLE_NAMES[role.lower()], **({} if content is None else {"content": content}), **rest}


def _is_transcript(text: Any) -> bool:
    return isinstance(text, str) and TRANSCRIPT_TURN.match("\n\n" + text.lstrip()) is not None


def _transcript(text: str) -> list[Message]:
    r"""Reads "\n\nHuman: hi\n\nAssistant: yo"; white space around a turn is layout, not content.

    >>> _transcript("\n\nHuman: hi\n\nAssistant: yo")
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    """
    before, *pieces = TRANSCRIPT_TURN.split("\n\n" + text.lstrip())
    if before.strip() or not pieces:
        raise BadRow("wrong_type", f"a transcript must begin with 'Human:' or 'Assistant:', found {text[:60]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": words.strip()} for role, words in zip(pieces[::2], pieces[1::2])]


def _pair(turns: Callable[[Row], Turns]) -> Callable[..., Record]:
    """The reader of a pair format, from what gives the two whole conversations of a row."""

    def read(row: Row, *, by_place: bool, source: str, where: str, keep: bool) -> Record:
        chosen, rejected = turns(row)
        system, weight = _optional(row, "system"), _optional(row, "weight")
        preference, margin = _label(row, by_place)
        return pair(
            _with_system(chosen, system),
            _with_system(rejected, system),
            preference=preference,
            margin=margin,
            weight=1.0 if weight is None else float(weight),
            tools=_tools(row),
            source=_optional(row, "source") or source,
            row=where,
            keep=keep,
        )

    return read


def _text_turns(row: Row) -> Turns:
    first, second = ([*_messages(row["prompt"], "user"), *_messages(row[c])] for c in ("chosen", "rejected"))
    return first, second


def _transcript_turns(row: Row) -> Turns:
    whole = lambda text: text if _is_transcript(text) else str(row.get("prompt") or "") + text
    return _transcript(whole(row["chosen"])), _transcript(whole(row["rejected"]))


def _plain_turns(row: Row) -> Turns:
    # An empty user turn, because many templates refuse a conversation that an assistant begins.
    return _text_turns({**row, "prompt": ""})


def _message_turns(row: Row) -> Turns:
    prompt = [] if row.get("prompt") is None else row["prompt"]
    if not (isinstance(prompt, str) or prompt == [] or _is_messages(prompt)):
        raise _wrong("prompt", prompt, MESSAGES)
    turns = _messages(prompt, "user")
    return _joined(turns, _messages(row["chosen"])), _joined(turns, _messages(row["rejected"]))


def _joined(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """Puts the prompt before the turns that answer it; whole conversations are left alone.

    They are whole if they begin with the prompt, or with a system or user turn where the prompt already ends
    with one of the user.
    """
    begins = messages[: len(prompt)] == prompt
    asks_again = bool(prompt) and prompt[-1]["role"] == "user" and messages[0]["role"] in ("system", "user")
    return messages if begins or asks_again else [*prompt, *messages]


def _conversation_turns(row: Row) -> Turns:
    history = _messages(row["conversations"])
    return [*history, *_messages(row["chosen"])], [*history, *_messages(row["rejected"])]


def _no_transcripts(row: Row) -> bool:
    return not any(_is_transcript(row.get(column)) for column in ("prompt", "chosen", "rejected"))


_PAIR_OF_TEXTS = {"chosen": TEXT, "rejected": TEXT}

# name, the columns it must have, what tells it from formats with the same columns, and how a row is read.
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("pair_text", {"prompt": TEXT, **_PAIR_OF_TEXTS}, _no_transcripts, _pair(_text_turns)),
        Format(
            "pair_transcript",
            _PAIR_OF_TEXTS,
            lambda row: (
                "conversations" not in row
                and all(_is_transcript(row[c]) or _is_transcript(row.get("prompt")) for c in _PAIR_OF_TEXTS)
            ),
            _pair(_transcript_turns),
        ),
        Format(
            "pair_plain",
            _PAIR_OF_TEXTS,
            lambda row: row.get("prompt") is None and "conversations" not in row and _no_transcripts(row),
            _pair(_plain_turns),
        ),
        Format(
            "pair_messages",
            {"chosen": MESSAGES, "rejected": MESSAGES},
            lambda row: "conversations" not in row,
            _pair(_message_turns),
        ),
        Format(
            "pair_conversations",
            {"conversations": MESSAGES, "chosen": TURN, "rejected": TURN},
            lambda row: True,
            _pair(_conversation_turns),
        ),
    )
}
