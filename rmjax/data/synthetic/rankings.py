"""Rankings of four replies with a planted rule: the more of the words that the prompt names a reply has, the better.

Yields `ranked` rows; of four replies, those rank higher that have more of the three words of the user turn.

Each reply has three different words of TOPICS, at any places but the first, among words of FILLER; 8 to 16 words in
all. None to three of them, drawn evenly for each reply, are words that the user turn names; equally many is a tie.
So every word is as frequent in good replies as in bad ones, and neither the prompt, the replies, their lengths nor
a linear model of the words tells the order: a model has to look each word up, and count. One prompt in five has a
system message.

Of every 20 rows 14 follow the rule. 4 do too, but one reply is not ranked (null). 2 have their ranks in random
order, so that no model can be right about more than 95 % of the pairs.

One row:

    {"prompt": [{"role": "user", "content": "Tell me about the river, the jacket and the piano. Green often."}],
     "responses": ["Every river soft garden under small early engine.", "Soft piano empty river near jacket warm.",
                   "Quiet garden engine small empty island plain.", "Often candle round jacket hammer always."],
     "ranks": [2, 1, 3, 2]}
"""

import random
from collections.abc import Sequence

from rmjax.data.synthetic.words import FILLER, SYSTEM, TOPICS, Rows, dealt, question, sentence, shuffled

REPLIES = 4
ASKED = 3  # words of TOPICS that the prompt names, and that each reply has

# The kinds of rows in every block of 20; see `rankings`.
BLOCK = (*["random"] * 2, *["partial"] * 4, *["ordinary"] * 14)


def rankings(rng: random.Random) -> Rows:
    for kind in dealt(lambda: shuffled(rng, BLOCK)):
        topics = rng.sample(TOPICS, len(TOPICS))
        asked, others = topics[:ASKED], topics[ASKED:]
        counts = [rng.randint(0, ASKED) for _ in range(REPLIES)]
        yield {
            "prompt": _prompt(rng, asked),
            "responses": [_reply(rng, rng.sample(asked, c) + rng.sample(others, ASKED - c)) for c in counts],
            "ranks": _ranks(rng, kind, counts),
        }


def _prompt(rng: random.Random, asked: Sequence[str]) -> list[dict[str, str]]:
    """A user turn that asks for these words; one time in five after a system message."""
    system = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.2 else []
    words = ", the ".join(asked[:-1]) + f" and the {asked[-1]}"
    return [*system, {"role": "user", "content": question(rng, words)}]


def _reply(rng: random.Random, topics: Sequence[str]) -> str:
    """8 to 16 words, these among them."""
    words = rng.sample(FILLER, rng.randint(8, 16))
    for place, topic in zip(rng.sample(range(1, len(words)), len(topics)), rng.sample(topics, len(topics))):
        words[place] = topic
    return sentence(words)


def _ranks(rng: random.Random, kind: str, counts: Sequence[int]) -> list[int | None]:
    """1 for the highest count, 2 for the next, and so on."""
    order = sorted(set(counts), reverse=True)
    ranks: list[int | None] = [1 + order.index(count) for count in counts]
    if kind == "random":
        rng.shuffle(ranks)
    if kind == "partial":
        ranks[rng.randrange(len(ranks))] = None
    return ranks
