"""What a request asks for: token sequences from its JSON, or a refusal in words."""

import contextlib
import functools
import json
import logging
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rmjax.batches.chat import Chat
from rmjax.batches.frame import Frame, NotWhole, read_conversation, read_prompt
from rmjax.data.formats import kinds
from rmjax.data.records import BadRow, Conversation, check_conversation
from rmjax.serve import REFUSE, TRUNCATE
from rmjax.serve.turns import read_prompts, read_tools, read_turns

Body = Mapping[str, Any]
# Fields of others' requests that would change what is scored or how it is answered, and what they must be if given.
FIXED: Body = {
    "add_special_tokens": False,
    "truncate_prompt_tokens": None,
    "max_tokens_per_doc": None,
    "chat_template": None,
    "chat_template_kwargs": None,
    "add_generation_prompt": False,
    "continue_final_message": False,
    "encoding_format": "float",
    "dimensions": None,
    "instruction": None,
}
# Fields that are read, and those that trainers and servers' clients send beside what is scored.
READ = {
    *("model", "complete", "system", "history", "context", "tools", "activation", "use_activation", "softmax"),
    *("input", "messages", "text", "input_ids", "query", "queries", "documents", "items", "prompt", "prompts"),
    *("response", "text_1", "text_2", "data_1", "data_2", "top_n", "return_documents"),
}
BESIDE = {"label", "labels", "user", "priority", "request_id", "rid"}
# What vLLM calls the two sides of /score; the first names are the oldest, and ours in messages.
SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))

STOPPING = "the server is stopping; try again later"
UNFINISHED = "the server stopped before this request's turn; try again later"
PIECE = 65_536  # characters that are tokenized at a time: others' texts come in between
MOST_RENDERED = 2**27  # characters of a request's renderings, of which each response repeats the prompt
LEFT = 32  # characters that must be left of a prompt whose beginning was cut off
TEMPLATE_MARKS = ("<|", "[INST]", "<start_of_turn>", "<s>", "<｜")  # of rendered prompts, in the usual templates

log = logging.getLogger("rmjax.serve")


class Refused(Exception):
    """A request that is answered with an error: HTTP's code, and what was found and expected."""

    def __init__(self, code: int, detail: str):
        super().__init__(detail)
        self.code, self.detail = code, detail


class Asked:
    """The sequences (token ids) that a request asks for.

    In the place of a sequence that is too long, and gets a fixed reward, there is None.
    """

    def __init__(self, sequences: Sequence[Sequence[int] | None]):
        self.sequences = list(sequences)
        self.lengths = [len(ids or ()) for ids in sequences]
        self.tokens = sum(self.lengths)
        self.scored = [index for index, ids in enumerate(sequences) if ids is not None]


