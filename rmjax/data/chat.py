"""From records to trees of tokens: the chat template, the tokenizer and the length policy.

The scored token of a conversation is the last token of `apply_chat_template(conversation, tokenize=False,
add_generation_prompt=False)`, tokenized without adding special tokens. Nothing is trimmed: that is what
transformers and vLLM pool. The tree is built from token ids, never from strings: a response that begins with
a newline merges with the header before it, so a prefix of the text need not be a prefix of the tokens.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import transformers

from rmjax.data.records import BadRow, Conversation
from rmjax.data.tasks import Example, Span
from rmjax.data.trees import Tree, build_tree

Sequences = list[list[int]]
Shortened = tuple[Sequence[Conversation], Sequences]  # conversations that fit, and their tokens

ASKED, ANSWERED = ("first question", "second question"), ("first answer", "second answer")
PROBE: Conversation = [
    message
    for asked, answered in zip(ASKED, ANSWERED)
    for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
]
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}
DATE = re.compile(r"\b\d{1,2} [A-Z][a-z]{2,8} \d{4}\b|\b[A-Z][a-z]{2,8} \d{1,2}, \d{4}\b|\b\d{4}-\d{2}-\d{2}\b")
EMPTY_THINKING = re.compile(r"<(think|thinking|reasoning)>\s*</\1>")

# Names of tokens that models set aside, the best first. None of them is written by a template or by people.
RESERVED = (
    r"<\|?(finetune_right_)?pad(_id)?\|?>|\[PAD\]",
    r"<\|?reserved.*>|<SPECIAL_\d+>|<\|?special_\d+\|?>",
    r"<\|?unused_?\d+\|?>|\[unused\d+\]|\[control_\d+\]|<\|?(extra|dummy|buffer)_?\d+\|?>",
    r"<\|(fim|vision|image|video|audio)_pad\|>",
)
# How templates fail on a conversation: by refusing it, or by meeting what they did not expect.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
# Files of which a directory with a tokenizer has at least one.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
SETTINGS = (
    "conversation",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
)


class Labelled(NamedTuple):
    """A group's tree and its labels, by the fields of its task."""

    tree: Tree
    labels: dict[str, np.ndarray]


