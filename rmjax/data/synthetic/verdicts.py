"""Judged pairs with a planted rule: the reply about what the prompt names is better; if neither is, it is a tie.

Yields `judged_pair` rows: the reply with the word that the prompt names is better; if neither has it, a tie.

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

import random

from rmjax.data.synthetic.words import TOPICS, Rows, dealt, question, reply

# What is right, and the verdict that is given, in every block of 60 rows, in random order.
BLOCK = (*((v, v) for v in ("A", "B", "tie") for _ in range(19)), ("A", "B"), ("B", "tie"), ("tie", "A"))


def verdicts(rng: random.Random) -> Rows:
    for right, verdict in dealt(lambda: rng.sample(BLOCK, len(BLOCK))):
        topics = dict(zip(("A", "B", "tie"), rng.sample(TOPICS, 3)))
        counts = {"A": rng.randint(1, 3), "B": rng.randint(1, 3), "tie": 0}
        yield {
            "input": [{"role": "user", "content": question(rng, topics[right])}],
            "output": [{"content": reply(rng, 5, 9, topics[name], counts[name])} for name in ("A", "B")],
            "metadata": {"preferred": verdict, "preference_strength": counts[verdict]},
        }
