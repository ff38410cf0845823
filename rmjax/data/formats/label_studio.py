"""Label Studio's JSON export: tasks with the annotations of one or several people.

    {"data": {"prompt": ..., "response_1": ..., "response_2": ...},
     "annotations": [{"completed_by": 7, "was_cancelled": false, "result": [
         {"type": "choices", "from_name": "preference", "to_name": "prompt", "value": {"choices": ["left"]}}]}]}

The prompt and the responses are text or messages; a single response may be called `response`, and a response in the
terms of other projects `answer`, `completion`, `output`, `reply` or `text`. What people said:

    pairwise            "left" or "right"; Label Studio knows no tie here, and an annotation without a side is no vote
    choices             a word of VERDICTS; questions with other answers are not read
    rating, number      a score of the response that it belongs to, under the control's name

One person has one vote, the last one given; skipped annotations, drafts and predictions are none. Wins and ties are
shares of the votes, and `agreement` is the largest share; a score is the mean over those who gave one. Where nobody
voted, scores compare the responses as in `scored.py`.

`rmjax.data.label_studio` writes such tasks; what it notes in `data.rmjax` brings the record back as it was: its
`row`, the `order` in which its responses are shown, and the `lowest` score, which one star stands for.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.formats.cells import (
    NUMBER,
    OBJECT,
    PROMPT,
    TURN,
    Format,
    Kind,
    Reading,
    Row,
    messages,
    prompt_turns,
    show,
    wrong,
)
from rmjax.data.formats.judged import voted
from rmjax.data.formats.scored import scored
from rmjax.data.records import BadRow, Record

FIRST, SECOND, TIE = 1, 2, 0  # as `annotated_pair` writes votes
VERDICTS = {
    **dict.fromkeys(("left", "a", "1", "first", "response 1", "response a", "answer 1", "answer a"), FIRST),
    **dict.fromkeys(("right", "b", "2", "second", "response 2", "response b", "answer 2", "answer b"), SECOND),
    **dict.fromkeys(("tie", "equal", "same", "both", "neither", "no preference", "about the same"), TIE),
}
AMBIGUOUS = ("1", "2", "both", "neither")
PROMPTS = ("prompt", "question", "instruction", "messages", "conversation", "dialogue")
RESPONSE = re.compile(r"(?:response|answer|completion|output|reply|text)[ _-]?(\d*)")


@dataclasses.dataclass
class Answers:
    """What one person said of one task: a vote, or None, and scores by attribute and response (from 0)."""

    vote: int | None = None
    scores: dict[tuple[str, int], float] = dataclasses.field(default_factory=dict)


def read(row: Row, reading: Reading) -> Record:
    """The group of a task; see the module.

    Raises:
        BadRow: `no_label` without annotations, or what `group` raises.
    """
    data = row["data"]
    shown, order = _responses(data)
    prompt = prompt_turns(data, _prompt(data))
    conversations = [[*prompt, *messages(data[shown[order.index(i)]])] for i in range(len(shown))]
    answers = list(_answers(row).values())
    scores = [_means(answers, i) for i in range(len(shown))]
    if given := [answer.vote for answer in answers if answer.vote is not None]:
        made = voted(conversations, given, data, reading)
        names = dict.fromkeys(name for of_one in scores for name in of_one)
        attributes = {name: tuple(of_one.get(name, math.nan) for of_one in scores) for name in names}
        made = dataclasses.replace(made, attributes=attributes)
    elif any(scores):
        made = scored(conversations, scores, data, reading)
    else:
        raise BadRow("no_label", f"none of {len(row['annotations'])} annotations has a verdict or a score")
    return dataclasses.replace(made, row=_notes(data).get("row") or reading.where)


def votes(row: Row) -> list[tuple[str, Mapping[str, float]]]:
    """Each question that was asked of a task, with the answer of each person: for `agreement.summaries`.

    The question is "preference" (answers 1, 2 and 0, a tie) or the name of an attribute, once for each response.

    Raises:
        BadRow: `wrong_type`.
    """
    answers = _answers(row)
    asked: dict[tuple[str, int], dict[str, float]] = {}
    for person, given in answers.items():
        if given.vote is not None:
            asked.setdefault(("preference", -1), {})[person] = given.vote
        for about, score in given.scores.items():
            asked.setdefault(about, {})[person] = score
    return [(question, said) for (question, _), said in asked.items()]


def _prompt(data: Mapping[str, Any]) -> Any:
    name = next((name for name in PROMPTS if name in data), None)
    if name is None:
        raise BadRow("wrong_type", f"data has no prompt; expected one of {', '.join(PROMPTS)}, found {', '.join(data)}")
    if not (PROMPT.test(data[name]) or data[name] == []):
        raise wrong(f"data.{name}", data[name], PROMPT)
    return data[name]


def _notes(data: Mapping[str, Any]) -> Mapping[str, Any]:
    notes = data.get("rmjax", {})
    if not OBJECT.test(notes):
        raise wrong("data.rmjax", notes, OBJECT)
    return notes


def _responses(data: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The names of the responses as they are shown, and which response of the record each is."""
    found = sorted((int(match[1] or 1), name) for name in data if (match := RESPONSE.fullmatch(name)))
    shown = [name for _, name in found]
    if not found or [number for number, _ in found] != list(range(1, len(found) + 1)):
        expected = "one `response`, or response_1, response_2, ..."
        raise BadRow("wrong_type", f"data must have {expected}; found {', '.join(data)}")
    for name in shown:
        if not TURN.test(data[name]):
            raise wrong(f"data.{name}", data[name], TURN)
    order = _notes(data).get("order", list(range(len(shown))))
    if len(order) != len(shown) or set(order) != set(range(len(shown))):
        raise BadRow("wrong_type", f"data.rmjax.order is {show(order)}, expected the numbers 0 to {len(shown) - 1}")
    return shown, order


