"""The canonical record: one prompt, K responses, and what was said of them.

Every format on disk becomes this (`formats`), and this can go back to disk (`store.py`); `tasks.py` makes of it what
an objective learns from.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Message = Mapping[str, Any]  # {"role": ..., "content": ...} and whatever else the chat template reads
Conversation = Sequence[Message]

TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of the parts of a content that are text
BESIDE_TEXT = ("type", "text", "annotations", "cache_control", "logprobs", "index")  # keys of such a part
HALF_PAIR = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: JSON can escape it, no tokenizer takes it
ROLES = ("system", "user", "assistant", "tool")

# What a conversation can hold, for what a chat template does not show of it.
PARTS = {
    **{"system": "a system message", "text": "the text of an earlier turn", "empty_turn": "an empty turn"},
    **{"tools": "the tool descriptions", "tool_calls": "tool calls", "thought": "a thought within the content"},
    **{"reasoning_content": "reasoning beside the content", "other_key": "another key of a message"},
}
# What becomes otherwise than it was meant of rows that are used; the last turn's parts have names of their own.
LEFT_OUT = {
    **{f"{kind}_left_out": f"the chat template does not show {words}" for kind, words in PARTS.items()},
    **{
        f"scored_{kind}_left_out": f"the chat template does not show {PARTS[kind]} of the last turn, which is scored"
        for kind in ("tool_calls", "thought", "reasoning_content", "other_key")
    },
    "special_tokens_in_text": "a text holds special tokens of the chat template, as if it were rendered already",
    "arguments_not_json": "the arguments of a tool call are no JSON of an object, which the chat template expects",
}
# Why a row could not be used, or not as it is. The audit counts rows under these names, with an example of each.
REASONS = {
    **LEFT_OUT,
    "empty_response": "a response without text",
    "identical_responses": "the responses of a group are the same",
    "identical_after_truncation": "the responses became the same when they were truncated",
    "over_long": "longer than data.max_length and the policy data.over_long could not shorten it",
    "tree_too_long": "the group's tree does not fit a row of plan.row_tokens",
    "question_too_long": "a judge's context has no room for a question about it and a judgement",
    "filter": "config.data.filter leaves it out",
    "sample": "config.data.sample leaves it out",
    "tie": "neither response is preferred (objective.ties='skip')",
    "conflicting_label": "the label contradicts itself or the other labels of the row",
    "wrong_type": "a cell of another type than its column needs",
    "not_read": "a column of text, a label or media that no reader reads",
    "out_of_scale": "a score outside its attribute's scale (objective.scales)",
    "no_assistant_turn": "the conversation does not end with an assistant turn",
    "labelled_bad": "a response that was judged bad, which is not imitated",
    "no_column": "a column that the reward reads is missing or null",
    "no_label": "it says nothing that the objective learns from",
    "not_answered": "a task that nobody answered: skipped, or not yet labelled",
    "template_error": "the chat template refuses the conversation, or does not show its last turn",
    "too_many_responses": "more responses than a group takes (records.MOST_RESPONSES)",
}
MOST_RESPONSES = 4_096  # of a group: its pairs take three arrays of that many times that many numbers
# The defects of a row that still allow training on it (data.on_bad_row="keep").
KEEPABLE = ("empty_response", "identical_responses", "identical_after_truncation")


class BadRow(Exception):
    """A row that cannot be used: a name in REASONS, what was found, and the length that was too long, or 0."""

    def __init__(self, reason: str, detail: str, tokens: int = 0):
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}; known: {sorted(REASONS)}")
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.tokens = reason, detail, tokens


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a response."""

    stop: int  # characters of the response's text up to the step's last one, inclusive
    label: float  # from 0 (wrong) to 1 (right); NaN where it was not judged


@dataclasses.dataclass(frozen=True)
class Record:
    """One group of K responses; it may say several things at once, or nothing."""

    conversations: tuple[tuple[Message, ...], ...]  # K whole ones, each ending with an assistant turn
    # float32 [K, K]; wins[i, j] is how much i is preferred to j: 1 for a hard label, p and 1 - p for a soft one.
    wins: np.ndarray
    ties: np.ndarray  # float32 [K, K], symmetric; 1 where i and j were judged equal
    # float32 [K, K]; by how much i beats j where wins[i, j] > 0, in the source's own units, NaN where that is not
    # known; 0 elsewhere
    margin: np.ndarray
    weight: float = 1.0  # in the loss
    tools: tuple[Any, ...] | None = None  # descriptions handed to the chat template
    source: str = ""  # name of the source it came from
    row: str = ""  # where it stands there, "file.jsonl:17" (row numbers count from 0)
    # Named scores of each response, K numbers each, NaN where one is missing.
    attributes: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    steps: tuple[tuple[Step, ...], ...] = ()  # for each response its steps in order; () where no steps were judged
    agreement: float = math.nan  # share of the annotators who gave the label; NaN where it is not known
    # Cells of the row that were asked for by name (`formats.Layout.carried`), as JSON has them; none is null.
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        k = len(self.conversations)
        for name in ("wins", "ties", "margin"):
            shape = getattr(self, name).shape
            if shape != (k, k):
                raise ValueError(f"{self.row}: {name} has shape {shape}, expected {(k, k)} for {k} responses")
        counts = {name: len(values) for name, values in self.attributes.items()}
        if any(n != k for n in counts.values()) or len(self.steps) not in (0, k):
            raise ValueError(f"{self.row}: {k} responses, but attributes of {counts} and {len(self.steps)} with steps")

    @property
    def largest_margin(self) -> float:
        """Of all that are known; 0 where none is."""
        return float(np.nan_to_num(self.margin).max())

    def select(self, responses: Sequence[int]) -> "Record":
        chosen = list(responses)
        pick = lambda values: tuple(values[i] for i in chosen)
        return dataclasses.replace(
            self,
            conversations=pick(self.conversations),
            attributes={name: pick(values) for name, values in self.attributes.items()},
            steps=pick(self.steps) if self.steps else (),
            **{name: getattr(self, name)[np.ix_(chosen, chosen)] for name in ("wins", "ties", "margin")},
        )


