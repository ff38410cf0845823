r"""Preference pairs: `chosen` and `rejected`.

They may carry these columns beside those of all formats (`cells.py`):

    margin                            by how much the better one is better, >= 0
    preference_strength               the same; read where there is no margin
    chosen_score, rejected_score      the attribute `score`; their difference is the margin, and a row whose label they
                                      contradict is bad; ratings of both sides by other names are read as these
    preference                        either the probability in [0, 1] that `chosen` is better, or the place in
                                      [1, 2] of the better one, 1 for `chosen`; 1 means the same in both
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import (
    Format,
    Reading,
    Row,
    answer,
    answered,
    common,
    continued,
    is_empty,
    joined,
    prompt_turns,
    row_format,
    with_system,
)
from rmjax.data.formats.kinds import Kind
from rmjax.data.formats.transcripts import asks, has_dialogue, has_turns, is_transcript, transcript
from rmjax.data.records import BadRow, Message, Record, pair

Turns = Sequence[list[Message]]

SIDES = ("chosen", "rejected")
SCORES = ("chosen_score", "rejected_score")
PAIR_LABELS = ("margin", "preference_strength", "preference", *SCORES)
OPTIONAL: Mapping[str, Kind] = {**kinds.COMMON, **dict.fromkeys(PAIR_LABELS, kinds.NUMBER)}
PROMPTED = {**OPTIONAL, "prompt": kinds.PROMPT}
CHOSEN_TEXTS = dict.fromkeys(SIDES, kinds.TEXT)


def _label(row: Row, by_place: bool) -> tuple[float, float]:
    """Probability that `chosen` is better (1 if the row does not say), and the margin of the better one, or NaN."""
    value = kinds.NUMBER.optional(row, "preference")
    preference = 1.0 if value is None else float(2 - value if by_place else value)
    if not 0 <= preference <= 1:
        raise BadRow("conflicting_label", f"preference {value} is outside {'[1, 2]' if by_place else '[0, 1]'}")
    chosen, rejected = _scores(row) or (math.nan, math.nan)
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
    chosen, rejected = (kinds.NUMBER.optional(row, name) for name in SCORES)
    return None if chosen is None or rejected is None else (float(chosen), float(rejected))


def _pair_format(
    name: str,
    columns: Mapping[str, Kind],
    agrees: Callable[[Row], bool] = lambda row: True,
    optional: Mapping[str, Kind] = PROMPTED,
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
        return row_format(name, columns, agrees, optional=optional)(read)

    return decorate


def _no_transcripts(row: Row) -> bool:
    return not (any(map(is_transcript, map(row.get, ("prompt", *SIDES)))) or asks(row.get("prompt")))


def _is_plain(row: Row) -> bool:
    """Nothing else in the row could be the prompt: no text, no list, no object."""
    known = {*SIDES, *kinds.COMMON}
    others = [cell for column, cell in row.items() if column not in known and not is_empty(cell)]
    texts = any(isinstance(cell, str | list | Mapping) for cell in others)
    return not texts and _no_transcripts(row) and not any(has_dialogue(row[side]) for side in SIDES)


def _is_transcripts(row: Row) -> bool:
    prompt = row.get("prompt")
    begun = is_transcript(prompt) or asks(prompt)
    whole = has_dialogue if is_empty(prompt) else is_transcript
    return "conversations" not in row and all(begun or is_transcript(row[side]) or whole(row[side]) for side in SIDES)


@_pair_format("pair_text", {"prompt": kinds.PROMPT, **CHOSEN_TEXTS}, _no_transcripts)
def _text_turns(row: Row) -> Turns:
    """Texts, or messages as the prompt; the chosen response is better."""
    return answered(row, row["prompt"], [row[side] for side in SIDES])


@_pair_format("pair_transcript", CHOSEN_TEXTS, _is_transcripts)
def _transcript_turns(row: Row) -> Turns:
    r"""Transcripts `\n\nHuman: ... \n\nAssistant: ...`; histories that differ keep their own."""
    return [_whole_transcript(row, row[side]) for side in SIDES]


def _whole_transcript(row: Row, text: str) -> list[Message]:
    prompt: Any = row.get("prompt")
    if is_transcript(prompt) or asks(prompt) or (has_turns(prompt) and is_transcript(text)):
        return continued(prompt, text)
    return joined([] if is_empty(prompt) else prompt_turns(row, prompt), transcript(text))


@_pair_format("pair_plain", CHOSEN_TEXTS, _is_plain, OPTIONAL)
def _plain_turns(row: Row) -> Turns:
    """Texts without a prompt, which is then empty; only where it is named, or where no other column has text."""
    # An empty user turn, because many templates refuse a conversation that an assistant begins.
    return [[{"role": "user", "content": ""}, answer(row[side])] for side in SIDES]


@_pair_format(
    "pair_messages", {"chosen": kinds.MESSAGES, "rejected": kinds.MESSAGES}, lambda row: "conversations" not in row
)
def _message_turns(row: Row) -> Turns:
    """Whole conversations, or the turns after `prompt` (text or messages)."""
    prompt = [] if row.get("prompt") is None else row["prompt"]
    if not (kinds.PROMPT.test(prompt) or prompt == []):
        raise kinds.MESSAGES.wrong("prompt", prompt)
    return answered(row, prompt, [row[side] for side in SIDES])


@_pair_format(
    "pair_conversations",
    {"conversations": kinds.MESSAGES, "chosen": kinds.TURN, "rejected": kinds.TURN},
    optional=OPTIONAL,
)
def _conversation_turns(row: Row) -> Turns:
    """`conversations` is the history (`from`/`value` or `role`/`content`), the others are its last turns."""
    return answered(row, row["conversations"], [row[side] for side in SIDES])
