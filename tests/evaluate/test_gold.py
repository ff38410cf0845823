"""A proxy against a gold model: agreement against scipy, the rule for compressed rewards, and words for the fit."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from rmjax.data import records
from rmjax.evaluate import gold
from rmjax.evaluate.scored import Scored


def scored(scores, n, prompt=None):
    k = len(scores)
    labels = records.compare(np.zeros(k))
    return Scored(id=f"g:{n}", prompt=n if prompt is None else prompt, source="g", tokens=np.arange(k), scores=np.array(
        scores, float), **labels)  # fmt: skip


def both(noise=0.7, n=200, k=4, seed=0, prompt_effect=0.5, shape=lambda x: x):
    """Groups with a proxy's scores, `shape` of gold's with noise; and gold's."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(n, k)) + prompt_effect * rng.normal(size=(n, 1))
    proxy = shape(true + noise * rng.normal(size=(n, k)))
    return [scored(s, i) for i, s in enumerate(proxy)], list(true)


def value(compared, name):
    return compared["metrics"][name]["value"]


def test_ranks_against_scipy():
    import scipy.stats

    groups, true = both()
    true = [np.round(x, 1) for x in true]
    groups = [dataclasses.replace(g, scores=np.round(g.scores)) for g in groups]
    found = gold.compare(groups, true)
    proxy, every = np.concatenate([g.scores for g in groups]), np.concatenate(true)
    assert value(found, "spearman") == pytest.approx(scipy.stats.spearmanr(proxy, every).statistic)
    assert value(found, "kendall") == pytest.approx(scipy.stats.kendalltau(proxy, every).statistic)
    for name, theirs in (("spearman_within", scipy.stats.spearmanr), ("kendall_within", scipy.stats.kendalltau)):
        each = [theirs(g.scores, x).statistic if np.ptp(g.scores) else 0.0 for g, x in zip(groups, true) if np.ptp(x)]
        assert value(found, name) == pytest.approx(np.mean(each)), name
    assert all(x["low"] < x["value"] < x["high"] for name, x in found["metrics"].items() if name != "kendall")


def test_match_rate_counts_pairs_of_a_prompt_that_gold_orders():
    groups = [scored([1.0, 2.0, 2.0], 0), scored([5.0, 4.0], 1)]
    found = gold.compare(groups, [np.array([0.0, 1.0, 3.0]), np.array([7.0, 7.0])])
    assert (found["pairs"], found["gold_ties"], found["groups"], found["responses"]) == (3, 1, 2, 5)
    assert value(found, "match_rate") == pytest.approx(2.5 / 3) and value(found, "tie_rate") == pytest.approx(1 / 3)
    assert found["proxy"] == {
        "min": 1,
        "max": 5,
        "range": 4,
        "mean": 2.8,
        "std": pytest.approx(np.std([1, 2, 2, 5, 4])),
    }


def test_scores_of_the_proxy_that_the_computation_cannot_tell_apart_are_ties():
    groups = [scored([1.0, 1.0 + 1e-6], 0), scored([0.0, 1.0], 1)]
    gold_scores = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    for resolution, rate, ties in ((0.0, 0.5, 0.0), (1e-5, 0.75, 0.5)):
        metrics = gold.compare(groups, gold_scores, resolution=resolution)["metrics"]
        assert (metrics["match_rate"]["value"], metrics["tie_rate"]["value"]) == (rate, ties)


def test_separation_and_cohens_d_by_their_definitions():
    groups, true = both(n=50, k=3)
    found = gold.compare(groups, true)
    apart, better, other = [], [], []
    for g, x in zip(groups, true):
        for i, j in itertools.combinations(range(3), 2):
            apart.append(abs(g.scores[i] - g.scores[j]))
            better.append(g.scores[i if x[i] > x[j] else j])
            other.append(g.scores[j if x[i] > x[j] else i])
    assert value(found, "separation_proxy") == pytest.approx(np.mean(apart) / np.std([g.scores for g in groups]))
    pooled = np.sqrt((np.var(better) + np.var(other)) / 2)
    assert value(found, "cohens_d") == pytest.approx((np.mean(better) - np.mean(other)) / pooled)


def test_normal_rewards_without_prompts_are_separated_as_said():
    groups, true = both(n=3000, k=2, prompt_effect=0)
    assert value(gold.compare(groups, true), "separation_gold") == pytest.approx(2 / np.sqrt(np.pi), rel=0.03)


def test_gold_itself_and_its_opposite():
    _, true = both(n=30)
    same = gold.compare([scored(3 * x - 1, i) for i, x in enumerate(true)], true)
    opposite = gold.compare([scored(-x, i) for i, x in enumerate(true)], true)
    for name in ("match_rate", "spearman_within", "kendall_within", "spearman", "kendall"):
        assert value(same, name) == pytest.approx(1)
        assert value(opposite, name) == pytest.approx(0 if name == "match_rate" else -1)
    assert value(same, "separation_proxy") == pytest.approx(value(same, "separation_gold"))


