"""Metrics of preferences against scikit-learn, scipy, the objectives' own sums and cases worked by hand."""

import dataclasses
import itertools
import json
import math
import time

import numpy as np
import pytest
from made_up_answers import group, judged, metrics_of, pairs, rankings, rated, value

from rmjax.data import records
from rmjax.evaluate import benchmarks, best_of_n, estimates, measures, scored, tables
from rmjax.evaluate.estimates import Estimates
from rmjax.evaluate.rules import REWARD_BENCH
from rmjax.objectives.bradley_terry import BradleyTerry
from rmjax.objectives.pairwise import Pairwise


def flat(groups):
    """The decided pairs one by one, as Scored tells them: verdict, probability, weight."""
    found = []
    for g in groups:
        for i, j in zip(*np.nonzero(g.wins > g.wins.T)):
            if not np.isnan(g.alone.verdicts[0][i, j]):
                found.append((g.alone.verdicts[0][i, j], g.alone.preference[0][i, j], g.weight))
    return (np.array(column) for column in zip(*found))


# Stacks and estimates


@pytest.mark.parametrize("groups", [rankings(), judged(), judged(classes=2), pairs(9) + rankings(5)], ids=len)
def test_stacks_say_what_single_groups_say(groups):
    seen = 0
    for stack in scored.stacks(groups):
        for row, n in enumerate(stack.at):
            one = groups[n]
            np.testing.assert_array_equal(stack.verdicts[row], one.alone.verdicts[0])
            np.testing.assert_array_equal(stack.preference[row], one.alone.preference[0])
            if one.orders is not None:
                np.testing.assert_array_equal(stack.first_verdicts[row], one.alone.first_verdicts[0])
            seen += 1
    assert seen == len(groups)


def test_large_groups_are_measured_in_parts(monkeypatch):
    groups = rankings(40)
    whole = measures.preferences(groups)
    monkeypatch.setattr(scored, "CHUNK", 100)
    assert len(list(scored.stacks(groups))) == 10
    assert measures.preferences(groups) == whole


