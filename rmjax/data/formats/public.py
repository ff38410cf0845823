"""Layouts that one public set has; the sets that share a layout with others are read by its format."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, Row, answered, common, named_only, row_format, score, without
from rmjax.data.formats.kinds import NUMBER, OBJECT, PROMPT, TEXT, Kind, show
from rmjax.data.formats.scored import scored
from rmjax.data.formats.steps import joined_steps
from rmjax.data.records import BadRow, Record, group, pair, require_as_many

JUDGE_TASK = re.compile(
    r"###\s*The instruction to evaluate:\s*\n(?P<instruction>.*?)\n+"
    r"###\s*Response to evaluate:\s*\n(?P<response>.*?)\n+###\s*Reference Answer",
    re.DOTALL,
)
STEP_RATINGS = {-1: 0.0, 0: 1.0, 1: 1.0}
STRENGTH = Kind("a number in [-3, 3]", lambda c: NUMBER.test(c) and -3 <= c <= 3)
COMPLETIONS = Kind(
    "a list of {response, annotations, overall_score}",
    lambda c: kinds.MESSAGES.test(c) and all("response" in each and "annotations" in each for each in c),
)
QUESTION = Kind("an object with `problem`", lambda c: OBJECT.test(c) and isinstance(c.get("problem"), str))
SOLUTION = Kind("an object with `steps`", lambda c: OBJECT.test(c) and "steps" in c)
JUDGED = {"instruction": TEXT, "gpt4_score": kinds.NUMBERS, "gpt4_feedback": kinds.TEXTS}

# ----------------------------------------------------------------------------------------------------
# HelpSteer
# ----------------------------------------------------------------------------------------------------


def _by_strength(
    conversations: Sequence[Any], strength: float, annotators: Any, key: str, row: Row, reading: Reading
) -> Record:
    """A pair; the agreement is the share of the annotators on its side, whose strengths are under `key`."""
    votes: list[Any] = [vote.get(key) for vote in annotators or () if isinstance(vote, Mapping)]
    sides = [_sign(vote) for vote in votes if STRENGTH.test(vote)]  # -100 is no vote
    return pair(
        *conversations,
        preference=(1 - _sign(strength)) / 2,
        margin=abs(float(strength)),
        agreement=sides.count(_sign(strength)) / len(sides) if sides else math.nan,
        **common(row, reading),
    )


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


@row_format(
    "strength_pair",
    {"prompt": PROMPT, "response_1": TEXT, "response_2": TEXT, "preference_strength": STRENGTH},
    left_out=("preference_statement", "preference_elaboration", "all_preferences_unprocessed"),
)
def _strength_pair(row: Row, reading: Reading) -> Record:
    """-3 is the first response much better, 3 the second, 0 a tie; the size is the margin."""
    conversations = answered(row, row["prompt"], [row["response_1"], row["response_2"]])
    annotators = row.get("three_most_similar_preferences")
    return _by_strength(conversations, row["preference_strength"], annotators, "strength", row, reading)


@row_format("strength_chat", {"context": PROMPT, "response1": TEXT, "response2": TEXT, "overall_preference": STRENGTH})
def by_strength_chat(row: Row, reading: Reading) -> Record:
    """The same for HelpSteer3; `individual_preference` gives the agreement."""
    conversations = answered(row, row["context"], [row["response1"], row["response2"]])
    annotators = row.get("individual_preference")
    return _by_strength(conversations, row["overall_preference"], annotators, "score", row, reading)


# ----------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------


def _rating(cell: Any, name: str) -> float:
    """A rating that may be written as text; "N/A" is missing."""
    if not isinstance(cell, str):
        return score(cell, name)
    if cell.strip().upper() in ("N/A", "NA", ""):
        return math.nan
    try:
        return score(float(cell), name)
    except ValueError:
        raise BadRow("wrong_type", f"{name} is {show(cell)}, expected a number") from None


@row_format(
    "ultrafeedback",
    {"instruction": TEXT, "completions": COMPLETIONS},
    left_out=("correct_answers", "incorrect_answers"),
)
def _ultrafeedback(row: Row, reading: Reading) -> Record:
    """Attribute `score` (overall, compares the completions) and the rating of each aspect.

    The system prompts that the completions were written under are left out.
    """
    labels = []
    for completion in row["completions"]:
        aspects = completion.get("annotations") or {}
        ratings = {name: _rating((said or {}).get("Rating"), name) for name, said in aspects.items()}
        labels.append({"score": _rating(completion.get("overall_score"), "overall_score"), **ratings})
    texts = [completion.get("response") for completion in row["completions"]]
    return scored(answered(row, row["instruction"], texts), labels, row, reading)


@row_format(
    "unieval",
    {"source": TEXT, "system_output": TEXT, "scores": OBJECT},
    optional={"context": TEXT},
    left_out=("reference",),
)
def _unieval(row: Row, reading: Reading) -> Record:
    """An attribute for each of `scores`, on its own scale; the prompt is `source` and `context`."""
    parts = [row["source"], row.get("context")]
    asked = "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    conversation = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["system_output"]}]
    # Here `source` is a text to answer, not the name of a data set.
    return scored([conversation], [row["scores"]], without(row, "source"), reading)


@row_format("prometheus", JUDGED)
def _prometheus(row: Row, reading: Reading) -> Record:
    """The response inside a judge's task; attribute `score` is the mean rating, 1 to 5."""
    task = JUDGE_TASK.search(row["instruction"])
    if not task:
        expected = "'###The instruction to evaluate:' and '###Response to evaluate:'"
        raise BadRow("wrong_type", f"instruction has no {expected}")
    ratings = [r for r in (score(r, "gpt4_score") for r in row["gpt4_score"]) if not math.isnan(r)]
    mean = sum(ratings) / len(ratings) if ratings else math.nan
    agreement = max(map(ratings.count, ratings)) / len(ratings) if ratings else math.nan
    conversations = answered(row, task["instruction"].strip(), [task["response"].strip()])
    return group(conversations, attributes={"score": [mean]}, agreement=agreement, **common(row, reading))