class Place(NamedTuple):
    """Where a message's text stands in a rendering; `cut` characters of white space before it were left out."""

    start: int
    stop: int
    cut: int


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Loads a tokenizer that has a chat template from a directory or hub id.

    Raises:
        FileNotFoundError: a directory without a tokenizer.
        ValueError: it has no chat template.
    """
    if Path(path).is_dir() and not any(file for name in TOKENIZER_FILES for file in Path(path).glob(name)):
        raise FileNotFoundError(
            f"there are no tokenizer files in {path}; copy tokenizer.json and tokenizer_config.json there, with the "
            "chat template, or in training name another tokenizer (config.model.tokenizer)"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path} has no chat template, so what is scored would be undefined; take the tokenizer "
            "of the instruction-tuned model of the same family (in training config.model.tokenizer), or put a "
            "chat_template.jinja beside tokenizer_config.json"
        )
    return tokenizer


def conversation_key(conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
    """A text that is equal for equal conversations."""
    return json.dumps([conversation, tools], sort_keys=True, ensure_ascii=False, default=str)


class Chat:
    """A tokenizer, its chat template with arguments, and what is done with conversations that are too long.

    Attributes:
        tokenizer: the transformers tokenizer.
        template_kwargs: arguments of the template.
        max_length: most tokens of one conversation; 0 is no limit.
        over_long: "drop" the group, "truncate_prompt" (oldest exchanges first; the system message and the
            last user turn stay) or "truncate_response" (all responses at the same number of characters).
        notes: what the template inserts on its own and thereby changes scores, as sentences.
        closing: ids of the tokens that a rendering ends with, after the last response's text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        max_length: int = 0,
        over_long: str = "drop",
    ):
        """Checks the template on a made-up conversation.

        Raises:
            ValueError: the template depends on the clock or cannot render, or the policy is unknown.
        """
        if over_long not in POLICIES:
            raise ValueError(f"data.over_long={over_long!r} is none of {', '.join(POLICIES)}")
        self.tokenizer, self.template_kwargs = tokenizer, dict(template_kwargs or {})
        self.max_length, self.over_long = max_length, over_long
        if taken := sorted(set(SETTINGS) & self.template_kwargs.keys()):
            raise ValueError(f"template_kwargs: {taken[0]!r} is set by rmjax; it is no argument of a template")
        self._refuse_clock()
        try:
            probe = self.render(PROBE)
        except BadRow as error:
            raise ValueError(f"the chat template cannot render a plain conversation: {error.detail}") from None
        self.notes = self._find_notes(probe)
        tail = probe.rpartition(ANSWERED[-1])[2]
        self.closing = {*self.encode([tail])[0], self.encode([probe])[0][-1]}

    def render(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
        """Renders a whole conversation as the model reads it.

        Raises:
            BadRow: `template_error`.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(conversation),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=False,
                **self.template_kwargs,
            )
        except TEMPLATE_ERRORS as error:
            raise BadRow("template_error", f"{type(error).__name__}: {error}") from error

    def encode(self, texts: Sequence[str]) -> Sequences:
        """Token ids of renderings; special tokens only where the text has them, so never a second BOS."""
        if not texts:
            return []
        encoding = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return encoding["input_ids"]

    def groups(self, examples: Sequence[Example], *, keep: bool = False) -> list[Labelled | BadRow]:
        """Builds the tree of each example, and its labels.

        Each distinct conversation is rendered once, and all are tokenized together.

        Args:
            examples: the groups.
            keep: let responses that become the same through.

        Returns:
            For each example its tree and labels, or why there is none: `template_error`, `over_long`,
            `identical_responses` (the template renders them alike) or `identical_after_truncation`.
        """
        keys = [[conversation_key(c, e.tools) for c in e.conversations] for e in examples]
        rendered: dict[str, str | BadRow] = {}
        for example, names in zip(examples, keys):
            for name, conversation in zip(names, example.conversations):
                if name not in rendered:
                    rendered[name] = self._try_render(conversation, example.tools)
        good = {name: text for name, text in rendered.items() if isinstance(text, str)}
        encoded = dict(zip(good, self.encode(list(good.values()))))
        made: list[Labelled | BadRow] = []
        for example, names in zip(examples, keys):
            failures = [text for name in names if isinstance(text := rendered[name], BadRow)]
            made.append(failures[0] if failures else self._group(example, [encoded[n] for n in names], keep))
        return made

    def locate(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> tuple[str, list[Place]]:
        """Finds where each message's text stands in the rendering.

        Templates rarely mark that themselves, so the conversation is rendered a second time with marks for texts;
        what stands between the marks tells the texts' places. Where that fails (templates that look into the
        texts), each text is looked for after the one before.

        Returns:
            The rendering, and the place of each message; a message that is not rendered has an empty one.

        Raises:
            BadRow: `template_error`: the last message's text is not in the rendering as it is.
        """
        text = self.render(conversation, tools)
        marks = [f"\ue000{i}\ue001" for i in range(len(conversation))]
        try:
            marked = self.render([{**m, "content": mark} for m, mark in zip(conversation, marks)], tools)
        except BadRow:
            marked = ""
        pieces = re.split("\ue000[0-9]+\ue001", marked)
        exact = re.findall("\ue000[0-9]+\ue001", marked) == marks
        places, at = [], 0
        for i, message in enumerate(conversation):
            before, after = (pieces[i], pieces[i + 1]) if exact else ("", "")
            places.append(_place(text, at, message.get("content") or "", before, after))
            at = max(at, places[-1].stop)
        if conversation and not places[-1].stop:
            raise BadRow("template_error", "the template changes the last turn's text, so it cannot be found again")
        return text, places

    def fingerprint(self) -> str:
        """SHA-256, as hex, of what decides the tokens: vocabulary, template, arguments, length policy."""
        special = [self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.unk_token]
        policy = [self.template_kwargs, self.max_length, self.over_long]
        parts = [_vocabulary_digest(self.tokenizer), self.tokenizer.chat_template, special, policy]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _try_render(self, conversation: Conversation, tools: Sequence[Any] | None) -> str | BadRow:
        try:
            text = self.render(conversation, tools)
            text.encode()
        except BadRow as error:
            return error
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; tokenizers would stop at it
            return BadRow("wrong_type", f"the text is no Unicode: {error.reason}")
        return text or BadRow("template_error", "it renders to nothing")

    def _group(self, example: Example, sequences: Sequences, keep: bool) -> Labelled | BadRow:
        conversations: Sequence[Conversation] = example.conversations
        too_long = bool(self.max_length) and max(map(len, sequences)) > self.max_length
        try:
            if too_long:
                conversations, sequences = POLICIES[self.over_long](self, example, max(map(len, sequences)))
            distinct = {conversation_key(c) for c in example.conversations}
            if len(set(map(tuple, sequences))) < len(distinct) and not keep:
                if too_long:
                    raise BadRow("identical_after_truncation", f"at {self.max_length} tokens they are the same")
                raise BadRow("identical_responses", "they differ only in what the template leaves out")
            tree = build_tree(sequences)
            if example.scored is None and not example.spans:
                return Labelled(tree, dict(example.labels))
            return self._labelled(example, conversations, tree)
        except BadRow as bad:
            return bad

    def _labelled(self, example: Example, conversations: Sequence[Conversation], tree: Tree) -> Labelled:
        """Finds the scored tokens and the tokens of the spans."""
        fields = {name: np.zeros(len(tree), np.float32) for name in example.spans}
        ends: list[int] = []
        slots: list[int] = []
        kept: list[bool] = []  # truncation can cut scored tokens off
        for k, conversation in enumerate(conversations):
            text, places = self.locate(conversation, example.tools)
            encoding = self.tokenizer([text], add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            offsets = np.array(encoding["offset_mapping"][0], np.int64)
            path = tree.path(int(tree.end[k]))
            for name, spans in example.spans.items():
                for span in spans[k]:
                    place = -span.message <= len(conversation) and places[span.message]
                    original = example.conversations[k][span.message]
                    if place and place.stop and conversation[span.message]["role"] == original["role"]:
                        at = _tokens_of(span, place, original.get("content") or "", offsets)
                        fields[name][path[at[at > 0] - 1]] = span.value
            for stop in () if example.scored is None else example.scored[k]:
                place, length = places[-1], len(conversation[-1].get("content") or "")
                kept.append(stop <= length)
                if kept[-1]:
                    character = min(max(place.start + stop - place.cut, place.start + 1), place.stop) - 1
                    ends.append(int(path[np.flatnonzero(offsets[:, 0] <= character)[-1]]))
                    slots.append(k)
        labels = {**example.labels, **fields}
        if example.scored is None:
            return Labelled(tree, labels)
        if not ends:
            raise BadRow("over_long", f"no scored token is left of {self.max_length} tokens")
        per_end = {name: x[np.array(kept)] for name, x in labels.items() if len(x) == len(kept) and name not in fields}
        scored = dataclasses.replace(tree, end=np.array(ends, np.int32), end_slot=np.array(slots, np.int32))
        return Labelled(scored, {**labels, **per_end})

    def _sequences(self, conversations: Sequence[Conversation], example: Example) -> Sequences:
        return self.encode([self.render(c, example.tools) for c in conversations])

    def _drop(self, example: Example, longest: int) -> Shortened:
        raise BadRow("over_long", f"{longest} tokens, data.max_length is {self.max_length}", longest)

    def _truncate_prompt(self, example: Example, longest: int) -> Shortened:
        """Leaves out as many of the oldest exchanges as needed, the same number before every response."""
        most = min(sum(m["role"] == "user" for m in c) for c in example.conversations)
        for exchanges in range(1, most):
            shorter = [_without_oldest(c, exchanges) for c in example.conversations]
            sequences = self._sequences(shorter, example)
            longest = max(map(len, sequences))
            if longest <= self.max_length:
                return shorter, sequences
        raise BadRow("over_long", f"{longest} tokens without its older turns, of {self.max_length}", longest)

    def _truncate_response(self, example: Example, longest: int) -> Shortened:
        """Cuts every response at the same number of characters, the most that fits."""
        contents = [c[-1].get("content") or "" for c in example.conversations]
        low, high = 0, max(map(len, contents))  # `low` characters fit, or it is 0; `high` characters do not
        best: Shortened | None = None
        while high - low > 1:
            middle = (low + high) // 2
            shorter = [_cut(c, middle) for c in example.conversations]
            sequences = self._sequences(shorter, example)
            if max(map(len, sequences)) <= self.max_length:
                low, best = middle, (shorter, sequences)
            else:
                high, longest = middle, max(map(len, sequences))
        if best is None or not all(text[:low].strip() for text in contents):
            raise BadRow("over_long", f"{longest} tokens without its response, of {self.max_length}", longest)
        return best

    def _refuse_clock(self) -> None:
        if not self._depends_on_clock(self.template_kwargs):
            return
        raise ValueError(
            "the chat template inserts today's date, so tomorrow's scores would differ; fix the date it reads: "
            'template_kwargs=\'{"date_string": "26 Jul 2024"}\' for Llama 3, or the variable that this template sets '
            "from strftime_now (config.data.template_kwargs in training, --template_kwargs in scoring)"
        )

    def _depends_on_clock(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether a template sees the clock: two clocks (macros in place of the global) differ."""
        system = [{"role": "system", "content": "s"}, *PROBE]
        for conversation, tools in ((PROBE, None), (system, None), (PROBE, [PROBE_TOOL])):
            rendered = set()
            for now in ("11", "12"):
                clock = f"{{% macro strftime_now(format) %}}{now}{{% endmacro %}}"
                template = clock + self.tokenizer.get_chat_template(tools=tools)
                try:
                    text = self.tokenizer.apply_chat_template(
                        list(conversation),
                        tools=tools,
                        tokenize=False,
                        chat_template=template,
                        **template_kwargs,
                    )
                except TEMPLATE_ERRORS:
                    continue  # it takes no tools or system messages; plain conversations are checked later
                rendered.add(text)
            if len(rendered) > 1:
                return True
        return False

    def _find_notes(self, probe: str) -> list[str]:
        """Names what the template adds to a plain conversation."""
        notes = []
        date = DATE.search(probe)
        if date or self._depends_on_clock({}):
            what = repr(date[0]) if date else "as template_kwargs says"
            notes.append(f"it inserts a date ({what}); scores hold for that date only")
        if thinking := EMPTY_THINKING.search(probe):
            notes.append(f"it inserts an empty thinking block ({thinking[0]!r}) before the last response")
        if header := _trailing_header(probe):
            notes.append(f"it ends with the header of another assistant turn ({header!r}), which is what is scored")
        return notes


