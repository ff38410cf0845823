r"""Preference pairs: `chosen` and `rejected`.

They may carry these columns beside those of all formats (`cells.py`):

    margin                            by how much the better one is better, >= 0
    preference_strength               the same; read where there is no margin
    chosen_score, rejected_score      the attribute `score`; their difference is the margin, and a row whose label they
                                      contradict is bad
    score_chosen, score_rejected      the same
    preference                        either the probability in [0, 1] that `chosen` is better, or the place in
                                      [1, 2] of the better one, 1 for `chosen`; 1 means the same in both
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Format, Reading, Row, common, messages, row_format, with_system
from rmjax.data.formats.kinds import Kind
from rmjax.data.records import BadRow, Message, Record, pair

Turns = tuple[list[Message], list[Message]]

TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
ASKED = ("prompt", "conversations", "messages", "instruction", "question", "query", "input", "context", "problem")
PAIR_LABELS = ("margin", "preference_strength", "preference", *(name for names in SCORES for name in names))
OPTIONAL: Mapping[str, Kind] = {**kinds.COMMON, **dict.fromkeys(PAIR_LABELS, kinds.NUMBER)}
CHOSEN_TEXTS = {"chosen": kinds.TEXT, "rejected": kinds.TEXT}


def _label(row: Row, by_place: bool) -> tuple[float, float]:
    """Probability that `chosen` is better (1 if the row does not say), and the margin of the better one."""
    value = kinds.NUMBER.optional(row, "preference")
    preference = 1.0 if value is None else float(2 - value if by_place else value)
    if not 0 <= preference <= 1:
        raise BadRow("conflicting_label", f"preference {value} is outside {'[1, 2]' if by_place else '[0, 1]'}")
    chosen, rejected = _scores(row) or (0.0, 0.0)
    if (chosen - rejected) * (preference - 0.5) < 0:
        said = f"its scores are {chosen:g} and {rejected:g}, the preference is {preference:g}"
        raise BadRow("conflicting_label", said)
    given = [kinds.NUMBER.optional(row, column) for column in ("margin", "preference_strength")]
    margin = next((float(m) for m in given if m is not None), abs(chosen - rejected))
    if margin < 0:
        raise BadRow("conflicting_label", f"margin {margin:g} is below 0: the other response would be better")
    return preference, margin


def _scores(row: Row) -> tuple[float, float] | None:
    """The scores of `chosen` and `rejected`; None where one is missing."""
    for names in SCORES:
        chosen, rejected = (kinds.NUMBER.optional(row, name) for name in names)
        if chosen is not None and rejected is not None:
            return float(chosen), float(rejected)
    return None


def _pair_format(
    name: str, columns: Mapping[str, Kind], agrees: Callable[[Row], bool] = lambda row: True
) -> Callable[[Callable[[Row], Turns]], Format]:
    """Decorates what gives the two whole conversations of a row; its docstring says what the row means."""

    def decorate(turns: Callable[[Row], Turns]) -> Format:
        def read(row: Row, reading: Reading) -> Record:
            chosen, rejected = turns(row)
            preference, margin = _label(row, reading.by_place)
            return pair(
                with_system(row, chosen),
                with_system(row, rejected),
                preference=preference,
                margin=margin,
                attributes={"score": scores} if (scores := _scores(row)) else None,
                **common(row, reading),
            )

        read.__doc__ = turns.__doc__
        return row_format(name, columns, agrees, optional=OPTIONAL)(read)

    return decorate


def is_transcript(text: Any) -> bool:
    """Whether a text begins with a turn of a transcript."""
    return isinstance(text, str) and TRANSCRIPT_TURN.match("\n\n" + text.lstrip()) is not None


def transcript(text: str) -> list[Message]:
    r"""Reads "\n\nHuman: hi\n\nAssistant: yo"; white space around a turn is layout, not content.

    >>> transcript("\n\nHuman: hi\n\nAssistant: yo")
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]
    """
    before, *pieces = TRANSCRIPT_TURN.split("\n\n" + text.lstrip())
    if before.strip() or not pieces:
        raise BadRow("wrong_type", f"a transcript must begin with 'Human:' or 'Assistant:', found {text[:60]!r}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": words.strip()} for role, words in zip(pieces[::2], pieces[1::2])]


def _no_transcripts(row: Row) -> bool:
    return not any(is_transcript(row.get(column)) for column in ("prompt", "chosen", "rejected"))


def _is_plain(row: Row) -> bool:
    asked = {*ASKED, *difflib.get_close_matches("prompt", row, cutoff=0.8)}  # what would be dropped without a word
    return all(kinds.is_null(row.get(column)) for column in asked) and _no_transcripts(row)


def _is_transcripts(row: Row) -> bool:
    whole = (is_transcript(row[c]) or is_transcript(row.get("prompt")) for c in ("chosen", "rejected"))
    return "conversations" not in row and all(whole)


def _after(turns: list[Message], row: Row) -> Turns:
    return [*turns, *messages(row["chosen"])], [*turns, *messages(row["rejected"])]


@_pair_format("pair_text", {"prompt": kinds.TEXT, **CHOSEN_TEXTS}, _no_transcripts)
def _text_turns(row: Row) -> Turns:
    """Texts; the chosen response is better."""
    return _after(messages(row["prompt"], "user"), row)


@_pair_format("pair_transcript", CHOSEN_TEXTS, _is_transcripts)
def _transcript_turns(row: Row) -> Turns:
    r"""Transcripts `\n\nHuman: ... \n\nAssistant: ...`; histories that differ keep their own."""
    whole = lambda text: text if is_transcript(text) else str(row.get("prompt") or "") + text
    return transcript(whole(row["chosen"])), transcript(whole(row["rejected"]))


@_pair_format("pair_plain", CHOSEN_TEXTS, _is_plain)
def _plain_turns(row: Row) -> Turns:
    """Texts without a prompt, which is then empty."""
    # An empty user turn, because many templates refuse a conversation that an assistant begins.
    return _after(messages("", "user"), row)


@_pair_format(
    "pair_messages", {"chosen": kinds.MESSAGES, "rejected": kinds.MESSAGES}, lambda row: "conversations" not in row
)
def _message_turns(row: Row) -> Turns:
    """Whole conversations, or the turns after `prompt` (text or messages)."""
    prompt = [] if row.get("prompt") is None else row["prompt"]
    if not (kinds.PROMPT.test(prompt) or prompt == []):
        raise kinds.MESSAGES.wrong("prompt", prompt)
    turns = messages(prompt, "user")
    return _joined(turns, messages(row["chosen"])), _joined(turns, messages(row["rejected"]))


def _joined(prompt: list[Message], turns: list[Message]) -> list[Message]:
    """Puts the prompt before the turns that answer it; whole conversations are left alone.

    They are whole if they begin with the prompt, or with a system or user turn where the prompt already ends
    with one of the user.
    """
    begins = turns[: len(prompt)] == prompt
    asks_again = bool(prompt) and prompt[-1]["role"] == "user" and turns[0]["role"] in ("system", "user")
    return turns if begins or asks_again else [*prompt, *turns]


@_pair_format("pair_conversations", {"conversations": kinds.MESSAGES, "chosen": kinds.TURN, "rejected": kinds.TURN})
def _conversation_turns(row: Row) -> Turns:
    """`conversations` is the history (`from`/`value` or `role`/`content`), the others are its last turns."""
    return _after(messages(row["conversations"]), row)
