"""Chains of steps with a planted rule: every step keeps to the two things that the prompt names.

Yields `stepwise` rows: `completions` is a chain of 3 to 5 steps, `labels` says which are right.

The prompt names two of the four THINGS, and every step has one among three to six words of FILLER. A step is wrong
if its thing is neither of the two, or if a step before it is wrong, as nothing right follows from that. Half of the
chains have no wrong step; in the others the first one is as likely at any place, and each step after it has a thing
of the prompt in half of the cases. Things are as often in right steps as in wrong ones, so a linear model of the
words tells nothing: a model has to look the thing up in the prompt, and to find out what went wrong before. The
chain alone tells some (a third thing is wrong), as solutions do.

One chain in 25 is labelled as if its first wrong step were another one, or as if it had one, or none.

One row:

    {"prompt": "Tell me about the bridge and the candle. Green still often.",
     "completions": ["Soft candle every small.", "Quiet engine once under warm.", "Early bridge often deep."],
     "labels": [True, False, False]}
"""

import random

from rmjax.data.synthetic.words import FILLER, TOPICS, Rows, question, sentence

THINGS = TOPICS[:4]  # of few words the rule is learnt in a minute
STEPS = (3, 5)  # fewest and most steps of a chain
NOISE = 0.04  # share of chains that are labelled as if they went wrong elsewhere


def steps(rng: random.Random) -> Rows:
    while True:
        things = rng.sample(THINGS, len(THINGS))
        named, others = things[:2], things[2:]
        count = rng.randint(*STEPS)
        first_wrong = count if rng.random() < 0.5 else rng.randrange(count)
        right = [place < first_wrong or (place > first_wrong and rng.random() < 0.5) for place in range(count)]
        claimed = first_wrong
        if rng.random() < NOISE:
            claimed = rng.choice([place for place in range(count + 1) if place != first_wrong])
        yield {
            "prompt": question(rng, " and the ".join(named)),
            "completions": [_step(rng, rng.choice(named if good else others)) for good in right],
            "labels": [place < claimed for place in range(count)],
        }


def _step(rng: random.Random, thing: str) -> str:
    """Three to six words of FILLER and, after the first, the thing."""
    words = rng.sample(FILLER, rng.randint(3, 6))
    words.insert(rng.randint(1, len(words)), thing)
    return sentence(words)
