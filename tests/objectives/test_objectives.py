"""Bradley-Terry against torch, published fits and hand-worked cases; sums that add. Rankings: test_likelihoods.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up_answers import metrics_of, sums_of
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


def values_of(objective, scores, wins, params=None, **kwargs):
    return metrics_of(objective, *make_batch(scores, wins, **kwargs), params)


def loss_of(objective, scores, wins, **kwargs):
    return values_of(objective, scores, wins, **kwargs)["loss"]


def test_plain_loss_is_minus_log_sigmoid_of_the_difference():
    import torch
    import torch.nn.functional as F

    scores, wins = pairs()
    expected = -F.logsigmoid(torch.tensor(scores[..., 0] - scores[..., 1])).mean().item()
    assert loss_of(BradleyTerry(), scores, wins) == pytest.approx(expected, abs=1e-6)


def test_margin_is_per_pair_and_scaled():  # NUMERICS 8: (B,1) - (B,) must not broadcast to (B,B)
    import torch
    import torch.nn.functional as F

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
        BradleyTerry().loss_sums(flat, batch | {"margin": batch["margin"][..., 0]}, {})
    with pytest.raises(ValueError, match="must agree"):
        BradleyTerry().loss_sums(flat[:, :-1], batch, {})


def test_soft_labels_and_smoothing_are_binary_cross_entropy():
    import torch
    import torch.nn.functional as F

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
    import torch
    import torch.nn.functional as F

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
    import torch
    import torch.nn.functional as F

    scores = np.array([[[2.0, 1.0, -1.0]]], np.float32)
    wins = np.zeros((1, 1, 3, 3), np.float32)
    wins[0, 0, 0, 1] = wins[0, 0, 0, 2] = wins[0, 0, 2, 1] = 1
    expected = -F.logsigmoid(torch.tensor([1.0, 3.0, -2.0])).mean().item()
    assert loss_of(BradleyTerry(), scores, wins) == pytest.approx(expected, abs=1e-6)
    values = values_of(BradleyTerry(), scores, wins)
    assert values["accuracy"] == pytest.approx(2 / 3) and values["pairs"] == 3
    assert values["margin"] == pytest.approx(2 / 3) and values["tie_rate"] == 0


def test_weights_and_absent_groups():
    import torch
    import torch.nn.functional as F

    scores, wins = pairs(b=1, g=3)
    d = torch.tensor(scores[0, :, 0] - scores[0, :, 1])
    expected = (-F.logsigmoid(d) * torch.tensor([2.0, 0.0, 0.5])).sum().item() / 2.5
    assert loss_of(BradleyTerry(), scores, wins, weight=[[2.0, 0.0, 0.5]]) == pytest.approx(expected, abs=1e-6)


def test_equal_rewards_count_half_and_are_reported():  # NUMERICS 5
    scores = np.array([[[1.0, 1.0], [2.0, 1.0]]], np.float32)
    wins = np.zeros((1, 2, 2, 2), np.float32)
    wins[..., 0, 1] = 1
    values = values_of(BradleyTerry(), scores, wins)
    assert values["accuracy"] == 0.75 and values["tie_rate"] == 0.5


def test_reward_statistics():  # NUMERICS 20
    scores, wins = pairs()
    values = values_of(BradleyTerry(), scores, wins)
    assert values["reward_mean"] == pytest.approx(scores.mean(), abs=1e-5)
    assert values["reward_std"] == pytest.approx(scores.std(), abs=1e-5)
    assert values["reward_max"] == scores.max() and values["reward_min"] == scores.min()


def test_loss_and_gradient_are_finite_for_any_difference():  # NUMERICS 10
    import torch
    import torch.nn.functional as F

    both = jax.jit(jax.value_and_grad(lambda flat, batch: BradleyTerry().loss_sums(flat, batch, {})[0]))
    for difference in (-1e4, -90.0, 0.0, 90.0, 1e4):
        value, gradient = both(*make_batch([[[difference, 0.0]]], [[[[0, 1], [0, 0]]]]))
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
    whole = sums_of(BradleyTerry(), flat, batch)
    total = {}
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = sums_of(BradleyTerry(), flat[rows], {n: x[rows] for n, x in batch.items()})
        total = sums_lib.add(total, part) if total else part
    for name, value in sums_lib.ratios(whole).items():
        assert sums_lib.ratios(total)[name] == pytest.approx(value, rel=1e-6), name


def test_what_was_not_measured_is_left_out():
    flat, batch = make_batch(*pairs(b=1), weight=np.zeros((1, 4)))
    values = sums_lib.ratios(sums_of(BradleyTerry(), flat, batch))
    assert "loss" not in values and "accuracy" not in values and values["pairs_count"] == 0
    with pytest.raises(ValueError, match="different names"):
        sums_lib.add({"a": np.zeros(2)}, {"b": np.zeros(2)})


def test_made_from_the_config():
    config = defaults().objective
    config.center = 0.5
    assert objectives.make(config) == BradleyTerry(center=0.5)
    with pytest.raises(ValueError, match="'dpo' is unknown; there is bradley_terry"):
        objectives.make(ConfigDict({"name": "dpo"}))


# Variants of the loss


def pairs_with_ties(b=3, g=4, seed=4):
    """Random pairs of which a third are ties; wins, ties and margins [B, G, 2, 2]."""
    rng = np.random.default_rng(seed)
    scores, wins = pairs(b, g, seed)
    tied = rng.uniform(size=(b, g)) < 1 / 3
    ties = np.zeros_like(wins)
    wins[tied], ties[tied] = 0, [[0, 1], [1, 0]]
    margin = wins * rng.integers(1, 4, size=(b, g, 1, 1)).astype(np.float32)
    return scores, wins, ties, margin


def rankings_of_four(b=2, g=3, seed=5):
    """Random rankings of four with ties and margins; one response in six is not ranked."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(b, g, 4)).astype(np.float32) * 2
    rank = np.where(rng.uniform(size=scores.shape) < 1 / 6, np.nan, rng.integers(0, 3, size=scores.shape))
    wins = (rank[..., :, None] < rank[..., None, :]).astype(np.float32)
    ties = ((rank[..., :, None] == rank[..., None, :]) & ~np.eye(4, dtype=bool)).astype(np.float32)
    return scores, wins, ties, wins * rng.integers(1, 4, size=wins.shape).astype(np.float32)