class Reader:
    """Turns requests into token sequences by the model's own tokenizer and template; raises Refused."""

    def __init__(
        self,
        chat: Chat,
        name: str,
        *,
        vocabulary: int,
        max_length: int,
        most: int,
        complete: bool = False,
        over_long: str | float = REFUSE,
        policy: Chat | None = None,
        count: Callable[[str, str], None] = lambda what, how: None,
    ):
        """A sequence may have `max_length` tokens (0 is no limit), a request `most` sequences.

        Args:
            complete: adds what renderings lack of a BOS or an end, unless a request says otherwise.
            over_long: what is done with longer sequences: REFUSE, TRUNCATE, or the reward that they get.
            policy: tokenizer and template of the prompts that trainers render; None is the model's own.
            count: hears of each sequence that was "over_long" or "completed", and what was done.
        """
        self._chat, self._name, self._vocabulary = chat, name, vocabulary
        self._max_length, self._most = max_length, most
        self._complete, self._over_long, self._count = complete, over_long, count
        self._frame, self._policy = Frame(chat), policy or chat
        self._policy_frame = Frame(policy) if policy else self._frame
        self._encoding: Any = contextlib.nullcontext() if chat.tokenizer.is_fast else threading.Lock()
        self._most_characters = max_length * characters_per_token(chat.tokenizer)
        self._unread: set[str] = set()

    def inputs(self, body: Body, complete: bool | None = None) -> Asked:
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
            return self._conversations([turns], body)
        return self.renderings("input", body, complete)

    def renderings(self, name: str, body: Body, complete: bool | None = None) -> Asked:
        """A field with whole renderings, like `input`; `complete` is for bodies that do not say it."""
        self._check_fields(body)
        given = body[name]
        if unread := [beside for beside in ("system", "history", "context", "tools", "documents") if body.get(beside)]:
            raise Refused(400, f"`{unread[0]}` goes with `messages`, not with `{name}`, which is a whole rendering")
        is_ids = lambda x: isinstance(x, list) and bool(x) and all(type(i) is int for i in x)
        given = [given] if isinstance(given, str) or is_ids(given) else given
        if not isinstance(given, list) or not given:
            raise Refused(400, f"`{name}` is {shown(given)}, expected text, texts, token ids or lists of token ids")
        self._check_count(len(given))
        complete = self._completes(body, complete)
        if all(isinstance(x, str) for x in given):
            return self._texts(given, complete)
        if not all(is_ids(x) or x == [] for x in given):
            raise Refused(400, f"`{name}` is {shown(given)}, expected text, texts, token ids or lists of token ids")
        for index, ids in enumerate(given):
            self._check_ids(index, ids)
        return self._whole(given, complete, given)

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
        return self._answers(names[0], prompts, responses, body)

    def ranked(self, body: Body) -> tuple[Asked, list[str], int]:
        """A `query` (the prompt) with `documents` (its responses): what to score, the responses, how many to answer."""
        self._check_fields(body)
        given = body.get("documents")
        if isinstance(given, list):
            given = [x["text"] if isinstance(x, dict) and set(x) == {"text"} else x for x in given]
        (query, *more), documents = _texts("query", body.get("query")), _texts("documents", given)
        top = body.get("top_n")
        if more or (top is not None and (type(top) is not int or top < 0)):
            raise Refused(400, f"expected one `query`, and a whole number of `top_n`; `top_n` is {shown(top)}")
        return self._answers("query", [query], documents, body), documents, top or len(documents)

    def rollouts(self, body: Body) -> Asked:
        """What trainers send of a rollout, rendered with the model's own template.

        OpenRLHF: `query` (rendered prompts with their responses) and `prompts`; without these a query is a rendering.
        slime: `prompt` (text or messages) and `response`. An empty response is scored like any other.
        """
        self._check_fields(body)
        prompts: list[Any]
        if "prompt" in body or "response" in body:
            prompts, responses = [body.get("prompt")], _texts("response", body.get("response"))
            if len(responses) > 1 or not isinstance(prompts[0], str | list):
                raise Refused(400, f"`prompt` is {shown(prompts[0])}, expected text or messages, and one `response`")
        else:
            queries = _texts("query", body.get("query"))
            if body.get("prompts") is None:
                return self.renderings("query", body, complete=True)
            prompts = _texts("prompts", body["prompts"])
            if len(prompts) != len(queries):
                raise Refused(400, f"{len(prompts)} texts in prompts for {len(queries)} in query; expected as many")
            bare = self._policy_frame.without_bos
            responses = [_after(i, bare(p), bare(query)) for i, (p, query) in enumerate(zip(prompts, queries))]
        self._check_count(len(prompts))
        with _refusing():
            read = [self._read_prompt(index, prompt, body) for index, prompt in enumerate(prompts)]
        texts = [self._policy_frame.without_ends(self._frame.without_ends(response)) for response in responses]
        if all(turns is not None for turns, _ in read):
            answered = self._policy_frame.answered
            whole = [answered(turns or (), begun, text) for (turns, begun), text in zip(read, texts)]
            return self._conversations(whole, body, keep=True)
        # Prompts of the model's own template that have more than messages say (tools), and so cannot be read.
        try:
            ending = self._frame.ending
            return self._texts([f"{prompt}{text}{ending}" for prompt, text in zip(prompts, texts)], complete=True)
        except Refused as refused:
            other = "a prompt that another model's template rendered needs the server's --policy_tokenizer"
            raise Refused(refused.code, f"{refused.detail}; {other}") from None

    def _read_prompt(self, index: int, prompt: Any, body: Body) -> tuple[Conversation | None, str]:
        """The messages of a prompt, and how the response begins; no messages if it is only known to be the model's."""
        if not isinstance(prompt, str):
            return read_turns(body, "prompt", prompt), ""
        bos = self._policy.tokenizer.bos_token or ""
        for text in dict.fromkeys((prompt, bos + prompt)):
            if (read := read_prompt(self._policy, text)) is not None:
                return read
        if not (self._policy_frame.has_special(prompt) or any(mark in prompt for mark in TEMPLATE_MARKS)):
            return read_turns(body, "prompt", prompt), ""
        if self._policy is self._chat:
            return None, ""
        raise Refused(
            400, f"prompt {index} is no rendering of --policy_tokenizer's template; send plain text or messages"
        )

    def _answers(self, name: str, prompts: Sequence[Any], responses: Sequence[str], body: Body) -> Asked:
        self._check_count(len(responses))
        prompts = list(prompts) * len(responses) if len(prompts) == 1 else prompts
        with _refusing():
            asked = {id(prompt): read_turns(body, name, prompt) for prompt in prompts}
        turns = [
            [*asked[id(prompt)], {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses)
        ]  # of references: a prompt is repeated only in the renderings
        return self._conversations(turns, body)

    def _conversations(self, given: Sequence[Any], body: Body, *, keep: bool = False) -> Asked:
        """What is asked by messages; with `keep` a response may be empty."""
        with _refusing():
            tools = read_tools(body)
        if tools and not self._chat.shows_tools:
            raise Refused(400, "the model's chat template does not show `tools`; leave them out")
        render = functools.partial(self._render, tools=tools, keep=keep)
        shorter = lambda index: self._shortened(index, given[index], render)
        return self._asked(self._encode(map(render, given)), shorter)

    def _texts(self, given: Sequence[str], complete: bool) -> Asked:
        for index, text in enumerate(given):
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise Refused(400, f"input {index} is no Unicode: half of a surrogate pair")
        try:
            texts = [self._completed(text) if complete and text else text for text in given]
        except NotWhole as problem:
            raise Refused(400, str(problem)) from None
        for _ in range(sum(text != before for text, before in zip(texts, given))):
            self._count("completed", "text")
        return self._whole(self._encode(texts), False, texts)

    def _completed(self, text: str) -> str:
        """A text as its messages are rendered, where they can be read; else with what it lacks."""
        with contextlib.suppress(BadRow):
            if (turns := self._frame.read(text)) is not None:
                return self._chat.render(turns)
        return self._frame.completed_text(text)

    def _whole(self, encoded: Sequence[list[int] | None], complete: bool, given: Sequence[Any]) -> Asked:
        """Renderings that begin and end as the template's do."""
        whole: list[list[int] | None] = []
        for index, ids in enumerate(encoded):
            whole.append(ids)
            if ids is None or (self._max_length and len(ids) > self._max_length):
                continue
            self._check_ids(index, ids)
            try:
                with self._encoding:
                    if complete:
                        whole[-1] = self._frame.completed_ids(ids)
                    self._frame.check(whole[-1] or ids)
            except NotWhole as problem:
                raise Refused(400, f"input {index} is no whole rendering of the chat template: {problem}") from None
            if whole[-1] != ids:
                self._count("completed", "ids")

        def shorter(index: int) -> list[int]:
            text = given[index] if isinstance(given[index], str) else self._chat.tokenizer.decode(given[index])
            if (turns := read_conversation(self._chat, text)) is None:
                raise Refused(400, f"input {index} is too long, and cannot be read as messages to truncate its prompt")
            return self._shortened(index, turns, self._render)

        return self._asked(whole, shorter)

    def _asked(self, encoded: Sequence[list[int] | None], shorter: Callable[[int], list[int]]) -> Asked:
        """What is asked, after what is done with sequences that are too long (None: so long that none was made)."""
        sequences: list[list[int] | None] = []
        for index, ids in enumerate(encoded):
            if ids is not None:
                self._check_ids(index, ids)
            if ids is not None and not (self._max_length and len(ids) > self._max_length):
                sequences.append(ids)
                continue
            if self._over_long == REFUSE:
                self._count("over_long", "refused")
                most = f"at most {self._max_length} are allowed"
                raise Refused(400, f"input {index} has {len(ids or ())} tokens, {most}")
            sequences.append(shorter(index) if self._over_long == TRUNCATE else None)
            self._count("over_long", "truncated" if self._over_long == TRUNCATE else "fixed")
        return Asked(sequences)

    def _shortened(self, index: int, conversation: Conversation, render: Callable[[Any], str]) -> list[int]:
        """The conversation without its oldest exchanges, and if need be the beginning of its last question."""
        users = [i for i, message in enumerate(conversation) if message["role"] == "user"]
        system = [message for message in conversation[: users[0] if users else 0] if message["role"] == "system"]

        def fitting(turns: Conversation) -> list[int] | None:
            text = render(turns)
            ids = [] if self._cannot_fit(text) else self._encoded([text])[0]
            return ids if 0 < len(ids) <= self._max_length else None

        for start in users[1:]:
            if ids := fitting([*system, *conversation[start:]]):
                return ids
        last, *answers = conversation[users[-1] :] if users else [{}]
        if text := last.get("content") if isinstance(last.get("content"), str) else "":
            without = lambda cut: fitting([*system, {**last, "content": text[cut:]}, *answers])
            low, high = 0, len(text) - 1  # to cut off `low` characters is not enough
            if best := without(high):
                while high - low > 1:
                    middle = (low + high) // 2
                    if ids := without(middle):
                        high, best = middle, ids
                    else:
                        low = middle
                return best
        self._count("over_long", "refused")
        raise Refused(400, f"input {index} has more than {self._max_length} tokens even without its prompt")

    def _completes(self, body: Body, default: bool | None) -> bool:
        given = body.get("complete")
        if not isinstance(given, bool | None):
            raise Refused(400, f"`complete` is {shown(given)}, expected true or false")
        return given if given is not None else self._complete if default is None else default

    def _check_fields(self, body: Body) -> None:
        if body.get("model") not in (None, self._name):
            raise Refused(404, f"the model {shown(body['model'])} is not served here; `model` is {self._name}")
        for name, value in FIXED.items():
            if body.get(name) is not None and body[name] != value:
                raise Refused(400, f"`{name}` is {shown(body[name])}, it must be {json.dumps(value)} or left out")
        unread = {name for name in body if body[name] is not None} - READ - BESIDE - FIXED.keys() - self._unread
        for name in sorted(unread)[: max(0, 100 - len(self._unread))]:  # each is told once, and strangers' are no end
            self._unread.add(name)
            log.warning("requests have a field that is not read: %s", shown(name))

    def _check_count(self, count: int) -> None:
        if count > self._most:
            raise Refused(400, f"the request has {count} sequences, at most {self._most} are allowed")

    def _check_ids(self, index: int, ids: Sequence[int]) -> None:
        if not len(ids):
            raise Refused(400, f"input {index} has no tokens")
        if max(ids) >= self._vocabulary or min(ids) < 0:
            wrong = next(i for i in ids if not 0 <= i < self._vocabulary)
            raise Refused(400, f"input {index} has the token id {wrong}, the vocabulary has {self._vocabulary}")

    def _encode(self, texts: Iterable[str]) -> list[list[int] | None]:
        """Token ids of texts; None for one that cannot fit, which is not tokenized."""
        encoded: list[list[int] | None] = []
        for piece in _pieces(self._bounded(texts), PIECE):
            ids = iter(self._encoded([text for text in piece if not self._cannot_fit(text)]))
            encoded += [None if self._cannot_fit(text) else next(ids) for text in piece]
        return encoded

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        with self._encoding:
            return self._chat.encode(texts) if texts else []

    def _cannot_fit(self, text: str) -> bool:
        return 0 < self._most_characters < len(text)

    def _bounded(self, texts: Iterable[str]) -> Iterator[str]:
        """Passes on texts; refuses one that cannot fit before others are made, and more than a request may have."""
        total = 0
        for index, text in enumerate(texts):
            total += len(text)
            if self._cannot_fit(text) and self._over_long == REFUSE:
                self._count("over_long", "refused")
                problem = f"input {index} has {len(text):,} characters"
                raise Refused(400, f"{problem}, more than {self._max_length} tokens can have; send a shorter one")
            if total > MOST_RENDERED:
                raise Refused(413, f"the request renders to more than {MOST_RENDERED:,} characters; send fewer texts")
            yield text

    def _render(self, conversation: Any, tools: list[Any] | None = None, *, keep: bool = False) -> str:
        with _refusing():
            return self._chat.render(check_conversation(conversation, keep=keep), tools)


def _after(index: int, prompt: str, query: str) -> str:
    """The response in a query: what follows the prompt, of which trainers may have cut off the beginning."""
    if query.startswith(prompt):
        return query[len(prompt) :]
    start = prompt.find(query[:LEFT])
    while 0 <= start <= len(prompt) - LEFT:
        if query.startswith(prompt[start:]):
            return query[len(prompt) - start :]
        start = prompt.find(query[:LEFT], start + 1)
    raise Refused(400, f"query {index} does not begin with its prompt, so its response cannot be told apart")


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
    """The most characters of a text that can become one token.

    A normalizer may shorten a text: four times of it is allowed for. One that leaves out more than that, or an unknown
    word of such a length, is not.
    """
    longest = max(map(len, tokenizer.get_vocab()))
    plain = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer is None
    return longest * (1 if plain else 4)  # NFC, for one, makes one character of up to four


def _pieces(items: Iterable[str], most: int) -> Iterator[list[str]]:
    """Neighbours together, whose lengths add up to at most `most`, unless one alone has more."""
    piece: list[str] = []
    total = 0
    for item in items:
        if piece and total + len(item) > most:
            yield piece
            piece, total = [], 0
        piece.append(item)
        total += len(item)
    if piece:
        yield piece
