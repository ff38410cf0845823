"""The quality gate: each check passing, failing, by a hair and not measured, with its reason and its advice."""

import re

import numpy as np
import pytest
import scipy.stats
from made_up_answers import pairs
from made_up_evaluations import attributes, estimate, evaluation, lines, preferences, steps, tokens

from rmjax import statistics
from rmjax.config import defaults
from rmjax.data import ledger
from rmjax.evaluate import gate, measures

GATE = defaults().gate.to_dict()


def judged(of=None, asked=None, losses=None, **sets):
    """Checks by name, of an evaluation of `sets` or `of`."""
    verdict = gate.judge(asked or GATE, of or {"sets": sets}, lines() if losses is None else losses)
    return verdict, {check["name"]: check for check in verdict["checks"]}


def with_metrics(measured, **metrics):
    return {**measured, "metrics": {**measured["metrics"], **metrics}}


def test_a_good_run_passes_every_check_and_is_given_no_advice():
    verdict, checks = judged(evaluation())
    assert verdict["passed"] and list(checks) == ["accuracy", "gap", "convergence", "beats_length", "ece"]
    assert all(check["passed"] is True and not check["advice"] for check in checks.values())
    assert all(check["shown"] for check in checks.values())
    assert gate.text(verdict)[0] == "Good enough: passes all 5 checks of the quality gate"
    assert sum(line.startswith("  passed") for line in gate.text(verdict)) == 5


def test_a_run_that_learnt_by_heart_fails_with_reasons_and_advice():
    validation = with_metrics(
        preferences(), accuracy=estimate(0.61), ece=estimate(0.24), longer_is_better=estimate(0.64)
    )
    train = with_metrics(preferences(), accuracy=estimate(0.99, 0.01))
    falling = [{"step": i, "train/loss": 1 - 0.009 * i} for i in range(1, 101)]
    verdict, checks = judged(validation=validation, train_slice=train, losses=falling)
    assert not verdict["passed"] and all(check["passed"] is False for check in checks.values())
    assert checks["accuracy"]["reason"] == "validation accuracy 61.0% (59.0% to 63.0%), at least 70.0% is asked"
    assert "accuracy in training is 99.0%, so the training data is fitted" in checks["accuracy"]["advice"]
    assert "38.0" in checks["gap"]["reason"] and "config.checkpoint.patience" in checks["gap"]["advice"]
    assert "config.duration" in checks["convergence"]["advice"]
    assert "64.0%" in checks["beats_length"]["reason"] and "rmjax.data audit" in checks["beats_length"]["advice"]
    assert "24.0%" in checks["ece"]["reason"] and "config.objective.label_smoothing" in checks["ece"]["advice"]
    text = gate.text(verdict)
    assert (
        text[0] == "Not good enough: fails all 5 checks of the quality gate"
        and sum("What to do: " in line for line in text) == 5
    )


def test_advice_knows_whether_the_training_data_is_fitted():
    validation = with_metrics(preferences(), accuracy=estimate(0.61))
    _, checks = judged(validation=validation, train_slice=with_metrics(preferences(), accuracy=estimate(0.63)))
    assert "not even the training data is fitted" in checks["accuracy"]["advice"]
    _, checks = judged(validation=validation)
    assert "config.eval.train_groups" in checks["accuracy"]["advice"] and checks["gap"]["passed"] is None


def test_what_the_interval_does_not_show_does_not_pass_and_the_reason_says_how_many_would_show_it():
    barely = with_metrics(preferences(), accuracy=estimate(0.705), ece=estimate(0.09), longer_is_better=estimate(0.69))
    verdict, checks = judged(validation=barely, train_slice=with_metrics(preferences(), accuracy=estimate(0.79)))
    assert not verdict["passed"] and gate.text(verdict)[0].startswith(
        "Not shown to be good enough by so few data: 4 of 5"
    )
    for name, side in (("accuracy", "below"), ("beats_length", "below"), ("gap", "above"), ("ece", "above")):
        assert f"not shown: the 95 % interval reaches {side} it" in checks[name]["reason"], name
        assert (checks[name]["passed"], checks[name]["shown"]) == (False, False) and "it takes about" in checks[name][
            "advice"
        ]
    assert f"{16 * barely['pairs']:,} pairs, if they are as these {barely['pairs']:,}" in checks["accuracy"]["advice"]
    short = with_metrics(preferences(), accuracy=estimate(0.69), ece=estimate(0.11))
    _, checks = judged(validation=short)
    for name, side in (("accuracy", "above"), ("ece", "below")):
        assert (
            not checks[name]["passed"] and f"not shown: the 95 % interval reaches {side} it" in checks[name]["reason"]
        )
        assert "config." in checks[name]["advice"] and "or more validation data" in checks[name]["advice"]
    unknown = with_metrics(preferences(), accuracy=estimate(0.9, None))
    _, checks = judged(validation=unknown)
    assert checks["accuracy"]["passed"] is False and "one prompt has no interval" in checks["accuracy"]["reason"]
    assert "it takes 11 pairs of different prompts at the least" in checks["accuracy"]["advice"]


