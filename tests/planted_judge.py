"""A judge that writes what a test wants."""

from types import SimpleNamespace

import numpy as np

from rmjax.batches.chat import Chat
from rmjax.inference.generation import Written
from rmjax.inference.sampler import Prompt


class Planted:
    """Stands in for a GenerativeModel: `judge` makes the k-th judgement of a question."""

    def __init__(self, tokenizer, judge):
        self.chat, self.judge = Chat(tokenizer), judge

    def sampler(self, drawing, groups=0):
        return SimpleNamespace(drawing=drawing, groups=2)

    def prompts(self, conversations, tools, rows):
        self.asked = [conversation[-1]["content"] for conversation in conversations]
        return [Prompt([1], row) for row in rows]

    def too_long(self, prompt, drawing):
        return ""

    def write(self, sampler, prompts):
        return [[self._written(self.judge(text, k)) for k in range(sampler.drawing.responses)] for text in self.asked]

    def _written(self, text):
        tokens = np.array(self.chat.encode([text])[0])
        return Written(text, tokens, np.zeros(len(tokens)), "stop" if text.endswith(">") else "length")
