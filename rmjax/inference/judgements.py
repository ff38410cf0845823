"""Judgements that a judge writes: several are sampled of each question, and the verdict of each is read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rmjax.data.records import Message
from rmjax.inference import engines
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

    Attributes:
        drawing: its `responses` are the judgements of a question.
        shared: whether every process asks all questions, of which each then writes its share; the model's parameters
            are on this process's own devices (`engines.on_this_process`).

    Raises:
        ValueError: its objective writes none, or ratings of several attributes.
    """

    model: GenerativeModel
    task: Writing
    drawing: Drawing
    shared: bool = False

    def __post_init__(self) -> None:
        check_judge(self.task)
        self._sampler = self.model.sampler(self.drawing)

    def greedy(self) -> "Judge":
        """The judge that writes the likeliest token each time, once."""
        return dataclasses.replace(self, drawing=dataclasses.replace(self.drawing, responses=1, temperature=0.0))

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
        found = self.answers(self._prompts(questions, rows), tell)
        assert found is not None
        return found

    def answers(
        self,
        prompts: Sequence[Prompt],
        tell: Callable[[int], None] = lambda done: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Judgement]] | None:
        """The judgements of questions as token ids; None if `stop` is true before all are there."""
        at_once = AT_ONCE * self._sampler.groups
        found: list[list[Judgement]] = []
        for start in range(0, len(prompts), at_once):
            if stop():
                return None
            some = prompts[start : start + at_once]
            written = self._written(some)
            found += [judgements_of(self.model, self.task, *both) for both in zip(some, written)]
            tell(len(found))
        return found

    def _written(self, prompts: Sequence[Prompt]) -> list[list[Written]]:
        if not self.shared:
            return self.model.write(self._sampler, prompts)
        found = engines.answers(self._sampler, prompts, self.drawing.responses, self.drawing.max_tokens)
        return [[self.model.written(response) for response in of_one] for of_one in found]

    def _prompts(self, questions: Sequence[Message], rows: Sequence[int]) -> list[Prompt]:
        prompts = self.model.prompts([[question] for question in questions], [None] * len(questions), rows)
        for place, prompt in enumerate(prompts):
            if why := self.model.too_long(prompt, self.drawing):
                raise BadConversation(place, why)
        return prompts