@pytest.mark.parametrize("n, passed", [(1, False), (10, False), (11, True)])
def test_as_many_pairs_pass_as_it_is_said_to_take_and_one_passes_nothing(n, passed):
    measured = measures.preferences(pairs(n, noise=1000))
    assert measured["metrics"]["accuracy"]["value"] == 1
    _, checks = judged({"sets": {"validation": measured}}, losses=[])
    assert checks["accuracy"]["passed"] is passed and checks["accuracy"]["shown"] is passed
    if not passed:
        assert "it takes 11 pairs" in checks["accuracy"]["advice"]
    if n == 1:
        assert not any(check["passed"] for check in checks.values())


def test_the_number_of_pairs_that_it_would_take_is_about_right():
    few = measures.preferences(pairs(150, noise=0.6))
    accuracy = few["metrics"]["accuracy"]["value"]
    _, checks = judged({"sets": {"validation": few}}, asked={**GATE, "accuracy": accuracy - 0.05})
    count = int(re.search(r"about ([\d,]+) pairs", checks["accuracy"]["advice"])[1].replace(",", ""))
    low = scipy.stats.binomtest(round(accuracy * count), count).proportion_ci(0.95, "wilson").low
    assert not checks["accuracy"]["passed"] and low == pytest.approx(accuracy - 0.05, abs=0.01)


def test_what_a_set_can_show_before_a_run():
    assert statistics.least_cases(0.7) == 11 and 0.7**11 < 0.025 < 0.7**10
    assert statistics.least_hits(0.7, 100) == pytest.approx(
        scipy.stats.binomtest(70, 100).proportion_ci(0.95, "wilson").high
    )
    assert "validation data of 10 prompts cannot show" in ledger.accuracy_shown(10, 0.7)
    assert "that takes 11, if all are right" in ledger.accuracy_shown(10, 0.7)
    assert "where about 78.1% are right" in ledger.accuracy_shown(100, 0.7)


@pytest.mark.parametrize(
    "measured, name, passed",
    [
        (with_metrics(preferences(), accuracy={"value": 0.72, "low": 0.7, "high": 0.74}), "accuracy", True),
        (with_metrics(preferences(), ece={"value": 0.08, "low": 0.06, "high": 0.1}), "ece", True),
        (with_metrics(preferences(), accuracy=estimate(0.56)), "beats_length", False),  # the point alone
    ],
)
def test_an_interval_that_ends_at_its_threshold(measured, name, passed):
    assert judged(validation=measured)[1][name]["passed"] is passed


def test_the_interval_of_the_gap_is_that_of_a_difference_of_independent_shares():
    """Newcombe 1998's method 10 is nearly the normal interval where shares are in the middle and samples large."""
    n, half = 4000, 1.96 * (0.25 / 4000) ** 0.5
    train, validation = (with_metrics(preferences(), accuracy=estimate(x, half)) for x in (0.53, 0.5))
    _, checks = judged(validation=validation, train_slice=train)
    low, high = (float(x) for x in checks["gap"]["reason"].split("(")[1].split(")")[0].split(" to "))
    rng = np.random.default_rng(0)
    drawn = 100 * (rng.binomial(n, 0.53, 20_000) - rng.binomial(n, 0.5, 20_000)) / n
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.15)


