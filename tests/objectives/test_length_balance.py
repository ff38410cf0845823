"""What lengths tell by themselves, fitted before training and weighted away: against scikit-learn and torch."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rmjax.objectives import bradley_terry
from rmjax.objectives.bradley_terry import MOST_LOG_ODDS, BradleyTerry


def fitted(monkeypatch, more, **options):
    """The expert of pairs whose preferred response has so many tokens more."""
    monkeypatch.setattr(bradley_terry, "longer_by_tokens", lambda groups: np.asarray(more))
    return BradleyTerry(length_balance=1.0, **options).fitted(None)


def test_the_expert_is_the_logistic_regression_of_the_lengths(monkeypatch):
    rng = np.random.default_rng(0)
    more = np.round(rng.lognormal(3, 1, 500)).astype(int) * np.where(rng.random(500) < 0.7, 1, -1)
    objective = fitted(monkeypatch, np.append(more, [0, 0, 0]))
    log_odds, tokens = objective.length_expert
    assert tokens == np.median(np.abs(more[more != 0]))
    x = np.arcsinh(more[more != 0] / tokens)[:, None]
    signs = np.where(np.arange(len(x)) % 2, 1, -1)  # half of the pairs the other way round
    reference = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10).fit(x * signs[:, None], signs)
    assert log_odds == pytest.approx(reference.coef_[0, 0], abs=1e-4) and log_odds > 0.3
    assert objective.found.startswith(f"length alone: log-odds {log_odds:.3g}") and "% of the time" in objective.found


@pytest.mark.parametrize(("more", "expected"), [([5, 7], MOST_LOG_ODDS), ([-5, -7], -MOST_LOG_ODDS), ([0, 0], 0.0)])
def test_lengths_that_tell_all_or_nothing(monkeypatch, more, expected):
    assert fitted(monkeypatch, more).length_expert[0] == expected


def test_an_expert_that_is_given_stays(monkeypatch):
    assert fitted(monkeypatch, [5, -7], length_expert=(0.5, 30.0)).length_expert == (0.5, 30.0)
    assert BradleyTerry().fitted(None).found == ""


def test_without_an_expert_there_is_no_loss():
    with pytest.raises(ValueError, match="needs a length_expert"):
        BradleyTerry(length_balance=1.0).loss_sums(jnp.zeros((1, 6, 1)), BATCH, {})


# A group of three responses of 7, 4 and 12 tokens after a prompt of 3, ranked; and a pair of 5 and 5 tokens.
END = np.array([[9, 13, 25, 34, 39, -1]], np.int32)
POSITIONS = np.zeros((1, 48), np.int32)
POSITIONS[0, END[0, :5]] = 9, 6, 14, 8, 8
WINS = np.zeros((1, 2, 3, 3), np.float32)
WINS[0, 0, [0, 0, 1], [1, 2, 2]] = 1
WINS[0, 1, 1, 0] = 1
BATCH = {
    "end": END,
    "positions": POSITIONS,
    "end_group": np.array([[0, 0, 0, 1, 1, -1]], np.int32),
    "end_slot": np.array([[0, 1, 2, 0, 1, -1]], np.int32),
    "wins": WINS,
    "ties": np.zeros_like(WINS),
    "margin": np.full_like(WINS, np.nan),
    "weight": np.array([[1.0, 2.0]], np.float32),
}


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_loss_and_gradients_are_those_of_torch(share):
    log_odds, tokens = 0.8, 4.0
    objective = BradleyTerry(length_balance=share, length_expert=(log_odds, tokens))
    scores = np.random.default_rng(1).normal(size=(1, 6, 1)).astype(np.float32)

    def loss(scores):
        top, bottom = objective.loss_sums(scores, BATCH, {})
        return top / bottom

    value, slope = jax.value_and_grad(loss)(jnp.asarray(scores))
    s = torch.tensor(scores[0, :, 0], requires_grad=True)
    lengths = torch.tensor([7.0, 4.0, 12.0, 5.0, 5.0])
    total = 0.0
    for i, j, weight in ((0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0), (4, 3, 2.0)):
        likely = torch.sigmoid(share * log_odds * torch.asinh((lengths[i] - lengths[j]) / tokens))
        total = total - weight * 0.5 / likely * torch.nn.functional.logsigmoid(s[i] - s[j])
    (total / 5.0).backward()
    assert float(value) == pytest.approx(total.item() / 5.0, rel=1e-6)
    np.testing.assert_allclose(slope[0, :, 0], s.grad, rtol=1e-5, atol=1e-7)


def test_no_pair_counts_more_than_ten_times_and_ties_count_once():
    objective = BradleyTerry(length_balance=1.0, length_expert=(100.0, 4.0), ties="half")
    weights = objective._length_weights(BATCH)[0]
    assert float(weights[0].max()) == 10.0 and float(weights[0, 2, 1]) == 0.5 and float(weights[1, 0, 1]) == 0.5 / 0.5


def test_weights_balance_what_they_were_fitted_to(monkeypatch):
    """Among weighted pairs the longer one wins as often as the shorter one, at every length."""
    rng = np.random.default_rng(3)
    sizes = np.round(rng.lognormal(3, 0.7, 20_000)).astype(int)
    more = sizes * np.where(
        rng.random(len(sizes)) < 1 / (1 + np.exp(-1.5 * np.arcsinh(sizes / np.median(sizes)))), 1, -1
    )
    log_odds, tokens = fitted(monkeypatch, more).length_expert
    weight = 0.5 * (1 + np.exp(-log_odds * np.arcsinh(more / tokens)))
    assert weight.mean() == pytest.approx(1, abs=0.05)
    for low, high in itertools.pairwise(np.quantile(sizes, [0, 0.25, 0.5, 0.75, 1])):
        here = (sizes >= low) & (sizes <= high)
        assert weight[here & (more > 0)].sum() / weight[here].sum() == pytest.approx(0.5, abs=0.04)


def test_the_reward_itself_is_without_it():
    plain = BradleyTerry()
    offset = dataclasses.replace(plain, length_balance=1.0, length_expert=(2.0, 4.0))
    scores = jnp.asarray(np.random.default_rng(2).normal(size=(1, 6, 1)), jnp.float32)
    assert "length_expert" not in plain.terms() and offset.terms()["length_expert"] == (2.0, 4.0)
    for name, value in plain.outcomes(scores, BATCH, {}).items():
        np.testing.assert_array_equal(offset.outcomes(scores, BATCH, {})[name], value)
