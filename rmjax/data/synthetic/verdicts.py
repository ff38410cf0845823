"""Judged pairs with a planted rule: the reply about what the prompt names is better; if neither is, it is a tie."""

import random
from collections.abc import Iterator
from typing import Any

from rmjax.data.synthetic.pairs import FILLER, TOPICS, _question, _sentence

# What is right, and the verdict that is given, in every block of 60 rows, in random order.
BLOCK = (
    *[("A", "A")] * 19,
    *[("B", "B")] * 19,
    *[("tie", "tie")] * 19,
    *(("A", "B"), ("B", "tie"), ("tie", "A")),
)


def verdicts(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields `judged_pair` rows: the reply with the word that the prompt names is better; if neither has it, a tie.

    Each reply has one of TOPICS, one to three times, among words of FILLER; 5 to 9 words in all. The two replies have
    different topics, and the prompt names that of the first, that of the second or another one. So prompts alone,
    replies alone, their lengths or a linear model of all the words tell nothing. The strength of a preference is how
    often the better reply has its topic: 1 to 3; of ties 0.

    Of every 60 rows 57 follow the rule, so the best reachable accuracy is 95 %. Each verdict is that of 20 of them.

    One row:

        {"input": [{"role": "user", "content": "Tell me about the river. Green still often."}],
         "output": [{"content": "Every quiet river soft small early."},
                    {"content": "Soft garden empty near plain always garden warm."}],
         "metadata": {"preferred": "A", "preference_strength": 1}}
    """
    rng = random.Random(f"verdicts/{seed}")  # seeded by text: hashed with SHA-512, whatever PYTHONHASHSEED is
    kinds: list[tuple[str, str]] = []
    for _ in range(n):
        if not kinds:
            kinds = rng.sample(BLOCK, len(BLOCK))
        right, verdict = kinds.pop()
        topics = dict(zip(("A", "B", "tie"), rng.sample(TOPICS, 3)))
        counts = {"A": rng.randint(1, 3), "B": rng.randint(1, 3), "tie": 0}
        yield {
            "input": [{"role": "user", "content": _question(rng, topics[right])}],
            "output": [{"content": _reply(rng, topics[name], counts[name])} for name in ("A", "B")],
            "metadata": {"preferred": verdict, "preference_strength": counts[verdict]},
        }


def _reply(rng: random.Random, topic: str, count: int) -> str:
    """5 to 9 words, `count` of them `topic`, which never comes first: there it would be another token."""
    words = rng.sample(FILLER, rng.randint(5, 9))
    for place in rng.sample(range(1, len(words)), count):
        words[place] = topic
    return _sentence(words)