def test_what_an_objective_does_not_measure_is_said_and_does_not_fail():
    verdict, checks = judged(validation=attributes(), train_slice=attributes())
    assert verdict["passed"] and checks["convergence"]["passed"] is True
    for name in ("accuracy", "gap", "beats_length", "ece"):
        assert checks[name]["passed"] is None and checks[name]["value"] is None
        assert checks[name]["reason"].startswith("not measured: ") and not checks[name]["advice"]
    assert gate.text(verdict)[0] == "Good enough: passes the one check of the quality gate; 4 not measured"
    nothing = gate.judge(GATE, {}, [])
    assert nothing["passed"] and gate.text(nothing)[0].startswith("The quality gate checked nothing")


def test_each_kind_has_its_accuracy():
    assert judged(validation=steps())[1]["accuracy"]["value"] == 0.92
    assert judged(validation=tokens())[1]["accuracy"]["value"] == 0.95  # of verdicts, not of tokens
    plain = {**tokens(), "metrics": {"loss": estimate(1.0), "accuracy": estimate(0.3)}}
    assert judged(validation=plain)[1]["accuracy"]["passed"] is None


def test_a_value_that_is_not_finite_was_not_measured():
    broken = with_metrics(preferences(), accuracy={"value": None, "low": None, "high": None})
    assert judged(validation=broken)[1]["accuracy"]["passed"] is None


def test_zero_and_false_ask_nothing():
    bad = with_metrics(preferences(), accuracy=estimate(0.1), ece=estimate(0.5))
    off = {"accuracy": 0, "gap": 0.0, "convergence": 0, "beats_length": False, "ece": 0.0, "exit_code": True}
    assert gate.judge(off, {"sets": {"validation": bad}}, []) == {"passed": True, "checks": []}
    assert [c["name"] for c in gate.judge({**off, "ece": 0.1}, {"sets": {"validation": bad}}, [])["checks"]] == ["ece"]


def test_convergence_is_the_share_of_the_fall_that_the_last_tenth_brought():
    points = ((5, 1.2), (10, 1.0), (50, 9.0), (81, 0.5), (85, 0.5), (90, 0.8), (91, 0.3), (100, 0.5))
    losses = [{"step": s, "train/loss": v} for s, v in points]
    losses += [{"step": 100, "validation/loss": 7.0}, {"step": 95, "train/loss": None}]
    assert gate.losses_by_tenths(losses) == pytest.approx((1.1, 0.6, 0.4))
    _, checks = judged(losses=losses)
    assert checks["convergence"]["value"] == pytest.approx(0.2 / 0.7) and not checks["convergence"]["passed"]
    halved = [{**line, "train/loss": line["train/loss"] / 2} for line in losses if line.get("train/loss") is not None]
    assert judged(losses=halved)[1]["convergence"]["value"] == pytest.approx(0.2 / 0.7)  # whatever the scale
    rising = [{"step": s, "train/loss": v} for s, v in ((10, 0.7), (85, 0.5), (100, 0.6))]
    assert judged(losses=rising)[1]["convergence"]["passed"] is True
    nothing = [{"step": s, "train/loss": v} for s, v in ((10, 0.7), (85, 0.7), (100, 0.7))]
    found = judged(losses=nothing)[1]["convergence"]
    assert found["passed"] is False and "not below" in found["reason"] and "nothing was learnt" in found["advice"]
    for few in ([], losses[:3], [{"step": 100, "train/loss": 0.3}]):
        assert judged(losses=few)[1]["convergence"]["passed"] is None


@pytest.mark.parametrize("observed, words", [(0.6, "too sure by 20.0 points"), (0.95, "15.0 points less sure")])
def test_advice_on_calibration_knows_the_direction(observed, words):
    bins = {"edges": [0.5, 0.75, 1.0], "counts": [0, 8], "predicted": [None, 0.8], "observed": [None, observed]}
    measured = {**with_metrics(preferences(), ece=estimate(0.2)), "reliability": bins}
    assert words in judged(validation=measured)[1]["ece"]["advice"]
    measured["reliability"] = None
    assert "too sure of what it says" in judged(validation=measured)[1]["ece"]["advice"]


def test_what_could_not_be_measured_at_all_fails():
    verdict = gate.judge(GATE, {"sets": {}, "errors": {"validation": "its scores [nan] are not all finite"}}, lines())
    assert not verdict["passed"] and "scores [nan]" in verdict["checks"][0]["reason"] and verdict["checks"][0]["advice"]
    assert gate.text(verdict)[0].startswith("Not good enough: fails 1 of 2 checks of the quality gate")
