"""What a request asks for: token sequences from its JSON, or a refusal in words."""

import contextlib
import itertools
import json
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import pre_tokenizers

from rmjax.batches.chat import Chat
from rmjax.data.formats import kinds
from rmjax.data.records import BadRow, check_conversation
from rmjax.serve.batching import cut_pieces
from rmjax.serve.turns import read_prompts, read_tools, read_turns

Body = Mapping[str, Any]
# Fields of vLLM's requests that would change what is scored or how it is answered, and what they must be if given.
FIXED: Body = {
    "add_special_tokens": False,
    "truncate_prompt_tokens": None,
    "chat_template": None,
    "chat_template_kwargs": None,
    "add_generation_prompt": False,
    "continue_final_message": False,
    "encoding_format": "float",
}
# What vLLM calls the two sides of /score; the first names are the oldest, and ours in messages.
SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))

STOPPING = "the server is stopping; try again later"
UNFINISHED = "the server stopped before this request's turn; try again later"
PIECE = 65_536  # characters that are tokenized at a time: others' texts come in between
MOST_RENDERED = 2**27  # characters of a request's renderings, of which each response repeats the prompt


class Refused(Exception):
    """A request that is answered with an error: HTTP's code, and what was found and expected."""

    def __init__(self, code: int, detail: str):
        super().__init__(detail)
        self.code, self.detail = code, detail


class Asked:
    """The sequences (token ids) that a request asks for; neighbours with equal prompts are worth one tree."""

    def __init__(self, sequences: Sequence[Sequence[int]], prompts: Sequence[Any]):
        self.sequences, self.prompts = list(sequences), list(prompts)
        self.tokens = sum(map(len, sequences))


