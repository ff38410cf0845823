"""Ties and rankings against published fits, statsmodels and all orders written out. Gradients: test_objectives.py."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sets import compared_four

from rmjax.objectives import likelihoods

# Davidson 1970, example 2: pairs of six brands of chocolate pudding: i, j, i preferred, j preferred, no preference.
PUDDING = (
    *((0, 1, 19, 22, 16), (0, 2, 16, 19, 12), (1, 2, 19, 19, 10), (0, 3, 18, 23, 13), (1, 3, 23, 19, 9)),
    *((2, 3, 19, 20, 15), (0, 4, 13, 19, 18), (1, 4, 16, 20, 12), (2, 4, 16, 15, 17), (3, 4, 17, 14, 16)),
    *((0, 5, 18, 21, 12), (1, 5, 22, 20, 12), (2, 5, 13, 18, 10), (3, 5, 14, 19, 18), (4, 5, 11, 21, 12)),
)
# Critchlow and Fligner 1991: salad dressings A, B, C, D ranked by tartness, and how many people ranked them so.
SALAD = {
    **{(1, 2, 3, 4): 2, (2, 1, 3, 4): 1, (2, 1, 4, 3): 2, (2, 3, 1, 4): 1, (3, 1, 2, 4): 2, (3, 1, 4, 2): 1},
    **{(3, 4, 2, 1): 1, (4, 1, 2, 3): 11, (4, 1, 3, 2): 6, (4, 2, 1, 3): 3, (4, 3, 1, 2): 1, (4, 3, 2, 1): 1},
}


def labels(ranks):
    """wins and ties [K, K] of ranks, 1 the best and None not ranked."""
    rank = np.array([math.nan if r is None else r for r in ranks])
    wins = (rank[:, None] < rank[None, :]).astype(np.float32)
    ties = ((rank[:, None] == rank[None, :]) & ~np.eye(len(rank), dtype=bool)).astype(np.float32)
    return wins, ties


order = jax.jit(likelihoods.order)


@jax.jit
def loss_of(scores, wins, ties=None):
    above, tied = likelihoods.order(wins, jnp.zeros_like(wins) if ties is None else ties)
    return likelihoods.plackett_luce(scores, above, None if ties is None else tied)


def logp_of_ranking(scores, ranking):
    """Plackett-Luce of one whole ranking, the best first, as its product of choices."""
    worth = np.exp(np.asarray(scores, np.float64))
    return sum(math.log(worth[i] / worth[list(ranking[place:])].sum()) for place, i in enumerate(ranking))


def wins_of(pairs, k):
    wins = np.zeros((k, k), np.float32)
    for i, j in pairs:
        wins[i, j] = 1
    return wins


def summed_over_rankings(scores, pairs):
    """-log of the summed probability of all rankings that agree with the pairs."""
    agreeing = [
        math.exp(logp_of_ranking(scores, ranking))
        for ranking in itertools.permutations(range(len(scores)))
        if all(ranking.index(i) < ranking.index(j) for i, j in pairs)
    ]
    return -math.log(sum(agreeing))


# Pairs with ties


def fit(loss, parameters, start=None):
    """The parameters that minimise `loss`, a jax function of a float64 vector, and its value there."""
    from scipy.optimize import minimize

    with jax.enable_x64(True):
        value_and_grad = jax.jit(jax.value_and_grad(loss))
        numpy = lambda x: tuple(np.asarray(y, np.float64) for y in value_and_grad(jnp.asarray(x)))
        found = minimize(numpy, np.zeros(parameters) if start is None else start, jac=True, tol=1e-12)
        return found.x, found.fun


def pudding_loss(model):
    i, j, first, second, tied = map(np.array, zip(*PUDDING))

    def loss(x):
        scores = jnp.concatenate([jnp.zeros(1), x[:5]])
        difference = scores[i] - scores[j]
        (won, tie), (lost, _) = model(difference, x[5]), model(-difference, x[5])
        return (first * won + second * lost + tied * tie).sum()

    return loss


def test_davidson_on_his_puddings_is_the_published_fit():
    # "Introduction to PlackettLuce" (Turner et al.), which stops R after 7 rounds to have the worths of Davidson's
    # paper: not quite converged, so four decimals are compared.
    x, loss = fit(pudding_loss(likelihoods.davidson), 6)
    worth = np.exp(np.append(0, x[:5]))
    published = [0.1388005, 0.1729985, 0.1617420, 0.1653930, 0.1586805, 0.2023855]
    np.testing.assert_allclose(worth / worth.sum(), published, atol=5e-5)
    assert math.exp(x[5]) == pytest.approx(0.7468147, abs=5e-5)
    assert 2 * loss == pytest.approx(1619.4, abs=0.05)


def test_rao_kupper_on_the_puddings_is_the_maximum_of_the_published_likelihood():
    x, loss = fit(pudding_loss(likelihoods.rao_kupper), 6)
    i, j, first, second, tied = map(np.array, zip(*PUDDING))

    def published(scores, theta):
        w_i, w_j = np.exp(np.append(0, scores)[i]), np.exp(np.append(0, scores)[j])
        won, lost = w_i / (w_i + theta * w_j), w_j / (w_j + theta * w_i)
        tie = (theta**2 - 1) * w_i * w_j / (w_i + theta * w_j) / (w_j + theta * w_i)
        np.testing.assert_allclose(won + lost + tie, 1)
        return -(first * np.log(won) + second * np.log(lost) + tied * np.log(tie)).sum()

    theta = 1 + math.exp(x[5])
    assert published(x[:5], theta) == pytest.approx(loss, rel=1e-9)
    assert loss < min(published(x[:5], theta * 1.01), published(x[:5], theta / 1.01))
    assert all(loss < published(x[:5] + move, theta) for sign in (1, -1) for move in sign * 0.01 * np.eye(5))
    davidson, davidson_loss = fit(pudding_loss(likelihoods.davidson), 6)
    assert np.argsort(x[:5]).tolist() == np.argsort(davidson[:5]).tolist() and abs(loss - davidson_loss) < 2


@pytest.mark.parametrize("model", [likelihoods.davidson, likelihoods.rao_kupper])
def test_three_outcomes_are_the_published_probabilities(model):
    difference, parameter = np.array([-2.0, 0.0, 0.7, 3.0]), 0.4
    w_i, w_j, raw = np.exp(difference), 1.0, math.log(parameter)
    (won, tie), (lost, _) = (jax.jit(model)(jnp.asarray(d), raw) for d in (difference, -difference))
    if model is likelihoods.davidson:
        total = w_i + w_j + parameter * np.sqrt(w_i * w_j)
        expected = w_i / total, parameter * np.sqrt(w_i * w_j) / total
    else:
        theta = 1 + parameter
        expected = w_i / (w_i + theta * w_j), (theta**2 - 1) * w_i * w_j / ((w_i + theta * w_j) * (theta * w_i + w_j))
    np.testing.assert_allclose(np.exp(-won), expected[0], rtol=1e-5)
    np.testing.assert_allclose(np.exp(-tie), expected[1], rtol=1e-5)
    np.testing.assert_allclose(np.exp(-won) + np.exp(-lost) + np.exp(-tie), 1, rtol=1e-5)


@pytest.mark.parametrize("model", [likelihoods.davidson, likelihoods.rao_kupper])
def test_a_tie_parameter_of_no_ties_leaves_bradley_terry(model):
    difference = jnp.linspace(-5, 5, 11)
    won, tie = jax.jit(model)(difference, -30.0)
    np.testing.assert_allclose(won, likelihoods.bradley_terry(difference), rtol=1e-5, atol=1e-6)
    assert (tie > 20).all()


DIFFERENCES = np.array([-1e4, -90.0, 0.0, 90.0, 1e4], np.float32)


@pytest.mark.parametrize("model", [likelihoods.davidson, likelihoods.rao_kupper])
def test_ties_are_finite_for_any_difference(model):  # NUMERICS 10
    d, raw = map(jnp.asarray, zip(*itertools.product(DIFFERENCES, (-20.0, 0.0, 20.0))))
    for outcome in (0, 1):
        f = jax.vmap(jax.value_and_grad(lambda d, r, outcome=outcome: model(d, r)[outcome], argnums=(0, 1)))
        value, gradients = jax.jit(f)(d, raw)
        assert np.isfinite(value).all() and np.isfinite(gradients).all()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_is_finite_for_any_difference(gamma):  # NUMERICS 10
    f = jax.vmap(jax.value_and_grad(lambda d: likelihoods.focal(d, gamma)))
    value, gradient = jax.jit(f)(jnp.asarray(DIFFERENCES))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(value[:2], -DIFFERENCES[:2])  # a pair that is wrong counts in full


def test_focal_is_what_internlm2_says():
    import torch
    import torch.nn.functional as F

    d = torch.linspace(-4, 4, 9, dtype=torch.float64)
    p = torch.sigmoid(d)
    for gamma in (0.5, 1.0, 2.0):
        expected = -((1 - 2 * F.relu(p - 0.5)) ** gamma) * torch.log(p)
        np.testing.assert_allclose(likelihoods.focal(jnp.asarray(d.numpy()), gamma), expected.numpy(), rtol=1e-5)


def test_barrier_is_the_published_one_inside_and_goes_on_outside():
    import torch

    s = torch.tensor([-4.9, -2.0, 0.0, 1.0, 4.5], dtype=torch.float64, requires_grad=True)
    published = -torch.log(s + 5) - torch.log(5 - s)
    (slope,) = torch.autograd.grad(published.sum(), s)
    inside = jnp.asarray(s.detach().numpy(), jnp.float32)
    np.testing.assert_allclose(likelihoods.barrier(inside), (published + 2 * math.log(5)).detach().numpy(), rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: likelihoods.barrier(x).sum()))
    np.testing.assert_allclose(gradient(inside), slope.numpy(), rtol=1e-4)
    outside = jnp.array([-1e4, -5.0, 4.95, 4.951, 5.0, 6.0, 1e4])
    assert np.isfinite(likelihoods.barrier(outside)).all()
    np.testing.assert_allclose(np.abs(gradient(outside)), 2 * 0.99 / (1 - 0.99**2) / 5, rtol=1e-3)
    assert (np.sign(gradient(outside)) == np.sign(outside)).all()  # whatever is out there is called back


# Rankings


def test_plackett_luce_on_salad_dressings_is_the_published_fit():
    # The vignette "Plackett-Luce Models with Item Covariates" of the R package PlackettLuce.
    wins, _ = map(np.stack, zip(*(labels(ranks) for ranks in SALAD)))
    count = np.array(list(SALAD.values()))

    def loss(x):
        scores = jnp.concatenate([jnp.zeros(1), x])
        return (count * likelihoods.plackett_luce(jnp.broadcast_to(scores, (len(count), 4)), wins > 0)).sum()

    x, value = fit(loss, 3)
    assert count.sum() == 32
    np.testing.assert_allclose(x, [2.7299, 1.5615, 1.0268], atol=1e-4)
    assert 2 * value == pytest.approx(152.83, abs=0.005)


@pytest.mark.parametrize("tied", [None, np.zeros((50, 2, 2), bool)])
def test_two_responses_are_bradley_terry(tied):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2)) * 5, jnp.float32)
    above = np.zeros((50, 2, 2), bool)
    above[:, 0, 1] = True
    ranking = jax.jit(lambda s: likelihoods.plackett_luce(s, above, tied))
    pair = jax.jit(lambda s: likelihoods.bradley_terry(s[:, 0] - s[:, 1]))
    np.testing.assert_allclose(ranking(scores), pair(scores), rtol=1e-6)
    gradients = [jax.jit(jax.grad(lambda s, f=f: f(s).sum()))(scores) for f in (ranking, pair)]
    np.testing.assert_allclose(*gradients, rtol=1e-6)


def test_whole_rankings_are_probabilities_and_their_product_of_choices():
    scores = np.array([0.3, -1.2, 0.8, 0.1])
    total = 0.0
    for ranking in itertools.permutations(range(4)):
        loss = loss_of(scores, wins_of(itertools.combinations(ranking, 2), 4))
        assert loss == pytest.approx(-logp_of_ranking(scores, ranking), rel=1e-5)
        total += math.exp(-loss)
    assert total == pytest.approx(1, rel=1e-5)


FORESTS = {
    "the best of four": ((0, 1), (0, 2), (0, 3)),
    "the best of three": ((2, 0), (2, 3)),
    "two pairs": ((0, 1), (2, 3)),
    "a chain, said by neighbours": ((0, 1), (1, 2), (2, 3)),
    "a chain of three": ((3, 1), (1, 0)),
    "a tree": ((0, 1), (0, 2), (2, 3), (2, 4)),
    "trees side by side": ((0, 1), (0, 2), (3, 4)),
}


@pytest.mark.parametrize("name", FORESTS)
def test_forests_are_summed_over_all_rankings_that_agree(name):
    pairs = FORESTS[name]
    scores = np.array([0.3, -1.2, 0.8, 0.1, -0.4])[: 4 if max(map(max, pairs)) < 4 else 5]
    assert loss_of(scores, wins_of(pairs, len(scores))) == pytest.approx(summed_over_rankings(scores, pairs), rel=1e-5)


def test_other_partial_orders_are_the_product_of_their_choices():
    import torch
    import torch.nn.functional as F

    s = np.array([0.3, -1.2, 0.8])  # 0 and 2 are above 1, and not ordered
    expected = -F.logsigmoid(torch.tensor([s[0] - s[1], s[2] - s[1]])).sum().item()
    assert loss_of(s, wins_of(((0, 1), (2, 1)), 3)) == pytest.approx(expected, rel=1e-5)
    assert loss_of(s, wins_of(((0, 1), (2, 1)), 3)) > summed_over_rankings(s, ((0, 1), (2, 1)))


def test_a_subset_that_is_ranked_knows_nothing_of_the_rest():
    s = np.array([0.3, -1.2, 0.8, 0.1])
    expected = -logp_of_ranking(s[[1, 3, 0]], (0, 1, 2))  # the best first
    assert loss_of(s, labels((3, 1, None, 2))[0]) == pytest.approx(expected, rel=1e-5)


# PHReg(ranks, scores, ties="efron").loglike([1.0]) of statsmodels 0.15.0, Cox's partial likelihood with these scores.
EFRON = (
    ((1, 2, 2, 3, 3, 3), -9.403546419814532),
    ((1, 1, 1, 1, 1, 1), -8.623937220082826),
    ((2, 1, 3, 4, 5, 6), -10.612722776920446),
    ((1, 1, 2, 2, 3, 3), -10.089905278081595),
    ((3, 1, 2, 2, 2, 2), -8.809846981884949),
)


@pytest.mark.parametrize("ranks, loglikelihood", EFRON)
def test_ties_are_efrons_as_statsmodels_has_them(ranks, loglikelihood):
    scores = np.array([0.3, -1.2, 0.8, 0.1, -0.4, 1.5])
    assert loss_of(scores, *labels(ranks)) == pytest.approx(-loglikelihood, rel=1e-5)


def test_a_tie_of_two_by_hand():
    import torch
    import torch.nn.functional as F

    s = torch.tensor([0.3, -1.2])
    expected = -(F.logsigmoid(s[0] - s[1]) + F.logsigmoid(s[1] - s[0])).item() - math.log(2)  # -log(2 p q)
    assert loss_of(s.numpy(), *labels((1, 1))) == pytest.approx(expected, rel=1e-5)
    assert loss_of(s.numpy(), labels((1, 1))[0]) == 0  # without ties, nothing is said


def test_order_closes_chains_and_drops_what_contradicts_itself():
    chain, none = order(jnp.asarray(wins_of(((0, 1), (1, 2), (2, 3), (3, 4)), 5)), jnp.zeros((5, 5)))
    assert chain.tolist() == np.triu(np.ones((5, 5), bool), 1).tolist() and not none.any()
    circle = wins_of(((0, 1), (1, 2), (2, 0), (2, 3)), 4)
    above, _ = order(jnp.asarray(circle), jnp.zeros((4, 4)))
    assert np.argwhere(above).tolist() == [[0, 3], [1, 3], [2, 3]]
    ties = np.zeros((3, 3), np.float32)
    ties[0, 2] = ties[2, 0] = 1  # said equal, but 0 is above 1 and 1 above 2
    above, tied = order(jnp.asarray(wins_of(((0, 1), (1, 2)), 3)), jnp.asarray(ties))
    assert above[0, 2] and not tied.any()


def test_order_decides_soft_labels_and_votes_for_what_has_most():
    def one(first, second, tie):
        wins, ties = np.array([[0, first], [second, 0]], np.float32), np.array([[0, tie], [tie, 0]], np.float32)
        above, tied = order(jnp.asarray(wins), jnp.asarray(ties))
        return "tie" if tied[0, 1] else "first" if above[0, 1] else "second" if above[1, 0] else "nothing"

    assert [one(0.7, 0.3, 0), one(0.2, 0.5, 0.3), one(0.5, 0.5, 0), one(0.3, 0.1, 0.6), one(0.4, 0.2, 0.4)] == [
        *("first", "second", "tie", "tie", "tie")
    ]
    assert one(0, 0, 0) == "nothing"


def test_absent_responses_and_empty_groups_count_nothing():
    import torch
    import torch.nn.functional as F

    scores = jnp.array([[1.0, -2.0, 50.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    above, tied = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    above[0, 0, 1] = True
    loss, gradient = jax.jit(jax.value_and_grad(lambda s: likelihoods.plackett_luce(s, above, tied).sum()))(scores)
    assert loss == pytest.approx(F.softplus(torch.tensor(-3.0)).item(), rel=1e-6)
    assert not gradient[0, 2:].any() and not gradient[1].any()


def test_rankings_are_finite_for_any_rewards():  # NUMERICS 10
    wins, ties = map(np.stack, zip(*(labels(ranks) for ranks in ((1, 2, 2, 3), (4, 3, 2, 1), (1, 1, 1, 1)))))
    above, tied = likelihoods.order(wins, ties)
    both = jax.jit(jax.value_and_grad(lambda s: likelihoods.plackett_luce(s, above, tied).sum()))
    for size in (90.0, 1e4):
        loss, gradient = both(size * jnp.array([[-1.0, 1.0, -1.0, 0.5]] * 3))
        assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_comparisons_of_four_with_ties():
    """Against the choices written out, with whom each response is above found by walking from winner to loser."""
    verdicts = [compared_four(i)["preference"] for i in range(200)]
    wins, ties = np.zeros((2, len(verdicts), 4, 4), np.float32)
    for n, row in enumerate(verdicts):
        for (i, j), verdict in zip(itertools.combinations(range(4), 2), row):
            if verdict:
                wins[n][(i, j) if verdict == 1 else (j, i)] = 1
            else:
                ties[n, i, j] = ties[n, j, i] = 1
    assert wins.sum() + ties.sum() / 2 == 1200 and ties.sum() > 400
    scores = np.random.default_rng(0).normal(size=(200, 4)) * 2
    with jax.enable_x64(True):
        above, tied = order(wins, ties)
        strict = np.asarray(likelihoods.plackett_luce(jnp.asarray(scores), above))
        efron = np.asarray(likelihoods.plackett_luce(jnp.asarray(scores), above, tied))
    circles = 0
    for n in range(200):
        below = [reached(wins[n], i) for i in range(4)]
        circles += any(i in below[i] for i in range(4))
        expected = expected_efron = 0.0
        for i in range(4):
            worse = [j for j in below[i] if i not in below[j]]
            equal = [i] + [j for j in range(4) if ties[n, i, j] and j not in below[i] and i not in below[j]]
            rest, level = np.exp(scores[n, worse]).sum(), np.exp(scores[n, equal]).sum()
            expected += math.log(rest + math.exp(scores[n, i])) - scores[n, i]
            steps = [math.log(rest + (1 - step / len(equal)) * level) for step in range(len(equal))]
            expected_efron += sum(steps) / len(equal) - scores[n, i]
        assert strict[n] == pytest.approx(expected, abs=1e-9) and efron[n] == pytest.approx(expected_efron, abs=1e-9)
    assert circles == 0  # whoever made these verdicts does not contradict himself


def reached(wins, start):
    """Whom a response beats, or beats by others."""
    found, ahead = set(), [start]
    while ahead:
        new = set(np.flatnonzero(wins[ahead.pop()])) - found
        found |= new
        ahead += new
    return sorted(found)
