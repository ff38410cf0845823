"""Bradley-Terry against torch and against hand-worked cases; sums that add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict

from rmjax import objectives
from rmjax.config import defaults
from rmjax.objectives import sums as sums_lib
from rmjax.objectives.bradley_terry import BradleyTerry, gather_groups


def make_batch(scores_BGK, wins, weight=None, margin=None, ties=None):
    """A batch whose flat scored tokens are the cells of scores_BGK, in a shuffled order."""
    scores = np.asarray(scores_BGK, np.float32)
    b, g, k = scores.shape
    order = np.random.default_rng(0).permutation(g * k)
    batch = {
        "end": np.tile(np.arange(g * k), (b, 1)),
        "end_group": np.tile(order // k, (b, 1)),
        "end_slot": np.tile(order % k, (b, 1)),
        "wins": np.asarray(wins, np.float32),
        "ties": np.zeros((b, g, k, k), np.float32) if ties is None else np.asarray(ties, np.float32),
        "margin": np.zeros((b, g, k, k), np.float32) if margin is None else np.asarray(margin, np.float32),
        "weight": np.ones((b, g), np.float32) if weight is None else np.asarray(weight, np.float32),
    }
    return scores.reshape(b, -1)[:, order][..., None], batch


def pairs(b=3, g=4, seed=0):
    """Random pairs: chosen is response 0."""
    scores = np.random.default_rng(seed).normal(size=(b, g, 2)).astype(np.float32) * 3
    wins = np.zeros((b, g, 2, 2), np.float32)
    wins[..., 0, 1] = 1
    return scores, wins


def loss_of(objective, scores, wins, **kwargs):
    flat, batch = make_batch(scores, wins, **kwargs)
    return sums_lib.ratios(sums_lib.to_host(objective.sums(flat, batch, {})))["loss"]


def test_plain_loss_is_minus_log_sigmoid_of_the_difference():
    scores, wins = pairs()
    expected = -F.logsigmoid(torch.tensor(scores[..., 0] - scores[..., 1])).mean().item()
    assert loss_of(BradleyTerry(), scores, wins) == pytest.approx(expected, abs=1e-6)


def test_margin_is_per_pair_and_scaled():  # NUMERICS 8: (B,1) - (B,) must not broadcast to (B,B)
    scores, wins = pairs()
    margin = np.random.default_rng(1).uniform(0, 2, scores.shape[:2]).astype(np.float32)
    full = np.zeros_like(wins)
    full[..., 0, 1] = margin
    difference = torch.tensor(scores[..., 0] - scores[..., 1] - 0.5 * margin)
    expected = -F.logsigmoid(difference).mean().item()
    assert loss_of(BradleyTerry(margin_scale=0.5), scores, wins, margin=full) == pytest.approx(expected, abs=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    scores, wins = pairs()
    flat, batch = make_batch(scores, wins)
    with pytest.raises(ValueError, match="not \\[B,G,K,K\\]"):
        BradleyTerry().sums(flat, batch | {"margin": batch["margin"][..., 0]}, {})
    with pytest.raises(ValueError, match="must agree"):
        BradleyTerry().sums(flat[:, :-1], batch, {})


def test_soft_labels_and_smoothing_are_binary_cross_entropy():
    scores, wins = pairs()
    p = np.random.default_rng(2).uniform(0, 1, scores.shape[:2]).astype(np.float32)
    wins[..., 0, 1], wins[..., 1, 0] = p, 1 - p
    logits = torch.tensor(scores[..., 0] - scores[..., 1])
    soft = F.binary_cross_entropy_with_logits(logits, torch.tensor(p)).item()
    assert loss_of(BradleyTerry(), scores, wins) == pytest.approx(soft, abs=1e-6)
    smooth = F.binary_cross_entropy_with_logits(logits, torch.tensor(p * 0.8 + 0.1)).item()
    assert loss_of(BradleyTerry(label_smoothing=0.1), scores, wins) == pytest.approx(smooth, abs=1e-6)


def test_centring_adds_the_squared_sum():
    scores, wins = pairs()
    plain = loss_of(BradleyTerry(), scores, wins)
    expected = plain + 0.01 * float(((scores[..., 0] + scores[..., 1]) ** 2).mean())
    assert loss_of(BradleyTerry(center=0.01), scores, wins) == pytest.approx(expected, abs=1e-5)


def test_ties_half_and_skipped():
    scores, wins = pairs()
    wins[0, 0], ties = 0, np.zeros_like(wins)
    ties[0, 0, 0, 1] = ties[0, 0, 1, 0] = 1
    d = torch.tensor(scores[..., 0] - scores[..., 1]).flatten()
    target = torch.ones_like(d)
    target[0] = 0.5
    half = F.binary_cross_entropy_with_logits(d, target).item()
    assert loss_of(BradleyTerry(ties="half"), scores, wins, ties=ties) == pytest.approx(half, abs=1e-6)
    assert loss_of(BradleyTerry(), scores, wins, ties=ties) == pytest.approx(
        -F.logsigmoid(d[1:]).mean().item(), abs=1e-6
    )


def test_groups_of_three_are_their_pairs():
    scores = np.array([[[2.0, 1.0, -1.0]]], np.float32)
    wins = np.zeros((1, 1, 3, 3), np.float32)
    wins[0, 0, 0, 1] = wins[0, 0, 0, 2] = wins[0, 0, 2, 1] = 1
    expected = -F.logsigmoid(torch.tensor([1.0, 3.0, -2.0])).mean().item()
    assert loss_of(BradleyTerry(), scores, wins) == pytest.approx(expected, abs=1e-6)
    flat, batch = make_batch(scores, wins)
    values = BradleyTerry().summary(sums_lib.to_host(BradleyTerry().sums(flat, batch, {})))
    assert values["accuracy"] == pytest.approx(2 / 3) and values["pairs"] == 3
    assert values["margin"] == pytest.approx(2 / 3) and values["tie_rate"] == 0


def test_weights_and_absent_groups():
    scores, wins = pairs(b=1, g=3)
    d = torch.tensor(scores[0, :, 0] - scores[0, :, 1])
    expected = (-F.logsigmoid(d) * torch.tensor([2.0, 0.0, 0.5])).sum().item() / 2.5
    assert loss_of(BradleyTerry(), scores, wins, weight=[[2.0, 0.0, 0.5]]) == pytest.approx(expected, abs=1e-6)


def test_equal_rewards_count_half_and_are_reported():  # NUMERICS 5
    scores = np.array([[[1.0, 1.0], [2.0, 1.0]]], np.float32)
    wins = np.zeros((1, 2, 2, 2), np.float32)
    wins[..., 0, 1] = 1
    flat, batch = make_batch(scores, wins)
    values = BradleyTerry().summary(sums_lib.to_host(BradleyTerry().sums(flat, batch, {})))
    assert values["accuracy"] == 0.75 and values["tie_rate"] == 0.5


def test_reward_statistics():  # NUMERICS 20
    scores, wins = pairs()
    flat, batch = make_batch(scores, wins)
    values = BradleyTerry().summary(sums_lib.to_host(BradleyTerry().sums(flat, batch, {})))
    assert values["reward_mean"] == pytest.approx(scores.mean(), abs=1e-5)
    assert values["reward_std"] == pytest.approx(scores.std(), abs=1e-5)
    assert values["reward_max"] == scores.max() and values["reward_min"] == scores.min()


@pytest.mark.parametrize("difference", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_loss_and_gradient_are_finite_for_any_difference(difference):  # NUMERICS 10
    flat, batch = make_batch([[[difference, 0.0]]], [[[[0, 1], [0, 0]]]])
    value, gradient = jax.value_and_grad(lambda s: BradleyTerry().sums(s, batch, {})["loss"][0])(jnp.asarray(flat))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert value == pytest.approx(F.softplus(torch.tensor(-difference, dtype=torch.float64)).item(), rel=1e-6)


def test_absent_ends_reach_no_group_and_get_no_gradient():
    scores = jnp.arange(4.0)[None]
    group, slot = jnp.array([[0, -1, 0, -1]]), jnp.array([[1, -1, 0, -1]])
    assert gather_groups(scores, group, slot, (2, 2)).tolist() == [[[2.0, 0.0], [0.0, 0.0]]]
    gradient = jax.grad(lambda s: gather_groups(s, group, slot, (2, 2)).sum())(scores)
    assert gradient.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_sums_add_over_any_split():  # NUMERICS 9 and 18: no mean of means
    scores, wins = pairs(b=6)
    weight = np.random.default_rng(3).uniform(0, 2, (6, 4)).astype(np.float32)
    flat, batch = make_batch(scores, wins, weight=weight)
    whole = sums_lib.to_host(BradleyTerry().sums(flat, batch, {}))
    total = {}
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = sums_lib.to_host(BradleyTerry().sums(flat[rows], {name: x[rows] for name, x in batch.items()}, {}))
        total = sums_lib.add(total, part) if total else part
    for name, value in sums_lib.ratios(whole).items():
        assert sums_lib.ratios(total)[name] == pytest.approx(value, rel=1e-6), name


def test_what_was_not_measured_is_left_out():
    flat, batch = make_batch(*pairs(b=1), weight=np.zeros((1, 4)))
    values = sums_lib.ratios(sums_lib.to_host(BradleyTerry().sums(flat, batch, {})))
    assert "loss" not in values and "accuracy" not in values and values["pairs_count"] == 0
    with pytest.raises(ValueError, match="different names"):
        sums_lib.add({"a": np.zeros(2)}, {"b": np.zeros(2)})


def test_made_from_the_config():
    config = defaults().objective
    config.center = 0.5
    assert objectives.make(config) == BradleyTerry(center=0.5)
    with pytest.raises(ValueError, match="'dpo' is unknown; there is bradley_terry"):
        objectives.make(ConfigDict({"name": "dpo"}))