POLICIES: dict[str, Callable[[Chat, Example, int], Shortened]] = {
    "drop": Chat._drop,
    "truncate_prompt": Chat._truncate_prompt,
    "truncate_response": Chat._truncate_response,
}


def set_pad_token(chat: Chat, vocab_size: int = 0) -> tuple[int, bool]:
    """Makes sure that padding can be told from text; transformers scores the right-most other token.

    A pad token that is missing, is EOS, is one that the template ends with, or has no row in the embedding is
    replaced by an unused reserved one.

    Args:
        chat: its tokenizer's pad token is set.
        vocab_size: rows of the model's embedding; 0 is no limit.

    Returns:
        The id of the pad token, and whether it was changed.

    Raises:
        ValueError: there is no unused token.
    """
    tokenizer = chat.tokenizer
    usable = lambda i: i is not None and i not in {*chat.closing, tokenizer.eos_token_id} and i < (vocab_size or i + 1)
    if usable(tokenizer.pad_token_id):
        return tokenizer.pad_token_id, False
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    added = [(i, token.content) for i, token in sorted(tokenizer.added_tokens_decoder.items())]
    found = [
        (i, name)
        for pattern in RESERVED
        for i, name in added
        if re.fullmatch(pattern, name, re.IGNORECASE) and usable(i) and name not in template
    ]
    if usable(tokenizer.unk_token_id):  # last: it can stand in a text, but no rendering ends with it
        found.append((tokenizer.unk_token_id, tokenizer.unk_token))
    if not found:
        raise ValueError(
            f"pad token {tokenizer.pad_token!r} is missing, is EOS ({tokenizer.eos_token!r}) or ends the chat "
            "template, and the tokenizer has no unused reserved token to take instead; add one to the tokenizer "
            "(and its row to the model's embedding) and set it as pad_token"
        )
    pad, name = found[0]
    tokenizer.pad_token = name
    return pad, True