def _answers(row: Row) -> dict[str, Answers]:
    """What each person said, in terms of the record's responses, not of the order in which they were shown."""
    _, order = _responses(row["data"])
    lowest = _notes(row["data"]).get("lowest", 1)
    said: dict[str, Answers] = {}
    for i, annotation in enumerate(sorted(row["annotations"], key=lambda a: str(a.get("created_at", "")))):
        if annotation.get("was_cancelled") or not annotation.get("result"):
            continue
        by = annotation.get("completed_by")
        person = by.get("email") or by.get("id") if isinstance(by, Mapping) else by
        answers = Answers(_vote(annotation["result"], order), _scores(annotation["result"], order, lowest))
        if answers.vote is not None or answers.scores:  # a comment alone takes nothing back
            said[f"annotation {i}" if person is None else str(person)] = answers
    return said


def _vote(results: Sequence[Mapping[str, Any]], order: Sequence[int]) -> int | None:
    """The verdict of one annotation; of several ones that which its control calls `preference`.

    A number, "both" and "neither" can be choices of anything, so they are verdicts under that name only.
    """
    if len(order) < 2:
        return None  # choices about one response compare nothing
    verdicts = {}
    for result in results:
        key = {"pairwise": "selected", "choices": "choices"}.get(result.get("type", ""))
        said = result.get("value", {}).get(key)
        word = said[0] if isinstance(said, list) and len(said) == 1 else said
        name = str(result.get("from_name"))
        word = word.strip().lower() if isinstance(word, str) else ""
        if word in VERDICTS and (name == "preference" or word not in AMBIGUOUS):
            verdicts[name] = VERDICTS[word]
    if len(verdicts) > 1 and "preference" not in verdicts:
        raise BadRow("wrong_type", f"there are several verdicts ({', '.join(verdicts)}); call one control 'preference'")
    if not verdicts:
        return None
    if len(order) != 2:
        raise BadRow("wrong_type", f"there is a verdict on {len(order)} responses, expected 2")
    vote = verdicts.get("preference", next(iter(verdicts.values())))
    return vote if vote == TIE else order[vote - 1] + 1


def _scores(results: Sequence[Mapping[str, Any]], order: Sequence[int], lowest: float) -> dict[tuple[str, int], float]:
    """The scores of one annotation, by attribute and response."""
    scores = {}
    for result in results:
        kind = result.get("type")
        if kind not in ("rating", "number"):
            continue
        number = result.get("value", {}).get(kind)
        if not NUMBER.test(number):
            raise wrong(str(result.get("from_name")), number, NUMBER)
        if kind == "rating" and number == 0:  # stars that were taken back
            continue
        scores[_about(result, order)] = float(number + (lowest - 1 if kind == "rating" else 0))
    return scores


def _about(result: Mapping[str, Any], order: Sequence[int]) -> tuple[str, int]:
    """The attribute of a score and the response: from the number that the object's or the control's name ends in.

    >>> _about({"from_name": "helpful_2", "to_name": "response_2"}, [0, 1])
    ('helpful', 1)
    """
    control, about = str(result.get("from_name")), str(result.get("to_name"))
    ends = [match for name in (about, control) if (match := re.search(r"[ _-]?(\d+)$", name))]
    if not ends and len(order) > 1:
        raise BadRow("wrong_type", f"{control!r} scores {about!r}; which of {len(order)} responses is that? Number it")
    number = int(ends[0][1]) if ends and len(order) > 1 else 1
    if not 1 <= number <= len(order):
        raise BadRow("wrong_type", f"{control!r} scores response {number} of {len(order)}")
    return re.sub(rf"[ _-]?{number}$", "", control) or control, order[number - 1]


def _means(answers: Sequence[Answers], response: int) -> dict[str, float]:
    """Each attribute of a response: the mean over those who gave it."""
    given: dict[str, list[float]] = {}
    for answer in answers:
        for (name, of), score in answer.scores.items():
            if of == response:
                given.setdefault(name, []).append(score)
    return {name: sum(numbers) / len(numbers) for name, numbers in given.items()}


def _is_annotations(cell: Any) -> bool:
    if not isinstance(cell, list) or not all(isinstance(annotation, Mapping) for annotation in cell):
        return False
    lists = [annotation.get("result") or [] for annotation in cell]
    if not all(isinstance(results, list) for results in lists):
        return False
    results = [result for results in lists for result in results]
    return all(isinstance(result, Mapping) and isinstance(result.get("value", {}), Mapping) for result in results)


ANNOTATIONS = Kind("a list of annotations, each with a list `result`", _is_annotations)

LABEL_STUDIO = (
    Format(
        "label_studio",
        {"data": OBJECT, "annotations": ANNOTATIONS},
        read,
        means="an export of Label Studio (JSON): `pairwise`, `choices`, `rating` and `number` of one or several people",
    ),
)