def test_scaled_multiplies_the_loss_of_a_pair_by_its_strength():
    import torch
    import torch.nn.functional as F

    scores, wins, ties, margin = pairs_with_ties()
    at = np.argwhere(wins[..., 0, 1] > 0)
    (*unknown,), (*nothing,) = at[0], at[1]
    margin[*unknown, 0, 1], margin[*nothing, 0, 1] = np.nan, 0  # not known: counts once; stated: no weight in the loss
    won = torch.tensor(wins[..., 0, 1] > 0)
    strength = torch.tensor(np.nan_to_num(margin[..., 0, 1], nan=1.0))
    assert strength[*nothing] == 0 and strength[*unknown] == 1
    loss = -strength * F.logsigmoid(torch.tensor(scores[..., 0] - scores[..., 1]))
    expected = loss[won].mean().item()
    assert loss_of(BradleyTerry(scaled=True), scores, wins, ties=ties, margin=margin) == pytest.approx(expected, 1e-6)
    half = BradleyTerry(scaled=True, ties="half")  # a tie counts once
    flat, batch = make_batch(scores, wins, ties=ties, margin=margin)
    even = (np.logaddexp(0, d := scores[..., 0] - scores[..., 1]) + np.logaddexp(0, -d)) / 2
    summed = loss[won].sum().item() + even[~won.numpy()].sum()
    assert sums_of(half, flat, batch, {})["loss"][0] == pytest.approx(summed, 1e-5)
    asked = loss_of(BradleyTerry(margin_scale=0.5), scores, wins, ties=ties, margin=margin)
    assert asked == loss_of(BradleyTerry(margin_scale=0.5), scores, wins, ties=ties, margin=np.nan_to_num(margin))
    swapped = [x[..., ::-1, ::-1] for x in (wins, ties, margin)]  # the strength belongs to the pair, not to a side
    flipped = loss_of(BradleyTerry(scaled=True), scores[..., ::-1], swapped[0], ties=swapped[1], margin=swapped[2])
    assert flipped == pytest.approx(expected, 1e-6)


