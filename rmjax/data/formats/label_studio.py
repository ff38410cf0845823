"""Label Studio's JSON export: tasks with the annotations of one or several people.

    {"data": {"prompt": ..., "response_1": ..., "response_2": ...},
     "annotations": [{"completed_by": 7, "was_cancelled": false, "result": [
         {"type": "choices", "from_name": "preference", "to_name": "prompt", "value": {"choices": ["left"]}}]}]}

The prompt and the responses are text or messages; a single response may be called `response`, and a response in the
terms of other projects `answer`, `completion`, `output`, `reply` or `text`. What people said:

    pairwise            "left" or "right"; Label Studio knows no tie here, and an annotation without a side is no vote
    choices             a word of VERDICTS; questions with other answers are not read
    rating, number      a score of the response that it belongs to, under the control's name

One person has one vote, the one updated last; skipped annotations, drafts and predictions are none. A score is the mean
over those who gave one. Where nobody voted, scores compare the responses as in `scored.py`. A task that nobody answered
is counted as `not_answered`, which is no defect of the data.

`rmjax.data.labelling` writes such tasks; what it notes in `data.rmjax` brings the record back as it was: its
`row`, the `order` in which its responses are shown, and the `lowest` score, which one star stands for.
"""

import dataclasses
import datetime
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rmjax.data.formats.cells import Reading, Row, messages, prompt_turns, row_format
from rmjax.data.formats.judged import voted
from rmjax.data.formats.kinds import NUMBER, OBJECT, PROMPT, TURN, Kind, show
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
FLAT = ("annotation_id", "annotator", "lead_time")  # columns of the exports that hold a row for each annotation
Answers = dict[tuple[str, int], float]  # of one person: scores by attribute and response (from 0), and the vote
VOTE = ("preference", -1)  # its key in Answers
RESPONSE = re.compile(r"(?:response|answer|completion|output|reply|text)[ _-]?(\d*)")


def _is_annotations(cell: Any) -> bool:
    if not isinstance(cell, list) or not all(isinstance(annotation, Mapping) for annotation in cell):
        return False
    lists = [annotation.get("result") or [] for annotation in cell]
    if not all(isinstance(results, list) for results in lists):
        return False
    results = [result for results in lists for result in results]
    return all(isinstance(result, Mapping) and isinstance(result.get("value", {}), Mapping) for result in results)


ANNOTATIONS = Kind("a list of annotations, each with a list `result`", _is_annotations)


def refuse_flat_export(columns: Collection[str]) -> None:
    """Raises ValueError for columns of Label Studio's JSON_MIN: which control gave what answer is not in them."""
    if all(column in columns for column in FLAT):
        raise ValueError(
            f"the columns {', '.join(FLAT)} are those of a JSON_MIN or CSV export of Label Studio, which does not say "
            "which control gave an answer to which response; export as JSON"
        )


@row_format("label_studio", {"data": OBJECT, "annotations": ANNOTATIONS})
def _task(row: Row, reading: Reading) -> Record:
    """An export of Label Studio (JSON): `pairwise`, `choices`, `rating` and `number` of one or several people."""
    data = row["data"]
    if not any(annotation.get("result") and not annotation.get("was_cancelled") for annotation in row["annotations"]):
        raise BadRow("not_answered", f"{len(row['annotations'])} annotations, all skipped or empty")
    shown, order = _responses(data)
    prompt = prompt_turns(data, _prompt(data))
    conversations = [[*prompt, *messages(data[shown[order.index(i)]])] for i in range(len(shown))]
    answers = list(_answers(row).values())
    scores = _mean_scores(answers, len(shown))
    if votes := [given[VOTE] for given in answers if VOTE in given]:
        names = dict.fromkeys(name for by_name in scores for name in by_name)
        attributes = {name: [by_name.get(name, math.nan) for by_name in scores] for name in names}
        record = voted(conversations, votes, data, reading, attributes=attributes)
    elif any(scores):
        record = scored(conversations, scores, data, reading)
    else:
        raise BadRow("no_label", f"none of {len(row['annotations'])} annotations has a verdict or a score")
    return dataclasses.replace(record, row=_notes(data).get("row") or reading.where)


def answers_by_question(row: Row) -> list[tuple[str, dict[str, float]]]:
    """Each question that was asked of a task, with the answer of each person: for `agreement.summaries`.

    The question is "preference" (answers 1, 2 and 0, a tie) or the name of an attribute, once for each response.
    """
    asked: dict[tuple[str, int], dict[str, float]] = {}
    for person, answers in _answers(row).items():
        for about, answer in answers.items():
            asked.setdefault(about, {})[person] = answer
    return [(question, by_person) for (question, _), by_person in asked.items()]


