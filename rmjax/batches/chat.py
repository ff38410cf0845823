"""From records to trees of tokens: the chat template, the tokenizer and the length policy.

The scored token of a conversation is the last token of `apply_chat_template(conversation, tokenize=False,
add_generation_prompt=False)`, tokenized without adding special tokens. Nothing is trimmed: that is what
transformers and vLLM pool. The tree is built from token ids, never from strings: a response that begins with
a newline merges with the header before it, so a prefix of the text need not be a prefix of the tokens.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import transformers

from rmjax.batches import places, rendering
from rmjax.batches.encoding import Encoder, Sequences, json_digest, vocabulary_digest
from rmjax.batches.tasks import Example, Span
from rmjax.batches.template import KEY, Template
from rmjax.batches.trees import Tree, build_tree
from rmjax.data.records import LEFT_OUT, BadRow, Conversation

Shortened = tuple[Sequence[Conversation], Sequences]  # conversations that fit, and their tokens
ASKED, ANSWERED = ("first question", "second question"), ("first answer", "second answer")
PROBE: Conversation = [
    message
    for asked, answered in zip(ASKED, ANSWERED)
    for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
]
PROBE_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
DATE = re.compile(r"\b\d{1,2} [A-Z][a-z]{2,8} \d{4}\b|\b[A-Z][a-z]{2,8} \d{1,2}, \d{4}\b|\b\d{4}-\d{2}-\d{2}\b")
EMPTY_THINKING = re.compile(r"<(think|thinking|reasoning)>\s*</\1>")

# Names of tokens that models set aside, the best first. Neither templates nor people write them.
RESERVED = (
    r"<\|?(finetune_right_)?pad(_id)?\|?>|\[PAD\]",
    r"<\|?reserved.*>|<SPECIAL_\d+>|<\|?special_\d+\|?>",
    r"<\|?unused_?\d+\|?>|\[unused\d+\]|\[control_\d+\]|<\|?(extra|dummy|buffer)_?\d+\|?>",
    r"<\|(fim|vision|image|video|audio)_pad\|>",
)
# Files of which a directory with a tokenizer has at least one.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
# Arguments of apply_chat_template that template_kwargs cannot have.
SETTINGS = {"conversation", "tools", "tokenize", "add_generation_prompt", "chat_template", "continue_final_message"}


class Labelled(NamedTuple):
    """A group's tree and its labels."""

    tree: Tree
    labels: dict[str, np.ndarray]  # by the fields of its task
    left_out: tuple[BadRow, ...] = ()  # see Chat.left_out


