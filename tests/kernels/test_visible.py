"""The lists of blocks against the mask itself, written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_tree_attention import rows_of_trees

from rmjax.kernels.visible import NO_WINDOW, visible


def demanded(seen_BTT, block):
    """bool [B, X, X] twice: blocks of which some query sees some key, and every query every key."""
    b, t, _ = seen_BTT.shape
    cut = seen_BTT.reshape(b, t // block, block, t // block, block)
    return cut.any((2, 4)), cut.all((2, 4))


def listed(visits, b, x):
    """The blocks of one list, those without a mask first."""
    order, whole, total = (np.asarray(y)[b, x] for y in visits)
    assert (order[total:] == order[total - 1]).all()  # a copy made ahead copies nothing new
    return order[:whole].tolist(), order[whole:total].tolist()


@pytest.mark.parametrize("window", [None, 1, 2, 9, 33, NO_WINDOW])
@pytest.mark.parametrize("block", [4, 16, 32])
def test_blocks_are_those_that_the_mask_demands(block, window):
    rng = np.random.default_rng(block)
    for length in (128, 160):
        spans, seen_BTT = rows_of_trees(rng, length)
        positions = np.asarray(spans[2])
        if window is not None:
            seen_BTT = seen_BTT & (positions[:, :, None] - positions[:, None] < window)
        found = visible(*spans, window if window is None else jnp.int32(window), block=block)
        some, every = demanded(seen_BTT, block)
        for b in range(len(some)):
            for x in range(length // block):
                for visits, one, all_of in ((found.by_query, some, every), (found.by_key, some.mT, every.mT)):
                    whole, rest = listed(visits, b, x)
                    assert sorted(whole + rest) == np.flatnonzero(one[b, x]).tolist()
                    assert sorted(whole) == whole and sorted(rest) == rest
                    if window is None:
                        assert whole == np.flatnonzero(all_of[b, x]).tolist()
                    else:  # judged by the extremes of both blocks, so some that need no mask get one
                        assert set(whole) <= set(np.flatnonzero(all_of[b, x]))
                assert listed(found.by_query, b, x)[1][-1] == x


def test_rows_are_padded_to_whole_blocks():
    spans, _ = rows_of_trees(np.random.default_rng(0), 50)
    found = visible(*spans, block=16)
    assert found.first.shape == (3, 64)
    np.testing.assert_array_equal(found.first[:, 50:], np.broadcast_to(np.arange(50, 64), (3, 14)))
    np.testing.assert_array_equal(found.until[:, 50:], np.broadcast_to(np.arange(51, 65), (3, 14)))
    assert np.asarray(found.by_query.total)[2].tolist() == [1, 1, 1, 1]  # a row of padding: the diagonal


def test_spans_of_different_shapes_are_named():
    index = jnp.arange(8)[None]
    with pytest.raises(ValueError, match=r"visible_until has shape \(1, 7\), expected \[B, T\] = \(1, 8\)"):
        visible(index, index[:, 1:], index, block=4)
