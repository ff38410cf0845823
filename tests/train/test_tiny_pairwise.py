"""The generated verdicts give nothing away, and `configs/pairwise_tiny.py` reaches the score that it states."""

import collections
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import transformers

from rmjax.data import synthetic
from rmjax.data.synthetic import TOPICS
from rmjax.inference.reward_model import RewardModel
from rmjax.train import training

CONFIG = Path(__file__).parents[2] / "configs" / "pairwise_tiny.py"
VERDICTS = ("A", "B", "tie")


def texts(row):
    return [row["input"][0]["content"], *(output["content"] for output in row["output"])]


def label(row):
    return VERDICTS.index(row["metadata"]["preferred"])


def rule(row):
    """The planted rule, read from the texts."""
    prompt, first, second = ({word.strip(".,?").lower() for word in text.split()} for text in texts(row))
    (named,) = prompt & set(TOPICS)
    return 0 if named in first else 1 if named in second else 2


@pytest.fixture(scope="module")
def generated():
    return [list(synthetic.rows("verdicts", n=n, seed=seed)) for n, seed in ((6000, 0), (600, 1))]


def test_the_best_reachable_score_and_the_majority(generated):
    for rows in generated:
        right = [rule(row) == label(row) for row in rows]
        assert np.mean(right) == 0.95
        assert collections.Counter(map(label, rows)) == dict.fromkeys(range(3), len(rows) // 3)


def test_strengths_are_how_often_the_better_reply_has_the_word(generated):
    for row in generated[1]:
        topic = [word for word in TOPICS if word in texts(row)[1 + label(row)]] if label(row) < 2 else []
        assert row["metadata"]["preference_strength"] == sum(texts(row)[1 + label(row)].count(t) for t in topic[:1])
    strengths = collections.Counter(row["metadata"]["preference_strength"] for row in generated[0])
    assert strengths[0] == 2000 and all(1200 < strengths[s] < 1470 for s in (1, 2, 3))


def test_lengths_tell_nothing(generated):
    from sklearn.tree import DecisionTreeClassifier

    def features(rows):
        _, first, second = np.array([[len(text.split()) for text in texts(row)] for row in rows]).T
        return np.stack([first, second, first - second, abs(first - second)], 1)

    tree = DecisionTreeClassifier(max_depth=6, random_state=0).fit(
        features(generated[0]), list(map(label, generated[0]))
    )
    assert tree.score(features(generated[1]), list(map(label, generated[1]))) < 0.38
    difference = features(generated[1])[:, 2]
    longer = np.where(difference > 0, 0, np.where(difference < 0, 1, 2))  # equally long is a tie
    assert np.mean(longer == list(map(label, generated[1]))) == pytest.approx(0.29, abs=0.005)  # as the config says


@pytest.mark.parametrize("parts", [(0,), (1, 2), (0, 1, 2)], ids=["prompt", "replies", "all"])
def test_a_linear_model_of_the_words_tells_nothing(generated, parts):
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = [CountVectorizer().fit([texts(row)[p] for row in generated[0]]) for p in parts]
    features = lambda rows: sparse.hstack([c.transform([texts(r)[p] for r in rows]) for p, c in zip(parts, counts)])
    model = LogisticRegression(C=0.1, max_iter=200).fit(features(generated[0]), list(map(label, generated[0])))
    assert model.score(features(generated[1]), list(map(label, generated[1]))) < 0.39


def test_prompts_of_other_seeds_are_others(generated):
    seen = [{texts(row)[0] for row in rows} for rows in generated]
    assert not seen[0] & seen[1] and len(seen[0]) > 5990


@pytest.mark.slow
def test_the_tiny_config_reaches_its_score_and_its_export_judges(tmp_path, generated):
    import torch

    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.data.cache_dir = str(tmp_path / "cache")
    training.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = max((v for v in lines if "validation/loss" in v), key=lambda v: v["validation/accuracy_averaged"])
    # Of four seeds the least were 0.948 and 0.978; another number of cores is like another seed.
    assert values["validation/accuracy_averaged"] > 0.92 and values["validation/consistency"] > 0.94
    assert min(values[f"validation/recall_{name}"] for name in VERDICTS) > 0.85
    assert json.loads((tmp_path / "run" / "quality.json").read_text())["passed"]
    assert values["validation/labels_A_count"] == values["validation/labels_B_count"] == 400  # 200 of each, both orders

    rows = generated[1]
    turns = [[[*row["input"], {"role": "assistant", **output}] for output in row["output"]] for row in rows]
    first, second = (list(side) for side in zip(*turns))
    model = RewardModel.load(tmp_path / "run" / "export")
    judged, swapped = model.judge(first, second), model.judge(second, first)
    decided = [max(verdict, key=verdict.get) for verdict in judged]
    accuracy = np.mean([name == row["metadata"]["preferred"] for name, row in zip(decided, rows)])
    assert accuracy == pytest.approx(values["validation/accuracy_averaged"], abs=0.5 / len(rows))
    for one, other in zip(judged, swapped):
        assert [one["A"], one["B"], one["tie"]] == pytest.approx([other["B"], other["A"], other["tie"]], abs=1e-4)

    hf = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "export")
    assert hf.config.id2label == dict(enumerate(VERDICTS))
    task = model.objective.task
    for verdict, *conversations in zip(judged[:5], first, second):
        texts = [model.chat.render(question) for question in task.questions(*conversations)]
        with torch.no_grad():
            one, other = (torch.softmax(hf(torch.tensor(model.chat.encode([t]))).logits[0], -1).numpy() for t in texts)
        assert list(verdict.values()) == pytest.approx(((one + other[[1, 0, 2]]) / 2).tolist(), abs=1e-4)
