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
from rmjax.judging.verdicts import (
    BETTER,
    SCORE,
    VERDICTS,
    ask,
    check_template,
    divide,
    labelled_pairs,
    number_text,
    some_good,
    text_of,
)


def _answered(question: Mapping[str, object], texts: Sequence[str]) -> list[Conversation]:
    return [(question, {"role": "assistant", "content": text}) for text in texts]


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Which of two responses is better; each labelled pair of a record is one group of K = 2 C sequences.

    The first C answer the question in which response i is A and j is B, the others that with the responses exchanged.

    Attributes:
        template: text of the template that states the question, kind "pair".
        ties: whether a verdict may be "tie": C is 3 or 2.
    """

    template: str
    ties: bool = True

    def __post_init__(self) -> None:
        check_template(self.template, "pair")

    @property
    def classes(self) -> int:
        """C."""
        return 3 if self.ties else 2

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`verdict`: the shares of "i", "j" and "tie" in what people said. `strength`: as in Judgements."""
        return {"verdict": ("G", 3), "strength": ("G", 1)}

    def examples(self, record: Record) -> Sequence[Example | BadRow]:
        """One group for each labelled pair.

        Raises:
            BadRow: `no_label`, or why no pair can be shown.
        """
        pairs = list(labelled_pairs(record))
        if not pairs:
            raise no_label(record, "preferences")
        return some_good([self._example(record, i, j, said) for i, j, said in pairs])

    def _example(self, record: Record, i: int, j: int, said: np.ndarray) -> Example | BadRow:
        try:
            history, *texts = divide(record.conversations[i], record.conversations[j])
        except BadRow as bad:
            return bad
        orders = (texts, texts[::-1])
        questions = [ask(self.template, "pair", history, shown, ties=self.ties) for shown in orders]
        answers = [f"<{BETTER}>{verdict}</{BETTER}>" for verdict in VERDICTS[: self.classes]]
        labels = {
            "verdict": said.astype(np.float32),
            "strength": np.array([max(record.margin[i, j], record.margin[j, i])], np.float32),
        }
        return Example(tuple(c for q in questions for c in _answered(q, answers)), labels, name=f"{i}-{j}")


@dataclasses.dataclass(frozen=True)
class Ratings:
    """How good each response is; a record of K responses is one group of K R sequences, R ratings of each.

    Attributes:
        template: text of the template that states the question, kind "score".
        scale: lowest and highest rating; the whole numbers between them are asked for.
        attribute: what is rated, in the words of the template.
    """

    template: str
    scale: tuple[float, float]
    attribute: str = "score"

    def __post_init__(self) -> None:
        check_template(self.template, "score")
        if len(self.ratings) < 2:
            raise ValueError(f"scale={self.scale} has fewer than two whole numbers that could be written")

    @functools.cached_property
    def ratings(self) -> tuple[int, ...]:
        """The whole numbers of the scale, R of them."""
        return tuple(range(math.ceil(self.scale[0]), math.floor(self.scale[1]) + 1))

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`wins`, `ties` and `margin`, as in Record, in the first K rows and columns of K R."""
        return dict.fromkeys(("wins", "ties", "margin"), ("G", "K", "K"))

    def examples(self, record: Record) -> Sequence[Example]:
        """One group."""
        ends = (number_text(self.scale[0]), number_text(self.scale[1]))
        answers = [f"<{SCORE}>{rating}</{SCORE}>" for rating in self.ratings]
        made: list[Conversation] = []
        for conversation in record.conversations:
            shown = [text_of(conversation[-1])]
            made += _answered(
                ask(self.template, "score", conversation[:-1], shown, attributes=[self.attribute], scale=ends), answers
            )
        more = len(made) - len(record.conversations)
        labels = {name: np.pad(getattr(record, name), ((0, more), (0, more))) for name in self.fields}
        return [Example(tuple(made), labels)]
