"""Questions to a judge that writes: every verdict it could write is a sequence, and how likely each is tells which.

The verdicts of a question share all but their last tokens, so they cost one tree. What a judge would write before its
verdict (feedback, thinking) is not asked for: a judge that was trained to write the verdict at once is asked as it was
trained. Reading a rating as the mean over the likelihoods of all ratings: Liu et al. 2023 (G-Eval), arXiv:2303.16634.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rmjax.batches.tasks import Axes, Example, no_label
from rmjax.data.records import BadRow, Conversation, Record
from rmjax.judging import verdicts


def _answered(question: Mapping[str, object], texts: Sequence[str]) -> list[Conversation]:
    return [(question, {"role": "assistant", "content": text}) for text in texts]


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Which of two responses is better; each labelled pair of a record is one group of K = 2 C sequences.

    The first C answer the question in which response i is A and j is B, the others that with the responses exchanged.
    """

    template: str  # text of the template that states the question, kind "pair"
    ties: bool = True  # whether a verdict may be "tie": C is 3 or 2

    def __post_init__(self) -> None:
        verdicts.check_template(self.template, "pair")

    @property
    def classes(self) -> int:
        return 3 if self.ties else 2

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`verdict`: the shares of "i", "j" and "tie" in what people said. `strength`: as in Judgements."""
        return {"verdict": ("G", 3), "strength": ("G", 1)}

    def examples(self, record: Record) -> Sequence[Example | BadRow]:
        pairs = list(verdicts.labelled_pairs(record))
        if not pairs:
            raise no_label(record, "preferences")
        return verdicts.some_good([self._example(record, i, j, said) for i, j, said in pairs])

    def _example(self, record: Record, i: int, j: int, said: np.ndarray) -> Example | BadRow:
        questions = verdicts.ask_in_both_orders(
            self.template, record.conversations[i], record.conversations[j], self.ties
        )
        answers = [f"<{verdicts.BETTER}>{verdict}</{verdicts.BETTER}>" for verdict in verdicts.VERDICTS[: self.classes]]
        labels = {"verdict": said.astype(np.float32), "strength": verdicts.strength_of(record, i, j)}
        return Example(tuple(c for q in questions for c in _answered(q, answers)), labels, name=f"{i}-{j}")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """How good each response is; a record of K responses is one group of K R sequences, R ratings of each."""

    template: str  # text of the template that states the question, kind "score"
    scale: tuple[float, float]  # lowest and highest rating; the whole numbers between them are asked for
    attribute: str = "score"  # what is rated, in the words of the template

    def __post_init__(self) -> None:
        verdicts.check_template(self.template, "score")
        if len(self.ratings) < 2:
            raise ValueError(f"scale={self.scale} has fewer than two whole numbers that could be written")

    @functools.cached_property
    def ratings(self) -> tuple[int, ...]:
        return tuple(range(math.ceil(self.scale[0]), math.floor(self.scale[1]) + 1))

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`wins`, `ties` and `margin`, as in Record, in the first K rows and columns of K R."""
        return dict.fromkeys(("wins", "ties", "margin"), ("G", "K", "K"))

    def examples(self, record: Record) -> Sequence[Example]:
        ends = (verdicts.number_text(self.scale[0]), verdicts.number_text(self.scale[1]))
        answers = [f"<{verdicts.SCORE}>{rating}</{verdicts.SCORE}>" for rating in self.ratings]
        conversations: list[Conversation] = []
        for *history, last in record.conversations:
            question = verdicts.ask(
                self.template, "score", history, [verdicts.text_of(last)], attributes=[self.attribute], scale=ends
            )
            conversations += _answered(question, answers)
        more = len(conversations) - len(record.conversations)
        labels = {name: np.pad(getattr(record, name), ((0, more), (0, more))) for name in self.fields}
        return [Example(tuple(conversations), labels)]