HEALTHY = {
    "as gold": lambda x: x,
    "tiny scale": lambda x: 1e-3 * x + 40,
    "large scale": lambda x: 1e4 * x,
    "bent": lambda x: np.tanh(x),
    "noise": lambda x: np.random.default_rng(1).normal(size=x.shape),
}
COMPRESSED = {
    "hears the prompt": lambda x: 0.1 * x + 2 * np.random.default_rng(1).normal(size=(len(x), 1)),
    "saturated but for a few": lambda x: np.exp(4 * x),
    "nearly constant": lambda x: np.where(np.arange(x.size).reshape(x.shape) % 50 == 0, 1.0, 0.0),
    "constant": lambda x: np.full(x.shape, 0.3),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_rewards_are_not_called_compressed(name):
    found = gold.compare(*both(shape=HEALTHY[name]))
    assert found["compressed"] is False and found["compression"].startswith("not compressed")


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_rewards_are_flagged(name):
    found = gold.compare(*both(shape=COMPRESSED[name], noise=0.1))
    assert found["compressed"] is True and found["compression"].startswith("compressed")
    assert "Compressed: two responses" in "\n".join(gold.lines(found))
    json.dumps(found, allow_nan=False)


def test_compression_begins_at_a_third_of_golds_separation():
    assert gold._compression(0.32, 1.0)[0] is True and gold._compression(0.34, 1.0)[0] is False
    assert gold._compression(0.32, 0.9)[0] is False and gold._compression(None, 1.0)[0] is True


def test_a_gold_model_that_hears_the_prompt_too_excuses_the_proxy():
    assert gold.compare(*both(prompt_effect=20, noise=0.1))["compressed"] is False


def test_compression_is_not_judged_where_gold_tells_nothing_apart():
    groups, _ = both(n=5)
    found = gold.compare(groups, [np.full(4, float(i)) for i in range(5)])
    assert found["compressed"] is None and value(found, "match_rate") is None and found["gold_ties"] == 30
    assert gold.compare(groups, [np.ones(4)] * 5)["compressed"] is None
    gold.lines(found)


@pytest.mark.parametrize(
    "train, test, fitted, says",
    [
        (None, None, None, "is not known"),
        (None, 0.8, None, "on held-out data it is 80.0%"),
        (0.6, 0.58, False, "the training set itself is not fitted: accuracy in training is 60.0%"),
        (0.95, 0.7, True, "fitted but does not carry over"),
        (0.9, 0.85, True, "fitted, and it carries over"),
        (0.9, None, True, "whether that carries over was not measured"),
    ],
)
def test_the_fit_is_told_training_first(train, test, fitted, says):
    groups, true = both(n=10)
    found = gold.compare(groups, true, train_accuracy=train, test_accuracy=test)
    assert found["fitted"]["fitted"] is fitted and says in found["fitted"]["text"]
    last = gold.lines(found)[-1]
    assert says[1:] in last and last.endswith(".") and last[0].isupper()


def test_responses_without_gold_are_left_out_and_counted():
    groups, true = both(n=20)
    whole = gold.compare(groups, true)
    more = [scored([*g.scores, 99.0], i) for i, g in enumerate(groups)]
    found = gold.compare(more, [np.array([*x, np.nan]) for x in true])
    assert found["without_gold"] == 20 and {**found, "without_gold": 0} == whole
    assert "20 responses without a gold score left out" in gold.lines(found)[0]


def test_the_block_is_aligned_and_whole():
    found = gold.compare(*both(), train_accuracy=0.9, test_accuracy=0.8)
    shown = gold.lines(found)
    assert "1,200 pairs of 800 responses to 200 prompts" in shown[0]
    rows = [row for row in shown if row.startswith("  ")]
    end = rows[0].index("%") + 1  # of the column of values
    assert len(rows) == len(found["metrics"]) + 2 and {row[end : end + 2] for row in rows} <= {"", "  "}
    assert max(map(len, shown[:-2])) <= 110


def test_what_cannot_be_compared_is_refused():
    groups, true = both(n=3)
    judge = dataclasses.replace(groups[0], scores=None, orders=np.full((4, 4, 2), 0.5))
    for wrong, scores, says in (
        (groups, true[:2], "3 groups, but gold scores of 2"),
        ([judge, *groups[1:]], true, "a judge has no scores"),
        (groups, [x[:3] for x in true], "4 responses, but gold scores"),
        (groups, [x * np.inf for x in true], "not finite"),
        (groups, [x * np.nan for x in true], "nothing can be compared"),
    ):
        with pytest.raises(ValueError, match=says):
            gold.compare(wrong, scores)
