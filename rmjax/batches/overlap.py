"""Which groups of a set that measures are known from the training data: by their prompts, or by runs of equal tokens.

A token of the measured set counts where it is in a run of RUN tokens which the training data have as well. A group
overlaps where that is LEAST of its tokens, or where its prompt is in the training data (data/prompts.py). Touvron et
al. 2023, arXiv:2307.09288, appendix A.6, look for runs of more than 10 tokens in the same way. Runs that several
prompts of the measured set share are its template or its instructions, and do not count.
"""

import dataclasses

import numpy as np

from rmjax.batches.groups import Groups

RUN = 13  # tokens
RUN_OF_BYTES = 60  # where tokens are bytes
LEAST = 0.5
COMMON = 0.02  # a run in more than this share of the measured prompts, and in more than COMMON_PROMPTS, is a template's
COMMON_PROMPTS = 3
EXAMPLES = 3
_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_BITS = 20  # of a hash, that are looked up in a table first


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What `find` found of n measured groups."""

    prompts: np.ndarray  # bool [n], the prompt is in the training data
    shared_prompts: int  # different ones that are
    all_prompts: int  # different ones
    shares: np.ndarray  # float32 [n], of the tokens that are not a template's, those in runs of equal tokens
    run: int  # tokens of a run
    examples: list[tuple[str, str]]  # rows of training and measured set with equal runs; their prompts differ

    @property
    def groups(self) -> np.ndarray:
        """bool [n], which overlap."""
        return self.prompts | (self.shares >= LEAST)

    def line(self, name: str) -> str:
        """A sentence about the measured set; "" where nothing overlaps."""
        shared, of, more = self.shared_prompts, self.all_prompts, int((self.groups & ~self.prompts).sum())
        runs = f"half of their tokens or more in runs of {self.run} tokens that the training data have, too"
        shown = "; ".join(f"{ours} and {theirs}" for ours, theirs in self.examples)
        example = f" (for example {shown})" if shown else ""
        if shared:
            text = f"{name}: {shared:,} of its {of:,} prompts are in the training data, so its numbers mislead"
            return text + (f"; {more:,} other groups have {runs}{example}" if more else "")
        if not more:
            return ""
        return f"{name}: {more:,} of its {len(self.groups):,} groups have {runs}{example}: its numbers mislead"


def find(train: Groups, measured: Groups, run: int = RUN) -> Overlap:
    """Compares two sets that were tokenized alike.

    Time grows linearly with the tokens of both; memory with those of the measured set, and with a part of the file that
    holds the training data. Runs are compared by 64-bit hashes: a training run is taken for one of a million others
    with a chance of 5e-14.

    Args:
        train: the groups trained on.
        measured: the groups that measure.
        run: tokens in a row that have to be equal.
    """
    own, theirs = train.prompts_beside(measured)
    by_prompt = np.isin(theirs, own)
    tokens, begin = measured.column("tokens")
    hashes, start, group = _runs(tokens, begin, run)
    keys, which = np.unique(hashes, return_inverse=True)
    first = _first_groups(train, keys, run)
    template = _template(which, theirs[group], len(keys))
    covered, ours = (_covered(len(tokens), start[mask[which]], run) for mask in ((first >= 0) & ~template, template))
    of_group = lambda marks: np.diff(np.concatenate([[0], np.cumsum(marks)])[begin])
    shares = of_group(covered & ~ours) / np.maximum(of_group(~ours), 1)
    examples = []
    for index in np.argsort(np.where(by_prompt, 0, -shares), kind="stable")[:EXAMPLES]:
        of_both = which[(group == index) & (first[which] >= 0) & ~template[which]]
        if shares[index] >= LEAST and not by_prompt[index] and len(of_both):
            most = int(np.bincount(first[of_both]).argmax())  # the training group that has most of its runs
            examples.append((train.id(most), measured.id(int(index))))
    distinct = len(np.unique(theirs[by_prompt])), len(np.unique(theirs))
    return Overlap(by_prompt, *distinct, shares.astype(np.float32), run, examples)


def _runs(tokens: np.ndarray, begin: np.ndarray, run: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A hash, uint64, of each `run` tokens in a row of one group, where it starts, and which group's it is."""
    count = max(len(tokens) - run + 1, 0)
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _FACTOR
    mixed ^= mixed >> np.uint64(32)
    hashes = np.zeros(count, np.uint64)
    for j in range(run):  # wraps around at 2^64
        hashes = hashes * _MIX + mixed[j : j + count]
    hashes ^= hashes >> np.uint64(29)
    starts = np.arange(count)
    group = np.searchsorted(begin, starts, side="right") - 1
    inside = starts + run <= begin[group + 1]
    return hashes[inside] * _FACTOR, starts[inside], group[inside]


def _first_groups(train: Groups, keys: np.ndarray, run: int) -> np.ndarray:
    """int64 [keys], the first training group that has each of these runs; -1 where none has. `keys` ascend."""
    first = np.full(len(keys), -1)
    if not len(keys):
        return first
    table, shift = np.zeros(1 << _BITS, bool), np.uint64(64 - _BITS)
    table[keys >> shift] = True
    for tokens, begin, groups in train.token_batches():
        hashes, _, group = _runs(tokens, begin, run)
        likely = np.flatnonzero(table[hashes >> shift])  # most hashes are in no key's neighbourhood
        at = np.minimum(np.searchsorted(keys, hashes[likely]), len(keys) - 1)
        equal = keys[at] == hashes[likely]
        found, where = at[equal], groups[group[likely[equal]]]
        new = first[found] < 0
        first[found[new][::-1]] = where[new][::-1]  # of several the first stays
    return first


def _template(which: np.ndarray, prompt: np.ndarray, keys: int) -> np.ndarray:
    """bool [keys], the runs that several prompts share; `which` key and `prompt` of every run."""
    pairs = np.unique(np.stack([which.astype(np.uint64), prompt.astype(np.uint64)]), axis=1)
    prompts = np.bincount(pairs[0].astype(np.int64), minlength=keys)
    return prompts > max(COMMON_PROMPTS, COMMON * len(np.unique(prompt)))


def _covered(tokens: int, starts: np.ndarray, run: int) -> np.ndarray:
    """bool [tokens], those within a run that starts at one of `starts`."""
    change = np.bincount(starts, minlength=tokens + 1) - np.bincount(starts + run, minlength=tokens + 1)
    return np.cumsum(change)[:tokens] > 0