def _vocabulary_digest(tokenizer: Any) -> str:
    """Digest of the tokenizer's serialization, without what calls change and what only decoding reads."""
    if not tokenizer.is_fast:
        parts: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        ignored = ("truncation", "padding", "post_processor", "decoder")
        parts = {key: value for key, value in parts.items() if key not in ignored}
        parts["added_tokens"] = [{**token, "special": None} for token in parts["added_tokens"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _without_oldest(conversation: Conversation, exchanges: int) -> Conversation:
    """Leaves out what stands before user turn number `exchanges`, except leading system messages."""
    users = [i for i, message in enumerate(conversation) if message["role"] == "user"]
    kept = [message for message in conversation[: users[0]] if message["role"] == "system"]
    return [*kept, *conversation[users[exchanges] :]]


def _place(text: str, at: int, content: str, before: str, after: str) -> Place:
    """Finds a message's text from `at` on, given what stands around it; templates may strip it."""
    candidates = dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip()))
    if text.startswith(before, at):
        start = at + len(before)
        for words in candidates:
            if text.startswith(words + after, start):
                return Place(start, start + len(words), content.find(words))
    for words in filter(None, (*candidates, content.rpartition("</think>")[2].strip())):
        if (start := text.find(words, at)) >= 0:
            return Place(start, start + len(words), content.rfind(words))
    return Place(at, 0, 0)


