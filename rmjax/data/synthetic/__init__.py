"""Data that is made, not read: rows with a planted rule, and a tokenizer for them.

For the demos and the tests: no network, no files, a known right answer. One file and one row of GENERATORS each; a
generator yields rows without end.
"""

import itertools
import random
from collections.abc import Callable

from rmjax.data.synthetic.long_winded import long_winded
from rmjax.data.synthetic.pairs import pairs
from rmjax.data.synthetic.rankings import rankings
from rmjax.data.synthetic.ratings import favourites, ratings
from rmjax.data.synthetic.scores import scores
from rmjax.data.synthetic.steps import steps
from rmjax.data.synthetic.tokenizer import CHAT_TEMPLATE, VOCABULARY, make_tokenizer
from rmjax.data.synthetic.verdicts import verdicts
from rmjax.data.synthetic.words import FILLER, TOPICS, Rows

__all__ = ["CHAT_TEMPLATE", "FILLER", "GENERATORS", "OPTIONS", "TOPICS", "VOCABULARY", "make_tokenizer", "rows"]

GENERATORS: dict[str, Callable[[random.Random], Rows]] = {
    generator.__name__: generator
    for generator in (favourites, long_winded, pairs, rankings, ratings, scores, steps, verdicts)
}
VERSION = 1  # of the rows: any change of them needs another, so that runs and caches know that their data changed
OPTIONS: dict[str, int | str] = {"n": 1000, "seed": 0}  # of every generator, and what they are unless given


def rows(name: str, **kwargs: int | str) -> Rows:
    """Yields the rows that a `synthetic://NAME?n=...&seed=...` source stands for.

    The rows depend on the name, `n` and `seed` only (see OPTIONS): every process sees the same, and fewer rows are a
    prefix of more.

    Raises:
        ValueError: by the call itself, on an unknown name or option, or one that is not a whole number >= 0.
    """
    if name not in GENERATORS:
        raise ValueError(f"unknown synthetic data {name!r}; known: {', '.join(GENERATORS)}")
    if unknown := sorted(kwargs.keys() - OPTIONS.keys()):
        raise ValueError(f"synthetic data {name!r} has no option {unknown[0]!r}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | kwargs
    for option, value in options.items():
        if not str(value).isdecimal():
            raise ValueError(f"synthetic data {name!r}: {option} must be a whole number >= 0, got {value!r}")
    # A text as seed is hashed with SHA-512, whatever PYTHONHASHSEED is.
    rng = random.Random(f"{name}/{int(options['seed'])}")
    return itertools.islice(GENERATORS[name](rng), int(options["n"]))
