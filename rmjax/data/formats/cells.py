"""What the readers of all formats share: the columns any row may have, and how messages and scores are read.

Any format may carry these columns; a missing or null cell means that the row says nothing there:

    source, weight      name of the data set; weight in the loss
    system, tools       system message, where the conversation has none; tool descriptions, a list or JSON of one
    history, context    turns before the prompt; what the prompt is about, which follows it after a blank line
    principle           what the responses are judged by: text, or a list of texts, one to a line
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.kinds import Kind
from rmjax.data.formats.transcripts import asks, has_turns, in_blocks, is_transcript, transcript
from rmjax.data.records import BadRow, Message, Record

Row = Mapping[str, Any]

TURN_MARK = "<extra_id_1>"  # before each turn of a text, in NeMo's data and in HelpSteer2's prompts
NAMING = 'name what it is in config.data.columns, as "prompt=COLUMN", or leave it out with "ignore=COLUMN"'
LONG = 16  # characters of a text that does not stand in another by chance
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
    left_out: Collection[str]  # columns of the public set that are no part of what is asked, answered and said of it

    @property
    def declared(self) -> frozenset[str]:
        return frozenset((*self.columns, *self.optional))

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
    left_out: Collection[str] = (),
) -> Callable[[Reader], Format]:
    """Decorates the reader of a format; its docstring says what a row and its labels mean."""
    return lambda read: Format(name, columns, read, agrees, optional, scores, left_out)


def named_only(row: Row) -> bool:
    """For `agrees`: a format that is never detected, because its columns are those of another."""
    return False


def common(row: Row, reading: Reading) -> dict[str, Any]:
    """What any row may say, as keyword arguments of records.group and records.pair."""
    weight = kinds.NOT_NEGATIVE.optional(row, "weight")
    tools = _from_json(kinds.TOOLS.optional(row, "tools") or None)
    principle = kinds.PRINCIPLE.optional(row, "principle") or ""
    return {
        "weight": 1.0 if weight is None else float(weight),
        "tools": [_from_json(tool) for tool in tools] if tools else None,
        "source": kinds.TEXT.optional(row, "source") or reading.source,
        "row": reading.where,
        "principle": (principle if isinstance(principle, str) else "\n".join(principle)).strip(),
        "keep": reading.keep,
        "defects": reading.defects,
    }


def _from_json(cell: Any) -> Any:
    """A list or object that may be written as JSON text."""
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except json.JSONDecodeError:
        raise BadRow("wrong_type", f"a tool description is {kinds.show(cell)}, expected an object") from None


def prompt_turns(row: Row, cell: Any) -> list[Message]:
    r"""The turns before the response: the `system` and `history` columns, `cell`, and after it the `context`.

    What the cell holds already is not added. BadRow (`not_read`) where the columns cannot be put together.

    >>> row = {"system": "be kind", "history": [["a", "b"]], "context": "of maps"}
    >>> [message["content"] for message in prompt_turns(row, "hi")]
    ['be kind', 'a', 'b', 'hi\n\nof maps']
    """
    marked = isinstance(cell, str) and f"\n{TURN_MARK}Assistant\n" in cell
    transcribed = asks(cell)
    turns = transcript(cell)[:-1] if transcribed else marked_turns(cell) if marked else messages(cell, "user")
    context = row.get("context")
    if is_empty(context) or context is cell:
        pass
    elif is_dialogue(context):
        turns = _after("context", context, turns)
    elif holds(turns, context):
        pass
    elif (
        isinstance(cell, str)
        and context is not None
        and not (marked or transcribed)
        and (kinds.TEXT.test(context) or kinds.TEXTS.test(context))
    ):
        about = context if isinstance(context, str) else "\n\n".join(context)
        turns = [{"role": "user", "content": f"{cell}\n\n{about}" if cell.strip() else about}]
    else:
        raise not_read("context", context, "neither text beside a prompt of text nor messages")
    history = row.get("history")
    if not (is_empty(history) or history is cell):
        turns = _after("history", history, turns)
    return with_system(row, turns)


def _after(column: str, cell: Any, turns: list[Message]) -> list[Message]:
    """The turns after those of an earlier conversation.

    The cell holds messages, a transcript, [[asked, answered], ...] or [[role, said], ...].

    Turns that hold that conversation already are left alone.
    """
    if is_transcript(cell):
        earlier = transcript(cell)
    elif is_dialogue(cell):
        earlier = messages(cell)
    elif isinstance(cell, list) and all(kinds.TEXTS.test(pair) and len(pair) == 2 for pair in cell):
        named = all(first.lower() in ROLE_NAMES for first, _ in cell)
        said = cell if named else [turn for pair in cell for turn in zip(("user", "assistant"), pair)]
        earlier = messages([{"role": role, "content": text} for role, text in said])
    else:
        raise not_read(column, cell, "neither messages nor a list of [asked, answered]")
    if holds(turns, earlier):
        return turns
    system = [message for message in turns[:1] if message["role"] == "system"]
    turns = turns[len(system) :]
    if earlier[-1]["role"] == "user" or (system and earlier[0]["role"] == "system"):
        raise not_read(column, cell, "the turns before the prompt: they must end with an answer")
    return [*system, *earlier, *turns]


def not_read(column: str, cell: Any, expected: str) -> BadRow:
    return BadRow("not_read", f"{column} is {kinds.show(cell)}, {expected}; {NAMING}")


def without(row: Row, column: str) -> Row:
    """A row without a column, of the same kind: what is read of it is still noted."""
    rest: Any = copy.copy(row)
    rest.pop(column, None)
    return rest


def texts_in(cell: Any) -> list[str]:
    """Every text in a cell, but roles and other names; spacing aside."""
    if isinstance(cell, str):
        return [words] if (words := " ".join(cell.split())) else []
    if isinstance(cell, Mapping):
        return [text for name, value in cell.items() if name not in ("role", "from") for text in texts_in(value)]
    return [text for value in cell for text in texts_in(value)] if isinstance(cell, list | tuple) else []


def holds(turns: Any, cell: Any) -> bool:
    """Whether every text of a cell is one of the turns', or a part of one that is no chance (`LONG`)."""
    held = texts_in(turns)
    return all(text in held or (len(text) >= LONG and any(text in x for x in held)) for text in texts_in(cell))


