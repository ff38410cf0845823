"""The bootstrap of score heads that stand on one model: how often each of them counts a group.

Models of an ensemble differ by their first weights and by the order of their data. Heads on one trunk read the same
batches in the same order, so what sets them apart is what each counts: every head learns from a resample of the groups
of its own (bootstrapped heads: Osband et al. 2016, arXiv:1602.04621; ensembles of reward models: Coste et al. 2023,
arXiv:2310.02743). Drawn with replacement, a group is there about Poisson(1) times (Oza and Russell 2001), so that is
its weight: 0 for 37 % of the groups, 1 on average.

A weight is a hash of the run's seed, the head and the group's conversations, nothing else: neither the step, the row,
the file nor the number of heads changes it. So a group has the same weight in every epoch, and so have its copies with
the responses in another order, or twice in the data.
"""

import dataclasses
import math

import numpy as np

from rmjax.batches.groups import Group, Groups

FIELD = "bootstrap"  # of a batch: float32 [B, G, M]
_MOST = 20  # of a weight; P(more) is 2e-20
_CUMULATED = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(_MOST)])  # of Poisson(1)


def weights(groups: np.ndarray, heads: int, seed: int) -> np.ndarray:
    """How often each of M heads counts each group: float32 [n, M], Poisson(1).

    Args:
        groups: uint64 [n], hashes of them.
    """
    stream = _mixed(_mixed(np.array([seed], np.uint64)) + np.arange(heads, dtype=np.uint64))
    share = (_mixed(groups.astype(np.uint64)[:, None] ^ stream) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    return np.searchsorted(_CUMULATED, share, side="right").astype(np.float32)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step and finalizer: Steele et al. 2014, Fast splittable pseudorandom number generators."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Resampled(Groups):
    """Groups with a further label field, `bootstrap` [G, M]; what is selected from them is without it."""

    def __init__(self, groups: Groups, heads: int, seed: int):
        self.__dict__.update(vars(groups))
        self.fields = {**groups.fields, FIELD: ("G", heads)}
        self._heads, self._seed = heads, seed

    def group(self, index: int) -> Group:
        group = super().group(index)
        counted = weights(self.response_sets[[index]], self._heads, self._seed)[0]
        return dataclasses.replace(group, labels={**group.labels, FIELD: counted})
