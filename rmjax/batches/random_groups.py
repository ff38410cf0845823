"""Pairs and rankings of random tokens whose lengths follow a file, for measurements that need no data.

A file of lengths is a JSON list of [prompt, chosen, rejected] in tokens. Two come with the package (lengths/):

    hh      2,307 short pairs: prompts of 125 tokens, responses of 41 and 51 on average
    long    4,000 pairs shaped like today's preference sets: 324, 463 and 418
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rmjax.batches.groups import Group
from rmjax.batches.tasks import Axes, Preferences
from rmjax.batches.trees import build_tree

FILES = Path(__file__).parent / "lengths"


def read_lengths(name: str) -> np.ndarray:
    """The lengths of a file, or of the packaged `hh` or `long`: int64 [n, 3], each above 0."""
    packaged = sorted(path.stem for path in FILES.glob("*.json"))
    path = FILES / f"{name}.json" if name in packaged else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"--lengths={name}: there is no such file; give one, or {' or '.join(packaged)}")
    expected = "expected a JSON list of [prompt, chosen, rejected] in tokens"
    try:
        rows = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--lengths={name} is not JSON ({error}); {expected}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--lengths={name} holds {type(rows).__name__} without rows; {expected}")
    for i, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 3 and all(type(n) is int and n > 0 for n in row)):
            raise ValueError(f"--lengths={name}: row {i} is {json.dumps(row)[:80]}; {expected}, each above 0")
    return np.array(rows, np.int64)


def visible_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of a query and a key that it sees in sequences of these lengths: 1 + 2 + ... + n, each at most `window`."""
    band = lengths if window is None else np.minimum(lengths, window)
    return band * (band + 1) // 2 + (lengths - band) * band


class RandomGroups:
    """n groups of K responses, each preferred to all that follow; a source as `batches/groups.py` has.

    A group is drawn when it is asked for, the same whenever it is. Its responses differ from their first token on.

    Attributes:
        sizes: int64 [n, 1 + K] tokens of the prompt and of each response; of a pair [prompt, chosen, rejected].
        lengths: int64 [n] tokens of each tree: one more than a pair's sizes, since the last token of the prompt is in
            every branch (batches/trees.py).
    """

    fields: Mapping[str, Axes] = Preferences().fields
    sources = ("random",)

    def __init__(self, sizes: np.ndarray, vocabulary: int, seed: int = 0):
        self.sizes, self._vocabulary, self._seed = sizes, vocabulary, seed
        responses = sizes.shape[1] - 1
        self.lengths = sizes.sum(1) + responses - 1
        self.conversations = sizes[:, :1] + sizes[:, 1:]
        self.unshared = self.conversations.sum(1)
        self.source = np.zeros(len(sizes), np.int32)
        self.ends = self.responses = np.full(len(sizes), responses)

    def __len__(self) -> int:
        return len(self.sizes)

    def visible_pairs(self, window: int | None) -> np.ndarray:
        """int64 [n] pairs of a query and a key that it sees: those of all conversations, the shared ones once."""
        every = visible_pairs(self.conversations, window).sum(1)
        return every - (self.sizes.shape[1] - 2) * visible_pairs(self.sizes[:, 0] - 1, window)

    def group(self, index: int) -> Group:
        prompt, *responses = self.sizes[index].tolist()
        rng = np.random.default_rng((self._seed, index))
        tokens = rng.integers(0, self._vocabulary, prompt + sum(responses), np.int32)
        shared, *drawn = np.split(tokens, prompt + np.cumsum([0, *responses[:-1]]))
        for number, response in enumerate(drawn):
            response[0] = (drawn[0][0] + number) % self._vocabulary
        wins = np.triu(np.ones((len(drawn), len(drawn)), np.float32), 1)
        labels = {"wins": wins, "ties": np.zeros_like(wins), "margin": np.where(wins, np.float32(np.nan), wins)}
        return Group(build_tree([np.concatenate([shared, x]) for x in drawn]), labels, 1.0, self.id(index))

    def id(self, index: int) -> str:
        return f"random:{index}"
