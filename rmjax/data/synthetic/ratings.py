"""Rated replies with a planted rule: in `ratings` a reply about the topic that the prompt names is good, any other bad;
in `favourites` a reply about one of four topics is good, whatever was asked.

Both yield `scored_text` rows. In `ratings` one is rated 5 if the reply has the word of SUBJECTS that the prompt names,
and 1 if another.

A reply has its word one to three times, at any place but the first, among words of FILLER; 8 to 14 words in all. In
`ratings` every word is as frequent in good replies as in bad ones, and so it is in prompts; so neither the prompt, the
reply, its length nor a linear model of all the words tells the rating: a model has to look the word up. In `favourites`
the reply's word tells it, so that what is half learnt is half right.

Of every 40 rows 38 follow the rule; the best reachable accuracy is 95 %. Each rating is that of 20 of them.

One row of `ratings`:

    {"prompt": "Tell me about the candle. Green still often.",
     "response": "Every quiet candle soft under small early candle once.",
     "score": 5}
"""

import random
from collections.abc import Iterator

from rmjax.data.synthetic.words import TOPICS, Rows, dealt, question, reply

SUBJECTS = TOPICS[:4]  # of few words the rule is learnt in a minute
OTHERS = TOPICS[4:8]
BAD, GOOD = 1, 5
# Whether the reply is about the named topic, and its rating, in every block of 40 rows, in random order.
BLOCK = (*[(True, GOOD)] * 19, *[(False, BAD)] * 19, (True, BAD), (False, GOOD))  # the last two are wrong


def _dealt(rng: random.Random) -> Iterator[tuple[bool, int]]:
    return dealt(lambda: rng.sample(BLOCK, len(BLOCK)))


def ratings(rng: random.Random) -> Rows:
    for follows, rating in _dealt(rng):
        named, other = rng.sample(SUBJECTS, 2)
        prompt = question(rng, named)
        yield {"prompt": prompt, "response": reply(rng, 8, 14, named if follows else other), "score": rating}


def favourites(rng: random.Random) -> Rows:
    for good, rating in _dealt(rng):
        prompt = question(rng, rng.choice(TOPICS[8:]))
        yield {
            "prompt": prompt,
            "response": reply(rng, 8, 14, rng.choice(SUBJECTS if good else OTHERS)),
            "score": rating,
        }
