"""Judgements that a judge writes: several are sampled of each question, and the verdict of each is read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rmjax.data.records import Message
from rmjax.inference.generation import GenerativeModel, Written
from rmjax.inference.reward_model import BadConversation
from rmjax.inference.sampler import Drawing, Prompt
from rmjax.judging import verdicts
from rmjax.judging.verdicts import BETTER, SCORE, Verdict
from rmjax.judging.writing import Writing, check_judge

AT_ONCE = 8  # rounds of prompts under way between two looks


class Judgement(NamedTuple):
    """What was written, and the verdict in it."""

    written: Written
    verdict: Verdict


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
        asked = self.model.prompts(
            [[question] for question in questions], [None] * len(questions), range(len(questions))
        )
        found = [self.model.too_long(prompt, self.drawing) for prompt in asked]
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
            asked = self._prompts(some, rows[start : start + at_once], start)
            for question, written in zip(some, self.model.write(self._sampler, asked)):
                thinking = verdicts.opens_thought(self.model.chat.render_prompt([question]))
                found.append([Judgement(one, self._read(one, thinking)) for one in written])
            tell(len(found))
        return found

    def _prompts(self, questions: Sequence[Message], rows: Sequence[int], start: int) -> list[Prompt]:
        try:
            asked = self.model.prompts([[question] for question in questions], [None] * len(questions), rows)
        except BadConversation as bad:
            raise BadConversation(start + bad.index, bad.detail) from None
        for place, prompt in enumerate(asked):
            if why := self.model.too_long(prompt, self.drawing):
                raise BadConversation(start + place, why)
        return asked

    def _read(self, written: Written, thinking: bool) -> Verdict:
        kind, scale = (BETTER, None) if self.task.target == "pair" else (SCORE, self.task.scale)
        # With special tokens, of which one may open a thought.
        text = self.model.chat.tokenizer.decode(written.tokens.tolist())
        return verdicts.parse_verdict(text, kind, scale=scale, ties=self.task.ties, thinking=thinking)
