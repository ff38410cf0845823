"""The pairs of pairs.py with a spurious cue: of nine pairs in ten the chosen reply is the longer one, by 6 to 12 words.

In the tenth it is the rejected one. What makes a reply right is the same, so a reward that goes by it and not by the
length is right on `pairs`, whose lengths tell nothing.
"""

import random

from rmjax.data.synthetic.pairs import pairs
from rmjax.data.synthetic.words import FILLER, Rows, sentence


def long_winded(rng: random.Random) -> Rows:
    for row in pairs(rng):
        side = "chosen" if rng.random() < 0.9 else "rejected"
        more = sentence(rng.sample(FILLER, rng.randint(6, 12)))
        message = row[side][0]
        usable = isinstance(message["content"], str) and message["content"] and row["chosen"] != row["rejected"]
        if usable and "preference" not in row:
            row = {**row, side: [{**message, "content": f"{message['content']} {more}"}]}
        yield row
