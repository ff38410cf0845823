"""Judgements that a judge writes: several are sampled of each question, and the verdict of each is read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rmjax.data.records import Message
from rmjax.inference.generation import GenerativeModel, Written
from rmjax.inference.reward_model import BadConversation
from rmjax.inference.sampler import Drawing, Prompt
from rmjax.judging import asked, verdicts
from rmjax.judging.verdicts import Verdict
from rmjax.judging.writing import Writing, check_judge

AT_ONCE = 8  # rounds of prompts under way between two looks


class Judgement(NamedTuple):
    """What was written, and the verdict in it."""

    written: Written
    verdict: Verdict


def judgements_of(model: GenerativeModel, task: Writing, prompt: Prompt, written: Sequence[Written]) -> list[Judgement]:
    """What was written as an answer to a prompt, with the verdicts in it."""
    decode = model.chat.tokenizer.decode  # with special tokens, of which one may open a thought
    thinking = verdicts.opens_thought(decode(prompt.tokens))
    return [Judgement(one, asked.read(decode(one.tokens.tolist()), task, thinking=thinking)) for one in written]


@dataclasses.dataclass
class Judge:
    """A model that writes verdicts.

    Raises:
        ValueError: its objective writes none, or ratings of several attributes.
    """

    model: GenerativeModel
    task: Writing
    drawing: Drawing  # its `responses` are the judgements of a question

    def __post_init__(self) -> None:
        check_judge(self.task)
        self._sampler = self.model.sampler(self.drawing)

    def no_room(self, questions: Sequence[Message]) -> list[str]:
        """Why the model's context has no room for each question and a judgement of it; "" where it has.

        Raises:
            BadConversation: a question that the template refuses.
        """
        prompts = self.model.prompts(
            [[question] for question in questions], [None] * len(questions), range(len(questions))
        )
        found = [self.model.too_long(prompt, self.drawing) for prompt in prompts]
        return [f"{why}; give a smaller --max_tokens" if why else "" for why in found]

    def judgements(
        self, questions: Sequence[Message], rows: Sequence[int], tell: Callable[[int], None] = lambda done: None
    ) -> list[list[Judgement]]:
        """The judgements of each question.

        Args:
            questions: a user's turn each.
            rows: a number for each, of its random numbers.
            tell: is told now and then how many questions are done.

        Raises:
            BadConversation: a question that the template refuses, or that there is no room for.
        """
        at_once = AT_ONCE * self._sampler.groups
        found: list[list[Judgement]] = []
        for start in range(0, len(questions), at_once):
            some = questions[start : start + at_once]
            found += self._answers(self._prompts(some, rows[start : start + at_once], start))
            tell(len(found))
        return found

    def answers(
        self, prompts: Sequence[Prompt], *, stop: Callable[[], bool] = lambda: False
    ) -> list[list[Judgement]] | None:
        """The judgements of questions as token ids; None if `stop` is true before all are there."""
        found: list[list[Judgement]] = []
        for start in range(0, len(prompts), AT_ONCE * self._sampler.groups):
            if stop():
                return None
            found += self._answers(prompts[start : start + AT_ONCE * self._sampler.groups])
        return found

    def _answers(self, prompts: Sequence[Prompt]) -> list[list[Judgement]]:
        written = self.model.write(self._sampler, prompts)
        return [judgements_of(self.model, self.task, *both) for both in zip(prompts, written)]

    def _prompts(self, questions: Sequence[Message], rows: Sequence[int], start: int) -> list[Prompt]:
        try:
            prompts = self.model.prompts([[question] for question in questions], [None] * len(questions), rows)
        except BadConversation as bad:
            raise BadConversation(start + bad.index, bad.detail) from None
        for place, prompt in enumerate(prompts):
            if why := self.model.too_long(prompt, self.drawing):
                raise BadConversation(start + place, why)
        return prompts