class Reader:
    """Turns requests into token sequences by the model's own tokenizer and template; raises Refused."""

    def __init__(self, chat: Chat, name: str, *, vocabulary: int, max_length: int, most: int):
        """A sequence may have `max_length` tokens (0 is no limit), a request `most` sequences."""
        self._chat, self._name, self._vocabulary = chat, name, vocabulary
        self._max_length, self._most = max_length, most
        self._encoding: Any = contextlib.nullcontext() if chat.tokenizer.is_fast else threading.Lock()
        widest = characters_per_token(chat.tokenizer)
        self._most_characters = max_length * widest if max_length and widest else 0

    def inputs(self, body: Body) -> Asked:
        """`input`, which is rendered text, a list of texts, token ids or lists of them; or `messages`, and with them
        `system` and `tools`, as training reads a row of them."""
        self._check_fields(body)
        if ("input" in body) == ("messages" in body):
            raise Refused(400, "expected one of `input` (rendered text, texts, or token ids) and `messages`")
        if "messages" in body:
            if body.get("documents"):
                raise Refused(400, "`documents` are not read beside `messages`; write them into a message")
            with _refusing():
                turns = read_turns(body, "messages", body["messages"], kinds.MESSAGES)
            return self._checked(self._encode([turns], self._renderer(body)), [object()])
        if unread := [name for name in ("system", "tools", "documents") if body.get(name)]:
            raise Refused(400, f"`{unread[0]}` goes with `messages`, not with `input`, which is a whole rendering")
        return self.renderings("input", body["input"])

    def renderings(self, name: str, given: Any) -> Asked:
        """A field with whole renderings, like `input`."""
        is_ids = lambda x: isinstance(x, list) and bool(x) and all(type(i) is int for i in x)
        given = [given] if isinstance(given, str) or is_ids(given) else given
        if not isinstance(given, list) or not given:
            raise Refused(400, f"`{name}` is {shown(given)}, expected text, texts, token ids or lists of token ids")
        self._check_count(len(given))
        if all(isinstance(x, str) for x in given):
            for index, text in enumerate(given):
                if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                    raise Refused(400, f"input {index} is no Unicode: half of a surrogate pair")
            given = self._encode(given)
        elif not all(is_ids(x) or x == [] for x in given):
            raise Refused(400, f"`{name}` is {shown(given)}, expected text, texts, token ids or lists of token ids")
        return self._checked(given, _alike(given))

    def pairs(self, body: Body) -> Asked:
        """A prompt (text or messages) with each of several responses; or as many prompts as responses, which SIDES
        names. `system` and `tools` are those of all."""
        self._check_fields(body)
        names = next((both for both in SIDES if all(name in body for name in both)), SIDES[0])
        with _refusing():
            prompts = read_prompts(names[0], body.get(names[0]))
        responses = _texts(names[1], body.get(names[1]))
        if len(prompts) not in (1, len(responses)):
            problem = f"{len(prompts)} texts in {names[0]} for {len(responses)} in {names[1]}"
            raise Refused(400, f"{problem}; expected one, or as many")
        self._check_count(len(responses))
        prompts = prompts * len(responses) if len(prompts) == 1 else prompts
        with _refusing():
            asked = {id(prompt): read_turns(body, names[0], prompt) for prompt in prompts}
        turns = [
            [*asked[id(prompt)], {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses)
        ]  # of references: a prompt is repeated only in the renderings
        return self._checked(self._encode(turns, self._renderer(body)), prompts)

    def _check_fields(self, body: Body) -> None:
        if body.get("model") not in (None, self._name):
            raise Refused(404, f"the model {shown(body['model'])} is not served here; `model` is {self._name}")
        for name, value in FIXED.items():
            if body.get(name) is not None and body[name] != value:
                raise Refused(400, f"`{name}` is {shown(body[name])}, it must be {json.dumps(value)} or left out")

    def _check_count(self, count: int) -> None:
        if count > self._most:
            raise Refused(400, f"the request has {count} sequences, at most {self._most} are allowed")

    def _checked(self, sequences: Sequence[Sequence[int]], prompts: Sequence[Any]) -> Asked:
        for index, ids in enumerate(sequences):
            if not len(ids):
                raise Refused(400, f"input {index} has no tokens")
            if self._max_length and len(ids) > self._max_length:
                raise Refused(400, f"input {index} has {len(ids)} tokens, at most {self._max_length} are allowed")
            if max(ids) >= self._vocabulary or min(ids) < 0:
                wrong = next(i for i in ids if not 0 <= i < self._vocabulary)
                raise Refused(400, f"input {index} has the token id {wrong}, the vocabulary has {self._vocabulary}")
        return Asked(sequences, prompts)

    def _encode(self, given: Sequence[Any], render: Callable[[Any], str] = lambda text: text) -> list[list[int]]:
        encoded: list[list[int]] = []
        for texts in cut_pieces(self._fitting(map(render, given)), len, PIECE):
            with self._encoding:
                encoded += self._chat.encode(texts)
        return encoded

    def _fitting(self, texts: Iterable[str]) -> Iterator[str]:
        """Passes on texts that may fit; refuses those that cannot."""
        total = 0
        for index, text in enumerate(texts):
            total += len(text)
            if self._most_characters and len(text) > self._most_characters:
                problem = f"input {index} has {len(text):,} characters"
                raise Refused(400, f"{problem}, more than {self._max_length} tokens can have; send a shorter one")
            if total > MOST_RENDERED:
                raise Refused(413, f"the request renders to more than {MOST_RENDERED:,} characters; send fewer texts")
            yield text

    def _renderer(self, body: Body) -> Callable[[Any], str]:
        """Renders conversations with the tools of a request; Refused where the template does not show them."""
        with _refusing():
            tools = read_tools(body)
        if tools and not self._chat.shows_tools:
            raise Refused(400, "the model's chat template does not show `tools`; leave them out")

        def render(conversation: Any) -> str:
            with _refusing():
                return self._chat.render(check_conversation(conversation), tools)

        return render


def _alike(sequences: Sequence[Sequence[int]]) -> list[Any]:
    """Neighbours whose first halves are equal get equal prompts, so that what they share is computed once."""
    prompts: list[Any] = []
    before: Sequence[int] = []
    for now in sequences:
        half = min(len(before), len(now)) // 2
        prompts.append(prompts[-1] if half and before[:half] == now[:half] else object())
        before = now
    return prompts


def responses(body: Body) -> int:
    """The number of responses in a body of /score: its prompt is rendered so often."""
    return max((len(body[second]) for _, second in SIDES if isinstance(body.get(second), list)), default=1)


def _texts(name: str, given: Any) -> list[str]:
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise Refused(400, f"`{name}` is {shown(given)}, expected a text or a list of texts")
    return given


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except BadRow as bad:
        raise Refused(400, bad.detail) from None


def shown(value: Any) -> str:
    if value is None:
        return "missing"
    # str() of a large list takes seconds in which no other thread runs
    text = value if isinstance(value, str) else reprlib.repr(value)
    return f"{type(value).__name__} {text[:60]!r}"


def characters_per_token(tokenizer: Any) -> int:
    """The most characters of a text that can become one token; 0 where there may be no limit.

    There is one where every byte is a token and nothing is left out: byte-level BPE, whose entries have a character for
    each byte. Normalizers may shorten texts, splitters leave something out, and an unknown word be one token.
    """
    if not tokenizer.is_fast:
        return 0
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    normal, model, added = parts["normalizer"], parts["model"], parts["added_tokens"]
    splitters = _flat(parts["pre_tokenizer"] or {}, "pretokenizers")
    kept = all(s.get("type") in ("ByteLevel", "Split", "Digits") and s.get("behavior") != "Removed" for s in splitters)
    level = any(s.get("type") == "ByteLevel" for s in splitters)
    swallows = any(token["lstrip"] or token["rstrip"] for token in added)
    known = (normal or {}).get("type") in (None, "NFC") and model.get("type") == "BPE" and kept and level
    if not known or swallows or not model["vocab"].keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return 0
    longest = max(map(len, itertools.chain(model["vocab"], (token["content"] for token in added))))
    return longest * (4 if normal else 1)  # NFC makes one character of up to four


def _flat(part: Mapping[str, Any], inner: str) -> list[Mapping[str, Any]]:
    return [leaf for branch in part[inner] for leaf in _flat(branch, inner)] if inner in part else [part]
