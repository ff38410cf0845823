"""What a judge that writes is asked, without an answer; and how what it answers is read.

    records -> `questions_about` -> prompts -> what is written -> `read` -> verdicts

Sampled evaluation, scoring and reinforcement learning share it. This module imports no jax.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rmjax.batches.tasks import Axes, Example, no_label
from rmjax.data.records import BadRow, Conversation, Message, Record
from rmjax.judging import verdicts
from rmjax.judging.verdicts import BETTER, SCORE, VERDICTS, Verdict
from rmjax.judging.writing import Writing


@dataclasses.dataclass(frozen=True)
class Question:
    """What a judge is asked once: about a pair in one order, or about a response.

    Attributes:
        asked: the user's turn.
        label: of a pair its verdict as a place in VERDICTS, of a response its rating.
        place: of what is asked about in its record: a number that the two orders of a pair share.
        strength: how much better the preferred response of a pair is; NaN where it is not known.
    """

    asked: Message
    label: float
    place: int
    strength: float = math.nan


def questions_about(record: Record, task: Writing) -> Iterator[Question | BadRow]:
    """The questions about a record, the two orders of a pair one after the other; a BadRow for what has no label.

    Raises:
        BadRow: one that the template cannot ask.
    """
    if task.target == "pair":
        for place, (i, j, said) in enumerate(verdicts.labelled_pairs(record)):
            shares = said if task.ties else said[:2]
            if (shares == shares.max()).sum() > 1:
                yield BadRow("tie", "no verdict has a majority")
                continue
            label = int(shares.argmax())
            pair = record.conversations[i], record.conversations[j]
            strength = float(verdicts.strength_of(record, i, j)[0])
            turns = verdicts.ask_in_both_orders(task.template, *pair, task.ties)
            for turn, verdict in zip(turns, (label, verdicts.SWAPPED[label])):
                yield Question(turn, verdict, place, strength)
        return
    name = next(iter(task.attributes or tuple(record.attributes)), "")
    ends = (verdicts.number_text(task.scale[0]), verdicts.number_text(task.scale[1]))
    for k, (*history, last) in enumerate(record.conversations):
        rating = float(record.attributes.get(name, (math.nan,) * (k + 1))[k])
        if math.isnan(rating):
            yield no_label(record, f"the attribute {name}" if name else "a rating")
        elif not task.scale[0] <= rating <= task.scale[1]:
            yield BadRow("out_of_scale", f"{rating:g} on a scale from {ends[0]} to {ends[1]}")
        else:
            shown = [verdicts.text_of(last)]
            asked = verdicts.ask(task.template, "score", history, shown, attributes=[name], scale=ends)
            yield Question(asked, rating, k)


def labelled_questions(record: Record, task: Writing) -> tuple[list[Question], list[BadRow]]:
    """The questions about a record, and what of it has no label; no questions where one of them cannot be asked."""
    questions: list[Question] = []
    bad: list[BadRow] = []
    try:
        for question in questions_about(record, task):
            bad.append(question) if isinstance(question, BadRow) else questions.append(question)
    except BadRow as error:
        return [], [error]
    if not questions and not bad:
        bad.append(no_label(record, "preferences" if task.target == "pair" else "a rating"))
    return questions, bad


def read(text: str, task: Writing, *, thinking: bool = False) -> Verdict:
    """The verdict in what a judge wrote, special tokens included; `thinking` as of `verdicts.parse_verdict`."""
    if task.target == "pair":
        return verdicts.parse_verdict(text, BETTER, ties=task.ties, thinking=thinking)
    return verdicts.parse_verdict(text, SCORE, scale=task.scale, thinking=thinking)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts that a judge is to answer; each labelled pair, or each rated response, is one group.

    Of a pair the group has K = 2 prompts, which show its responses in either order, or one of them.
    """

    writing: Writing  # what the judge writes; its target is "pair" or "score"
    # Of the row, that stay with the group, for the reward. Not in `repr`, which names the cache of those without, too.
    columns: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    @property
    def orders(self) -> int:
        """Prompts of a group."""
        return 2 if self.writing.target == "pair" and self.writing.both_orders else 1

    @property
    def names(self) -> tuple[str, ...]:
        """What is rated; () of pairs."""
        return () if self.writing.target == "pair" else (self.writing.attributes or (SCORE,))

    @property
    def fields(self) -> Mapping[str, Axes]:
        """Of pairs `verdict`, 1 at the label among A, B and tie, for each prompt, and `strength` as in Question; of
        ratings `value`, and `mask`, which is 1."""
        if self.writing.target == "pair":
            return {"verdict": ("G", "K", len(VERDICTS)), "strength": ("G", 1)}
        return dict.fromkeys(("value", "mask"), ("G", "K", 1))

    def examples(self, record: Record) -> Sequence[Example | BadRow]:
        if missing := [name for name in self.columns if name not in record.columns]:
            raise BadRow("no_column", f"there is no {', '.join(missing)}")
        by_place: dict[int, list[Question]] = {}
        bad: list[BadRow] = []
        for question in questions_about(record, self.writing):
            if isinstance(question, BadRow):
                bad.append(question)
            else:
                by_place.setdefault(question.place, []).append(question)
        if not by_place:
            raise bad[0] if bad else no_label(record, "preferences" if self.writing.target == "pair" else "a rating")
        several = len(by_place) + len(bad) > 1
        found = [self._example(group, str(place) if several else "") for place, group in by_place.items()]
        return [*found, *bad]

    def _example(self, group: Sequence[Question], name: str) -> Example:
        if len(group) > self.orders:  # one order, by a coin that is tossed for the question
            group = [group[verdicts.coin((), [question.asked["content"] for question in group])]]
        prompts: list[Conversation] = [(question.asked,) for question in group]
        label = np.array([question.label for question in group], np.float32)
        if self.writing.target == "pair":
            strength = np.array([group[0].strength], np.float32)
            labels = {"verdict": np.eye(len(VERDICTS), dtype=np.float32)[label.astype(int)], "strength": strength}
        else:
            labels = {"value": label[:, None], "mask": np.ones((len(label), 1), np.float32)}
        return Example(tuple(prompts), labels, name=name, answered=False)


def labels_of(labels: Mapping[str, np.ndarray]) -> np.ndarray:
    """float [K]: the label of each prompt of a group, as in Question."""
    return labels["verdict"].argmax(-1) if "verdict" in labels else labels["value"][:, 0]


def in_words(label: float, task: Writing) -> str | float:
    """A label as a verdict has it: "A", or 3.0."""
    return VERDICTS[int(label)] if task.target == "pair" else float(label)
