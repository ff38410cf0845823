"""Judges: records as questions about responses, and the verdicts that answer them.

A judge reads the conversation and the responses as one user turn, made by a Jinja2 template that states the question.
One kind answers by classification (`Judgements`), the other in writing (`score_conversations`, `better_conversations`,
`parse_verdict`). This module imports no jax.

Variables of a template, by kind:

    "pair"   prompt, conversation, messages, principle, ties, response_a, response_b     must show both responses
    "score"  prompt, conversation, messages, principle, attributes, scale, response      must show the response

`prompt` is the text of the last user turn; `messages` the history as a list of {role, content}, and `conversation`
the same as a readable transcript; `principle` what the responses are judged by (the key `principle` of the last turn
that has one, see records.group), or ""; `ties` whether "tie" is a possible verdict; `attributes` the list of names that
are rated; `scale` the lowest and the highest score, as text. Tool descriptions are not shown.

The history is what both conversations of a pair begin with. Where they differ before their last turns, all that
follows the first difference belongs to the response and is shown as a transcript.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np

from rmjax.batches import rendering
from rmjax.batches.tasks import Axes, Example, no_label
from rmjax.data.records import BadRow, Conversation, Message, Record

T = TypeVar("T")

VERDICTS = ("A", "B", "tie")
SWAPPED = (1, 0, 2)  # what each verdict is when the responses change places

SHARED = ("prompt", "conversation", "messages", "principle")
SHOWN = {"pair": ("response_a", "response_b"), "score": ("response",)}
CASES: dict[str, list[dict[str, Any]]] = {  # of the other variables, each of which a template must be able to render
    "pair": [{"ties": True}, {"ties": False}],
    "score": [{"attributes": names, "scale": ("0", "4")} for names in (["score"], ["fluency"], ["truth", "style"])],
}
VARIABLES = {kind: {*SHARED, *SHOWN[kind], *cases[0]} for kind, cases in CASES.items()}
DEFAULTS = {"pairwise": "pair", "judge_pair": "pair", "judge_score": "score"}  # packaged templates and their kinds
REASONS = "reasons"  # names the packaged template that asks a judge to reason before the verdict it writes
SCORE, BETTER = "score", "better"  # the tags of written verdicts, where no attribute names one


# Templates


def load_template(path: str, default: str) -> str:
    """The text of a template: of a file, the packaged one for "" (for "reasons" the one that asks a judge to reason
    first), or `path` itself if it is a template, which its "{{" shows."""
    packaged = {"": default, REASONS: f"{default}_{REASONS}"}
    if path in packaged and not (path and default == "pairwise"):  # whose judge writes nothing
        return (resources.files("rmjax.judging") / "templates" / f"{packaged[path]}.jinja").read_text()
    if "{{" in path:
        check_template(path, DEFAULTS[default])
        return path
    if not Path(path).is_file():
        raise FileNotFoundError(f'there is no judging template {path}; give a Jinja2 file, or "" for the packaged one')
    text = Path(path).read_text()
    check_template(text, DEFAULTS[default], path)
    return text


def check_template(text: str, kind: str, name: str = "the judging template") -> None:
    """Refuses a template (ValueError) that cannot be rendered, or that does not show every response."""
    try:
        names, template = _names_in(text), _compiled(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: {error.message}; expected a Jinja2 template") from None
    if unknown := sorted(names - VARIABLES[kind]):
        known = ", ".join(sorted(VARIABLES[kind]))
        raise ValueError(f"{name} uses {', '.join(unknown)}, which a {kind} template does not have; it has {known}")
    history: list[Message] = [{"role": "user", "content": "a question"}]
    responses = [f"\ue000{i}\ue001" for i in range(len(SHOWN[kind]))]
    for more in CASES[kind]:
        variables = _variables(history, responses, kind, more)
        try:
            rendered = rendering.render(functools.partial(template.render, variables))
        except BadRow as bad:
            raise ValueError(f"{name} cannot be rendered: {bad.detail}") from None
        missing = [shown for shown, mark in zip(SHOWN[kind], responses) if mark not in rendered]
        if missing:
            raise ValueError(f"{name} does not show {' and '.join(missing)}, which is to be judged; put it in")


# A template is a file from elsewhere: sandboxed, and a name that is not there fails instead of vanishing.
ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(text)


@functools.lru_cache(maxsize=16)
def _names_in(text: str) -> set[str]:
    """The variables that a template reads."""
    return jinja2.meta.find_undeclared_variables(ENVIRONMENT.parse(text))


def _variables(history: Conversation, responses: Sequence[str], kind: str, more: Mapping[str, Any]) -> dict[str, Any]:
    asked = [text_of(message) for message in history if message["role"] == "user"]
    shared = {
        "prompt": asked[-1] if asked else "",
        "conversation": transcript(history),
        "messages": [dict(message) for message in history],
        "principle": str(next((m["principle"] for m in reversed(history) if m.get("principle")), "")),
    }
    return {**shared, **dict(zip(SHOWN[kind], responses)), **more}


def ask(template: str, kind: str, history: Conversation, responses: Sequence[str], **more: Any) -> Message:
    """The user turn in which a judge is asked about the texts of responses; `more` are the kind's other variables.

    Raises:
        BadRow: `template_error`; or `not_read`: the row has a principle, and the template does not read it.
    """
    variables = _variables(history, responses, kind, more)
    if variables["principle"] and not _names_in(template) & {"principle", "messages"}:
        raise BadRow(
            "not_read",
            f"the responses are judged by {variables['principle'][:60]!r}, and the judging template does not show it; "
            'put {{ principle }} into it, or leave the column out with "ignore=COLUMN" in config.data.columns',
        )
    text = rendering.render(lambda: _compiled(template).render(variables), "the judging template: ")
    return {"role": "user", "content": text}


def ask_in_both_orders(template: str, first: Conversation, second: Conversation, ties: bool) -> tuple[Message, Message]:
    """The questions about two whole conversations: with the first as A, and with the second as A."""
    history, *texts = divide(first, second)
    one, other = (ask(template, "pair", history, shown, ties=ties) for shown in (texts, texts[::-1]))
    return one, other


def text_of(message: Message) -> str:
    """The text of a message; tool calls as JSON after it."""
    calls = message.get("tool_calls")
    parts = [message.get("content") or "", json.dumps(calls, ensure_ascii=False, default=str) if calls else ""]
    return "\n".join(filter(None, parts))


def transcript(conversation: Conversation) -> str:
    r"""Messages in readable form.

    >>> transcript([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    'User: Hi\n\nAssistant: Hello'
    """
    return "\n\n".join(f"{message['role'].capitalize()}: {text_of(message)}" for message in conversation)


def divide(first: Conversation, second: Conversation) -> tuple[Conversation, str, str]:
    """Splits two conversations into the history that they share, and what is to be judged of each.

    The history is at most all but the last turns; what follows is a response, or a transcript of several turns. BadRow
    (`not_read`) where the principle is no part of the history.
    """
    same = itertools.takewhile(lambda both: both[0] == both[1], zip(first[:-1], second[:-1]))
    history = [message for message, _ in same]
    rests = [conversation[len(history) :] for conversation in (first, second)]
    if any(message.get("principle") for rest in rests for message in rest):
        raise BadRow("not_read", "the principle belongs to a turn in which the two conversations differ already")
    texts = [text_of(rest[0]) if len(rest) == 1 else transcript(rest) for rest in rests]
    return history, texts[0], texts[1]


# Judges that classify


def some_good(parts: list[T | BadRow]) -> list[T | BadRow]:
    """The parts that a record became; if all of them are bad, the first is raised."""
    bad = [part for part in parts if isinstance(part, BadRow)]
    if bad and len(bad) == len(parts):
        raise bad[0]
    return parts


def strength_of(record: Record, i: int, j: int) -> np.ndarray:
    """float32 [1]: how much better the preferred one of two responses is, in the source's units; NaN where
    it is not known, or neither is preferred."""
    preferred = record.wins[i, j] != record.wins[j, i]
    return np.array([record.margin[i, j] + record.margin[j, i] if preferred else np.nan], np.float32)


def labelled_pairs(record: Record) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (i, j, float64 [3]) for i < j of which something is said: shares of "i better", "j better" and "tie"."""
    for i, j in itertools.combinations(range(len(record.conversations)), 2):
        said = np.array([record.wins[i, j], record.wins[j, i], record.ties[i, j]], np.float64)
        if said.sum() > 0:
            yield i, j, said / said.sum()


@dataclasses.dataclass(frozen=True)
class Judgements:
    """Verdicts about pairs; each labelled pair of a record is one group of K = 2 sequences.

    The first sequence shows response i as A and j as B, the second the other way round; their shared beginning is
    computed once. A record of several pairs gives several groups, each with the record's weight.
    """

    template: str  # text of the template that states the question, kind "pair"
    classes: int = 3  # verdicts, C: 3 (A, B, tie) or 2 (A, B)
    ties: str = "skip"  # with 2 classes, "skip" what was judged equal, or count it as "half" a verdict each way

    def __post_init__(self) -> None:
        check_template(self.template, "pair")
        if self.classes not in (2, 3):
            raise ValueError(f"classes={self.classes} is none of 2 (A, B) and 3 (A, B, tie)")
        if self.ties not in ("skip", "half"):
            raise ValueError(f"ties={self.ties!r} is none of skip, half")

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`verdict`: for each order the probabilities of A, B (and tie). `strength`: how much better the preferred
        response is, in the source's units (Record.margin); NaN where it is not known, and for ties.
        """
        return {"verdict": ("G", "K", self.classes), "strength": ("G", 1)}

    def questions(self, first: Conversation, second: Conversation) -> tuple[Conversation, Conversation]:
        """What the judge reads of two whole conversations: the first as A, and the second as A."""
        one, other = ask_in_both_orders(self.template, first, second, ties=self.classes == 3)
        return (one,), (other,)

    def examples(self, record: Record) -> Sequence[Example | BadRow]:
        pairs = list(labelled_pairs(record))
        if not pairs:
            raise no_label(record, "preferences")
        name = lambda i, j: f"{i}-{j}" if len(pairs) > 1 else ""
        return some_good([self._example(record, i, j, said, name(i, j)) for i, j, said in pairs])

    def _verdict(self, said: np.ndarray) -> np.ndarray | None:
        """Shares of the classes [C]; None for a tie that is skipped."""
        if self.classes == 3:
            return said
        if self.ties == "half":
            return said[:2] + said[2] / 2
        return said[:2] / said[:2].sum() if said[:2].any() else None

    def _example(self, record: Record, i: int, j: int, said: np.ndarray, name: str) -> Example | BadRow:
        if (verdict := self._verdict(said)) is None:
            return BadRow("tie", "neither response is preferred, and there are 2 classes")
        try:
            questions = self.questions(record.conversations[i], record.conversations[j])
        except BadRow as bad:
            return bad
        if questions[0] == questions[1] and record.conversations[i] != record.conversations[j]:
            return BadRow("identical_responses", "they differ only in what the judge is not shown")
        labels = {
            "verdict": np.stack([verdict, verdict[list(SWAPPED[: self.classes])]]).astype(np.float32),
            "strength": strength_of(record, i, j),
        }
        return Example(questions, labels, name=name)


# Judges that write


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge wrote."""

    kind: str  # "score", "better", or "unparseable", which is never a score
    value: float | str  # the score as a float; "A", "B" or "tie"; or why there is no verdict
    # Characters [start, stop) of the value, "3" or "A", the last where it is repeated.
    span: tuple[int, int] | None = dataclasses.field(default=None, compare=False)


def score_conversations(
    record: Record, template: str, *, scale: tuple[float, float], attributes: Sequence[str] = ()
) -> list[Conversation | BadRow]:
    """A judge's rating of each response, as a conversation of a question and an answer.

    The answer is "<score>3</score>" for one attribute, whatever its name, and for several one line each,
    "<helpfulness>3</helpfulness>". A BadRow (`no_label`, `out_of_scale`) stands for a response that lacks one, or has
    one off the scale.

    Args:
        scale: lowest and highest score.
        attributes: names of those that are rated; () is all that the record has.

    Raises:
        BadRow: no response can be rated; or `conflicting_label`: attributes whose names cannot be told apart as tags.
    """
    names = tuple(attributes) or tuple(record.attributes)
    tags = names if len(names) > 1 else (SCORE,) * len(names)
    ends = (number_text(scale[0]), number_text(scale[1]))
    conversations: list[Conversation | BadRow] = []
    for k, conversation in enumerate(record.conversations):
        values = [float(record.attributes[name][k]) if name in record.attributes else math.nan for name in names]
        if not values or any(map(math.isnan, values)):
            conversations.append(no_label(record, f"the attributes {', '.join(names) or 'of a rating'}"))
            continue
        if not all(scale[0] <= value <= scale[1] for value in values):
            conversations.append(BadRow("out_of_scale", f"{values} on a scale from {ends[0]} to {ends[1]}"))
            continue
        shown = [text_of(conversation[-1])]
        question = ask(template, "score", conversation[:-1], shown, attributes=list(names), scale=ends)
        answer = "\n".join(f"<{tag}>{number_text(value)}</{tag}>" for tag, value in zip(tags, values))
        for tag, name, value in zip(tags, names, values):
            parsed = parse_verdict(answer, SCORE, tag=tag, scale=scale)
            if parsed != Verdict(SCORE, float(number_text(value))):
                detail = f"{name} {value:g} cannot be read back from the answer: {parsed.value}"
                raise BadRow("conflicting_label", detail)
        conversations.append((question, {"role": "assistant", "content": answer}))
    return some_good(conversations)


def better_conversations(
    record: Record, template: str, *, ties: bool = True, both_orders: bool = False
) -> list[Conversation | BadRow]:
    """A judge's verdict on each labelled pair, as a conversation of a question and an answer.

    The answer is "<better>A</better>", B or tie: what most annotators said; a BadRow (`tie`) stands for a pair without
    a strict majority. Whether the record's first response is A is drawn from a hash of the pair; a record with the
    responses in the opposite order (config.data.augment="swap") shows the other order.

    Args:
        ties: whether "tie" is a possible verdict; if not, ties are left out.
        both_orders: show each pair twice, with the responses in either order, instead of once.

    Raises:
        BadRow: `no_label`: no preferences. `tie`: none of the pairs has a verdict.
    """
    pairs = list(labelled_pairs(record))
    if not pairs:
        raise no_label(record, "preferences")
    conversations: list[Conversation | BadRow] = []
    for i, j, said in pairs:
        said = said if ties else said[:2]
        winners = np.flatnonzero(said == said.max())
        if len(winners) > 1:
            conversations.append(BadRow("tie", "no verdict has a majority"))
            continue
        history, *texts = divide(record.conversations[i], record.conversations[j])
        for swap in (False, True) if both_orders else (coin(history, texts),):
            shown, winner = (texts[::-1], SWAPPED[winners[0]]) if swap else (texts, winners[0])
            answer = {"role": "assistant", "content": f"<{BETTER}>{VERDICTS[winner]}</{BETTER}>"}
            conversations.append((ask(template, "pair", history, shown, ties=ties), answer))
    return some_good(conversations)


def coin(history: Conversation, texts: Sequence[str]) -> bool:
    """A coin that is tossed for a pair of texts, whichever comes first: whether the second is shown as A."""
    key = json.dumps([list(history), sorted(texts)], sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=1).digest()
    return bool(digest[0] & 1)


def number_text(value: float) -> str:
    """A score as it is written: up to four decimals, without trailing zeros: "3", "2.5"."""
    return f"{round(value, 4) + 0.0:.4f}".rstrip("0").rstrip(".")


THINK = re.compile(r"<(/?)(?:think|thinking|reasoning)>", re.IGNORECASE)
OPENED = re.compile(r"<(?:think|thinking|reasoning)>\s*\Z", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
WORDS = {word.lower(): word for word in VERDICTS}


def parse_verdict(
    text: str,
    kind: str,
    *,
    tag: str = "",
    scale: tuple[float, float] | None = None,
    ties: bool = True,
    thinking: bool = False,
) -> Verdict:
    """Reads the verdict in what a judge wrote. Every text has exactly one outcome.

    The verdict is what stands between <score> and </score>, or <better> and </better>, in any case and with white
    space around it. Thinking blocks are not read. A verdict may be repeated, but not contradicted.

    Args:
        kind: "score" or "better".
        tag: its tag; "" is the kind. An attribute's name where several are rated.
        scale: lowest and highest score, both allowed; None is no limit.
        ties: whether "tie" is a verdict.
        thinking: whether the text begins within a thought, which the rendering before it opened (`opens_thought`). Of
            such a text nothing is read before the thought is closed.

    Returns:
        Verdict("score", 3.0), Verdict("better", "A"), or Verdict("unparseable", why): no tag, unbalanced or nested
        tags, several that disagree, no plain decimal number ("NaN", "3/5", "three", "1e3"), a score off the scale, or
        no verdict among A, B and tie.
    """
    if kind not in (SCORE, BETTER):
        raise ValueError(f"kind={kind!r} is none of {SCORE}, {BETTER}")
    tag, said = tag or kind, _without_thinking(text, thinking)
    tags = list(re.finditer(rf"<(/?)\s*{re.escape(tag)}\s*>", said, re.IGNORECASE))
    if not tags:
        return Verdict("unparseable", f"there is no <{tag}>")
    if len(tags) % 2 or any(bool(match[1]) != bool(place % 2) for place, match in enumerate(tags)):
        return Verdict("unparseable", f"<{tag}> and </{tag}> are not balanced")
    verdicts = []
    for opening, closing in zip(tags[::2], tags[1::2]):
        inside = said[opening.end() : closing.start()]
        word = inside.strip()
        if (value := _value(word, kind, scale, ties)) is None:
            return Verdict("unparseable", f"{word[:40]!r} is no verdict")
        start = opening.end() + len(inside) - len(inside.lstrip())
        verdicts.append(Verdict(kind, value, (start, start + len(word))))
    return verdicts[-1] if len(set(verdicts)) == 1 else Verdict("unparseable", f"<{tag}> contradicts itself")


def _value(inside: str, kind: str, scale: tuple[float, float] | None, ties: bool) -> float | str | None:
    if kind == BETTER:
        word = WORDS.get(inside.lower())
        return word if ties or word != "tie" else None
    low, high = scale or (-math.inf, math.inf)
    if not NUMBER.fullmatch(inside):
        return None
    value = float(inside)
    return value if low <= value <= high and math.isfinite(value) else None


def opened_thought(rendering: str) -> str:
    """How a rendering ends that opens a thought for what follows, as R1's and QwQ's templates do for every answer; else
    "". A tag in what was asked opens none.

    >>> opened_thought("<|Assistant|><think>\\n"), opened_thought("<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n")
    ('<think>\\n', '')
    """
    match = OPENED.search(rendering)
    return match[0] if match else ""


def opens_thought(rendering: str) -> bool:
    """Whether what follows a rendering is within a thought; see `opened_thought`."""
    return bool(opened_thought(rendering))


def _without_thinking(text: str, thinking: bool) -> str:
    """The text with blanks in place of thinking blocks, so that characters keep their places.

    A block that is not closed reaches to the end. One that was not opened reaches from the start: some templates open
    it in the prompt.
    """
    blocks: list[tuple[int, int]] = []
    depth, start = int(thinking), 0
    for match in THINK.finditer(text):
        if not match[1]:
            start = start if depth else match.start()
            depth += 1
        elif depth > 1:
            depth -= 1
        else:
            if not depth:
                blocks.clear()
            blocks.append((start if depth else 0, match.end()))
            depth = 0
    if depth:
        blocks.append((start, len(text)))
    pieces, at = [], 0
    for start, stop in blocks:
        pieces += [text[at:start], " " * (stop - start)]
        at = stop
    return "".join(pieces) + text[at:]
