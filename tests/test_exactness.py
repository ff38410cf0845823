"""The one idea is exact: a score does not depend on what else is in its row, nor does a gradient. NUMERICS 3."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax.batches import loader
from rmjax.batches.groups import Group
from rmjax.batches.trees import build_tree
from rmjax.models import config as model_config
from rmjax.models import heads

ROW = 160
VALUES = {
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral", "sliding_window": 9},  # shorter than most paths
}


def values(family):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4} | VALUES[family]


@pytest.fixture(scope="module", params=list(VALUES))
def scorer(request):
    """Parameters far from their initial values, and the jitted scores of a batch."""
    config = model_config.from_hf(values(request.param))
    graph, _ = heads.abstract(config, 1)
    rng = np.random.default_rng(0)
    noisy = lambda x: x + jnp.asarray(rng.normal(0, 0.15, x.shape), x.dtype)
    params = jax.tree.map(noisy, heads.init(config, 1, seed=0))
    return params, jax.jit(lambda p, b: heads.merge(graph, p)(b)[..., 0])


def branching(rng, k, depth):
    """K sequences that branch off each other, the last `depth` - 1 levels off an earlier branch."""
    made = [rng.integers(0, 61, rng.integers(6, 20)).tolist()]
    while len(made) < k:
        base = made[rng.integers(0, len(made))] if depth > 1 else made[0]
        made.append(base[: rng.integers(1, len(base))] + rng.integers(0, 61, rng.integers(1, 12)).tolist())
    return made


def batch_of(trees, tokens=ROW, ends=24):
    """One row of trees."""
    shape = loader.Shape(1, 1, tokens, 16, ends, 5)
    batch = loader.empty_rows(shape, 1)
    groups = [Group(t, {}, 1.0, "") for t in trees]
    loader.fill_row(batch, 0, groups)
    return batch


def by_response(batch, scores):
    """{(group, response): score}."""
    here = batch["end"][0] >= 0
    keys = zip(batch["end_group"][0][here].tolist(), batch["end_slot"][0][here].tolist())
    return dict(zip(keys, np.asarray(scores)[0][here].tolist(), strict=True))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_score_alone_equals_score_in_any_row(scorer, k, depth):
    params, forward = scorer
    rng = np.random.default_rng((k, depth))
    given = branching(rng, k, depth)
    tree = build_tree(given)
    alone = []
    for sequence in given:
        batch = batch_of([build_tree([sequence])])
        alone.append(by_response(batch, forward(params, batch))[0, 0])
    others = [build_tree(branching(rng, 2, 1)) for _ in range(2)]
    for order in ([tree, *others], [others[0], tree, others[1]], [*others, tree], [tree]):
        batch = batch_of(order)
        at = order.index(tree)
        scores = by_response(batch, forward(params, batch))
        assert np.allclose([scores[at, i] for i in range(k)], alone, atol=1e-5, rtol=0)


def test_a_tree_that_ends_on_the_last_token_of_the_row(scorer):
    params, forward = scorer
    rng = np.random.default_rng(5)
    tree = build_tree(branching(rng, 3, 2))
    filler = build_tree([rng.integers(0, 61, ROW - len(tree)).tolist()])
    batch = batch_of([filler, tree])
    assert batch["end"].max() == ROW - 1
    alone = batch_of([tree])
    packed, single = (by_response(b, forward(params, b)) for b in (batch, alone))
    assert np.allclose([packed[1, i] for i in range(3)], [single[0, i] for i in range(3)], atol=1e-5, rtol=0)


def test_neighbours_and_padding_do_not_matter(scorer):
    params, forward = scorer
    rng = np.random.default_rng(6)
    trees = [build_tree(branching(rng, 2, 1)) for _ in range(3)]
    batch = batch_of(trees)
    reference = by_response(batch, forward(params, batch))
    mine = slice(len(trees[0]), len(trees[0]) + len(trees[1]))
    for _ in range(3):
        other = {name: x.copy() for name, x in batch.items()}
        random = rng.integers(0, 61, ROW)
        random[mine] = batch["tokens"][0][mine]
        other["tokens"][0] = random  # the neighbours' tokens and the padding's
        scores = by_response(other, forward(params, other))
        assert np.allclose([scores[1, i] for i in (0, 1)], [reference[1, i] for i in (0, 1)], atol=1e-5, rtol=0)


def test_a_branch_does_not_see_the_other_branch(scorer):
    params, forward = scorer
    prompt = list(range(10))
    scores = []
    for other in ([11, 12, 13], [44, 3, 7, 9, 60], [1]):
        batch = batch_of([build_tree([[*prompt, 20, 21, 22], [*prompt, *other]])])
        scores.append(by_response(batch, forward(params, batch))[0, 0])
    assert np.ptp(scores) < 1e-5


@pytest.mark.parametrize("k,depth", [(2, 1), (4, 2), (5, 3)])
def test_gradients_of_shared_nodes_are_the_sum_over_conversations(scorer, k, depth):
    params, forward = scorer
    rng = np.random.default_rng((k, depth, 1))
    given = branching(rng, k, depth)
    weights = rng.normal(size=k)

    def packed(p):
        batch = batch_of([build_tree(branching(np.random.default_rng(3), 2, 1)), build_tree(given)])
        use = np.where(batch["end_group"] == 1, weights[np.maximum(batch["end_slot"], 0) % k], 0.0)
        return (forward(p, batch) * use).sum()

    def alone(p):
        return sum(w * forward(p, batch_of([build_tree([s])]))[0, 0] for w, s in zip(weights, given))

    ours, reference = jax.grad(packed)(params), jax.grad(alone)(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(b).max(), 1e-3)


def test_dropout_in_a_base_config_is_ignored():  # NUMERICS 12
    plain = model_config.from_hf(values("qwen2"))
    dropped = model_config.from_hf(values("qwen2") | {"attention_dropout": 0.5, "hidden_dropout": 0.5})
    assert dataclasses.asdict(plain) == dataclasses.asdict(dropped)
