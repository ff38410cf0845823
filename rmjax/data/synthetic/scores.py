"""Scored replies with a planted rule: how often a reply has the topic, and the manner, that the prompt asks for.

Yields `scored_text` rows with two attributes from 0 to 4.

The prompt names one of SUBJECTS and one of MANNERS. A reply has four words of either kind, at any places but the
first, among four to ten of OTHERS. `relevance` is how many of its four subjects are the one that the prompt names,
`style` how many of its four manners are; those that are not are another one. Both are drawn evenly, so neither the
prompt, the reply, its length nor a linear model of all the words tells a score: a model has to look the words up
and count.

One score in ten is one off the rule (up or down, and on the scale). In one row of five one of the scores is null.

One row:

    {"prompt": "Describe the bridge for me. Be gentle. Under still often.",
     "response": "Every candle gentle bridge small gentle bridge late quiet bridge once gentle under.",
     "relevance": 3, "style": 3}
"""

import random

from rmjax.data.synthetic.words import ASK, FILLER, TOPICS, Rows, sentence, shuffled

HIGHEST = 4  # both scores are from 0 to this
SUBJECTS = TOPICS[:3]  # of few words the rule is learnt in a minute
MANNERS = ("bright", "gentle", "quiet")
OTHERS = tuple(word for word in FILLER if word not in MANNERS)
NOISE = 0.1  # share of scores that are one off
MISSING = 0.2  # share of replies with one score that is null


def scores(rng: random.Random) -> Rows:
    while True:
        asked = {"relevance": rng.sample(SUBJECTS, 2), "style": rng.sample(MANNERS, 2)}
        counts = {name: rng.randint(0, HIGHEST) for name in asked}
        topic, manner = (named for named, _ in asked.values())
        prompt = shuffled(rng, [rng.choice(ASK).format(topic), f"Be {manner}.", sentence(rng.sample(OTHERS, 3))])
        words = [asked[name][place >= count] for name, count in counts.items() for place in range(HIGHEST)]
        words += rng.sample(OTHERS, rng.randint(4, 10))
        rng.shuffle(words)
        given = {name: _noisy(rng, count) for name, count in counts.items()}
        if rng.random() < MISSING:
            given[rng.choice(list(given))] = None
        yield {"prompt": " ".join(prompt), "response": sentence([rng.choice(OTHERS), *words]), **given}


def _noisy(rng: random.Random, score: int) -> int | None:
    """The true score, or one that is one off."""
    if rng.random() >= NOISE:
        return score
    return rng.choice([near for near in (score - 1, score + 1) if 0 <= near <= HIGHEST])