@row_format("prometheus_judge", JUDGED, named_only)
def _prometheus_judge(row: Row, reading: Reading) -> Record:
    """The judge's task, and `Feedback: ... [RESULT] n` as the answer; only where it is named."""
    require_as_many("feedbacks", row["gpt4_feedback"], row["gpt4_score"])
    task = row["instruction"].removesuffix("###Feedback: ").rstrip()
    written = [f"Feedback: {text} [RESULT] {_whole(r)}" for text, r in zip(row["gpt4_feedback"], row["gpt4_score"])]
    return group(answered(row, task, written), **common(row, reading))


def _whole(rating: Any) -> int:
    if not NUMBER.test(rating) or rating != int(rating):
        raise BadRow("wrong_type", f"a rating is {show(rating)}, expected a whole number")
    return int(rating)


# ----------------------------------------------------------------------------------------------------
# PRM800K
# ----------------------------------------------------------------------------------------------------


@row_format("prm800k", {"question": QUESTION, "label": SOLUTION}, left_out=("question", "label"))
def _prm800k(row: Row, reading: Reading) -> Record:
    """Steps rated -1 (wrong), 0 or 1 (right); each alternative ends a response of its own.

    Neutral (0) counts as right (Lightman et al. 2023, arXiv:2305.20050, appendix F), and so does a step that a person
    wrote. An alternative's response has the labels of the steps before it.
    """
    responses = _paths(row["label"].get("steps") or ())
    if not responses:
        raise BadRow("no_label", "no step of the solution is rated")
    texts, steps = zip(*(joined_steps(*path, "\n") for path in responses))
    return group(answered(row, row["question"]["problem"], texts), steps=steps, **common(row, reading))


def _paths(steps: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], list[float | None]]]:
    """(texts, labels) of every response that the steps and their alternatives make."""
    texts: list[str] = []
    labels: list[float | None] = []
    branches: list[tuple[list[str], list[float | None]]] = []
    for step in steps:
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        alternatives = step.get("completions")
        for i, other in enumerate(alternatives or ()):
            if i != chosen:
                branches.append(([*texts, other["text"]], [*labels, STEP_RATINGS.get(other.get("rating"))]))
        if chosen is not None and alternatives:
            taken = alternatives[int(chosen)]
            labels.append(STEP_RATINGS.get(taken.get("rating")))
        elif human:
            taken = human
            labels.append(1.0)
        else:
            return branches
        texts.append(taken["text"])
    return [(texts, labels), *branches] if texts else branches
