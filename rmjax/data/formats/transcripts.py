r"""Transcripts `\n\nHuman: ... \n\nAssistant: ...`: a text, or a prompt and the text that goes on from it.

White space around a turn is layout, not content, and so is the kind of line end. What stands before the first turn of a
person is a system message.
"""

import re
from typing import Any

from rmjax.data.records import BadRow, Message

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
LINES = re.compile(r"\s*Human:.*\nAssistant:\s*", re.S)  # a prompt whose turns are single lines
ROLES = {"Human": "user", "Assistant": "assistant"}


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def in_blocks(text: str) -> str:
    r"""A transcript with a blank line before each turn, for one that asks and has single line ends there.

    >>> in_blocks("Human: hi\nAssistant:")
    'Human: hi\n\nAssistant:'
    """
    text = _lines(text)
    single = LINES.fullmatch(text) and len(TURN.findall("\n\n" + text.lstrip())) == 1
    return re.sub(r"\n+(?=(Human|Assistant):)", "\n\n", text) if single else text


def is_transcript(text: Any) -> bool:
    """Whether a text begins with a turn of a transcript."""
    return isinstance(text, str) and TURN.match("\n\n" + _lines(text).lstrip()) is not None


def asks(text: Any) -> bool:
    """Whether a text is a transcript, perhaps behind a preamble, that ends where the assistant's turn begins."""
    turns = _pieces(text)[1] if isinstance(text, str) else []
    return bool(turns) and turns[-1] == ("Assistant", "") and "Human" in dict(turns)


def has_turns(text: Any) -> bool:
    """Whether a text is a transcript that a person begins, perhaps behind a preamble."""
    return isinstance(text, str) and [name for name, _ in _pieces(text)[1][:1]] == ["Human"]


def has_dialogue(text: Any) -> bool:
    """Whether a turn of a person and one of the assistant stand in a text, whatever it begins with."""
    return isinstance(text, str) and [name for name, _ in _pieces(text)[1][:2]] == ["Human", "Assistant"]


def _pieces(text: str) -> tuple[str, list[tuple[str, str]]]:
    """What stands before the first turn, and the name and words of each turn."""
    before, *pieces = TURN.split("\n\n" + in_blocks(text).lstrip())
    return before.strip(), list(zip(pieces[::2], (words.strip() for words in pieces[1::2])))


def transcript(text: str) -> list[Message]:
    r"""Reads "\n\nHuman: hi\n\nAssistant: yo"; BadRow (`wrong_type`) for a text without turns.

    >>> transcript("\n\nHuman: hi\n\nAssistant: yo")
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    """
    before, turns = _pieces(text)
    if not turns or (before and turns[0][0] != "Human"):
        raise BadRow("wrong_type", f"a transcript must begin with 'Human:' or 'Assistant:', found {text[:60]!r}")
    system = [{"role": "system", "content": before}] if before else []
    return [*system, *({"role": ROLES[name], "content": words} for name, words in turns)]