def _prompt(data: Mapping[str, Any]) -> Any:
    name = next((name for name in PROMPTS if name in data), None)
    if name is None:
        raise BadRow("wrong_type", f"data has no prompt; expected one of {', '.join(PROMPTS)}, found {', '.join(data)}")
    if not (PROMPT.test(data[name]) or data[name] == []):
        raise PROMPT.wrong(f"data.{name}", data[name])
    return data[name]


def _notes(data: Mapping[str, Any]) -> Mapping[str, Any]:
    notes = data.get("rmjax", {})
    if not OBJECT.test(notes):
        raise OBJECT.wrong("data.rmjax", notes)
    return notes


def _responses(data: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The names of the responses as they are shown, and which response of the record each is."""
    numbered = sorted((int(match[1] or 1), name) for name in data if (match := RESPONSE.fullmatch(name)))
    shown = [name for _, name in numbered]
    if not shown or [number for number, _ in numbered] != list(range(1, len(shown) + 1)):
        expected = "one `response`, or response_1, response_2, ..."
        raise BadRow("wrong_type", f"data must have {expected}; found {', '.join(data)}")
    for name in shown:
        if not TURN.test(data[name]):
            raise TURN.wrong(f"data.{name}", data[name])
    order = _notes(data).get("order", list(range(len(shown))))
    if len(order) != len(shown) or set(order) != set(range(len(shown))):
        raise BadRow("wrong_type", f"data.rmjax.order is {show(order)}, expected the numbers 0 to {len(shown) - 1}")
    return shown, order


def _answers(row: Row) -> dict[str, Answers]:
    """What each person said, in terms of the record's responses, not of the order in which they were shown."""
    _, order = _responses(row["data"])
    lowest = _notes(row["data"]).get("lowest", 1)
    by_person: dict[str, Answers] = {}
    for i, annotation in enumerate(sorted(row["annotations"], key=_updated)):
        results = annotation.get("result")
        if annotation.get("was_cancelled") or not results:
            continue
        by = annotation.get("completed_by")
        person = by.get("email") or by.get("id") if isinstance(by, Mapping) else by
        vote = _vote(results, order)
        answers = ({} if vote is None else {VOTE: vote}) | _scores(results, order, lowest)
        if answers:  # a comment alone takes nothing back
            by_person[f"annotation {i}" if person is None else str(person)] = answers
    return by_person


def _updated(annotation: Mapping[str, Any]) -> datetime.datetime:
    """When somebody last changed an annotation; the earliest of all times where it does not say."""
    try:
        when = datetime.datetime.fromisoformat(str(annotation.get("updated_at") or annotation.get("created_at")))
    except ValueError:
        when = datetime.datetime.min
    return when if when.tzinfo else when.replace(tzinfo=datetime.UTC)


def _vote(results: Sequence[Mapping[str, Any]], order: Sequence[int]) -> int | None:
    """The verdict of one annotation; of several ones that which its control calls `preference`.

    A number, "both" and "neither" can be choices of anything, so they are verdicts under that name only.
    """
    if len(order) < 2:
        return None  # choices about one response compare nothing
    verdicts = {}
    for result in results:
        key = {"pairwise": "selected", "choices": "choices"}.get(result.get("type", ""))
        word = result.get("value", {}).get(key)
        word = word[0] if isinstance(word, list) and len(word) == 1 else word
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


def _scores(results: Sequence[Mapping[str, Any]], order: Sequence[int], lowest: float) -> Answers:
    scores: Answers = {}
    for result in results:
        kind = result.get("type")
        if kind not in ("rating", "number"):
            continue
        number = result.get("value", {}).get(kind)
        if not NUMBER.test(number):
            raise NUMBER.wrong(str(result.get("from_name")), number)
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


def _mean_scores(answers: Sequence[Answers], responses: int) -> list[dict[str, float]]:
    """For each response the mean of each attribute over those who gave it."""
    given: list[dict[str, list[float]]] = [{} for _ in range(responses)]
    for by_question in answers:
        for (name, response), score in by_question.items():
            if (name, response) != VOTE:
                given[response].setdefault(name, []).append(score)
    return [{name: sum(scores) / len(scores) for name, scores in by_name.items()} for by_name in given]
