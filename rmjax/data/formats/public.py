"""Layouts that one public set has; the sets that share a layout with others are read by its format.

strength_pair      HelpSteer2's preferences: `preference_strength` from -3 (the first response is much better) to 3
                   (the second is), 0 a tie; its size is the margin. Agreement: share of the annotators on that side
strength_chat      HelpSteer3's: the same as `overall_preference`, after a `context` of messages
ultrafeedback      `completions` with ratings of four aspects (text, "N/A" is missing) and `overall_score`, which
                   compares them; the system prompts they were written under are left out
unieval            `scores` by name, each on its own scale, of `system_output` for `source` and `context`
prometheus         the instruction and the response inside a judge's task, and the mean of its ratings, 1 to 5
prometheus_judge   the judge's task, answered by what judges wrote with their rating: for judges that write; named only
prm800k            steps with alternatives, rated -1 (wrong), 0 (neutral) or 1 (right); neutral counts as right
                   (Lightman et al. 2023, arXiv:2305.20050, appendix F). Each alternative ends a response of its own,
                   with the labels of the steps before it; a step that a person wrote counts as right
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.formats.cells import (
    MESSAGES,
    NUMBER,
    NUMBERS,
    OBJECT,
    PROMPT,
    TEXT,
    TEXTS,
    Format,
    Kind,
    Reading,
    Row,
    answer,
    common,
    prompt_turns,
    score,
    show,
)
from rmjax.data.formats.ranked import as_many
from rmjax.data.formats.scored import scored
from rmjax.data.formats.steps import joined_steps
from rmjax.data.records import BadRow, Record, Step, group, pair

JUDGE_TASK = re.compile(
    r"###\s*The instruction to evaluate:\s*\n(?P<instruction>.*?)\n+"
    r"###\s*Response to evaluate:\s*\n(?P<response>.*?)\n+###\s*Reference Answer",
    re.DOTALL,
)
STEP_RATINGS = {-1: 0.0, 0: 1.0, 1: 1.0}

# ----------------------------------------------------------------------------------------------------
# HelpSteer
# ----------------------------------------------------------------------------------------------------


def _by_strength(prompt: Any, responses: Sequence[str], strength: float, votes: Any, row: Row, reading: Reading) -> Any:
    turns = prompt_turns(row, prompt)
    sides = [_sign(vote) for vote in votes if NUMBER.test(vote) and abs(vote) <= 3]  # -100 is no vote
    return pair(
        *([*turns, answer(text)] for text in responses),
        preference=(1 - _sign(strength)) / 2,
        margin=abs(float(strength)),
        agreement=sides.count(_sign(strength)) / len(sides) if sides else math.nan,
        **common(row, reading),
    )


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _strength_pair(row: Row, reading: Reading) -> Record:
    said = row.get("three_most_similar_preferences") or ()
    votes = [vote.get("strength") for vote in said if isinstance(vote, Mapping)]
    texts = [row["response_1"], row["response_2"]]
    return _by_strength(row["prompt"], texts, row["preference_strength"], votes, row, reading)


def _strength_chat(row: Row, reading: Reading) -> Record:
    said = row.get("individual_preference") or ()
    votes = [vote.get("score") for vote in said if isinstance(vote, Mapping)]
    texts = [row["response1"], row["response2"]]
    return _by_strength(row["context"], texts, row["overall_preference"], votes, row, reading)


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


def _ultrafeedback(row: Row, reading: Reading) -> Record:
    prompt = prompt_turns(row, row["instruction"])
    labels = []
    for completion in row["completions"]:
        aspects = completion.get("annotations") or {}
        ratings = {name: _rating((said or {}).get("Rating"), name) for name, said in aspects.items()}
        labels.append({"score": _rating(completion.get("overall_score"), "overall_score"), **ratings})
    conversations = [[*prompt, answer(completion.get("response"))] for completion in row["completions"]]
    return scored(conversations, labels, row, reading)


def _unieval(row: Row, reading: Reading) -> Record:
    parts = [row["source"], row.get("context")]
    asked = "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    conversation = [{"role": "user", "content": asked}, answer(row["system_output"])]
    # Here `source` is a text to answer, not the name of a data set.
    return scored([conversation], [row["scores"]], {k: v for k, v in row.items() if k != "source"}, reading)


def _prometheus(row: Row, reading: Reading) -> Record:
    found = JUDGE_TASK.search(row["instruction"])
    if not found:
        raise BadRow(
            "wrong_type", "instruction has no '###The instruction to evaluate:' and '###Response to evaluate:'"
        )
    ratings = [r for r in (score(r, "gpt4_score") for r in row["gpt4_score"]) if not math.isnan(r)]
    mean = sum(ratings) / len(ratings) if ratings else math.nan
    agreement = max(map(ratings.count, ratings)) / len(ratings) if ratings else math.nan
    conversation = [*prompt_turns(row, found["instruction"].strip()), answer(found["response"].strip())]
    return group([conversation], attributes={"score": [mean]}, agreement=agreement, **common(row, reading))


def _prometheus_judge(row: Row, reading: Reading) -> Record:
    as_many("feedbacks", row["gpt4_feedback"], row["gpt4_score"])
    prompt = prompt_turns(row, row["instruction"].removesuffix("###Feedback: ").rstrip())
    written = [f"Feedback: {text} [RESULT] {_whole(r)}" for text, r in zip(row["gpt4_feedback"], row["gpt4_score"])]
    return group([[*prompt, answer(text)] for text in written], **common(row, reading))


def _whole(rating: Any) -> int:
    if not NUMBER.test(rating) or rating != int(rating):
        raise BadRow("wrong_type", f"a rating is {show(rating)}, expected a whole number")
    return int(rating)


# ----------------------------------------------------------------------------------------------------
# PRM800K
# ----------------------------------------------------------------------------------------------------


def _prm800k(row: Row, reading: Reading) -> Record:
    responses = _paths(row["label"].get("steps") or ())
    if not responses:
        raise BadRow("no_label", "no step of the solution is rated")
    made: list[tuple[str, list[Step]]] = [joined_steps(*path, "\n") for path in responses]
    prompt = prompt_turns(row, row["question"]["problem"])
    conversations = [[*prompt, answer(text)] for text, _ in made]
    return group(conversations, steps=[steps for _, steps in made], **common(row, reading))


def _paths(steps: Sequence[Mapping[str, Any]]) -> list[tuple[list[str], list[float | None]]]:
    """(texts, labels) of every response that the steps and their alternatives make."""
    texts: list[str] = []
    labels: list[float | None] = []
    found: list[tuple[list[str], list[float | None]]] = []
    for step in steps:
        chosen, human, alternatives = (
            step.get("chosen_completion"),
            step.get("human_completion"),
            step.get("completions"),
        )
        for i, other in enumerate(alternatives or ()):
            if i != chosen:
                found.append(([*texts, other["text"]], [*labels, STEP_RATINGS.get(other.get("rating"))]))
        if chosen is not None and alternatives:
            taken = alternatives[int(chosen)]
            labels.append(STEP_RATINGS.get(taken.get("rating")))
        elif human:
            taken = human
            labels.append(1.0)
        else:
            return found
        texts.append(taken["text"])
    return [(texts, labels), *found] if texts else found


STRENGTH = Kind("a number in [-3, 3]", lambda c: NUMBER.test(c) and -3 <= c <= 3)
COMPLETIONS = Kind(
    "a list of {response, annotations, overall_score}",
    lambda c: MESSAGES.test(c) and all("response" in each and "annotations" in each for each in c),
)
QUESTION = Kind("an object with `problem`", lambda c: OBJECT.test(c) and isinstance(c.get("problem"), str))
STEPS = Kind("an object with `steps`", lambda c: OBJECT.test(c) and "steps" in c)
_RATED = {"instruction": TEXT, "gpt4_score": NUMBERS, "gpt4_feedback": TEXTS}

PUBLIC = (
    Format(
        "strength_pair",
        {"prompt": PROMPT, "response_1": TEXT, "response_2": TEXT, "preference_strength": STRENGTH},
        _strength_pair,
        means="-3 is the first response much better, 3 the second, 0 a tie; the size is the margin",
    ),
    Format(
        "strength_chat",
        {"context": PROMPT, "response1": TEXT, "response2": TEXT, "overall_preference": STRENGTH},
        _strength_chat,
        means="the same for HelpSteer3; `individual_preference` gives the agreement",
    ),
    Format(
        "ultrafeedback",
        {"instruction": TEXT, "completions": COMPLETIONS},
        _ultrafeedback,
        means="attribute `score` (overall, compares the completions) and the rating of each aspect",
    ),
    Format(
        "unieval",
        {"source": TEXT, "system_output": TEXT, "scores": OBJECT},
        _unieval,
        optional={"context": TEXT},
        means="an attribute for each of `scores`, on its own scale; the prompt is `source` and `context`",
    ),
    Format(
        "prometheus",
        _RATED,
        _prometheus,
        means="the response inside a judge's task; attribute `score` is the mean rating, 1 to 5",
    ),
    Format(
        "prometheus_judge",
        _RATED,
        _prometheus_judge,
        lambda row: False,
        means="the judge's task, and `Feedback: ... [RESULT] n` as the answer; only where it is named",
    ),
    Format(
        "prm800k",
        {"question": QUESTION, "label": STEPS},
        _prm800k,
        means="steps rated -1 (wrong), 0 or 1 (right); each alternative ends a response of its own",
    ),
)
