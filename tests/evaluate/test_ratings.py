"""Metrics of ratings, steps and text against scikit-learn, scipy, the objectives and cases worked by hand."""

import json
import math

import numpy as np
import pytest
from made_up_answers import metrics_of, rated, stepped, value

from rmjax.evaluate import measures
from rmjax.objectives.prm import ProcessReward

# Attributes


def test_attributes_against_scikit_learn_and_scipy():
    import scipy.stats
    import sklearn.metrics

    scores, labels, given = rated()
    found = measures.attributes(scores, labels, **given)
    for i, name in enumerate("ab"):
        here = ~np.isnan(labels[:, i])
        x, y = scores[here, i], labels[here, i]
        rating = np.clip(np.floor(x + 0.5), 0, 4).astype(int)
        expected = {
            "mse": sklearn.metrics.mean_squared_error(y, x),
            "mae": sklearn.metrics.mean_absolute_error(y, x),
            "pearson": scipy.stats.pearsonr(x, y).statistic,
            "spearman": scipy.stats.spearmanr(x, y).statistic,
            "kappa": sklearn.metrics.cohen_kappa_score(y.astype(int), rating, weights="quadratic"),
        }
        for metric, want in expected.items():
            estimate = found["metrics"][f"{metric}/{name}"]
            assert estimate["value"] == pytest.approx(want), metric
            assert estimate["low"] < want < estimate["high"]
    for metric in ("pearson", "spearman", "kappa"):
        assert value(found, metric) == pytest.approx(np.mean([value(found, f"{metric}/{name}") for name in "ab"]))
    assert value(found, "mse") == pytest.approx(np.nanmean((scores - labels) ** 2))
    assert (found["groups"], found["prompts"]) == (150, 150)


def test_labels_count_with_their_weight_in_errors_and_once_in_correlations():
    scores, labels, given = rated()
    weight = np.random.default_rng(1).uniform(0.5, 2, len(scores))
    plain, found = (
        measures.attributes(scores, labels, **given),
        measures.attributes(scores, labels, **given, weight=weight),
    )
    assert value(found, "kappa/a") == value(plain, "kappa/a") and value(found, "pearson") == value(plain, "pearson")
    known = ~np.isnan(labels)
    errors = np.abs(scores - labels)[known]
    assert value(found, "mae") == pytest.approx(np.average(errors, weights=np.stack([weight] * 2, 1)[known]))


def test_attributes_as_plots_and_errors_show_them():
    scores, labels, given = rated()
    found = measures.attributes(scores, labels, **given)
    one, here = found["attributes"]["a"], ~np.isnan(labels[:, 0])
    assert one["labels"]["edges"] == one["scores"]["edges"] and one["labels"]["edges"][1] % 1 == 0.5
    assert sum(one["labels"]["counts"]) == sum(one["scores"]["counts"]) == here.sum() == sum(one["curve"]["counts"])
    assert one["curve"]["label"] == [0, 1, 2, 3, 4]
    third = scores[here, 0][labels[here, 0] == 3]
    assert one["curve"]["mean"][3] == pytest.approx(third.mean()) and one["curve"]["sd"][3] == pytest.approx(
        third.std()
    )
    errors = [abs(x["score"] - x["label"]) for x in found["worst"]]
    assert errors == sorted(errors, reverse=True) and len(errors) == 20
    assert errors[0] == pytest.approx(np.nanmax(np.abs(scores - labels)))


def test_labels_that_are_no_ratings_and_attributes_without_labels():
    rng = np.random.default_rng(0)
    labels = np.stack([rng.normal(size=90), np.full(90, np.nan)], 1)
    made = measures.attributes(
        labels + 0.1, labels, np.arange(90), ["x"] * 90, np.arange(90), np.zeros(90), ("a", "b")
    )  # fmt: skip
    assert len(made["attributes"]["a"]["curve"]["label"]) == 10 and made["attributes"]["b"]["curve"]["label"] == []
    assert value(made, "pearson") == pytest.approx(1) == value(made, "pearson/a")
    assert made["metrics"]["pearson/b"] == {"value": None, "low": None, "high": None}
    assert {x["attribute"] for x in made["worst"]} == {"a"}
    json.dumps(made, allow_nan=False)
    with pytest.raises(ValueError, match="expected \\[n, 2\\]"):
        measures.attributes(labels[:5], labels, np.arange(90), ["x"] * 90, np.arange(90), np.zeros(90), ("a", "b"))


