"""How the renderings of a chat template begin and end, and the way back from a rendering to its messages.

Texts and token ids that come from elsewhere are compared with this: a reward is read from the last token, so a text
that lacks the end of its turn, or the newline after it, gets a reward of something else.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rmjax.batches.chat import ANSWERED, ASKED, EMPTY_THINKING, PROBE, PROBE_TOOL, Chat
from rmjax.data.records import BadRow, Conversation, Message

# Tokens merge with what stands beside them, so what all renderings share is sought with contents of several kinds.
CONTENTS = ("one", "\n two", "3.", " four\n", "(five)\n\n")
SYSTEM = "the system's text"
ADD_IT = "; `complete` adds it"


class NotWhole(ValueError):
    """A text that is no whole rendering; says what it lacks."""


class Frame:
    """What the renderings of a template begin and end with, in tokens, and what stands between two turns.

    A template without such parts (one that ends with a response's own text, say) frames nothing, and nothing is missed.

    Attributes:
        ending: the text after a response's own, with which renderings end.
    """

    def __init__(self, chat: Chat):
        self._chat = chat
        self._bos = chat.tokenizer.bos_token_id
        answers = [[_user(text), _assistant(text)] for text in CONTENTS]
        systems = [[{"role": "system", "content": text}, _user("x"), _assistant("y")] for text in CONTENTS]
        renderings = [text for c in (*answers, *systems, PROBE) if (text := _rendered(chat, c))]
        with_tools = _rendered(chat, PROBE, [PROBE_TOOL])
        calls = [
            _rendered(
                chat, [_user("x"), {"role": "assistant", "content": "", "tool_calls": [_call(text)]}], [PROBE_TOOL]
            )
            for text in CONTENTS
        ]
        self._opening = _common(chat.encode([*renderings, *filter(None, (with_tools, *calls))]))
        self._ending = _common([ids[::-1] for ids in chat.encode(renderings)])[::-1]
        self._endings = [self._ending]
        if all(calls) and len(set(calls)) == len(calls):  # a turn that calls a tool may end in another way
            self._endings.append(_common([ids[::-1] for ids in chat.encode(calls)])[::-1])
        texts = [self._text(ids)[::-1] for ids in chat.encode(renderings)]
        self.ending = self._text(self._ending) or _common(texts)[::-1]
        probe = self._text(chat.encode([chat.render(PROBE)])[0])
        self._to_assistant = _between(probe, ASKED[0], ANSWERED[0]).rstrip()
        self._to_user = _between(probe, ANSWERED[0], ASKED[1]).rstrip()
        self._to_first_user = probe.partition(ASKED[0])[0].rstrip()
        self._headed = bool(self._to_assistant) and self._to_assistant != self._to_user
        special = sorted((t.content for t in chat.tokenizer.added_tokens_decoder.values() if t.special), key=len)
        self._special = re.compile("|".join(map(re.escape, reversed(special))) or "(?!)")

    def check(self, ids: Sequence[int]) -> None:
        """Makes sure that token ids begin and end as renderings do, and that their last turn is the assistant's.

        Raises:
            NotWhole: says what they lack.
        """
        ids = list(map(int, ids))
        self._check_opening(ids)
        text = self._text(ids)
        self._check_last_turn(text)
        if (whole := self.completed_ids(ids)) != ids:
            lacks = self._text(whole[len(ids) :])
            raise NotWhole(
                f"it ends with {text[-20:]!r} and lacks {lacks!r}, with which the template's renderings end{ADD_IT}"
            )

    def completed_ids(self, ids: Sequence[int]) -> list[int]:
        """Token ids with a BOS, an end of turn and what follows it, where they lack them.

        Raises:
            NotWhole: nothing can be added, because of what they end with.
        """
        ids = list(map(int, ids))
        if self._has_bos and ids[0] != self._bos:
            ids = [self._bos, *ids]
        text = self._text(ids)
        if self._ends(ids, text):
            return ids
        most = range(min(len(self._ending), len(ids)), 0, -1)
        have = next((n for n in most if ids[-n:] == self._ending[:n]), 0)
        if not have:
            self._check_open_end(text)
            if not self._ending or self._ending[0] not in self._chat.special:
                lacks = f"it lacks {self.ending!r} at its end"
                raise NotWhole(f"{lacks}, which may be part of its last token; send the text, not its ids")
        return ids + self._ending[have:]

    def completed_text(self, text: str) -> str:
        """The same for a text."""
        bos = self._chat.tokenizer.bos_token
        if self._has_bos and not text.startswith(bos):
            text = bos + text
        if any(text.endswith(self._text(ending)) for ending in self._endings if ending) or text.endswith(self.ending):
            return text
        cuts = (self._text(self._ending[:n]) for n in range(len(self._ending) - 1, 0, -1))
        have = next((cut for cut in cuts if text.endswith(cut) and self.ending.startswith(cut)), "")
        if not have:
            self._check_open_end(text)
        return text + self.ending[len(have) :]

    def read(self, text: str) -> list[Message] | None:
        """The messages of a rendering that lacks its BOS or its end, or has other special tokens there.

        None where it is no rendering, or nothing follows the header of its response.
        """
        bos, generation = self._chat.tokenizer.bos_token or "", _marks(self._chat)["generation"]
        asked, header, said = text.rpartition(generation) if generation else ("", "", "")
        if not header or not said.strip():
            return None
        whole = f"{asked}{header}"
        read = read_prompt(self._chat, f"{bos}{self.without_bos(whole)}" if self._has_bos else whole)
        return None if read is None else self.answered(*read, self.without_ends(said))

    def answered(self, turns: Sequence[Message], begun: str, response: str) -> list[Message]:
        """A conversation of what `read_prompt` gives and the response, as text after the rendered prompt."""
        marks = _marks(self._chat)
        # Mistral's prompts end with "[/INST]", and an answer's text begins after the space that follows it.
        header, generation = marks["to_assistant"], marks["generation"]
        space = header[len(generation) :] if generation and header.startswith(generation) else ""
        return [*turns, _assistant(begun + response.removeprefix(space))]

    def without_bos(self, text: str) -> str:
        """A text without the BOS, or several of them, that it begins with."""
        bos = self._chat.tokenizer.bos_token
        while bos and text.startswith(bos):
            text = text.removeprefix(bos)
        return text

    def without_ends(self, text: str) -> str:
        """A response without the special tokens at its end, and the spaces between and after them."""
        return re.sub(rf"(?:(?:{self._special.pattern})\s*)+\Z", "", text)

    def has_special(self, text: str) -> bool:
        return self._special.search(text) is not None

    @property
    def _has_bos(self) -> bool:
        return self._opening[:1] == [self._bos]

    def _text(self, ids: Sequence[int]) -> str:
        return self._chat.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _ends(self, ids: list[int], text: str) -> bool:
        """Whether they end as renderings do; where the ending merges with what precedes it, the text decides."""
        if not self._ending:
            return text.endswith(self.ending)
        return any(ids[len(ids) - len(ending) :] == ending for ending in self._endings)

    def _check_opening(self, ids: list[int]) -> None:
        opening = self._opening
        if self._has_bos and ids[:1] != [self._bos]:
            bos = self._chat.tokenizer.bos_token
            raise NotWhole(f"it lacks the BOS {bos!r}, with which the template's renderings begin{ADD_IT}")
        if self._has_bos and ids[:2] == [self._bos] * 2 != opening[:2]:
            raise NotWhole("it begins with two BOS, the template's renderings with one; tokenize without adding any")
        if ids[: len(opening)] != opening:
            found, wanted = self._text(ids[: len(opening) + 4]), self._text(opening)
            raise NotWhole(
                f"it begins with {found[:60]!r}, the template's renderings with {wanted!r}; send those, or messages"
            )

    def _check_last_turn(self, text: str) -> None:
        if not self._headed:
            return
        last = text.rfind(self._to_assistant)
        if last < text.rfind(self._to_user) or (last < 0 and text.startswith(self._to_first_user)):
            raise NotWhole("its last turn is not the assistant's, so there is no response to score")

    def _has_response(self, text: str) -> bool:
        last = text.rfind(self._to_assistant)
        response = EMPTY_THINKING.sub("", text[last + len(self._to_assistant) :])
        return not self._headed or last < 0 or bool(response.strip())

    def _check_open_end(self, text: str) -> None:
        """Nothing can be put after the header of a response, or a special token that the template has not there."""
        if not self._has_response(text):
            raise NotWhole("its last turn has no text, so there is no response to score")
        if self._special.match(self.ending) and (after := text[len(self.without_ends(text)) :]):
            raise NotWhole(
                f"it ends with {after!r}, the template's renderings with {self.ending!r}; end it with the "
                "response's text, which `complete` completes"
            )


@functools.lru_cache(maxsize=8)
def _marks(chat: Chat) -> dict[str, str]:
    """What stands between turns, in text."""
    whole, system = chat.render(PROBE), _rendered(chat, [{"role": "system", "content": SYSTEM}, *PROBE])
    asked = chat.render_prompt(PROBE[:3])
    return {
        "start": whole.partition(ASKED[0])[0],
        "to_assistant": _between(whole, ASKED[0], ANSWERED[0]),
        "to_user": _between(whole, ANSWERED[0], ASKED[1]),
        "to_last": _between(whole, ASKED[1], ANSWERED[1]),
        "end": whole.rpartition(ANSWERED[1])[2],
        "generation": asked.rpartition(ASKED[1])[2],
        "start_system": system.partition(SYSTEM)[0] if SYSTEM in system else "",
        "system_end": _between(system, SYSTEM, ASKED[0]) if SYSTEM in system else "",
    }


def read_prompt(chat: Chat, text: str) -> tuple[list[Message], str] | None:
    """The messages of a rendered prompt, which ends with the header of the response; None where it is no rendering.

    Rendered again they give the same text. The second value is how the response begins for the template, beyond its
    header (the start of a thought, say).
    """
    marks = _marks(chat)
    generation, header = marks["generation"], marks["to_assistant"]
    if not generation or not text.endswith(generation):
        return None
    for turns in _turns(marks, text[: len(text) - len(generation)]):
        try:
            if chat.render_prompt(turns) == text:
                return turns, generation.removeprefix(header) if generation.startswith(header) else ""
        except BadRow:
            continue
    return None


def read_conversation(chat: Chat, text: str) -> list[Message] | None:
    """The messages of a rendered conversation; None where it is no rendering."""
    marks = _marks(chat)
    if not text.endswith(marks["end"]):
        return None
    body = text[: len(text) - len(marks["end"])]
    for header in dict.fromkeys((marks["to_last"], marks["to_assistant"])):
        asked, found, answer = body.rpartition(header)
        for turns in _turns(marks, asked) if found and header else ():
            if _rendered(chat, whole := [*turns, _assistant(answer)]) == text:
                return whole
    return None


def _turns(marks: dict[str, str], text: str) -> Iterable[list[Message]]:
    """What a text may be as messages up to a user's: without a system message, and with.

    Where both begin alike (Mistral's templates put the system message before the first question), it is read as a part
    of the question.
    """
    with_system = [(marks["start_system"], marks["system_end"])] if marks["system_end"] else []
    for start, system_end in ((marks["start"], ""), *with_system):
        if not text.startswith(start) or system_end not in text:
            continue
        first, turns = text[len(start) :], list[Message]()
        if system_end:
            system, _, first = first.partition(system_end)
            turns.append({"role": "system", "content": system})
        *before, asked = first.split(marks["to_user"]) if marks["to_user"] else [first]
        pairs = [exchange.partition(marks["to_assistant"]) for exchange in before]
        if all(found for _, found, _ in pairs):
            turns += [m for user, _, assistant in pairs for m in (_user(user), _assistant(assistant))]
            yield [*turns, _user(asked)]


def _rendered(chat: Chat, conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
    """A rendering; "" where the template refuses the conversation."""
    try:
        return chat.render(conversation, tools)
    except BadRow:
        return ""


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _call(text: str) -> dict[str, Any]:
    return {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {"text": text}}}


def _between(text: str, left: str, right: str) -> str:
    return text.partition(left)[2].partition(right)[0]


def _common(sequences: Sequence[Any]) -> Any:
    """What all sequences begin with."""
    differs = (i for i, items in enumerate(zip(*sequences)) if len(set(items)) > 1)
    return sequences[0][: next(differs, min(map(len, sequences)))]