def is_dialogue(cell: Any) -> bool:
    """Whether a cell is a message or a list of messages."""
    messages = cell if isinstance(cell, list) else [cell]
    return bool(messages) and all(isinstance(m, Mapping) and {"role", "from"} & set(m) for m in messages)


def is_empty(cell: Any) -> bool:
    """Null, or nothing but white space, or a list or object without anything."""
    return kinds.is_null(cell) or (isinstance(cell, str) and not cell.strip()) or cell in ([], {})


def answered(row: Row, prompt: Any, answers: Sequence[Any]) -> list[list[Message]]:
    """A conversation for each answer (text, a message, or messages) to a prompt (a cell as `prompt_turns` takes it).

    A prompt may be a transcript that the answers go on from.
    """
    texts = all(map(kinds.TEXT.test, answers))
    if texts and (asks(prompt) or (has_turns(prompt) and all(map(is_transcript, answers)))):
        return [with_system(row, continued(prompt, text)) for text in answers]
    turns = prompt_turns(row, prompt)
    given = [messages(x) if kinds.TURN.test(x) else [answer(x)] for x in answers]
    if turns and any(turns[-1] == last for *_, last in given):  # the prompt is a whole conversation
        turns = turns[:-1]
    return [joined(turns, each) for each in given]


def continued(prompt: str, text: str) -> list[Message]:
    r"""A transcript and what goes on from it: more turns, the whole transcript, or the words of the assistant.

    >>> continued("Human: hi", "Assistant: yo") == continued("Human: hi\n\nAssistant:", " yo")
    True
    """
    turns = transcript(prompt)
    if turns[-1]["role"] == "assistant" and not is_transcript(text):
        return transcript(in_blocks(prompt) + text)  # the words may end those of the prompt, and begin other turns
    if turns[-1] == answer(""):
        turns.pop()
    return joined(turns, transcript(text) if is_transcript(text) else [answer(text)])


def joined(prompt: list[Message], turns: list[Message]) -> list[Message]:
    """Puts the prompt before the turns that answer it; of whole conversations only its system message is put there.

    Turns are whole if they begin with the prompt, or begin with a system or user turn and hold all its texts. BadRow
    (`not_read`) for a prompt that such turns do not hold.
    """
    system = [message for message in prompt[:1] if message["role"] == "system"]
    asked = prompt[len(system) :]
    own = [message for message in turns[:1] if message["role"] == "system"]
    begins = turns[len(own) : len(own) + len(asked)] == asked
    asks_again = bool(asked) and asked[-1]["role"] == "user" and turns[0]["role"] in ("system", "user")
    if not (begins or asks_again):
        return [*prompt, *turns]
    if not (begins or holds(turns, asked)):
        raise not_read("the prompt", asked[-1].get("content"), "which is not in the conversation that should answer it")
    if system and own and not holds(own, system):
        raise not_read("the prompt's system message", system[0].get("content"), "the conversation has another")
    return turns if own else [*system, *turns]


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
    return {"role": "assistant", "content": "" if kinds.is_null(text) else text}


def messages(cell: Any, last_role: str = "assistant") -> list[Message]:
    """Reads a cell of messages, in either naming; text alone is one turn of `last_role`, null one without text.

    >>> messages([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}])
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    """
    if isinstance(cell, str) or kinds.is_null(cell):
        return [{"role": last_role, "content": cell if isinstance(cell, str) else ""}]
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