def _tokens_of(span: Span, place: Place, content: str, offsets: np.ndarray) -> np.ndarray:
    """Indices of the tokens that have a character of the span; one more if it reaches the end of its message."""
    start, stop = (min(max(place.start + c - place.cut, place.start), place.stop) for c in (span.start, span.stop))
    at = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
    whole = span.stop >= len(content)
    if whole and len(at) and at[-1] + 1 < len(offsets):
        at = np.append(at, at[-1] + 1)
    return at


def _cut(conversation: Conversation, characters: int) -> Conversation:
    last = conversation[-1]
    return [*conversation[:-1], {**last, "content": (last.get("content") or "")[:characters]}]


def _trailing_header(probe: str) -> str:
    """The assistant header that a rendering ends with although no turn follows; "" if it does not.

    Headers are what stands between turns: a template that puts the same before users and assistants has none.
    """
    probe = EMPTY_THINKING.sub("", probe)
    before_user = probe.partition(ANSWERED[0])[2].partition(ASKED[1])[0]
    before_assistant = probe.partition(ASKED[1])[2].partition(ANSWERED[1])[0]
    tail = probe.rpartition(ANSWERED[1])[2]
    if before_user == before_assistant or not before_assistant.split():
        return ""
    header = before_assistant.split()[-1]
    return header if tail.rstrip().endswith(header) else ""


def sequence_lengths(tree: Tree) -> np.ndarray:
    """int32 [E]: tokens of each scored sequence alone, unshared."""
    return tree.positions[tree.end] + 1
