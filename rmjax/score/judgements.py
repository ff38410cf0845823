"""Scores of judges that write: several judgements of each question are sampled, and those that can be read averaged.

A judgement that cannot be read is never a score: its share is a column of its own, and where none can be read there is
no score.
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
from rmjax.score.rows import JUDGING, SCORING, Asked, Kind

if TYPE_CHECKING:  # JAX takes seconds
    from rmjax.inference.judgements import Judge, Judgement

UNREADABLE = "unreadable"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a judge is asked."""

    samples: int  # judgements of each question
    max_tokens: int  # of a judgement


def kind_of(task: Writing, sampling: Sampling) -> Kind:
    """What rows are asked for a judge of this task."""
    judge_of = functools.cache(functools.partial(_judge, task, sampling))  # it has a copy of the parameters
    ask = functools.partial(_pairs if task.target == "pair" else _ratings, task, judge_of)
    if task.target == "pair":
        return dataclasses.replace(JUDGING, names=[*VERDICTS, UNREADABLE], ask=ask)
    return dataclasses.replace(SCORING, names=[SCORE, UNREADABLE], ask=ask, left_out=JUDGING.left_out)


def _judge(task: Writing, sampling: Sampling, model: Any) -> "Judge":
    from rmjax.inference.generation import GenerativeModel
    from rmjax.inference.judgements import Judge
    from rmjax.inference.sampler import Drawing

    return Judge(GenerativeModel.of(model), task, Drawing(responses=sampling.samples, max_tokens=sampling.max_tokens))


def _judgements(judge: "Judge", questions: Sequence[tuple[Asked, Message, int]]) -> "list[list[Judgement]]":
    """The judgements on questions (row, user's turn, its number in the row); ValueError where one cannot be asked."""
    from rmjax.inference.reward_model import BadConversation

    numbers = [_number(asked.where, place) for asked, _, place in questions]
    try:
        return judge.judgements([turn for _, turn, _ in questions], numbers)
    except BadConversation as bad:
        raise ValueError(f"{questions[bad.index][0].where}: {bad.detail}") from None


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
    questions = []
    where = [i for i, one in enumerate(asked) if len(one.usable) == 2]
    for i in where:
        first, second = asked[i].conversations
        both = functools.partial(verdicts.ask_in_both_orders, task.template, first, second, task.ties)
        questions += [(asked[i], turn, place) for place, turn in enumerate(_asking(asked[i], both))]
    found = _judgements(judge_of(model), questions) if questions else []
    values: list[dict[str, list[Any]]] = [
        {name: [None] * len(one.conversations) for name in kind.names} for one in asked
    ]
    for n, i in enumerate(where):
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
    name = (*task.attributes, "score")[0]
    ends = (verdicts.number_text(task.scale[0]), verdicts.number_text(task.scale[1]))
    questions, at = [], []
    for i, one in enumerate(asked):
        for k in one.usable:
            *history, last = one.conversations[k]
            more = {"attributes": [name], "scale": ends}
            ask = functools.partial(verdicts.ask, task.template, "score", history, [verdicts.text_of(last)], **more)
            questions.append((one, _asking(one, ask), k))
            at.append((i, k))
    found = _judgements(judge_of(model), questions) if questions else []
    values: list[dict[str, list[Any]]] = [{n: [None] * len(one.conversations) for n in kind.names} for one in asked]
    for (i, k), of_one in zip(at, found):
        ratings = [float(x.verdict.value) for x in of_one if x.verdict.kind == SCORE]
        values[i][SCORE][k] = float(np.mean(ratings)) if ratings else None
        values[i][UNREADABLE][k] = 1 - len(ratings) / len(of_one)
    return values