@pytest.mark.parametrize(
    "groups, says",
    [
        ([], "none of 0 groups"),
        ([dataclasses.replace(g, weight=0.0) for g in pairs(3)], "none of 3 groups"),
        (pairs(2) + judged(1), "1 of 3 groups are a judge's"),
        ([*pairs(2), group([[0, 1], [0, 0]], [1, np.nan], id="bad:7")], "bad:7: its scores .* not all finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(groups, says):
    with pytest.raises(ValueError, match=says):
        measures.preferences(groups)


def test_a_share_of_one_has_the_exact_binomial_end():
    import scipy.stats

    found = Estimates(np.arange(7))
    found.share("all", np.arange(7), np.ones(7), np.ones(7))
    found.share("none", np.arange(7), np.zeros(7), np.ones(7))
    made, exact = found.all(), scipy.stats.binomtest(7, 7).proportion_ci(0.95, "exact")
    assert made["all"] == pytest.approx({"value": 1, "low": exact.low, "high": 1})
    assert made["none"] == pytest.approx({"value": 0, "low": 0, "high": 1 - exact.low})


@pytest.mark.parametrize("true, n", [(0.97, 28), (0.9, 12), (0.5, 10), (0.03, 28)])
def test_intervals_of_shares_cover_the_truth_near_their_ends_and_of_few(true, n):
    """In benchmarks and elsewhere; binomial 95 % intervals that keep their promise are too wide for few (Agresti and
    Coull 1998), so only the lower bound is asked for: 300 of 0.95 are over 0.92 in 99 % of the cases."""
    rng, held = np.random.default_rng(5), {"of a set": 0, "of a benchmark": 0}
    benchmark = benchmarks.BENCHMARKS["judge_bench"]
    for _ in range(300):
        hits = rng.random(n) < true
        found = Estimates(np.arange(n))
        found.share("share", np.arange(n), hits, np.ones(n))
        rows = [group([[0, 1], [0, 0]], [x, 0.5], prompt=i, source="math") for i, x in enumerate(hits)]
        subset = benchmarks.score(benchmark, rows)["subsets"]["math"]
        for name, x in (("of a set", found.all()["share"]), ("of a benchmark", subset)):
            held[name] += x["low"] <= true <= x["high"]
    assert min(held.values()) / 300 > 0.92, held


def test_official_numbers_of_subsets_that_are_all_right_have_a_width():
    import scipy.stats

    sizes = {"knowledge": 40, "reasoning": 30, "math": 28, "coding": 1}
    rows = [
        group([[0, 1], [0, 0]], [1, 0], prompt=i, source=s)
        for i, s in enumerate(np.repeat([*sizes], [*sizes.values()]))
    ]
    found = benchmarks.score(benchmarks.BENCHMARKS["judge_bench"], rows)
    for name, n in {**sizes, "overall": 99}.items():
        low = scipy.stats.binomtest(n, n).proportion_ci(0.95, "exact").low
        assert found["metrics"][name] == pytest.approx({"value": 1, "low": low, "high": 1}), name
    safety = [group([[0, 1], [0, 0]], [1, 0], prompt=i, source=s) for s in REWARD_BENCH["Safety"] for i in range(20)]
    section = benchmarks.score(benchmarks.BENCHMARKS["reward_bench"], safety)["metrics"]["Safety"]
    assert (
        section["high"] == 1 and 0.025 ** (1 / 20) < section["low"] < 0.025 ** (1 / 100) < 1
    )  # weighted means vary less


def test_areas_and_curves_at_their_ends_have_a_width():
    right, n = np.arange(40) % 2 == 0, np.arange(40)
    made = measures.steps(np.where(right, 0.9, 0.1), right.astype(float), n, n)
    assert made["metrics"]["auc"]["value"] == 1 and 0.7 < made["metrics"]["auc"]["low"] < 0.9
    gold = np.arange(4.0)
    best = measures.preferences([group(gold[:, None] > gold, gold, prompt=i) for i in range(10)])["best_of_n"]
    assert best["model"][-1] == pytest.approx({"value": 1, "low": 0.025**0.1, "high": 1})


def test_one_prompt_tells_of_a_share_what_one_can_tell_and_nothing_of_others():
    metrics = measures.preferences(pairs(1, noise=100))["metrics"]
    assert metrics["accuracy"] == pytest.approx({"value": 1, "low": 0.025, "high": 1})
    assert metrics["margin"]["value"] > 0 and metrics["margin"]["low"] is metrics["margin"]["high"] is None


def test_groups_of_no_weight_count_nowhere():
    counted = pairs(30, per_prompt=2)
    others = [dataclasses.replace(g, prompt=1000 + i, weight=0.0) for i, g in enumerate(pairs(9, seed=1))]
    assert measures.preferences(others[:4] + counted + others[4:]) == measures.preferences(counted)
    scores, labels, given = rated(20)
    weight = np.arange(20) % 4 != 0
    few = {name: np.array(x)[weight] if len(x) == 20 else x for name, x in given.items()}
    assert measures.attributes(scores, labels, **given, weight=weight * 1.0) == measures.attributes(
        scores[weight], labels[weight], **{**few, "ids": few["ids"].tolist()}
    )
    p, right, n = scores[:, 0] / 4, labels[:, 0] > 2, np.arange(20)
    assert measures.steps(p, right * 1.0, n, n, weight * 1.0) == measures.steps(
        *(x[weight] for x in (p, right * 1.0, n, n))
    )


def test_accuracy_has_the_width_of_the_binomial_interval_and_of_scipys_bootstrap():
    import scipy.stats

    groups = pairs(600, noise=0.5)
    verdict, _, _ = flat(groups)
    found = measures.preferences(groups)["metrics"]["accuracy"]
    width = found["high"] - found["low"]
    exact = scipy.stats.binomtest(int(verdict.sum()), len(verdict)).proportion_ci(0.95, "wilson")
    other = scipy.stats.bootstrap((verdict,), np.mean, n_resamples=1000, method="percentile", rng=0)
    assert found["value"] == verdict.mean()
    assert width == pytest.approx(exact.high - exact.low, rel=0.1)
    assert width == pytest.approx(np.diff(other.confidence_interval)[0], rel=0.1)


def test_a_resample_in_blocks_is_one_of_all_prompts(monkeypatch):
    members, n = np.arange(100, 123), 23
    monkeypatch.setattr(estimates, "BLOCK", 5)
    blocks, counts = zip(*estimates._draws(members, np.random.default_rng(0)))
    counts = np.concatenate(counts, 1)
    assert np.concatenate(blocks).tolist() == members.tolist() and max(map(len, blocks)) == 5
    assert (counts.sum(1) == n).all()
    # A multinomial's: variance 1 - 1/n of each, covariance -1/n, whether two are in one block or not.
    covariance, error = np.cov(counts.T), 4 / estimates.RESAMPLES**0.5
    assert np.abs(covariance - np.eye(n) + 1 / n).max() < error * 1.5 and np.abs(counts.mean(0) - 1).max() < error
    values, prompt = np.random.default_rng(1).random((400, 2)), np.arange(400)
    small = estimates.bootstrap(values, prompt, estimates.ratio)
    monkeypatch.undo()
    (whole,) = estimates.bootstrap(values, prompt, estimates.ratio)
    assert small[0]["high"] - small[0]["low"] == pytest.approx(whole["high"] - whole["low"], rel=0.1)


def test_groups_of_one_prompt_widen_the_interval():
    once = pairs(200, noise=0.3)
    fourfold = [dataclasses.replace(g, id=f"{g.id}-{i}") for g in once for i in range(4)]
    width = lambda m: m["metrics"]["accuracy"]["high"] - m["metrics"]["accuracy"]["low"]
    one, many = measures.preferences(once), measures.preferences(fourfold)
    assert many["prompts"] == 200 and many["groups"] == 800
    assert width(many) == pytest.approx(width(one), rel=1e-9)


def test_intervals_cover_the_truth():
    """Of 150 data sets 95 % should hold it; a binomial share of 150 is within 0.9 and 0.987 in 99 % of the cases."""
    import scipy.stats

    rng, hits = np.random.default_rng(3), {"share": 0, "pearson": 0, "spearman": 0, "auc": 0}
    rho, shift = 0.6, 1.0
    truth = {
        **{"share": 0.7, "pearson": rho, "spearman": 6 / math.pi * math.asin(rho / 2)},
        "auc": scipy.stats.norm.cdf(shift / math.sqrt(2)),
    }
    for _ in range(150):
        x, n = rng.normal(size=(2, 120)), 120
        y = rho * x[0] + math.sqrt(1 - rho**2) * x[1]
        made = measures.attributes(
            x[0][:, None], y[:, None], np.arange(n), ["x"] * n, np.arange(n), y, ["a"]
        )["metrics"]  # fmt: skip
        found = Estimates(np.arange(n))
        found.share("share", np.arange(n), rng.random(n) < 0.7, np.ones(n))
        right = np.arange(n) % 2 == 0
        measures._add_auc(found, np.arange(n), x[1] + shift * right, right)
        all_of = {**found.all(), "pearson": made["pearson/a"], "spearman": made["spearman/a"]}
        for name, true in truth.items():
            hits[name] += all_of[name]["low"] <= true <= all_of[name]["high"]
    shares = {name: n / 150 for name, n in hits.items()}
    print(shares)
    assert all(0.9 <= share <= 0.987 for share in shares.values()), shares


# Preferences


def batch_of(groups):
    """The groups as a batch of one row for an objective."""
    g, k = len(groups), len(groups[0].wins)
    stack = lambda name: np.stack([getattr(x, name) for x in groups])[None].astype(np.float32)
    at = np.arange(g * k)[None]
    labels = {name: stack(name) for name in ("wins", "ties", "margin")}
    return {**labels, "weight": stack("weight"), "end": at, "end_group": at // k, "end_slot": at % k}


def test_outcomes_of_a_batch_are_measured_as_the_groups_and_nll_is_the_loss():
    groups = rankings()
    scores = np.concatenate([g.scores for g in groups])[None, :, None].astype(np.float32)
    expected = metrics_of(BradleyTerry(ties="half"), scores, batch_of(groups))
    found = measures.preferences(groups)
    assert found["pairs"] == expected["pairs"]
    for name in ("accuracy", "tie_rate", "margin", "reward_mean", "reward_std", "top1_accuracy", "ece"):
        assert value(found, name) == pytest.approx(expected[name], abs=1e-6), name
    assert value(found, "nll") == pytest.approx(expected["loss"], abs=1e-6)


def test_outcomes_of_a_judge_are_measured_as_its_groups():
    groups = judged(200, k=2, hidden=0)
    objective, n = Pairwise(), len(groups)
    at = np.arange(2 * n)[None]
    batch = {
        "verdict": np.stack([[[g.wins[0, 1], g.wins[1, 0], 0], [g.wins[1, 0], g.wins[0, 1], 0]] for g in groups])[None],
        **{"weight": np.ones((1, n), np.float32), "strength": np.zeros((1, n, 1), np.float32)},
        **{"end": at, "end_group": at // 2, "end_slot": at % 2},
    }
    outputs = np.log(np.stack([g.orders[[0, 1], [1, 0]] for g in groups]).reshape(1, 2 * n, 3)).astype(np.float32)
    expected = metrics_of(objective, outputs, batch)
    found = measures.preferences(groups)
    half = value(found, "tie_rate") / 2  # the objective counts a tie as wrong where a side is labelled better
    assert value(found, "accuracy") - half == pytest.approx(expected["accuracy_averaged"], abs=1e-6)
    for name in ("consistency", "ece"):
        assert value(found, name) == pytest.approx(expected[name], abs=1e-6), name
    assert "reward_mean" not in found["metrics"] and "margins" not in found


def test_accuracy_nll_and_reliability_against_scikit_learn():
    import sklearn.calibration
    import sklearn.metrics

    groups = pairs(500)
    found = measures.preferences(groups)
    verdict, p, _ = flat(groups)
    side = np.array([g.scores[0] > g.scores[1] for g in groups])
    label = np.array([g.wins[0, 1] > 0 for g in groups])
    of_first = np.array([g.alone.preference[0][0, 1] for g in groups])
    assert value(found, "accuracy") == sklearn.metrics.accuracy_score(label, side) == verdict.mean()
    assert value(found, "nll") == pytest.approx(sklearn.metrics.log_loss(label, of_first))
    confidence, right = np.maximum(p, 1 - p), verdict
    bins = 2 * confidence - 1  # their bins go from 0 to 1
    observed, predicted = sklearn.calibration.calibration_curve(right, bins, n_bins=10)
    ours, counts = found["reliability"], np.array(found["reliability"]["counts"])
    assert ours["observed"] == pytest.approx(observed) and ours["predicted"] == pytest.approx((1 + predicted) / 2)
    assert value(found, "ece") == pytest.approx(
        (np.abs((1 + predicted) / 2 - observed) * counts).sum() / counts.sum()
    )  # fmt: skip
    assert ours["edges"] == pytest.approx(np.linspace(0.5, 1, 11)) and counts.sum() == 500


def test_correlation_with_the_length_against_scipy():
    import scipy.stats

    groups = [*pairs(80), *rankings(20)]
    rewards, tokens = (np.concatenate([getattr(g, x) for g in groups]) for x in ("scores", "tokens"))
    found = value(measures.preferences(groups), "reward_length_correlation")
    assert found == pytest.approx(scipy.stats.pearsonr(rewards, tokens).statistic)


def test_constant_rewards_have_no_correlation_and_tie_everywhere():
    groups = [dataclasses.replace(g, scores=np.full(2, 0.1)) for g in pairs(20)]
    found = measures.preferences(groups)
    assert found["metrics"]["reward_length_correlation"] == {"value": None, "low": None, "high": None}
    assert value(found, "accuracy") == 0.5 and value(found, "tie_rate") == 1 and value(found, "reward_std") < 1e-12
    assert value(found, "nll") == pytest.approx(math.log(2)) and found["worst"] == []
    json.dumps(found, allow_nan=False)


def test_soft_labels_ties_and_weights_by_hand():
    soft = group([[0, 0.75], [0.25, 0]], [1.0, 0.0], prompt=1)
    tie = group([[0, 0], [0, 0]], [2.0, 0.0], ties=[[0, 1], [1, 0]], prompt=2)
    heavy = group([[0, 1], [0, 0]], [0.0, 1.0], prompt=3, weight=3.0)
    found = measures.preferences([soft, tie, heavy])
    nats = lambda d: math.log1p(math.exp(-d))
    expected = 0.75 * nats(1) + 0.25 * nats(-1) + 0.5 * nats(2) + 0.5 * nats(-2) + 3 * nats(-1)
    assert value(found, "nll") == pytest.approx(expected / 5)
    assert value(found, "accuracy") == 1 / 4 and found["pairs"] == 2  # the tie is no decided pair
    assert value(found, "margin") == (1 - 3) / 4 and value(found, "coin") == 0.5
    assert value(found, "longer_is_better") == 0  # the second is longer, the first preferred


def test_exchanging_the_responses_changes_nothing():
    for groups in (rankings(), judged()):
        swapped = []
        for g in groups:
            order = np.arange(len(g.wins))[::-1]
            cut = {n: getattr(g, n)[np.ix_(order, order)] for n in ("wins", "ties", "margin")}
            said = {"orders": g.orders[np.ix_(order, order)]} if g.scores is None else {"scores": g.scores[order]}
            swapped.append(dataclasses.replace(g, tokens=g.tokens[order], **cut, **said))
        one, other = measures.preferences(groups), measures.preferences(swapped)
        for name, estimate in one["metrics"].items():
            assert other["metrics"][name] == pytest.approx(estimate, abs=1e-12), name
        assert one["reliability"]["counts"] == other["reliability"]["counts"]
        assert one["best_of_n"]["model"][-1] == pytest.approx(other["best_of_n"]["model"][-1])


def test_scaling_the_rewards_leaves_what_depends_on_their_order():
    groups = rankings()
    scaled = measures.preferences([dataclasses.replace(g, scores=7 * g.scores + 3) for g in groups])
    plain = measures.preferences(groups)
    for name in ("accuracy", "tie_rate", "top1_accuracy", "longer_is_better", "reward_length_correlation"):
        assert scaled["metrics"][name] == pytest.approx(plain["metrics"][name], abs=1e-9), name
    assert scaled["best_of_n"] == plain["best_of_n"]
    assert value(scaled, "margin") == pytest.approx(7 * value(plain, "margin"))
    assert value(scaled, "nll") > value(plain, "nll")


def test_histograms_share_their_edges():
    found = measures.preferences(pairs(100))
    assert found["chosen"]["edges"] == found["rejected"]["edges"]
    assert all(sum(found[name]["counts"]) == 100 for name in ("margins", "chosen", "rejected"))
    edges, counts = (np.array(found["margins"][x]) for x in ("edges", "counts"))
    middle = (edges[1:] + edges[:-1]) / 2
    assert (counts * middle).sum() / 100 == pytest.approx(value(found, "margin"), abs=np.diff(edges)[0])


# Slices and errors


def test_slices_hold_every_pair_once_and_weigh_to_the_whole():
    found = measures.preferences(pairs(300))
    assert list(found["slices"]) == ["gold margin", "length difference", "source"]
    assert [row["name"] for row in found["slices"]["gold margin"]] == ["0.5", "1", "2", "3"]
    for rows in found["slices"].values():
        assert sum(row["pairs"] for row in rows) == 300
        assert sum(row["pairs"] * row["value"] for row in rows) / 300 == pytest.approx(value(found, "accuracy"))


def test_slices_by_length_say_which_side_is_longer():
    tokens = [(10, 12), (10, 30), (12, 10), (30, 10), (10, 10)]
    made = [group([[0, 1], [0, 0]], [1, 0], tokens=t, prompt=i) for i, t in enumerate(tokens)]
    rows = measures.preferences(made)["slices"]["length difference"]
    assert [(row["name"], row["pairs"]) for row in rows] == [
        ("preferred over 11 shorter", 1),
        ("preferred up to 11 shorter", 1),
        ("as long", 1),
        ("preferred up to 11 longer", 1),
        ("preferred over 11 longer", 1),
    ]


def test_many_margins_are_cut_into_quarters_and_many_sources_into_the_largest():
    wins = np.array([[0, 1], [0, 0]])
    made = [
        group(wins, [1, 0], margin=wins * (i + 1), tokens=[5, 5], source=f"s{min(i, 24)}", prompt=i) for i in range(100)
    ]
    found = measures.preferences(made)["slices"]
    assert [row["name"] for row in found["gold margin"]] == ["up to 25.8", "25.8 to 50.5", "50.5 to 75.2", "over 75.2"]
    assert [row["pairs"] for row in found["gold margin"]] == [25] * 4
    assert len(found["source"]) == 20 and found["source"][0]["name"] == "s24" and found["source"][0]["pairs"] == 76
    assert found["source"][-1]["name"] == "6 others" and "length difference" not in found


def test_a_kind_of_preference_that_fails_is_named_and_a_handful_is_not():
    good = [dataclasses.replace(g, source="good") for g in pairs(300, noise=9)]
    wrong = [dataclasses.replace(g, source="bad", scores=-g.scores) for g in pairs(60, noise=9, seed=1)]
    few = [dataclasses.replace(g, source="few", scores=-g.scores) for g in pairs(5, noise=9, seed=2)]
    every = [dataclasses.replace(g, prompt=i, margin=np.zeros((2, 2))) for i, g in enumerate([*good, *wrong, *few])]
    found = measures.preferences(every)
    failing = [row for row in found["failing"] if row["table"] == "source"]
    assert [row["name"] for row in failing] == ["bad"] and failing[0]["high"] < value(found, "accuracy")
    assert "Bad (source)" in "\n".join(tables.lines(found))


def test_worst_pairs_are_the_most_confidently_wrong_ones():
    groups = pairs(300)
    found = measures.preferences(groups, worst=7)["worst"]
    of = [(g.alone.preference[0][0, 1] if g.wins[0, 1] else g.alone.preference[0][1, 0], g) for g in groups]
    expected = sorted(of, key=lambda x: x[0])[:7]
    assert [x["id"] for x in found] == [g.id for _, g in expected]
    assert [x["probability"] for x in found] == [p for p, _ in expected]
    first, g = found[0], expected[0][1]
    assert first["difference"] == g.scores[first["preferred"]] - g.scores[first["rejected"]] < 0
    assert g.wins[first["preferred"], first["rejected"]] == 1 and first["margin"] == g.margin.max()
    assert all(x["probability"] < 0.5 for x in measures.preferences(groups, worst=300)["worst"])
    assert measures.preferences(groups, worst=0)["worst"] == []


def test_pairs_that_are_certain_to_the_last_digit_are_still_ordered():
    far = [group([[0, 1], [0, 0]], [0, d], prompt=d, id=str(d)) for d in (800, 2000, 900)]
    found = measures.preferences(far)
    assert [x["id"] for x in found["worst"]] == ["2000", "900", "800"]
    assert value(found, "nll") == pytest.approx(3700 / 3)


# Judges


def test_conflicts_of_a_judge_by_hand():
    a, b, even = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]
    orders = np.full((3, 3, 3), np.nan)
    for i, j, first, second in ((0, 1, a, b), (1, 2, a, b), (0, 2, b, a)):  # 0 > 1 > 2 > 0, a circle
        orders[i, j], orders[j, i] = first, second
    wins = np.triu(np.ones((3, 3)), 1)
    circle = group(wins, orders=orders, prompt=0)
    orders = orders.copy()
    orders[0, 1] = orders[1, 0] = a  # A in both orders
    orders[0, 2], orders[2, 0] = a, even  # not the same, but no contradiction
    found = measures.preferences([circle, group(wins, orders=orders, prompt=1)])
    assert value(found, "conflict_rate") == 1 / 6
    assert value(found, "consistency") == 4 / 6
    assert value(found, "cycle_rate") == 1 / 2
    only_pairs = measures.preferences(judged(5, k=2))
    assert "cycle_rate" not in only_pairs["metrics"] and only_pairs["best_of_n"] is None


def test_cycles_against_counting_triples():
    groups = judged(30, k=5, hidden=0.2)
    circles = asked = 0
    for g in groups:
        for i, j, k in itertools.combinations(range(5), 3):
            seen = [g.alone.verdicts[0][x] for x in ((i, j), (j, k), (k, i))]
            asked += not np.isnan(seen).any()
            circles += seen in ([1, 1, 1], [0, 0, 0])
    assert value(measures.preferences(groups), "cycle_rate") == pytest.approx(circles / asked) and circles


def test_scores_have_neither_cycles_nor_contradictions():
    assert not {"consistency", "conflict_rate", "cycle_rate"} & measures.preferences(rankings())["metrics"].keys()


def test_certain_judges_have_a_finite_loss():
    orders = np.full((2, 2, 2), np.nan)
    orders[0, 1], orders[1, 0] = [0, 1], [1, 0]
    found = measures.preferences([group([[0, 1], [0, 0]], orders=orders)])
    assert value(found, "nll") == pytest.approx(-math.log(1e-7)) and value(found, "accuracy") == 0


# Best of n


def test_best_of_n_against_all_subsets():
    import scipy.stats

    groups = rankings(12, k=5)
    found = measures.preferences(groups)["best_of_n"]
    assert found["n"] == [1, 2, 4] and found["random"] == [0.5] * 3
    for n, model, oracle in zip(found["n"], found["model"], found["oracle"]):
        expected, best, weight = 0.0, 0.0, 0.0
        for g in groups:
            known = np.flatnonzero((g.wins + g.wins.T + g.ties > 0).any(1))
            beats = (g.wins > g.wins.T).astype(int)
            if len(known) < n or not beats.any():
                continue
            gold = (beats - beats.T).sum(1)[known]
            rank = (scipy.stats.rankdata(gold) - 1) / (len(known) - 1)
            picks, tops = [], []
            for subset in itertools.combinations(range(len(known)), n):
                s = g.scores[known[list(subset)]]
                picks.append(rank[list(subset)][s == s.max()].mean())
                tops.append(rank[list(subset)].max())
            expected, best = expected + g.weight * np.mean(picks), best + g.weight * np.mean(tops)
            weight += g.weight
        assert model["value"] == pytest.approx(expected / weight) and oracle == pytest.approx(best / weight)


def test_the_rank_of_wins_is_the_rank_of_the_score_that_the_labels_come_from():
    import scipy.stats

    gold = np.random.default_rng(0).integers(0, 4, (20, 6)).astype(float)
    groups = [group(scores=np.zeros(6), prompt=i, **records.compare(s)) for i, s in enumerate(gold)]
    (stack,) = scored.stacks(groups)
    ranks, _ = best_of_n.gold_ranks(stack)
    np.testing.assert_allclose(ranks, (scipy.stats.rankdata(gold, axis=1) - 1) / 5)


def test_best_of_many_stays_exact():
    worth = np.arange(1024.0)[None]
    one = best_of_n.picked(worth, 512)
    assert one.sum() == pytest.approx(1) and one[0, -1] == pytest.approx(0.5) and (one >= 0).all()


def test_a_perfect_model_reaches_the_oracle_and_one_without_opinion_stays_at_random():
    gold = np.random.default_rng(1).normal(size=(30, 8))
    perfect = [group(scores=s, prompt=i, **records.compare(s)) for i, s in enumerate(gold)]
    found = measures.preferences(perfect)["best_of_n"]
    assert [m["value"] for m in found["model"]] == pytest.approx(found["oracle"]) and found["n"] == [1, 2, 4, 8]
    assert found["oracle"][-1] == 1
    flat_ones = [dataclasses.replace(g, scores=np.zeros(8)) for g in perfect]
    found = measures.preferences(flat_ones)["best_of_n"]
    assert [m["value"] for m in found["model"]] == pytest.approx([0.5] * 4)


def test_the_first_of_two_labelled_responses_is_no_best_of_several():
    wins = np.zeros((3, 3))
    wins[0, 1] = 1
    only_two = group(wins, [0, 1, 2], prompt=0)
    assert "top1_accuracy" not in measures.preferences([only_two])["metrics"]
    wins = np.triu(np.ones((3, 3)), 1)
    shared = group(wins, [2, 2, 1], prompt=1)  # two are first, one of them is the best
    assert value(measures.preferences([only_two, shared]), "top1_accuracy") == 0.5


# Scale


@pytest.mark.slow
def test_a_hundred_thousand_pairs_take_seconds():
    """3.4 s on an idle 2-core AMD EPYC (2026-11-27), up to 20 s of a busy one; a loop over pairs takes minutes."""
    groups = pairs(100_000)
    start = time.process_time()
    assert measures.preferences(groups)["pairs"] == 100_000
    assert time.process_time() - start < 60