def check_conversation(conversation: Any, *, keep: bool = False) -> tuple[Message, ...]:
    """Validates one conversation: a list of {role, content}, ending with an assistant turn that has text.

    A content that is a list of parts becomes the text of its parts. With `keep` the last turn may be empty, and null
    becomes "". Raises BadRow: `wrong_type`, `no_assistant_turn` or `empty_response`.
    """
    if not isinstance(conversation, list | tuple):
        raise BadRow("wrong_type", f"a conversation must be a list of messages, got {type(conversation).__name__}")
    checked: list[Message] = []
    for i, message in enumerate(conversation, 1):
        if not isinstance(message, Mapping) or "role" not in message:
            raise BadRow("wrong_type", f"a message must be a {{role, content}} object, got {str(message)[:80]!r}")
        if message["role"] not in ROLES:
            raise BadRow("wrong_type", f"role {message['role']!r} is none of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list | tuple | Mapping):
            content = _joined_text(content, message["role"])
            message = {**message, "content": content}
        may_be_null = message.get("tool_calls") or (i == len(conversation) and message["role"] == "assistant")
        if not isinstance(content, str) and not (content is None and may_be_null):
            raise BadRow("wrong_type", f"the {message['role']}'s content is {type(content).__name__}, expected text")
        if content and not content.isascii() and HALF_PAIR.search(content):
            raise BadRow("wrong_type", f"the {message['role']}'s content is no Unicode: half of a surrogate pair")
        if not isinstance(calls := message.get("tool_calls") or [], list | tuple):
            raise BadRow("wrong_type", f"tool_calls is {type(calls).__name__} {str(calls)[:60]!r}, expected a list")
        checked.append(message)
    if not checked or checked[-1]["role"] != "assistant":
        last = checked[-1]["role"] if checked else "nothing"
        raise BadRow("no_assistant_turn", f"the conversation ends with {last}, expected an assistant turn")
    if has_response(checked):
        return tuple(checked)
    if not keep:
        raise BadRow("empty_response", "the last assistant turn has no text")
    return (*checked[:-1], {**checked[-1], "content": checked[-1].get("content") or ""})


def has_response(conversation: Conversation) -> bool:
    """Whether the last turn has text, or calls a tool."""
    return bool((conversation[-1].get("content") or "").strip() or conversation[-1].get("tool_calls"))


def _joined_text(parts: Any, role: str) -> str:
    """The text of a content that is one part or a list of them, end to end; BadRow for a part that is none."""
    texts = []
    for part in [parts] if isinstance(parts, Mapping) else parts:
        part = {"text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping):
            raise BadRow("wrong_type", f"a part of the {role}'s content is {type(part).__name__}, expected text")
        media = [name for name, value in part.items() if name not in BESIDE_TEXT and value is not None]
        if part.get("type") not in TEXT_PARTS or media:
            name = part.get("type") if part.get("type") not in TEXT_PARTS else media[0]
            raise BadRow("wrong_type", f"the {role}'s content has a part {name!r}, only text can be read")
        if not isinstance(part.get("text"), str):
            raise BadRow("wrong_type", f"a part of the {role}'s content has no text: {str(part)[:80]!r}")
        texts.append(part["text"])
    return "".join(texts)


def group(
    conversations: Sequence[Any],
    *,
    wins: Any = None,
    ties: Any = None,
    margin: Any = None,
    attributes: Mapping[str, Sequence[float]] | None = None,
    steps: Sequence[Sequence[Step]] = (),
    tools: Sequence[Any] | None = None,
    principle: str = "",
    keep: bool = False,
    defects: list[BadRow] | None = None,
    **fields: Any,
) -> Record:
    """Builds a group of K whole conversations.

    A response that cannot be used, or that is the same as one before it, is left out where the others can be used
    without it: two of them if something was said of pairs, else one.

    Args:
        conversations, wins, ties, margin, attributes, steps, tools: as in Record; a matrix is 0 everywhere if None, and
            margins are not known then.
        principle: what the responses are judged by; it becomes the key `principle` of the first user turn, where
            judging templates find it (judging/verdicts.py).
        keep: let the defects in KEEPABLE through.
        defects: takes why responses were left out or let through. Without it none is left out.
        **fields: the other fields of Record.

    Raises:
        BadRow: the group cannot be used.
    """
    check_count(k := len(conversations))
    if not k:
        raise BadRow("empty_response", "there is no response")
    matrix = lambda x: np.zeros((k, k), np.float32) if x is None else np.array(x, np.float32)
    wins, ties = matrix(wins), matrix(ties)
    margin = np.where(wins > 0, np.float32(np.nan), np.float32(0)) if margin is None else matrix(margin)
    least = 2 if k > 1 and (wins.any() or ties.any()) else 1
    checked, bad = _check_all(conversations, keep)
    if principle:
        checked = [_judged_by(principle, turns) if turns else turns for turns in checked]
    if bad and not keep and (defects is None or k - len(bad) < least):
        raise next(iter(bad.values()))
    if defects is not None:
        defects.extend(bad.values())
    record = Record(
        tuple(checked),
        wins,
        ties,
        margin,
        tools=tuple(tools) if tools else None,
        attributes={name: tuple(map(float, values)) for name, values in (attributes or {}).items()},
        steps=tuple(map(tuple, steps)),
        **fields,
    )
    return record.select([i for i in range(k) if keep or i not in bad]) if bad else record


def _judged_by(principle: str, conversation: tuple[Message, ...]) -> tuple[Message, ...]:
    asked = min((i for i, message in enumerate(conversation) if message["role"] == "user"), default=None)
    if asked is None:
        raise BadRow("not_read", f"principle is {principle[:60]!r}, and there is no user turn that it belongs to")
    with_principle = {**conversation[asked], "principle": principle}
    return (*conversation[:asked], with_principle, *conversation[asked + 1 :])


def check_count(responses: int) -> None:
    """Raises BadRow (`too_many_responses`) where arrays of all pairs would become too large."""
    if responses > MOST_RESPONSES:
        raise BadRow("too_many_responses", f"it has {responses:,} responses, a group has at most {MOST_RESPONSES:,}")


def require_as_many(name: str, values: Sequence[Any], responses: Sequence[Any]) -> None:
    """Raises BadRow (`conflicting_label`) for lists that are not aligned."""
    if len(values) != len(responses):
        raise BadRow("conflicting_label", f"{len(values)} {name} for {len(responses)} responses")


def _check_all(conversations: Sequence[Any], keep: bool) -> tuple[list[tuple[Message, ...]], dict[int, BadRow]]:
    """The conversations, () for one that cannot be used, and what is wrong with which."""
    checked: list[tuple[Message, ...]] = []
    bad: dict[int, BadRow] = {}
    alike: dict[Any, list[int]] = {}  # by the last turn's text: comparing all with all takes seconds for thousands
    for i, conversation in enumerate(conversations):
        try:
            checked.append(check_conversation(conversation))
        except BadRow as error:
            if keep and error.reason not in KEEPABLE:
                raise
            bad[i] = error
            checked.append(check_conversation(conversation, keep=True) if keep else ())
        if i not in bad:
            before = alike.setdefault(checked[i][-1].get("content"), [])
            if first := next((j + 1 for j in before if checked[j] == checked[i]), None):
                same = f"responses {first} and {i + 1} of {len(conversations)} are the same"
                bad[i] = BadRow("identical_responses", same)
            else:
                before.append(i)
    return checked, bad


def pair(chosen: Any, rejected: Any, *, preference: float = 1.0, margin: float = math.nan, **rest: Any) -> Record:
    """Builds the group of a preference pair from two whole conversations.

    `preference` is the probability in [0, 1] that `chosen` (response 0) is better, 0.5 a tie. `margin`, in the source's
    units and NaN where it is not known, belongs to whichever side is preferred. `rest` is as in `group`.

    Raises:
        BadRow: as `group`, or a preference outside [0, 1].
    """
    if not 0.0 <= preference <= 1.0:
        raise BadRow("conflicting_label", f"preference {preference} is outside [0, 1]")
    tie = preference == 0.5
    wins = [[0.0, 0.0 if tie else preference], [0.0 if tie else 1.0 - preference, 0.0]]
    margins = [[0.0, margin if preference > 0.5 else 0.0], [margin if preference < 0.5 else 0.0, 0.0]]
    return group([chosen, rejected], wins=wins, ties=[[0, tie], [tie, 0]], margin=margins, **rest)


def compare(scores: Sequence[float]) -> dict[str, Any]:
    """What scores say of pairs: the higher one wins, equal ones tie, and the margin is the difference.

    Returns `wins`, `ties` and `margin`, float32 [K, K], as in Record; NaN is compared with nothing.

    >>> compare([3.0, 1.0, float("nan")])["wins"].tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    check_count(len(scores))
    s = np.array(scores, np.float64)
    difference = s[:, None] - s[None, :]
    wins, ties = difference > 0, (difference == 0) & ~np.eye(len(s), dtype=bool)
    arrays = {"wins": wins, "ties": ties, "margin": np.where(wins, difference, 0)}
    return {name: x.astype(np.float32) for name, x in arrays.items()}
