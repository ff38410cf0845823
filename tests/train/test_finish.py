"""What a run leaves: measured, judged and described, of a run that is good and of one that learnt by heart."""

import json

import pytest
from small_runs import Started

from rmjax.evaluate import gate
from rmjax.runtime import exits

HEART = {  # 60 pairs, over and over; every prompt of validation is new
    "data.train": "synthetic://pairs?n=60&seed=0",
    "data.validation": "synthetic://pairs?n=120&seed=1",
    "duration": "60 epochs",
    "eval.every": "25%",
    "eval.train_groups": 60,
    "checkpoint.every": "50%",
    "checkpoint.metric": "train_slice/accuracy",
    "checkpoint.patience": 0,
    "export.step": "last",
    "model.scratch.hidden_size": 64,
    "optim.learning_rate": 3e-3,
    "log.report": True,
    "gate.exit_code": True,
}


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("heart") / "run"
    code, text = Started(workdir, tmp_path_factory.mktemp("cache"), **HEART).end()
    return workdir, code, text


@pytest.mark.slow
def test_a_run_that_learns_by_heart_fails_the_gate_and_its_exit_code_says_so(by_heart):
    workdir, code, text = by_heart
    assert code == exits.NOT_GOOD_ENOUGH, text[-2000:]
    verdict = json.loads((workdir / "quality.json").read_text())
    checks = {check["name"]: check for check in verdict["checks"]}
    assert not verdict["passed"] and not checks["accuracy"]["passed"] and not checks["gap"]["passed"]
    assert "the training data is fitted" in checks["accuracy"]["advice"]
    assert "\n".join(gate.text(verdict)) in text and "fails the quality gate" in text
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    of = lambda name: evaluation["sets"][name]["metrics"]["accuracy"]["value"]
    assert of("train_slice") > 0.95 and of("validation") < 0.7
    assert checks["gap"]["value"] == pytest.approx(of("train_slice") - of("validation"))


@pytest.mark.slow
def test_the_evaluation_at_the_end_agrees_with_the_last_one_of_the_loop(by_heart):
    workdir, _, _ = by_heart
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "validation/loss" in line)
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["step"] == last["step"] == 240
    for name in ("validation", "train_slice"):
        metrics = evaluation["sets"][name]["metrics"]
        for metric in ("accuracy", "ece", "margin", "tie_rate"):
            assert metrics[metric]["value"] == pytest.approx(last[f"{name}/{metric}"], abs=1e-4), metric
        assert metrics["nll"]["value"] == pytest.approx(last[f"{name}/loss"], rel=1e-4)
    worst = evaluation["sets"]["validation"]["worst"]
    assert worst[0]["probability"] <= worst[-1]["probability"] < 0.5
    assert worst[0]["prompt"] and worst[0]["preferred_text"] != worst[0]["rejected_text"]


@pytest.mark.slow
def test_everything_is_there_and_the_report_tells_the_verdict(by_heart):
    workdir, _, _ = by_heart
    page = (workdir / "report.html").read_text()
    assert page.count("<svg") >= 10 and "http://" not in page and "https://" not in page
    for check in json.loads((workdir / "quality.json").read_text())["checks"]:
        assert check["reason"][1:].split("%")[0] in page
    assert len(list((workdir / "report").glob("*.png"))) == page.count("<svg")
    contract = json.loads((workdir / "export" / "reward_contract.json").read_text())
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert contract["estimates"]["validation/accuracy"] == evaluation["sets"]["validation"]["metrics"]["accuracy"]
    card = (workdir / "export" / "README.md").read_text()
    assert "**Not good enough: fails " in card and str(workdir) not in card
    timings = [json.loads(line) for line in (workdir / "timings.jsonl").read_text().splitlines()]
    assert timings[-1]["step"] == 240 and timings[-1]["timing/pairs_per_second"] > 0
