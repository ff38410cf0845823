"""What evaluation keeps of every batch beside sums: calibration, quantiles, conversations of an sft run."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from rmjax.objectives.bradley_terry import BradleyTerry
from rmjax.objectives.pairwise import Pairwise
from rmjax.objectives.prm import ProcessReward
from rmjax.objectives.sft import SFT
from rmjax.statistics import calibration_error, spread


def test_calibration_error_is_the_weighted_gap_of_the_bins():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 500).astype(np.float32)
    right = (rng.uniform(size=500) < confidence**2).astype(np.float32)
    found = calibration_error({"confidence": confidence, "right": right, "weight": np.ones(500)}, least=0.0)["ece"]
    observed, predicted = calibration_curve(right, confidence, n_bins=10)
    counts = np.histogram(confidence, 10, (0, 1))[0]
    assert found == pytest.approx(np.abs(observed - predicted) @ counts / 500, abs=1e-6)
    doubled = {"confidence": np.tile(confidence, 2), "right": np.tile(right, 2), "weight": np.full(1000, 0.5)}
    assert calibration_error(doubled, least=0.0)["ece"] == pytest.approx(found, abs=1e-6)
    nothing = np.full(3, np.nan)
    assert calibration_error({"confidence": nothing, "right": nothing, "weight": nothing}) == {}


def test_quantiles_by_name():
    found = spread("chosen", np.arange(101.0))
    assert found == {f"chosen_p{q:02}": float(q) for q in (5, 25, 50, 75, 95)} and spread("chosen", np.zeros(0)) == {}


def test_bradley_terry_tells_calibration_and_quantiles_of_both_sides():
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
    flat = jnp.concatenate([rewards.ravel(), jnp.zeros(2)])[None, :, None]
    seen = {name: np.asarray(x) for name, x in BradleyTerry().outcomes(flat, batch, {}).items()}
    chosen = seen["chosen"][~np.isnan(seen["chosen"])]
    assert sorted(chosen.tolist()) == [0, 1, 2] and np.isnan(seen["weight"]).sum() == 13
    values = BradleyTerry().summary({"pairs_count": np.array([3.0, 0.0])}, seen)
    sure = 1 / (1 + np.exp(-np.array([2.0, 0.0, 3.0])))  # right, half right, wrong: each in a bin of its own
    assert values["ece"] == pytest.approx(np.abs(sure - [1, 0.5, 0]).mean(), abs=1e-6)
    assert values["chosen_p50"] == 1 and values["rejected_p50"] == 1


def test_pairwise_is_as_sure_as_both_orders_averaged():
    verdict = np.zeros((1, 2, 2, 3), np.float32)
    verdict[0, 0, 0, 0] = verdict[0, 0, 1, 1] = 1  # the first is better
    verdict[0, 1, :, 2] = 1  # a tie, which is no pair
    p = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]])
    batch = {
        "verdict": verdict,
        "weight": np.ones((1, 2), np.float32),
        "end_group": np.array([[0, 0, 1, 1]]),
        "end_slot": np.array([[0, 1, 0, 1]]),
    }
    seen = Pairwise().outcomes(jnp.log(p)[None].astype(jnp.float32), batch, {})
    apart = (0.7 + 0.4) / 2 - (0.2 + 0.5) / 2  # of "the first is better" and "the second is"
    assert np.asarray(seen["confidence"])[0] == pytest.approx(0.5 + apart / 2, abs=1e-6)
    assert np.asarray(seen["right"])[0] == 1 and np.isnan(np.asarray(seen["confidence"])[1])


def test_steps_that_were_not_judged_are_left_out():
    batch = {
        "value": np.array([[[1.0], [0.0], [1.0]]], np.float32),
        "mask": np.array([[[1.0], [1.0], [0.0]]], np.float32),
        "weight": np.ones((1, 1), np.float32),
        "end_group": np.zeros((1, 3), np.int32),
    }
    seen = ProcessReward().outcomes(jnp.zeros((1, 3, 2)), batch, {})
    assert np.asarray(seen["confidence"])[:2].tolist() == [0.5, 0.5] and np.isnan(np.asarray(seen["right"])[2])
    assert np.asarray(seen["right"])[:2].tolist() == [1, 0]


def test_sft_sums_by_conversation():
    start = np.array([[0, 0, 0, 3, 3, 5]])
    weight = np.array([[0.0, 1, 1, 2, 0, 0]], np.float32)
    outputs = {
        "nll": np.array([[9.0, 1, 2, 4, 9, 9]], np.float32),
        "correct": np.array([[0.0, 1, 0, 1, 0, 0]], np.float32),
    }
    batch = {"loss_weight": weight, "verdict": np.array([[0.0, 0, 1, 0, 0, 0]], np.float32), "visible_from": start}
    seen = {name: np.asarray(x) for name, x in SFT().outcomes(outputs, batch, {}).items()}
    here = ~np.isnan(seen["nll"])
    assert here.tolist() == [True, False, False, True, False, False]
    assert seen["nll"][here].tolist() == [3, 8] and seen["count"][here].tolist() == [2, 2]
    assert seen["correct"][here].tolist() == [1, 2]
    assert seen["verdict"][here][0] == 0 and np.isnan(seen["verdict"][here][1])  # its one token is wrong; no verdict