class Rendering(NamedTuple):
    """A text and its tokens."""

    text: str
    edges: np.ndarray  # characters of the tokens, see places.edges


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Loads a tokenizer that has a chat template from a directory or hub id.

    Raises:
        FileNotFoundError: a directory without a tokenizer.
        ValueError: it cannot be read, or has no chat template.
    """
    if Path(path).is_dir() and not any(file for name in TOKENIZER_FILES for file in Path(path).glob(name)):
        raise FileNotFoundError(
            f"there are no tokenizer files in {path}; copy tokenizer.json and tokenizer_config.json there, with the "
            "chat template, or in training name another tokenizer (config.model.tokenizer)"
        )
    try:
        # Code that comes with a tokenizer is never run, and nobody is asked whether it should be.
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers meet in files that are not theirs
        problem = " ".join(str(error).split())[:300]
        raise ValueError(f"the tokenizer of {path} cannot be read ({type(error).__name__}: {problem})") from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {path} has no chat template, so what is scored would be undefined; take the tokenizer "
            "of the instruction-tuned model of the same family (in training config.model.tokenizer), or put a "
            "chat_template.jinja beside tokenizer_config.json"
        )
    return tokenizer


def conversation_key(conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
    """A text that is equal for equal conversations."""
    return KEY.encode([conversation, tools])


class Chat:
    """A tokenizer, its chat template with arguments, and what is done with conversations that are too long.

    Attributes:
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
        """Checks the template on a made-up conversation; one that depends on the clock or cannot render is a
        ValueError."""
        if over_long not in POLICIES:
            raise ValueError(f"data.over_long={over_long!r} is none of {', '.join(POLICIES)}")
        self.tokenizer, self.template_kwargs = tokenizer, dict(template_kwargs or {})
        self._template = Template(tokenizer, self.template_kwargs)
        self.max_length, self.over_long = max_length, over_long
        if taken := sorted(SETTINGS & self.template_kwargs.keys()):
            raise ValueError(f"template_kwargs: {taken[0]!r} is set by rmjax; it is no argument of a template")
        if self._depends_on_clock(self.template_kwargs):
            raise ValueError(
                "the chat template inserts today's date, so tomorrow's scores would differ; fix the date it reads: "
                'template_kwargs=\'{"date_string": "26 Jul 2024"}\' for Llama 3, or the variable that this template '
                "sets from strftime_now (config.data.template_kwargs in training, --template_kwargs in scoring)"
            )
        try:
            probe = self.render(PROBE)
        except BadRow as error:
            raise ValueError(f"the chat template cannot render a plain conversation: {error.detail}") from None
        self._encoder = Encoder(tokenizer, probe)
        self.notes = self._find_notes(probe)
        tail = probe.rpartition(ANSWERED[-1])[2]
        self.closing = {*self.encode([tail])[0], self.encode([probe])[0][-1]}
        self._tail = self.encode([tail])[0] if tail else []
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(special)
        own = [name for name in special.values() if name in probe or name in str(tokenizer.chat_template)]
        self._own_tokens = re.compile("|".join(map(re.escape, sorted(own, key=len, reverse=True))) or "(?!)")

    def render(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
        """Renders a whole conversation as the model reads it; BadRow as of `Template.render`."""
        return self._template.render(conversation, tools)

    def render_prompt(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
        """Renders turns that the assistant is to answer, up to where its text begins; a template that fails raises a
        BadRow."""
        return self._template.render_prompt(conversation, tools)

    def left_out(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> list[BadRow]:
        """What a rendering does not show of its conversation, or shows otherwise than it was meant: names in
        records.LEFT_OUT, with what was found."""
        found = []
        for part in self._template.not_shown(conversation, tools):
            scored = f"scored_{part.kind}_left_out"
            known = part.scored and scored in LEFT_OUT
            found.append(BadRow(scored if known else f"{part.kind}_left_out", part.words))
        for text in self._template.unparsed(conversation):
            found.append(BadRow("arguments_not_json", f"the arguments {text[:60]!r}"))
        for message in conversation:
            if own := self._own_tokens.search(message.get("content") or ""):
                found.append(BadRow("special_tokens_in_text", f"{own[0]!r} in the {message['role']}'s text"))
        return found

    @property
    def stops(self) -> set[int]:
        """The ids that end a response: the tokenizer's EOS, and the special token that the template puts after it."""
        ends = [*self._tail[:1], self.tokenizer.eos_token_id]
        return {i for i in ends if i is not None and (i in self.special or i == self.tokenizer.eos_token_id)}

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Whether the template renders tool descriptions."""
        with contextlib.suppress(BadRow):
            return self.render(PROBE, [PROBE_TOOL]) != self.render(PROBE)
        return False

    def encode(self, texts: Sequence[str]) -> Sequences:
        """Token ids of renderings; special tokens only where the text has them, so never a second BOS."""
        return self._encoder.encode(texts)

    def groups(self, examples: Sequence[Example], *, keep: bool = False) -> list[Labelled | BadRow]:
        """Builds the tree of each example, and its labels.

        Each distinct conversation is rendered once, and all are tokenized together.

        Returns:
            For each example its tree and labels, or why there is none: `template_error`, `over_long`,
            `identical_responses` (the template renders them alike) or `identical_after_truncation`.
        """
        keys = [[conversation_key(c, e.tools) + "?" * (not e.answered) for c in e.conversations] for e in examples]
        rendered: dict[str, str | BadRow] = {}
        for example, names in zip(examples, keys):
            for name, conversation in zip(names, example.conversations):
                if name not in rendered:
                    rendered[name] = self._try_render(conversation, example)
        good = {name: text for name, text in rendered.items() if isinstance(text, str)}
        located = {name for e, names in zip(examples, keys) if e.spans or e.scored is not None for name in names}
        plain, spotted = ({n: text for n, text in good.items() if (n in located) == wanted} for wanted in (False, True))
        encoded = dict(zip(plain, self.encode(list(plain.values()))))
        renderings: dict[str, Rendering] = {}
        for name, both in zip(spotted, self._encode_with_edges(list(spotted.values()))):
            encoded[name], renderings[name] = both
        groups: list[Labelled | BadRow] = []
        for example, names in zip(examples, keys):
            if failures := [text for name in names if isinstance(text := rendered[name], BadRow)]:
                groups.append(failures[0])
                continue
            texts = [renderings[name] for name in names if name in renderings]
            group = self._group(example, [encoded[name] for name in names], texts, len(set(names)), keep)
            if isinstance(group, Labelled):
                found = {name: self.left_out(c, example.tools) for name, c in zip(names, example.conversations)}
                group = group._replace(left_out=tuple(bad for of_one in found.values() for bad in of_one))
            groups.append(group)
        return groups

    def fingerprint(self) -> str:
        """SHA-256, as hex, of what decides the tokens: vocabulary, template, arguments, length policy."""
        policy = [self.template_kwargs, self.max_length, self.over_long]
        vocabulary = vocabulary_digest(self.tokenizer)
        return json_digest([vocabulary, self.tokenizer.chat_template, self._special_tokens(), policy])

    def identity(self) -> dict[str, str]:
        """The parts of the fingerprint that are no config keys, by their names."""
        return {
            "the chat template or its arguments": json_digest([self.tokenizer.chat_template, self.template_kwargs]),
            "the tokenizer": json_digest([vocabulary_digest(self.tokenizer), self._special_tokens()]),
        }

    def _special_tokens(self) -> list[Any]:
        special = [self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.unk_token]
        special += [getattr(self.tokenizer, "split_special_tokens", False)]
        return special + [self.tokenizer.pad_token] * ("pad_token" in str(self.tokenizer.chat_template))

    def _rendered(self, conversation: Conversation, example: Example) -> str:
        """The rendering that an example asks for; BadRow as of `render`."""
        return (self.render if example.answered else self.render_prompt)(conversation, example.tools)

    def _try_render(self, conversation: Conversation, example: Example) -> str | BadRow:
        try:
            text = self._rendered(conversation, example)
            text.encode()
        except BadRow as error:
            return error
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair; tokenizers would stop at it
            return BadRow("wrong_type", f"the text is no Unicode: {error.reason}")
        return text or BadRow("template_error", "it renders to nothing")

    def _encode_with_edges(self, texts: Sequence[str]) -> list[tuple[list[int], Rendering]]:
        if not texts:
            return []
        encoding = self.tokenizer(list(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        renderings = map(Rendering, texts, map(places.edges, encoding["offset_mapping"]))
        return list(zip(encoding["input_ids"], renderings))

    def _group(
        self, example: Example, sequences: Sequences, texts: Sequence[Rendering], distinct: int, keep: bool
    ) -> Labelled | BadRow:
        conversations: Sequence[Conversation] = example.conversations
        too_long = bool(self.max_length) and max(map(len, sequences)) > self.max_length
        try:
            if too_long:
                conversations, sequences = POLICIES[self.over_long](self, example, max(map(len, sequences)))
            if len(set(map(tuple, sequences))) < distinct and not keep:
                if too_long:
                    raise BadRow("identical_after_truncation", f"at {self.max_length} tokens they are the same")
                raise BadRow("identical_responses", "they differ only in what the template leaves out")
            tree = build_tree(sequences)
            if example.scored is None and not example.spans:
                return Labelled(tree, dict(example.labels))
            if too_long:
                rendered = [self._rendered(c, example) for c in conversations]
                texts = [rendering for _, rendering in self._encode_with_edges(rendered)]
            return self._labelled(example, conversations, texts, tree)
        except BadRow as bad:
            return bad

    def _labelled(
        self, example: Example, conversations: Sequence[Conversation], texts: Sequence[Rendering], tree: Tree
    ) -> Labelled:
        fields = {name: np.zeros(len(tree), np.float32) for name in example.spans}
        ends_and_slots: list[tuple[int, int]] = []
        kept: list[bool] = []  # truncation can cut scored tokens off
        for k, (conversation, text) in enumerate(zip(conversations, texts)):
            path = tree.path(int(tree.end[k]))
            spans = [span for of_field in example.spans.values() for span in of_field[k]]
            wanted = {len(conversation) - 1, *(len(conversation) + span.message for span in spans)}
            texts_at = places.locate(lambda c: self.render(c, example.tools), text.text, conversation, wanted)
            if (last := texts_at[-1]) is None:
                raise BadRow("template_error", "the template changes the last turn's text, so it cannot be found again")
            special = np.isin(tree.tokens[path], list(self.special))
            for name, of_field in example.spans.items():
                for span in of_field[k]:
                    learnt = _tokens_of(span, example.conversations[k], conversation, texts_at, text.edges, special)
                    fields[name][path[learnt[learnt > 0] - 1]] = span.value
            for stop in () if example.scored is None else example.scored[k]:
                content = conversation[-1].get("content") or ""
                kept.append(stop <= len(content))
                if kept[-1]:
                    if stop <= last.cut and content[:stop].strip():
                        raise BadRow("template_error", f"the template leaves out a step: {content[:stop][-60:]!r}")
                    character = max(last.characters(0, stop)[1] - 1, last.start)
                    ends_and_slots.append((int(path[np.flatnonzero(text.edges[:, 0] <= character)[-1]]), k))
        labels = {**example.labels, **fields}
        if example.scored is None:
            return Labelled(tree, labels)
        if not ends_and_slots:
            raise BadRow("over_long", f"no scored token is left of {self.max_length} tokens")
        per_end = {name: x[np.array(kept)] for name, x in labels.items() if len(x) == len(kept) and name not in fields}
        end, end_slot = np.array(ends_and_slots, np.int32).T
        return Labelled(dataclasses.replace(tree, end=end, end_slot=end_slot), {**labels, **per_end})

    def _encode_conversations(self, conversations: Sequence[Conversation], example: Example) -> Sequences:
        return self.encode([self._rendered(c, example) for c in conversations])

    def _drop(self, example: Example, longest: int) -> Shortened:
        raise BadRow("over_long", f"{longest} tokens, data.max_length is {self.max_length}", longest)

    def _truncate_prompt(self, example: Example, longest: int) -> Shortened:
        """Leaves out as many of the oldest exchanges as needed, the same number before every response."""
        most = min(sum(m["role"] == "user" for m in c) for c in example.conversations)
        for exchanges in range(1, most):
            shorter = [_without_oldest(c, exchanges) for c in example.conversations]
            sequences = self._encode_conversations(shorter, example)
            longest = max(map(len, sequences))
            if longest <= self.max_length:
                return shorter, sequences
        raise BadRow("over_long", f"{longest} tokens without its older turns, of {self.max_length}", longest)

    def _truncate_response(self, example: Example, longest: int) -> Shortened:
        if any(c[-1]["role"] != "assistant" for c in example.conversations):  # a judge's question, which ends with it
            self._drop(example, longest)
        contents = [c[-1].get("content") or "" for c in example.conversations]
        low, high = 0, max(map(len, contents))  # `low` characters fit, or it is 0; `high` characters do not
        best: Shortened | None = None
        while high - low > 1:
            middle = (low + high) // 2
            shorter = [
                [*c[:-1], {**c[-1], "content": text[:middle]}] for c, text in zip(example.conversations, contents)
            ]
            sequences = self._encode_conversations(shorter, example)
            if max(map(len, sequences)) <= self.max_length:
                low, best = middle, (shorter, sequences)
            else:
                high, longest = middle, max(map(len, sequences))
        if best is None or not all(text[:low].strip() for text in contents):
            raise BadRow("over_long", f"{longest} tokens without its response, of {self.max_length}", longest)
        return best

    def _depends_on_clock(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether a template sees the clock: two clocks (macros in place of the global) differ."""
        system = [{"role": "system", "content": "s"}, *PROBE]
        for conversation, tools in ((PROBE, None), (system, None), (PROBE, [PROBE_TOOL])):
            rendered = set()
            for now in ("11", "12"):
                clock = f"{{% macro strftime_now(format) %}}{now}{{% endmacro %}}"
                template = clock + self.tokenizer.get_chat_template(tools=tools)
                try:
                    rendered.add(self._template.apply(conversation, tools, chat_template=template, **template_kwargs))
                except BadRow as bad:  # it takes no tools or system messages; plain conversations are checked later
                    if isinstance(bad.__cause__, rendering.TooSlow):
                        raise ValueError(f"the chat template cannot be used: {bad.detail}") from None
            if len(rendered) > 1:
                return True
        return False

    def _find_notes(self, probe: str) -> list[str]:
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
    """Makes sure that padding can be told from text: transformers scores the right-most token that is not padding.

    A pad token that is missing, is EOS, ends the template's renderings, or has no row in an embedding of `vocab_size`
    rows (0: no limit) is replaced by an unused reserved one.

    Returns:
        Its id, and whether it was changed.

    Raises:
        ValueError: there is no unused token.
    """
    tokenizer = chat.tokenizer
    usable = lambda i: i is not None and i not in {*chat.closing, tokenizer.eos_token_id} and i < (vocab_size or i + 1)
    if usable(tokenizer.pad_token_id):
        return tokenizer.pad_token_id, False
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    added = [(i, token.content) for i, token in sorted(tokenizer.added_tokens_decoder.items())]
    reserved = [
        (i, name)
        for pattern in RESERVED
        for i, name in added
        if re.fullmatch(pattern, name, re.IGNORECASE) and usable(i) and name not in template
    ]
    if usable(tokenizer.unk_token_id):  # last: it can stand in a text, but no rendering ends with it
        reserved.append((tokenizer.unk_token_id, tokenizer.unk_token))
    if not reserved:
        raise ValueError(
            f"pad token {tokenizer.pad_token!r} is missing, is EOS ({tokenizer.eos_token!r}) or ends the chat "
            "template, and the tokenizer has no unused reserved token to take instead; add one to the tokenizer "
            "(and its row to the model's embedding) and set it as pad_token"
        )
    pad, tokenizer.pad_token = reserved[0]
    return pad, True


def _without_oldest(conversation: Conversation, exchanges: int) -> Conversation:
    """Leaves out what stands before user turn `exchanges`, except leading system messages."""
    users = [i for i, message in enumerate(conversation) if message["role"] == "user"]
    kept = [message for message in conversation[: users[0]] if message["role"] == "system"]
    return [*kept, *conversation[users[exchanges] :]]


def _tokens_of(
    span: Span,
    original: Conversation,
    conversation: Conversation,
    texts_at: Sequence[places.Place | None],
    edges: np.ndarray,
    special: np.ndarray,
) -> np.ndarray:
    """Indices of the tokens of a span; of those that end the turn too, if it reaches the end of its message.

    None where truncation left the message out, or the template does not show it. A message that was cut has no end.
    """
    i = len(conversation) + span.message
    place = texts_at[i] if i >= 0 else None
    if place is None or conversation[i]["role"] != original[span.message]["role"]:
        return np.zeros(0, np.int64)
    content = conversation[i]["content"]
    tokens = places.tokens_within(edges, *place.characters(span.start, span.stop))
    if len(tokens) and span.stop >= len(content) and content == original[span.message]["content"]:
        following = [other.start for other in texts_at[i + 1 :] if other]
        shown = any(m.get("content") for m in conversation[i + 1 :])
        limit = following[0] if following else place.stop + 1 if shown else int(edges[-1, 1])
        tokens = np.concatenate([tokens, places.closing_tokens(edges, special, int(tokens[-1]), limit)])
    return tokens


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
