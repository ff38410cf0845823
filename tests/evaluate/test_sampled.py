"""Judges asked by sampling: votes against all subsets, and judges whose judgements are planted."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats
import transformers
from planted_judge import Planted

from rmjax.evaluate import gate, sampled, tables
from rmjax.evaluate.estimates import Estimates
from rmjax.inference.judgements import Judge
from rmjax.inference.sampler import Drawing
from rmjax.judging import verdicts
from rmjax.judging.writing import Writing

A, B, TIE, UNREADABLE = range(4)


def vote(codes):
    """The verdict of more than half of those that can be read."""
    read = [code for code in codes if code != UNREADABLE]
    if not read:
        return UNREADABLE
    return next((code for code in (A, B) if 2 * read.count(code) > len(read)), TIE)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_a_vote_is_the_mean_over_all_subsets(n):
    codes = np.random.default_rng(n).integers(0, 4, (30, 6))
    counts = np.stack([(codes == code).sum(1) for code in range(4)], 1)
    for row, chances in zip(codes, sampled.vote_chances(counts, n)):
        votes = [vote(some) for some in itertools.combinations(row, n)]
        np.testing.assert_allclose(chances, np.bincount(votes, minlength=4) / len(votes))


def test_metrics_of_pairs_by_hand():
    codes = np.array([[A, A, B, UNREADABLE], [B, B, TIE, B], [UNREADABLE] * 4, [A, TIE, TIE, A]])
    label, pair = np.array([A, B, A, B]), np.array([0, 0, 1, 1])
    estimates = Estimates(np.array([0, 0, 1, 1]))
    right = sampled.of_pairs(estimates, codes, label, pair, np.ones(4))
    assert right.tolist() == [[1, 1, 0, 0], [1, 1, 0.5, 1], [0] * 4, [0, 0.5, 0.5, 0]]
    found = {name: x["value"] for name, x in estimates.all().items()}
    assert found["accuracy"] == right.mean()
    assert found["vote_4"] == np.mean([1, 1, 0, 0.5])  # two of three; three of four; nothing; no majority
    # Of six pairs: A A, A B (a tie), A and what cannot be read twice, A B, B and what cannot be read.
    first = np.mean([1, 0.5, 1, 0.5, 1, 0])
    second = np.mean([1, 0.5, 1, 0.5, 1, 0.5])
    assert found["vote_2"] == pytest.approx(np.mean([first, second, 0, np.mean([0.5, 0.5, 0, 0.5, 0.5, 0.5])]))
    assert found["consistency"] == 0.5  # the first pair's votes name one response; nothing is never consistent
    assert found["first_position"] == 4 / 8 and found["tie_rate"] == 3 / 11
    # Two votes have a majority, of 2/3 and 3/4, and both are right: in bins of their own.
    assert found["ece"] == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_metrics_of_ratings_by_hand():
    values = np.array([[1, 2, np.nan, 3], [5, 5, 5, 4], [np.nan] * 4, [2, 2, 2, 2.0]])
    label = np.array([2.0, 5, 3, 1])
    estimates = Estimates(np.arange(4))
    right = sampled.of_ratings(estimates, values, label, np.ones(4))
    assert right.sum() == 4 and right[2].sum() == 0
    found = {name: x["value"] for name, x in estimates.all().items()}
    assert found["accuracy"] == 4 / 16 and found["mae"] == pytest.approx((1 + 0 + 1 + 1 + 4) / 11)
    assert found["mae_of_mean"] == pytest.approx((0 + 0.25 + 1) / 3)
    means, labels = [2, 4.75, 2], [2, 5, 1]
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(means, labels).statistic)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(means, labels).statistic)


@pytest.fixture
def tokenizer(tokenizer_dir):
    return transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_judge_of_pairs_is_measured(tokenizer, tmp_path, capsys):
    rows = [
        {"prompt": f"question {n}", "chosen": "long " * 9 if n % 4 else "no", "rejected": "short"} for n in range(20)
    ]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "a"}]  # nothing to ask
    turns = []

    def judge(text, k):
        turns.append(text)
        if k == 3:
            return "I cannot say"
        first, second = text.find("long"), text.find("short")
        return "<better>A</better>" if 0 <= first < second or first < 0 else "<better>B</better>"

    task = Writing(target="pair", template=verdicts.load_template("", "judge_pair"))
    source = write(tmp_path / "in.jsonl", rows)
    found = sampled.measured(Judge(Planted(tokenizer, judge), task, Drawing(responses=4)), source)
    # Four samples of each question, and the likeliest one.
    assert (found["kind"], found["groups"], found["prompts"], len(turns)) == ("judgements", 40, 20, 200)
    metrics = {name: x["value"] for name, x in found["metrics"].items()}
    # The longer one is right in three of four; without one the judge takes the first, right in one order of two.
    assert metrics["accuracy"] == pytest.approx(0.75 * (0.75 + 0.25 / 2)) and metrics["unreadable"] == 0.25
    assert metrics["vote_4"] == pytest.approx(0.75 + 0.25 / 2) and metrics["consistency"] == 0.75
    assert metrics["accuracy_greedy"] == metrics["vote_4"]  # it says what the samples agree on
    assert metrics["ece"] == pytest.approx(1 - metrics["vote_4"])  # of one mind, and right seven times in eight
    assert metrics["cut_off"] == 0.25 and len(found["examples"]) == 20
    assert found["metrics"]["accuracy"]["low"] < metrics["accuracy"] < found["metrics"]["accuracy"]["high"]
    assert "identical_responses" in capsys.readouterr().err
    shown = "\n".join(tables.lines(found))
    assert "Vote of 4" in shown and "One judgement is right" in shown and "Unreadable" in shown


def test_a_judge_of_ratings_is_measured(tokenizer, tmp_path):
    rows = [{"prompt": f"question {n}", "response": "good " * (n % 5), "score": n % 5} for n in range(1, 20)]
    rows = [row for row in rows if row["response"]]
    judge = lambda text, k: f"<score>{min(4, text.count('good') + (k == 1))}</score>"
    task = Writing(target="score", template=verdicts.load_template("", "judge_score"), scale=(0, 4))
    source = write(tmp_path / "in.jsonl", rows)
    found = sampled.measured(Judge(Planted(tokenizer, judge), task, Drawing(responses=2)), source)["metrics"]
    four = np.mean([row["score"] == 4 for row in rows])
    assert found["accuracy"]["value"] == pytest.approx(0.5 + four / 2)
    assert found["mae"]["value"] == pytest.approx((1 - four) / 2) and found["unreadable"]["value"] == 0


def test_questions_that_there_is_no_room_for_are_named_and_counted(tokenizer, tmp_path, capsys):
    row = lambda prompt: {"prompt": prompt, "responses": ["a", "b", "endless"], "ranks": [1, 2, 3]}
    source = write(tmp_path / "in.jsonl", [row("first"), row("endless"), row("third")])
    task = Writing(target="pair", template=verdicts.load_template("", "judge_pair"))
    planted = Planted(tokenizer, lambda text, k: "<better>A</better>", over_long="endless")
    found = sampled.measured(Judge(planted, task, Drawing(responses=2)), source)
    assert (found["groups"], found["question_too_long"]) == (4, 14)  # of each of two rows one pair in both orders
    assert found["prompts"] == 2 and found["metrics"]["accuracy"]["value"] == 0.5
    told = capsys.readouterr().err
    assert "question_too_long 3 (2 kept)" in told and "in.jsonl:0: it is too long; give a smaller --max_tokens" in told
    source = write(tmp_path / "in.jsonl", [row("endless")])
    with pytest.raises(ValueError, match=r"no question that the model has room for; question_too_long 1: .*in.jsonl:0"):
        sampled.measured(Judge(planted, task, Drawing(responses=2)), source)


def test_data_without_a_label_is_refused(tokenizer, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "response": "a", "score": 1}])
    task = Writing(target="pair", template=verdicts.load_template("", "judge_pair"))
    with pytest.raises(ValueError, match="no row has a label that this judge writes"):
        sampled.measured(Judge(Planted(tokenizer, str), task, Drawing(responses=2)), source)


def test_the_gate_of_a_judge_that_is_sampled():
    share = lambda value: {"value": value, "low": max(value - 0.01, 0.0), "high": value + 0.01}
    keys = {"accuracy": 0.7, "gap": 0.0, "convergence": 0.05, "unreadable": 0.02, "cut_off": 0.05, "consistency": True}
    lines = [{"step": 0, "validation/consistency": 0.8, "train/loss": 1.0}]

    def judged(**metrics):
        known = {"accuracy": 0.9, "unreadable": 0.0, "cut_off": 0.0, "consistency": 0.85, **metrics}
        found = {name: share(value) for name, value in known.items()}
        sets = {"validation": {"kind": "judgements", "prompts": 100, "groups": 200, "metrics": found}}
        verdict = gate.judge(keys, {"sets": sets}, lines)
        return verdict["passed"], {check["name"]: check["passed"] for check in verdict["checks"]}

    passed, checks = judged()
    assert passed and set(checks) == {"accuracy", "unreadable", "cut_off", "consistency"}
    for name, value in (("unreadable", 0.1), ("cut_off", 0.1), ("consistency", 0.6), ("accuracy", 0.5)):
        assert judged(**{name: value})[1] == {**checks, name: False}