def test_a_smoothed_label_is_a_soft_one_with_and_without_a_margin():
    scores, wins, _, margin = pairs_with_ties()
    soft = 0.9 * wins + 0.1 * np.swapaxes(wins, -1, -2)
    for kwargs in ({}, {"margin_scale": 0.5}, {"scaled": True}, {"focal": 2.0}):
        smoothed = loss_of(BradleyTerry(label_smoothing=0.1, **kwargs), scores, wins, margin=margin)
        assert loss_of(BradleyTerry(**kwargs), scores, soft, margin=margin) == pytest.approx(smoothed, rel=1e-5)


def test_focal_and_barrier_as_published():  # Cai et al. 2024, arXiv:2403.17297
    import torch
    import torch.nn.functional as F

    scores, wins = pairs()
    chosen, rejected = (torch.tensor(scores[..., i], dtype=torch.float64).clamp(-4.9, 4.9) for i in (0, 1))
    p = torch.sigmoid(chosen - rejected)
    ranking = -((1 - 2 * F.relu(p - 0.5)) ** 2) * torch.log(p)
    penalty = sum(-torch.log(x + 5) - torch.log(5 - x) + 2 * np.log(5) for x in (chosen, rejected))
    clamped = np.clip(scores, -4.9, 4.9)
    expected = (ranking + 0.02 * penalty / 2).mean().item()  # of one response; XTuner has 0.01 and the sum of both
    assert loss_of(BradleyTerry(focal=2.0, barrier=0.02), clamped, wins) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ties, natural", [("davidson", "davidson_nu"), ("rao_kupper", "rao_kupper_theta")])
def test_a_tie_is_its_own_outcome(ties, natural):
    scores, wins, tied, _ = pairs_with_ties()
    objective, raw = BradleyTerry(ties=ties), np.float32(0.3)
    values = values_of(objective, scores, wins, {"tie": raw}, ties=tied)
    w_i, w_j = np.exp(scores[..., 0].astype(np.float64)), np.exp(scores[..., 1].astype(np.float64))
    if ties == "davidson":
        parameter = np.exp(0.3)
        total = w_i + w_j + parameter * np.sqrt(w_i * w_j)
        won, tie = w_i / total, parameter * np.sqrt(w_i * w_j) / total
    else:
        parameter = 1 + np.exp(0.3)
        won = w_i / (w_i + parameter * w_j)
        tie = (parameter**2 - 1) * w_i * w_j / ((w_i + parameter * w_j) * (parameter * w_i + w_j))
    is_tie = tied[..., 0, 1] > 0
    assert values["loss"] == pytest.approx(-np.log(np.where(is_tie, tie, won)).mean(), rel=1e-5)
    assert values[natural] == pytest.approx(parameter, rel=1e-5)
    assert values["ties_labelled"] == pytest.approx(is_tie.mean()) and values["pairs"] == (~is_tie).sum()
    assert values["ties_predicted"] == pytest.approx(tie.mean(), rel=1e-5)


def test_tie_parameters_are_learnt_by_the_objectives_that_have_them_and_keep_ties():
    assert BradleyTerry().params() == {} == BradleyTerry(rankings="plackett_luce", ties="efron").params()
    for ties in ("davidson", "rao_kupper"):
        (tie,) = BradleyTerry(ties=ties).params().values()
        assert tie.shape == () and tie.dtype == np.float32
        equal = {"scores": [[[1.0, 1.0]]], "wins": np.zeros((1, 1, 2, 2)), "ties": [[[[0, 1], [1, 0]]]]}
        values = values_of(BradleyTerry(ties=ties), equal.pop("scores"), equal.pop("wins"), {"tie": tie}, **equal)
        assert np.exp(-values["loss"]) == pytest.approx(1 / 3)  # where it starts
        assert BradleyTerry(ties=ties).task.ties == "keep"
    assert BradleyTerry(rankings="plackett_luce").task.ties == "skip" == BradleyTerry().task.ties


