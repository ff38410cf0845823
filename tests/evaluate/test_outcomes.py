"""What a run tells of its own steps and evaluations, of outcomes worked by hand; each objective's tests have more."""

import jax.numpy as jnp
import numpy as np
import pytest
from made_up_answers import metrics_of, sums_of

from rmjax.evaluate import moments
from rmjax.evaluate.estimates import Estimates
from rmjax.objectives.bradley_terry import BradleyTerry
from rmjax.objectives.pairwise import Pairwise
from rmjax.objectives.prm import ProcessReward
from rmjax.objectives.sft import SFT
from rmjax.statistics import first_where, softmax, spread


def calibration_error(confidence, right, weight):
    found = Estimates(np.zeros(len(right), int))
    moments.add_ece(found, np.arange(len(right)), confidence, right, weight, 0.0)
    return found.others().get("ece")


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    from sklearn.calibration import calibration_curve

    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 500)
    right = (rng.uniform(size=500) < confidence**2).astype(float)
    found = calibration_error(confidence, right, np.ones(500))
    observed, predicted = calibration_curve(right, confidence, n_bins=10)
    counts = np.histogram(confidence, 10, (0, 1))[0]
    assert found == pytest.approx(np.abs(observed - predicted) @ counts / 500, abs=1e-6)
    assert calibration_error(np.tile(confidence, 2), np.tile(right, 2), np.full(1000, 0.5)) == pytest.approx(found)
    assert calibration_error(np.zeros(0), np.zeros(0), np.zeros(0)) is None


def test_quantiles_by_name():
    found = spread("chosen", np.arange(101.0))
    assert found == {f"chosen_p{q:02}": float(q) for q in (5, 25, 50, 75, 95)} and spread("chosen", np.zeros(0)) == {}


def test_softmax_and_first_flags():
    np.testing.assert_allclose(softmax(np.array([[0.0, np.log(3)], [1e5, -1e5]])), [[0.25, 0.75], [1, 0]])
    flags, group = np.array([0, 1, 1, 0, 1], bool), np.array([0, 0, 0, 1, 2])
    assert first_where(flags, group, 4).tolist() == [1, 5, 4, 5]


def three_pairs():
    rewards = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]], np.float32)
    wins = np.zeros((1, 4, 2, 2), np.float32)
    wins[0, :3, 0, 1] = 1
    batch = {
        "wins": wins,
        "ties": np.zeros_like(wins),
        "margin": np.zeros_like(wins),
        "weight": np.array([[1.0, 1.0, 1.0, 0.0]], np.float32),
        "end": np.array([[0, 1, 2, 3, 4, 5, -1, -1]]),
        "end_group": np.array([[0, 0, 1, 1, 2, 2, -1, -1]]),
        "end_slot": np.array([[0, 1, 0, 1, 0, 1, -1, -1]]),
    }
    return jnp.concatenate([rewards.ravel(), jnp.zeros(2)])[None, :, None], batch


def test_bradley_terry_tells_calibration_and_quantiles_of_both_sides():
    values = metrics_of(BradleyTerry(), *three_pairs())
    sure = 1 / (1 + np.exp(-np.array([2.0, 0.0, 3.0])))  # right, half right, wrong: each in a bin of its own
    assert values["ece"] == pytest.approx(np.abs(sure - [1, 0.5, 0]).mean(), abs=1e-6)
    assert values["chosen_p50"] == 1 and values["rejected_p50"] == 1 and values["pairs"] == 3
    assert (values["chosen"], values["rejected"]) == (1, pytest.approx(4 / 3))
    assert (values["reward_min"], values["reward_max"], values["reward_mean"]) == (0, 3, pytest.approx(7 / 6))


def test_rewards_that_are_not_numbers_are_wrong_and_shown():
    flat, batch = three_pairs()
    values = metrics_of(BradleyTerry(), flat.at[0, 0, 0].set(np.nan), batch)
    assert values["accuracy"] == pytest.approx(0.5 / 3) and np.isnan(values["reward_mean"])


def test_a_steps_sums_have_no_statistics_that_do_not_add():
    found = sums_of(BradleyTerry(), *three_pairs())
    assert "ece" not in found and all(x.shape == (2,) and x.dtype == np.float64 for x in found.values())
    assert found["accuracy"].tolist() == [1.5, 3] and found["pairs_count"].tolist() == [3, 0]


def test_pairwise_is_as_sure_as_both_orders_averaged():
    verdict = np.zeros((1, 2, 2, 3), np.float32)
    verdict[0, 0, 0, 0] = verdict[0, 0, 1, 1] = 1  # the first is better
    verdict[0, 1, :, 2] = 1  # a tie, which is no pair
    p = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]])
    batch = {
        "verdict": verdict,
        "strength": np.zeros((1, 2, 1), np.float32),
        "weight": np.ones((1, 2), np.float32),
        "end_group": np.array([[0, 0, 1, 1]]),
        "end_slot": np.array([[0, 1, 0, 1]]),
    }
    values = metrics_of(Pairwise(), jnp.log(p)[None].astype(jnp.float32), batch)
    apart = (0.7 + 0.4) / 2 - (0.2 + 0.5) / 2  # of "the first is better" and "the second is"
    assert values["ece"] == pytest.approx(1 - (0.5 + apart / 2), abs=1e-6) and values["pairs"] == 2


def test_steps_that_were_not_judged_are_left_out():
    batch = {
        "value": np.array([[[1.0], [0.0], [1.0]]], np.float32),
        "mask": np.array([[[1.0], [1.0], [0.0]]], np.float32),
        "weight": np.ones((1, 1), np.float32),
        "end": np.arange(3)[None],
        "end_group": np.zeros((1, 3), np.int32),
        "end_slot": np.zeros((1, 3), np.int32),
    }
    values = metrics_of(ProcessReward(), jnp.array([[[0.0, 0.0], [0.0, 0.0], [0.0, 9.0]]]), batch)
    assert (values["steps"], values["responses"], values["accuracy"], values["ece"]) == (2, 1, 0.5, 0)
    assert values["reward_max"] > 0.99  # of all steps


def test_sft_sums_by_conversation():
    batch = {
        "loss_weight": np.array([[0.0, 1, 1, 2, 0, 0]], np.float32),
        "verdict": np.array([[0.0, 0, 1, 0, 0, 0]], np.float32),
        "visible_from": np.array([[0, 0, 0, 3, 3, 5]]),
        "end": np.array([[2, 4, 5, -1]]),
    }
    outputs = {
        "nll": np.array([[9.0, 1, 2, 4, 9, 9]], np.float32),
        "correct": np.array([[0.0, 1, 0, 1, 0, 0]], np.float32),
    }
    seen = {name: np.asarray(x)[0].tolist() for name, x in SFT().outcomes(outputs, batch, {}).items()}
    assert seen["nll"] == [3, 8, 0, 0] and seen["count"] == [2, 2, 0, 0] and seen["tokens"] == [2, 1, 0, 0]
    assert seen["correct"] == [1, 2, 0, 0]
    assert seen["verdict_weight"] == [1, 0, 0, 0] and seen["verdict_errors"][0] == 1  # its one token is wrong
