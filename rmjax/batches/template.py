"""A tokenizer's chat template: what it makes of conversations, and what of them it does not show.

What a template does not show is found with marks: a conversation of the same shape, with a mark in place of every text,
is rendered once, and what is lost is what has no mark there. Conversations of one shape share that rendering; where
all turns are plain text, the shape is told without marking them.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rmjax.batches import rendering
from rmjax.batches.places import MARK
from rmjax.data.records import BadRow, Conversation, Message

MOST_SHAPES = 4_096  # that are remembered
KEY = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
THOUGHT = re.compile(r"(<(?:think|thinking|thought|reasoning)>)?(.*)(</(?:think|thinking|thought|reasoning)>)", re.S)
WRAPPED = re.compile(r"(<[^<>\s]+>).*(</[^<>\s]+>)", re.S)  # templates look for <tool_response>, for example
REASONING = ("reasoning_content", "reasoning", "thinking")
LINKS = ("id", "tool_call_id", "index", "type")  # they say which belongs to which, and are no content


class Part(NamedTuple):
    """Something that a conversation holds."""

    kind: str  # a name in records.PARTS
    words: str  # which one it is
    scored: bool = False  # it is a part of the last turn


class Shown(NamedTuple):
    """What of a conversation a rendering lacks, and all that it holds."""

    lost: tuple[Part, ...]
    parts: tuple[Part, ...]


Shape = tuple[tuple[str, str | None], ...]  # of each turn its role, and None for a text or the blank that stands there


class CallForm(NamedTuple):
    """How a template takes tool calls."""

    beside: Mapping[str, str] | None  # the content of a turn that has nothing but calls; None: as it was written
    text: bool  # it shows arguments that are JSON text
    objects: bool  # it shows arguments that are objects


class Template:
    """The chat template of a tokenizer, with its arguments."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any]):
        self._tokenizer, self._arguments = tokenizer, arguments
        self._shapes: dict[str, tuple[Part, ...]] = {}  # what is not shown, by marked conversation
        self._plain: dict[Shape, Shown] = {}  # the same of conversations of plain text

    def apply(self, conversation: Conversation, tools: Sequence[Any] | None = None, **more: Any) -> str:
        """What transformers renders; `more` are arguments of apply_chat_template in place of the template's own."""
        apply, tools = self._tokenizer.apply_chat_template, list(tools) if tools else None
        given = more or {**self._arguments, "add_generation_prompt": False}
        return rendering.render(lambda: apply(list(conversation), tools=tools, tokenize=False, **given))

    def render(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
        """The rendering of a whole conversation, with its tool calls in the form that the template takes.

        Raises:
            BadRow: `template_error`: the template fails, or does not show the last turn's text, or nothing of it.
        """
        conversation = self._fitted(conversation)
        text = self.apply(conversation, tools)
        of_all = self._shown(conversation, tools)
        lost = [part for part in of_all.lost if part.scored and part.kind != "other_key"]
        shown = {part for part in of_all.parts if part.scored and part.kind != "other_key"}.difference(lost)
        if lost and (not shown or any(part.kind == "text" for part in lost)):
            raise BadRow("template_error", f"it does not show {' and '.join(part.words for part in lost)}")
        return text

    def render_prompt(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> str:
        """The rendering of turns that a response is to follow, up to where its text begins."""
        return self.apply(self._fitted(conversation), tools, **{**self._arguments, "add_generation_prompt": True})

    def not_shown(self, conversation: Conversation, tools: Sequence[Any] | None = None) -> tuple[Part, ...]:
        """What the rendering of a conversation lacks of it."""
        return self._shown(self._fitted(conversation), tools).lost

    def unparsed(self, conversation: Conversation) -> list[str]:
        """The arguments of tool calls that are no JSON objects, where the template expects objects."""
        calls = [call for message in self._fitted(conversation) for call in _calls(message)]
        if not calls or self.call_form.text:
            return []
        found = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
        texts = [function.get("arguments") for function in found if isinstance(function, Mapping)]
        return [text for text in texts if isinstance(text, str)]

    def _shown(self, conversation: Conversation, tools: Sequence[Any] | None) -> Shown:
        shape = None if tools else _plain_shape(conversation)
        if shape is not None and shape in self._plain:
            return self._plain[shape]
        marked = _marked(conversation, tools)
        found = Shown(self._not_shown(*marked), tuple(marked[2].values()))
        if shape is not None:
            if len(self._plain) >= MOST_SHAPES:
                self._plain.clear()
            self._plain[shape] = found
        return found

    def _not_shown(
        self, conversation: list[Message], tools: list[Any] | None, parts: dict[str, Part]
    ) -> tuple[Part, ...]:
        key = KEY.encode([conversation, tools])
        if key not in self._shapes:
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = tuple(self._lost(conversation, tools, parts))
        return self._shapes[key]

    def _lost(self, conversation: list[Message], tools: list[Any] | None, parts: dict[str, Part]) -> list[Part]:
        try:
            text = self.apply(conversation, tools)
        except BadRow:  # it looks into texts; what it does with the real ones is not known
            return []
        escaped = lambda mark: mark.encode("unicode_escape").decode()  # in JSON, or as Python prints it
        lost = [part for mark, part in parts.items() if mark not in text and escaped(mark) not in text]
        for i, message in enumerate(conversation):  # what cannot be marked is left out instead
            last = i == len(conversation) - 1
            for key in _other_keys(message):
                if not _has_mark(message[key]):
                    without = {name: value for name, value in message.items() if name != key}
                    if self._same(text, [*conversation[:i], without, *conversation[i + 1 :]], tools):
                        lost.append(_key_part(key, message, last))
            if not _has_mark(message) and self._same(text, [*conversation[:i], *conversation[i + 1 :]], tools):
                lost.append(Part("empty_turn", f"an empty {message['role']} turn"))
        return lost

    def _same(self, text: str, conversation: list[Message], tools: list[Any] | None) -> bool:
        try:
            return self.apply(conversation, tools) == text
        except BadRow:
            return False

    def _fitted(self, conversation: Conversation) -> Conversation:
        return [self._fit(message) if _calls(message) else message for message in conversation]

    def _fit(self, message: Message) -> Message:
        form = self.call_form
        calls = [_with_arguments(call, form) for call in _calls(message)]
        if message.get("content") or form.beside is None:
            return {**message, "tool_calls": calls}
        return {
            **{key: value for key, value in message.items() if key != "content"},
            **form.beside,
            "tool_calls": calls,
        }

    @functools.cached_property
    def call_form(self) -> CallForm:
        """The form of tool calls that the template shows; as they were written where it shows none."""
        mark = MARK.format("x")
        for beside in ({}, {"content": ""}):  # transformers leaves out what is null
            shown = [self._try_call(beside, arguments) for arguments in (f'{{"x": "{mark}"}}', {"x": mark})]
            text, objects = f'{{"x": "{mark}"}}' in shown[0], mark in shown[1] and "{'x'" not in shown[1]
            if text or objects:
                return CallForm(beside, text, objects)
        return CallForm(None, True, True)

    def _try_call(self, beside: Mapping[str, Any], arguments: Any) -> str:
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        try:
            return self.apply([{"role": "user", "content": "q"}, {"role": "assistant", **beside, "tool_calls": [call]}])
        except BadRow:
            return ""


def _calls(message: Message) -> Sequence[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list | tuple) else []


def _other_keys(message: Message) -> list[str]:
    """The keys beside role and content that hold something."""
    empty = lambda value: value is None or (isinstance(value, str | list | tuple | Mapping) and not value)
    return [key for key, value in message.items() if key not in ("role", "content", *LINKS) and not empty(value)]


def _with_arguments(call: Any, form: CallForm) -> Any:
    """A tool call with its arguments as an object or as text, whichever the template shows; both are as written."""
    if not isinstance(call, Mapping) or form.text == form.objects:
        return call
    if "function" in call:
        return {**call, "function": _with_arguments(call["function"], form)}
    arguments = call.get("arguments")
    if form.objects and isinstance(arguments, str):
        return {**call, "arguments": _object(arguments)}
    if form.text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call


def _object(text: str) -> Any:
    """The object that a text is JSON of; the text itself where it is none, as a model may have written it."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _marked(
    conversation: Conversation, tools: Sequence[Any] | None
) -> tuple[list[Message], list[Any] | None, dict[str, Part]]:
    """A conversation of the same shape with marks for its texts, and what stands behind each mark."""
    parts: dict[str, Part] = {}

    def mark(kind: str, words: str, scored: bool = False) -> str:
        name = MARK.format(len(parts))
        parts[name] = Part(kind, words, scored)
        return name

    marked: list[Message] = []
    for i, message in enumerate(conversation):
        last, role = i == len(conversation) - 1, message["role"]
        new = dict(message)
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            where = f"the {_turn(role, last)}'s text"
            kind = "system" if role == "system" else "text"
            new["content"] = _marked_text(
                content.strip(),
                functools.partial(mark, kind, where, last),
                functools.partial(mark, "thought", f"the thought in {where}", last),
            )
        for key in _other_keys(message):
            name = MARK.format(len(parts))
            new[key] = _replace(message[key], name)
            if _has_mark(new[key]):
                parts[name] = _key_part(key, message, last)
        marked.append(new)
    if not tools:
        return marked, None, parts
    name = mark("tools", "the tool descriptions")
    tool = {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}}
    wrapped_tool = isinstance(tools[0], Mapping) and "function" in tools[0]
    return marked, [{"type": "function", "function": tool} if wrapped_tool else tool], parts


def _plain_shape(conversation: Conversation) -> Shape | None:
    """What the marked conversation depends on where turns are roles and texts without tags; None of others."""
    shape: list[tuple[str, str | None]] = []
    for message in conversation:
        content = message.get("content")
        if len(message) != 2 or not isinstance(content, str) or "<" in content:
            return None
        shape.append((message["role"], None if content.strip() else content))
    return tuple(shape)


def _marked_text(content: str, text_mark: Callable[[], str], thought_mark: Callable[[], str]) -> str:
    """Marks in place of a text and of the thought before it; tags stay, which templates look for."""
    if thought := THOUGHT.match(content):
        begin, inside, end = thought.groups()
        answer = content[thought.end() :].strip()
        return f"{begin or ''}{thought_mark() if inside.strip() else ''}{end}{text_mark() if answer else ''}"
    wrapped = WRAPPED.fullmatch(content)
    return f"{wrapped[1]}{text_mark()}{wrapped[2]}" if wrapped else text_mark()


def _turn(role: str, last: bool) -> str:
    return f"last {role} turn" if last else f"{role} turn"


def _key_part(key: str, message: Message, last: bool) -> Part:
    kind = "tool_calls" if key == "tool_calls" else "reasoning_content" if key in REASONING else "other_key"
    return Part(kind, f"{key} of the {_turn(message['role'], last)}", last)


def _replace(value: Any, mark: str) -> Any:
    """A value with the mark in place of its texts."""
    if isinstance(value, str):
        return mark if value.strip() else value
    if isinstance(value, Mapping):
        return {key: x if key in LINKS else _replace(x, mark) for key, x in value.items()}
    return [_replace(x, mark) for x in value] if isinstance(value, list | tuple) else value


def _has_mark(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_mark, value.values()))
    if isinstance(value, list):
        return any(map(_has_mark, value))
    return isinstance(value, str) and MARK[0] in value
