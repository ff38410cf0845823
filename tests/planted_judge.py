"""A judge that writes what a test wants."""

from types import SimpleNamespace

import numpy as np

from rmjax.batches.chat import Chat
from rmjax.inference.generation import Written
from rmjax.inference.sampler import Prompt


class Planted:
    """Stands in for a GenerativeModel: `judge` makes the k-th judgement of a question.

    A question with the word that is `over_long` leaves no room for a judgement.
    """

    def __init__(self, tokenizer, judge, over_long=None):
        self.chat, self.judge, self.over_long = Chat(tokenizer), judge, over_long

    def drop_params(self):
        pass

    def sampler(self, drawing, groups=0):
        return SimpleNamespace(drawing=drawing, groups=2)

    def prompts(self, conversations, tools, rows):
        self.asked = {row: conversation[-1]["content"] for row, conversation in zip(rows, conversations)}
        too_long = lambda text: int(bool(self.over_long) and self.over_long in text)
        return [Prompt([too_long(text)], row) for row, text in self.asked.items()]

    def too_long(self, prompt, drawing):
        return "it is too long" * prompt.tokens[0]

    def write(self, sampler, prompts):
        of_one = lambda text: [self._written(self.judge(text, k)) for k in range(sampler.drawing.responses)]
        return [of_one(self.asked[prompt.row]) for prompt in prompts]

    def _written(self, text):
        tokens = np.array(self.chat.encode([text])[0])
        return Written(text, tokens, np.zeros(len(tokens)), "stop" if text.endswith(">") else "length")
