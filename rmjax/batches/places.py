"""Where the texts of a conversation's messages stand in its rendering, and which tokens they are.

Chat templates rarely say it themselves, and they do things to texts: strip them, drop the thinking of earlier turns,
put an empty thinking block before the last. What is found here is exact or not found at all; a text is never looked
for, since it may stand somewhere else as well.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from rmjax.data.records import BadRow, Conversation

Render = Callable[[Conversation], str]
MARK = "\ue000{}\ue001"  # private characters, in no text that a tokenizer was made for


class Place(NamedTuple):
    """Where a message's text stands in a rendering."""

    start: int  # its first character there
    stop: int  # one after its last
    cut: int  # characters left out before it: character c of the text is start + c - cut, within [start, stop]

    def characters(self, start: int, stop: int) -> tuple[int, int]:
        """The part [start, stop) of the text, in the rendering."""
        first, last = (min(max(self.start + c - self.cut, self.start), self.stop) for c in (start, stop))
        return first, last


def locate(render: Render, text: str, conversation: Conversation, wanted: Collection[int]) -> list[Place | None]:
    """Finds the texts of messages in a rendering.

    The conversation is rendered once more with marks for texts. What stands between the marks stands between the texts
    too, unless the template looks into them; a message for which that does not hold is rendered with itself alone
    replaced by a mark: its text is what changes.

    Args:
        wanted: indices of the messages that are needed; others are left out where they would cost a rendering.

    Returns:
        The place of each message; None for one that has no text, or is not rendered as it is.
    """
    texts = {i: message["content"] for i, message in enumerate(conversation) if message.get("content")}
    between = _between(render, conversation, texts)
    places: list[Place | None] = [None] * len(conversation)
    previous: int | None = 0  # where the text before stops
    for number, (i, content) in enumerate(texts.items()):
        if between and previous is not None:
            places[i] = _chained(text, previous, content, between[number], between[number + 1])
        if places[i] is None and i in wanted:
            places[i] = _replaced(render, text, conversation, i)
        place = places[i]
        previous = place.stop if place else None
    return places


def _render_marked(render: Render, conversation: Conversation, chosen: Collection[int]) -> str:
    """Renders with marks in place of the chosen texts; "" where the template refuses that."""
    with contextlib.suppress(BadRow):
        return render([{**m, "content": MARK.format(i)} if i in chosen else m for i, m in enumerate(conversation)])
    return ""


def _between(render: Render, conversation: Conversation, chosen: Collection[int]) -> list[str]:
    """What stands before, between and after the texts; [] where the template does not show all of them in order."""
    marked, mark = _render_marked(render, conversation, chosen), MARK.format("[0-9]+")
    in_order = re.findall(mark, marked) == [MARK.format(i) for i in chosen]
    return re.split(mark, marked) if in_order else []


def _variants(content: str) -> dict[str, int]:
    """What templates make of a text, and the characters left out before it."""
    return {words: content.find(words) for words in (content, content.rstrip(), content.lstrip(), content.strip())}


def _chained(text: str, previous: int, content: str, before: str, after: str) -> Place | None:
    """The place of a text that stands between `before`, which begins at `previous`, and `after`."""
    start = previous + len(before)
    if text.startswith(before, previous):
        for words, cut in _variants(content).items():
            if text.startswith(words + after, start):
                return Place(start, start + len(words), cut)
    return None


def _replaced(render: Render, text: str, conversation: Conversation, i: int) -> Place | None:
    """The place of a message's text, from a rendering in which it alone is another."""
    other = _render_marked(render, conversation, [i])
    if other.count(MARK.format(i)) != 1:
        return None
    start = _shared(text, other)
    stop = max(start, len(text) - _shared(text[::-1], other[::-1]))
    content = conversation[i]["content"]
    for words, cut in _variants(content).items():
        if text.endswith(words, 0, stop):
            return Place(stop - len(words), stop, cut)
    # Thinking was taken out, or moved: the answer stands at the end, so characters are counted from there.
    changed = text[start:stop].rstrip()
    answer = content.rpartition("</think>")[2].strip()
    return Place(start, stop, len(content.rstrip()) - len(changed)) if changed.endswith(answer) else None


def _shared(a: str, b: str) -> int:
    """Characters that two texts have in common from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def edges(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64 [n, 2]: first character of each token and one after its last, without gaps between tokens.

    Some tokenizers leave white space out of the offsets that they report; it belongs to the token after it.

    >>> edges([(0, 2), (3, 5), (5, 6), (5, 6)]).tolist()
    [[0, 2], [2, 5], [5, 6], [5, 6]]
    """
    pairs = np.array(offsets, np.int64).reshape(-1, 2)
    before = np.concatenate([[0], pairs[:-1, 1]])
    return np.stack([np.minimum(pairs[:, 0], before), pairs[:, 1]], axis=1)


def tokens_within(tokens_n2: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Indices of the tokens that have one of the characters [start, stop)."""
    if start >= stop:
        return np.zeros(0, np.int64)
    return np.flatnonzero((tokens_n2[:, 0] < stop) & (tokens_n2[:, 1] > start))


def closing_tokens(tokens_n2: np.ndarray, special_n: np.ndarray, after: int, limit: int) -> np.ndarray:
    """Indices of the tokens that end a turn, after its text's last token `after`: all up to the first special token, or
    the next token alone where no special one follows before character `limit`, which begins the next message's text."""
    following = np.arange(after + 1, len(tokens_n2))
    following = following[tokens_n2[following, 0] < limit]
    special = np.flatnonzero(special_n[following])
    return following[: special[0] + 1] if len(special) else following[:1]
