"""Token trees: what each scored token sees is exactly its own sequence."""

import doctest

import numpy as np
import pytest

from rmjax.batches import trees


def sequences(rng, k, depth):
    """K sequences that branch off each other up to `depth` times."""
    made = [rng.integers(0, 4, rng.integers(1, 8)).tolist()]
    while len(made) < k:
        base = made[rng.integers(0, len(made))] if depth > 1 else made[0]
        made.append(base[: rng.integers(0, len(base) + 1)] + rng.integers(0, 4, rng.integers(1, 6)).tolist())
    return made


def test_docstring():
    assert doctest.testmod(trees).failed == 0


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_paths_targets_and_leaves(k, depth):
    rng = np.random.default_rng((k, depth))
    for _ in range(50):
        given = sequences(rng, k, depth)
        tree = trees.build_tree(given)
        assert [s.tolist() for s in tree.sequences()] == given
        assert len(set(tree.end.tolist())) == k  # a last token of its own
        index = np.arange(len(tree))
        for end, sequence in zip(tree.end, given):
            path = index[(index <= end) & (end < tree.visible_until)]
            assert tree.positions[path].tolist() == list(range(len(sequence)))
            for at, following in zip(path, sequence[1:]):  # every next-token target stands at the next index
                assert tree.tokens[at + 1] == following
        assert len(tree) <= sum(map(len, given))


def test_shared_tokens_are_laid_once_but_one():
    tree = trees.build_tree([[7] * 100 + [1, 2], [7] * 100 + [3]])
    assert len(tree) == 99 + 3 + 2


def test_one_sequence_a_prefix_of_another_and_equal_ones():
    assert trees.build_tree([[1, 2], [1, 2, 3], [1, 2]]).end.tolist() == [1, 3, 4]


def test_empty_is_refused():
    with pytest.raises(ValueError, match=r"lengths \[2, 0\]"):
        trees.build_tree([[1, 2], []])


def test_a_long_conversation_scored_at_every_turn_is_one_tree():
    """Each of 1,200 sequences goes on from the one before: a trie as deep as there are sequences."""
    whole = np.arange(2_400, dtype=np.int32) % 97
    sequences = [whole[: 2 * k + 2] for k in range(1_200)]
    tree = trees.build_tree(sequences)
    # Each but the longest ends in a last token of its own, and the node before it is split there.
    assert len(tree) == len(whole) + len(sequences) - 1
    for k in (0, 1, 599, 1_199):
        np.testing.assert_array_equal(tree.tokens[tree.path(int(tree.end[k]))], sequences[k])
    assert len(set(tree.end.tolist())) == len(sequences)
