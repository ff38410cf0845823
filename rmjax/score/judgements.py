"""Scores of judges that write: several judgements of each question are sampled, and those that can be read averaged.

A judgement that cannot be read is never a score: its share is a column of its own, and where none can be read there is
no score. Nor is there one where the model's context has no room for a question and a judgement of it.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rmjax.data.records import BadRow, Message
from rmjax.judging import verdicts
from rmjax.judging.verdicts import BETTER, SCORE, VERDICTS
from rmjax.judging.writing import Writing
from rmjax.runtime import notes
from rmjax.score.rows import JUDGING, SCORING, Asked, Kind

if TYPE_CHECKING:  # JAX takes seconds
    from rmjax.inference.judgements import Judge, Judgement

UNREADABLE = "unreadable"
TOO_LONG = "without a score: question_too_long"  # how rows with a question that there is no room for are counted
T = TypeVar("T")
Question = tuple[Asked, Message, int]  # a row, the user's turn, and its number in the row


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a judge is asked."""

    samples: int  # judgements of each question
    max_tokens: int  # of a judgement


def kind_of(task: Writing, sampling: Sampling) -> Kind:
    """What rows are asked for a judge of this task."""
    judge_of = functools.cache(functools.partial(_judge, task, sampling))  # it takes over the parameters
    left_out = functools.partial(_left_out, task, judge_of)
    ask = functools.partial(_pairs if task.target == "pair" else _ratings, task, judge_of)
    if task.target == "pair":
        return dataclasses.replace(JUDGING, names=[*VERDICTS, UNREADABLE], ask=ask, left_out=left_out)
    return dataclasses.replace(SCORING, names=[SCORE, UNREADABLE], ask=ask, left_out=left_out)


def _judge(task: Writing, sampling: Sampling, model: Any) -> "Judge":
    from rmjax.inference.generation import GenerativeModel
    from rmjax.inference.judgements import Judge
    from rmjax.inference.sampler import Drawing

    drawing = Drawing(responses=sampling.samples, max_tokens=sampling.max_tokens)
    judge = Judge(GenerativeModel.of(model), task, drawing)
    model.drop_params()
    return judge


def _judgements(judge: "Judge", questions: Sequence[Question]) -> "list[list[Judgement]]":
    """The judgements on questions, none where there is no room; ValueError where one cannot be asked."""
    room = [i for i, why in enumerate(_no_room(judge, questions)) if not why]
    numbers = [_number(asked.where, place) for asked, _, place in (questions[i] for i in room)]
    found: list[list[Judgement]] = [[] for _ in questions]
    for i, of_one in zip(room, judge.judgements([questions[i][1] for i in room], numbers)):
        found[i] = of_one
    return found


def _no_room(judge: "Judge", questions: Sequence[Question]) -> list[str]:
    from rmjax.inference.reward_model import BadConversation

    try:
        return judge.no_room([turn for _, turn, _ in questions])
    except BadConversation as bad:
        raise ValueError(f"{questions[bad.index][0].where}: {bad.detail}") from None


def _left_out(task: Writing, judge_of: "Callable[[Any], Judge]", model: Any, asked: Asked) -> set[str]:
    """What of a row is not judged; the log names rows with a question that there is no room for."""
    why = next(filter(None, _no_room(judge_of(model), _questions(task, asked))), "")
    if why:
        notes.tell(f"{asked.where} has no score: {why}")
    return JUDGING.left_out(model, asked) | ({TOO_LONG} if why else set())


def _questions(task: Writing, asked: Asked) -> list[Question]:
    """About a pair, in both orders, or about each response; none about those that are empty."""
    if task.target == "pair":
        if len(asked.usable) < 2:
            return []
        first, second = asked.conversations
        both = functools.partial(verdicts.ask_in_both_orders, task.template, first, second, task.ties)
        return [(asked, turn, order) for order, turn in enumerate(_asking(asked, both))]
    name = (*task.attributes, "score")[0]
    ends = (verdicts.number_text(task.scale[0]), verdicts.number_text(task.scale[1]))
    questions = []
    for k in asked.usable:
        *history, last = asked.conversations[k]
        more = {"attributes": [name], "scale": ends}
        one = functools.partial(verdicts.ask, task.template, "score", history, [verdicts.text_of(last)], **more)
        questions.append((asked, _asking(asked, one), k))
    return questions


def _number(where: str, place: int) -> int:
    """Of the random numbers of a question: it depends on the row alone."""
    return int.from_bytes(hashlib.blake2b(f"{where} {place}".encode(), digest_size=4).digest())


def _asking(asked: Asked, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except BadRow as bad:
        raise ValueError(f"{asked.where}: {bad.detail}") from None


def _pairs(
    task: Writing, judge_of: "Callable[[Any], Judge]", model: Any, asked: Sequence[Asked], kind: Kind
) -> list[dict[str, list[Any]]]:
    """The shares of A (the first, or chosen one), B and tie among what can be read, over both orders."""
    where = [i for i, one in enumerate(asked) if len(one.usable) == 2]
    found = _judgements(judge_of(model), [question for i in where for question in _questions(task, asked[i])])
    values: list[dict[str, list[Any]]] = [
        {name: [None] * len(one.conversations) for name in kind.names} for one in asked
    ]
    for n, i in enumerate(where):
        if not all(found[2 * n : 2 * n + 2]):  # there is no room for a question
            continue
        codes = [
            VERDICTS.index(x.verdict.value) if not order else verdicts.SWAPPED[VERDICTS.index(x.verdict.value)]
            for order in (0, 1)
            for x in found[2 * n + order]
            if x.verdict.kind == BETTER
        ]
        shares = np.bincount(codes, minlength=3) / len(codes) if codes else [None] * 3
        told = dict(zip(VERDICTS, shares)) | {UNREADABLE: 1 - len(codes) / sum(map(len, found[2 * n : 2 * n + 2]))}
        for name, value in told.items():
            values[i][name][0] = None if value is None else float(value)
    return values


def _ratings(
    task: Writing, judge_of: "Callable[[Any], Judge]", model: Any, asked: Sequence[Asked], kind: Kind
) -> list[dict[str, list[Any]]]:
    """The mean of the ratings that can be read."""
    at = [(i, k) for i, one in enumerate(asked) for k in one.usable]
    found = _judgements(judge_of(model), [question for one in asked for question in _questions(task, one)])
    values: list[dict[str, list[Any]]] = [{n: [None] * len(one.conversations) for n in kind.names} for one in asked]
    for (i, k), of_one in zip(at, found):
        ratings = [float(x.verdict.value) for x in of_one if x.verdict.kind == SCORE]
        values[i][SCORE][k] = float(np.mean(ratings)) if ratings else None
        values[i][UNREADABLE][k] = 1 - len(ratings) / len(of_one) if of_one else None
    return values