# Steps and tokens


def test_steps_against_scikit_learn_and_the_objective():
    import sklearn.metrics

    p, label, response, prompt = stepped()
    found, right = measures.steps(p, label, response, prompt), label >= 0.5
    assert value(found, "auc") == pytest.approx(sklearn.metrics.roc_auc_score(right, p))
    assert value(found, "accuracy") == sklearn.metrics.accuracy_score(right, p >= 0.5)
    assert value(found, "accuracy_correct") == pytest.approx(sklearn.metrics.recall_score(right, p >= 0.5))
    assert value(found, "accuracy_incorrect") == pytest.approx(sklearn.metrics.recall_score(~right, p < 0.5))
    sure = np.clip(p, 1e-7, 1 - 1e-7)
    outputs = np.stack([np.log1p(-sure), np.log(sure)], -1)[None].astype(np.float32)
    e = len(p)
    batch = {
        **{"end": np.arange(e)[None], "end_group": response[None], "end_slot": np.zeros((1, e), int)},
        **{"value": label[None, :, None], "mask": np.ones((1, e, 1)), "weight": np.ones((1, response.max() + 1))},
    }
    expected = metrics_of(ProcessReward(), outputs, batch)
    assert value(found, "first_error_accuracy") == pytest.approx(expected["first_error_accuracy"])
    assert value(found, "nll") == pytest.approx(expected["loss"], rel=1e-5)
    assert value(found, "ece") == pytest.approx(expected["ece"], abs=1e-6)
    assert found["groups"] == expected["responses"] == 80 and found["prompts"] == 40
    assert sum(found["scores"]["correct"]["counts"]) == right.sum() and sum(found["reliability"]["counts"]) == e


def test_first_errors_by_hand_in_any_order_of_responses():
    said = {7: ([1, 0, 1], [1, 0, 0]), 2: ([1, 1], [1, 1]), 5: ([0], [1])}  # predicted, labelled
    response = np.concatenate([[r] * len(x) for r, (x, _) in said.items()])
    p, label = (np.concatenate([x[i] for x in said.values()]).astype(float) for i in (0, 1))
    found = measures.steps(0.1 + 0.8 * p, label, response, response)
    assert value(found, "first_error_accuracy") == pytest.approx(2 / 3)


def test_steps_of_one_kind_have_no_auc():
    found = measures.steps(np.array([0.9, 0.4]), np.ones(2), np.arange(2), np.arange(2))
    assert found["metrics"]["auc"]["value"] is None and found["metrics"]["accuracy_incorrect"]["value"] is None
    assert sum(found["scores"]["incorrect"]["counts"]) == 0
    with pytest.raises(ValueError, match="at least one step"):
        measures.steps(*[np.zeros(0)] * 4)


def test_tokens_by_hand():
    found = measures.tokens(
        np.array([2.0, 6.0, 1.0]), np.array([4.0, 4.0, 2.0]), np.array([3.0, 1.0, 2.0]),
        np.array([1.0, 0.0, np.nan]), np.arange(3),
    )  # fmt: skip
    assert value(found, "loss") == 0.9 and value(found, "perplexity") == pytest.approx(math.exp(0.9))
    assert value(found, "accuracy") == 0.6 and value(found, "verdict_accuracy") == 0.5 and found["groups"] == 3
    assert sum(found["losses"]["counts"]) == 3 and found["losses"]["edges"][-1] == 1.5
    without = measures.tokens(np.ones(2), np.ones(2), np.ones(2), np.full(2, np.nan), np.arange(2))
    assert "verdict_accuracy" not in without["metrics"]
    with pytest.raises(ValueError, match="some count above 0"):
        measures.tokens(*[np.zeros(2)] * 5)