def test_a_learnt_tie_parameter_works_on_every_pair_of_a_ranking():
    scores, wins, ties, _ = rankings_of_four()
    objective = BradleyTerry(ties="davidson")
    flat, batch = make_batch(scores, wins, ties=ties)
    loss = sums_of(objective, flat, batch, {"tie": np.float32(-0.4)})["loss"]
    numerator, nu = 0.0, np.exp(-0.4)
    for b, g, i, j in np.argwhere(wins + np.triu(ties) > 0):
        w_i, w_j = np.exp(scores[b, g, [i, j]].astype(np.float64))
        likelihood = nu * np.sqrt(w_i * w_j) if ties[b, g, i, j] else w_i
        numerator -= np.log(likelihood / (w_i + w_j + nu * np.sqrt(w_i * w_j)))
    assert loss[0] == pytest.approx(numerator, rel=1e-5) and loss[1] == wins.sum() + ties.sum() / 2


def test_two_responses_are_the_same_whichever_way_rankings_are_read():
    scores, wins, ties, _ = pairs_with_ties()
    weight = np.random.default_rng(6).uniform(0.5, 2, scores.shape[:2])
    for kwargs in ({}, {"center": 0.01, "barrier": 0.02}):
        flat, batch = make_batch(scores, wins, weight, ties=ties)
        expected = sums_of(BradleyTerry(**kwargs), flat, batch, {})
        for name, value in sums_of(BradleyTerry(rankings="plackett_luce", **kwargs), flat, batch, {}).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def test_a_ranking_counts_once_and_its_penalty_is_the_mean_over_its_pairs():
    import torch
    import torch.nn.functional as F

    scores = np.array([[[2.0, 1.0, -1.0, 0.5], [0.3, 0.1, 0.0, 0.0]]], np.float32)
    wins = np.zeros((1, 2, 4, 4), np.float32)
    wins[0, 0][np.triu_indices(4, 1)] = 1
    wins[0, 1, 0, 1] = 1
    objective = BradleyTerry(rankings="plackett_luce", center=0.1)
    flat, batch = make_batch(scores, wins, weight=[[2.0, 0.5]])
    loss = sums_of(objective, flat, batch, {})["loss"]
    s = torch.tensor(scores[0])
    ranking = sum(torch.logsumexp(s[0, i:], 0) - s[0, i] for i in range(4))
    centre = 0.1 * sum((s[0, i] + s[0, j]) ** 2 for i in range(4) for j in range(i + 1, 4)) / 6
    pair = -F.logsigmoid(s[1, 0] - s[1, 1]) + 0.1 * (s[1, 0] + s[1, 1]) ** 2
    assert loss[0] == pytest.approx((2 * (ranking + centre) + 0.5 * pair).item(), rel=1e-5) and loss[1] == 2.5


def test_top1_is_the_share_of_rankings_whose_best_response_has_the_highest_reward():
    def top1(scores, wins, ties=()):
        table = np.zeros((2, 1, 1, len(scores), len(scores)), np.float32)
        for i, j in wins:
            table[0, 0, 0, i, j] = 1
        for i, j in ties:
            table[1, 0, 0, i, j] = table[1, 0, 0, j, i] = 1
        return values_of(BradleyTerry(), [[scores]], table[0], ties=table[1]).get("top1_accuracy")

    ranking = ((0, 1), (0, 2), (1, 2))
    assert top1([3, 2, 1], ranking) == 1 and top1([2, 3, 1], ranking) == 0 and top1([3, 3, 1], ranking) == 0.5
    assert top1([1, 2, 0], ((0, 2), (1, 2)), ((0, 1),)) == 1  # two best ones
    assert top1([3, 2, 1, 9], ranking) == 1  # the last one is not ranked, or not there
    assert top1([3, 2, 1], ((0, 1),)) is None and top1([1, 1, 1], (), ((0, 1), (1, 2), (0, 2))) is None
    assert top1([3, 2, 1], ((0, 1), (1, 2), (2, 0))) is None  # nobody is best
    assert "top1_accuracy" not in values_of(BradleyTerry(), *pairs())


# What may stand together


