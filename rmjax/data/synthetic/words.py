"""Words of the generated data, and the sentences made of them.

What is looked up in a reply never comes first: there it would be another token.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Rows = Iterator[dict[str, Any]]
T = TypeVar("T")

# fmt: off
TOPICS = (
    "bridge", "candle", "desert", "engine", "forest", "garden",
    "hammer", "island", "jacket", "ladder", "piano", "river",
)
FILLER = (
    "above", "again", "almost", "always", "around", "before", "behind", "below", "beside", "bright",
    "careful", "clean", "clear", "close", "cold", "deep", "early", "easy", "empty", "every",
    "fresh", "full", "gentle", "green", "happy", "large", "late", "light", "never", "often",
    "once", "plain", "quick", "quiet", "round", "slow", "small", "soft", "under", "warm",
)
# fmt: on
ASK = (
    "Tell me about the {}.",
    "What is the {} like?",
    "Describe the {} for me.",
    "I want to know more about the {}.",
    "Could you say something of the {}?",
    "Write a few lines on the {}, please.",
    "Explain what the {} is for.",
    "My question: why does the {} matter?",
)
SYSTEM = ("You are a helpful assistant.", "Answer in one sentence.", "Be brief and stay on the subject.")


def dealt(draw: Callable[[], Sequence[T]]) -> Iterator[T]:
    """Yields kinds of rows, block after block; a block is drawn when its first row is due."""
    while True:
        yield from reversed(draw())


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    items = list(items)
    rng.shuffle(items)
    return items


def sentence(words: Sequence[str]) -> str:
    return " ".join(words).capitalize() + "."


def question(rng: random.Random, topic: str) -> str:
    """A question about `topic` and, before or after it, 3 to 5 words that make the prompt its own."""
    sentences = [rng.choice(ASK).format(topic), sentence(rng.sample(FILLER, rng.randint(3, 5)))]
    return " ".join(shuffled(rng, sentences))


def reply(rng: random.Random, fewest: int, most: int, topic: str, count: int | None = None) -> str:
    """`fewest` to `most` words, `count` of them `topic` (drawn from 1 to 3 unless given)."""
    words = rng.sample(FILLER, rng.randint(fewest, most))
    for place in rng.sample(range(1, len(words)), rng.randint(1, 3) if count is None else count):
        words[place] = topic
    return sentence(words)
