"""The planted rules of scores and steps hold, nothing simpler tells the labels, and the demos reach their scores."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from rmjax.data import formats, synthetic
from rmjax.data.synthetic.scores import MANNERS, SUBJECTS
from rmjax.data.synthetic.steps import THINGS
from rmjax.train import training

ROOT = Path(__file__).parents[2]
ATTRIBUTES = {"relevance": SUBJECTS, "style": MANNERS}
TRAIN = 4000


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def true_scores(row):
    """What the rule says, from the text alone."""
    found = {}
    for name, known in ATTRIBUTES.items():
        (asked,) = set(words(row["prompt"])) & set(known)
        found[name] = words(row["response"]).count(asked)
    return found


def first_wrong(row):
    """The place of the first step that breaks the rule, from the text alone; the number of steps if none does."""
    named = set(words(row["prompt"])) & set(THINGS)
    assert len(named) == 2
    for place, step in enumerate(row["completions"]):
        (thing,) = set(words(step)) & set(THINGS)
        if thing not in named:
            return place
    return len(row["completions"])


@pytest.fixture(scope="module")
def scores():
    return list(synthetic.rows("scores", n=6000, seed=0))


@pytest.fixture(scope="module")
def steps():
    return list(synthetic.rows("steps", n=6000, seed=0))


def bags(*columns):
    """Word counts of several columns of texts, side by side."""
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer

    tables = [CountVectorizer(token_pattern=r"\w+").fit_transform(column) for column in columns]
    return sparse.hstack(tables).tocsr()


# Scores


def test_rows_are_read_as_records_with_attributes_and_steps(scores, steps):
    for name, rows in (("scored_text", scores[:300]), ("stepwise", steps[:300])):
        layout = formats.detect(rows)
        assert layout.name == name
        for row in rows:
            (record,) = layout.read(row, source="", where="")
            if name == "scored_text":
                given = {a: np.nan if row[a] is None else row[a] for a in ATTRIBUTES}
                np.testing.assert_equal({a: x[0] for a, x in record.attributes.items()}, given)
            else:
                text = record.conversations[0][-1]["content"]
                assert [text[: s.stop].endswith(t) for s, t in zip(record.steps[0], row["completions"])]
                assert [step.label for step in record.steps[0]] == [float(x) for x in row["labels"]]


def test_scores_follow_the_rule_but_for_the_noise(scores):
    errors, missing = [], 0
    for row in scores:
        given = [row[name] for name in ATTRIBUTES]
        assert any(score is not None for score in given)
        missing += None in given
        errors += [row[name] - truth for name, truth in true_scores(row).items() if row[name] is not None]
    assert set(errors) == {-1, 0, 1} and 0.08 < np.mean(np.abs(errors)) < 0.12
    assert 0.18 < missing / len(scores) < 0.22


def test_scores_baselines(scores):
    """A constant and the length have the labels' variance; the rule has the planted noise."""
    from sklearn.linear_model import LinearRegression, Ridge
    from sklearn.metrics import mean_squared_error

    for name in ATTRIBUTES:
        rows = [row for row in scores if row[name] is not None]
        label = np.array([row[name] for row in rows], float)
        constant = np.mean((label - label.mean()) ** 2)
        truth = np.array([[true_scores(row)[name] == level for level in range(5)] for row in rows], float)
        best = mean_squared_error(label, LinearRegression().fit(truth, label).predict(truth))
        length = np.array([[len(words(row["response"]))] for row in rows])
        by_length = mean_squared_error(label, LinearRegression().fit(length, label).predict(length))
        table = bags([row["prompt"] for row in rows], [row["response"] for row in rows])
        fitted = Ridge(10.0).fit(table[:TRAIN], label[:TRAIN])
        by_words = mean_squared_error(label[TRAIN:], fitted.predict(table[TRAIN:]))
        assert 1.9 < constant < 2.1 and by_length > 0.99 * constant and by_words > 0.97 * constant
        assert 0.085 < best < 0.11


# Steps


def test_steps_follow_the_rule_but_for_the_noise(steps):
    right = 0
    for row in steps:
        claimed = sum(row["labels"])
        assert row["labels"] == sorted(row["labels"], reverse=True)  # after an error all is wrong
        right += claimed == first_wrong(row)
    assert 0.95 < right / len(steps) < 0.97
    truth = np.array([[first_wrong(row) < len(row["completions"]), len(row["completions"])] for row in steps])
    assert 0.48 < truth[:, 0].mean() < 0.52 and set(truth[:, 1]) == {3, 4, 5}


def test_steps_baselines(steps):
    """Neither the majority, the length, a linear model of the words, nor the response alone gets near the rule."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.tree import DecisionTreeClassifier

    label, rule, length, seen, prompt, before, now, chains = [], [], [], [], [], [], [], []
    for row in steps:
        wrong, so_far = first_wrong(row), []
        things = [(set(words(step)) & set(THINGS)).pop() for step in row["completions"]]
        for place, (step, given) in enumerate(zip(row["completions"], row["labels"])):
            label.append(given)
            rule.append(place < wrong)
            prompt.append(row["prompt"])
            before.append(" ".join(so_far) or "none")
            now.append(step)
            so_far.append(step)
            length.append(len(words(" ".join(so_far))))
            seen.append(
                [len(set(things[: place + 1])), things[place] in things[:place], place, things.index(things[place])]
            )
        chains.append(all(row["labels"]))
    label, length = np.array(label), np.array(length)[:, None]
    majority = max(label.mean(), 1 - label.mean())
    by_length = LogisticRegression().fit(length, label).score(length, label)
    table, half = bags(prompt, before, now), len(label) * 2 // 3
    by_words = LogisticRegression(max_iter=200).fit(table[:half], label[:half]).score(table[half:], label[half:])
    alone = DecisionTreeClassifier(max_depth=8).fit(seen[:half], label[:half]).score(seen[half:], label[half:])
    best = np.mean(label == np.array(rule))
    assert 0.66 < majority < 0.70 and abs(by_length - majority) < 0.01 and by_words < majority + 0.02
    assert alone < 0.83
    assert 0.97 < best < 0.99 and 0.47 < np.mean(chains) < 0.53


# Demos


def run(name, tmp_path, **values):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}_tiny.py"))["get_config"]()
    flat = {key.replace("__", "."): value for key, value in values.items()}
    config.update_from_flattened_dict({"log.to": "", "data.cache_dir": str(tmp_path / "cache"), **flat})
    training.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation/loss" in line]


@pytest.mark.slow
def test_pointwise_reaches_its_score(tmp_path):
    first, *_, last = run("pointwise", tmp_path)
    assert first["validation/mse"] > 1.9 and last["validation/mse"] < 0.2  # a constant has 1.9, the rule 0.09
    assert last["validation/pearson"] > 0.93 and last["validation/kappa"] > 0.93
    assert last["validation/labels"] > 1000


@pytest.mark.slow
def test_prm_reaches_its_score(tmp_path):
    first, *_, last = run("prm", tmp_path)
    assert first["validation/accuracy"] < 0.72
    assert last["validation/accuracy"] > 0.95 and last["validation/first_error_accuracy"] > 0.9
    assert last["validation/responses"] == 600
