"""Evaluations as text: aligned, whole, with the best of several models marked; and as JSON."""

import json

import numpy as np
import pytest
from made_up_answers import judged, pairs, rankings, rated, stepped
from made_up_evaluations import benchmark

from rmjax.evaluate import measures, tables
from rmjax.report import naming


@pytest.fixture(scope="module")
def every_kind():
    scores, labels, given = rated(60)
    return {
        "pairs": measures.preferences(pairs(120)),
        "rankings": measures.preferences(rankings()),
        "judge": measures.preferences(judged(30)),
        "ratings": measures.attributes(scores, labels, **given),
        "steps": measures.steps(*stepped(30)),
        "text": measures.tokens(np.ones(4), np.full(4, 2.0), np.ones(4), np.ones(4), np.arange(4)),
    }


def test_every_kind_is_json_and_has_names_for_its_headlines(every_kind):
    for measured in every_kind.values():
        assert json.loads(json.dumps(measured, allow_nan=False)) == measured
        assert all({"value", "low", "high"} == x.keys() for x in measured["metrics"].values())
        assert any(name in measured["metrics"] for name in naming.HEADLINES[measured["kind"]])


def test_a_block_is_aligned_and_has_every_metric(every_kind):
    for measured in every_kind.values():
        shown = tables.lines(measured)
        known = {name: x for name, x in measured["metrics"].items() if x["value"] is not None}
        rows = {row[2:].split("  ")[0]: row for row in shown if row.startswith("  ")}
        for name in known:
            metric = naming.metric(name, measured["kind"])
            assert naming.number(known[name]["value"], metric.percent) in rows[metric.title]
        assert max(map(len, rows.values())) <= 110
    text = "\n".join(tables.lines(every_kind["rankings"]))
    assert "\n  4 " in text and "Accuracy by length difference" in text


def test_a_benchmark_is_shown_with_subsets_and_what_is_missing():
    shown = tables.lines(benchmark())
    assert any(row.split() == ["overall", "78.0%", "76.0%", "to", "80.0%"] for row in shown)
    assert any(row.startswith("  xstest-should-refuse") and row.endswith("  96") for row in shown)
    unknown = {**benchmark(), "subsets": {"empty": {"count": 0, "value": None, "low": None, "high": None}}}
    assert any(row.split() == ["empty", "–", "0"] for row in tables.lines(unknown))
    assert shown[:3] == ["480 groups.", "Sections weigh equally.", "The data lacks refusals-dangerous."]


def test_models_stand_side_by_side_with_the_best_of_each_row_marked():
    good, bad = measures.preferences(pairs(200, noise=3)), measures.preferences(pairs(200, noise=0.3))
    shown = tables.side_by_side(
        {"one": {"held_out": bad, "rm_bench": benchmark()}, "a/longer-name": {"held_out": good}}
    )  # fmt: skip
    row = next(row for row in shown if row.startswith("  Accuracy"))
    assert "*" not in row[: row.index("%") + 10] and row.endswith("*") and "±" in row
    likelihood = next(row for row in shown if "log-likelihood" in row)
    assert likelihood.endswith("*")  # the lower one
    assert not any("*" in row for row in shown if row.startswith(("  A coin", "  Longer is better", "  overall")))
    assert next(row for row in shown if row.startswith("  overall")).endswith("–")
    assert shown[0] == "held_out" and shown[1].split() == ["one", "a/longer-name"]