@pytest.mark.parametrize(
    "values, said",
    [
        ({"rankings": "listwise"}, "rankings='listwise' is none of pairs, plackett_luce"),
        ({"ties": "efron"}, "ties='efron' is none of skip, half, rao_kupper, davidson with .*rankings='pairs'"),
        ({"rankings": "plackett_luce", "ties": "half"}, "ties='half' is none of skip, efron with .*'plackett_luce'"),
        ({"rankings": "plackett_luce", "focal": 2.0}, "rankings='plackett_luce' .* with config.objective.focal=2.0"),
        ({"rankings": "plackett_luce", "scaled": True, "label_smoothing": 0.1}, "label_smoothing=0.1, .*scaled=True"),
        ({"ties": "davidson", "margin_scale": 1.0}, "ties='davidson' .*margin_scale=1.0"),
        ({"ties": "rao_kupper", "focal": 2.0}, "ties='rao_kupper' .*focal=2.0"),
        ({"barrier": -0.1}, "barrier=-0.1 must not be negative"),
        ({"focal": -1.0}, "focal=-1.0 must not be negative"),
    ],
)
def test_keys_that_do_not_go_together_are_named(values, said):
    with pytest.raises(ValueError, match=said):
        BradleyTerry(**values)


def test_every_key_has_its_default_in_the_config():
    assert objectives.make(defaults().objective) == BradleyTerry()


VARIANTS = {
    "plain": BradleyTerry(),
    "all of pairs": BradleyTerry(
        ties="half", label_smoothing=0.1, margin_scale=0.3, scaled=True, focal=2.0, center=0.1, barrier=0.1
    ),
    "davidson": BradleyTerry(ties="davidson", label_smoothing=0.1, scaled=True, center=0.1, barrier=0.1),
    "rao_kupper": BradleyTerry(ties="rao_kupper", label_smoothing=0.1),
    "plackett_luce": BradleyTerry(rankings="plackett_luce", center=0.1, barrier=0.1),
    "efron": BradleyTerry(rankings="plackett_luce", ties="efron"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_by_finite_differences(name):
    objective = VARIANTS[name]
    scores, wins, ties, margin = rankings_of_four()
    _, batch = make_batch(scores, wins, np.random.default_rng(7).uniform(0.5, 2, scores.shape[:2]), margin, ties)
    own = 0.3 * np.ones(len(objective.params()))
    x, step = np.concatenate([scores.ravel(), own]).astype(np.float64), 1e-5
    with jax.enable_x64(True):

        def loss(x):
            params = dict.fromkeys(objective.params(), x[-1])
            numerator, denominator = objective.loss(x[: scores.size].reshape(scores.shape), batch, params)
            return numerator / denominator

        moved = jnp.asarray(np.concatenate([x + step * np.eye(x.size), x - step * np.eye(x.size)]))
        values = np.asarray(jax.jit(jax.vmap(loss))(moved))
        gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(x)))
    assert values.dtype == np.float64 and np.abs(gradient).max() > 1e-2
    np.testing.assert_allclose(gradient, (values[: x.size] - values[x.size :]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", VARIANTS)
def test_groups_do_not_mix_and_sums_add(name):  # NUMERICS 8, 9 and 11
    objective = VARIANTS[name]
    params = {name: np.float32(0.3) for name in objective.params()}
    scores, wins, ties, margin = rankings_of_four()
    run = jax.jit(lambda flat, batch: jnp.stack(objective.loss_sums(flat, batch, params)))
    flat, batch = make_batch(scores, wins, margin=margin, ties=ties)
    whole = run(flat, batch)
    alone = [run(flat, batch | {"weight": np.eye(6)[n].reshape(2, 3).astype(np.float32)}) for n in range(6)]
    np.testing.assert_allclose(sum(alone), whole, rtol=1e-5)
    other = np.where(np.arange(6).reshape(2, 3, 1) == 4, scores, -scores)  # all groups but one have other rewards
    changed = run(make_batch(other, wins)[0], batch | {"weight": np.eye(6)[4].reshape(2, 3).astype(np.float32)})
    np.testing.assert_array_equal(changed, alone[4])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_finite_for_large_rewards(name):  # NUMERICS 10
    objective = VARIANTS[name]
    scores, wins, ties, margin = rankings_of_four()
    flat, batch = make_batch(np.sign(scores), wins, margin=margin, ties=ties)
    params = {name: np.float32(0.3) for name in objective.params()}
    both = jax.jit(jax.value_and_grad(lambda s, p: objective.loss_sums(s, batch, p)[0], argnums=(0, 1)))
    for size in (100.0, 1e4):
        value, gradients = both(flat * size, params)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
