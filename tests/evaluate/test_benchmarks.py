"""Benchmarks: each rule against numbers of the benchmark's own code, with equal scores and missing subsets; the rows.

Reference numbers were made by running the published functions on the scores that each test draws again:
allenai/reward-bench at 05a9005e (rewardbench/utils.py: calculate_scores_per_section, reroll_and_score_dataset,
process_single_model; constants.py), THU-KEG/RM-Bench at 73c52d7b (scripts/utils.py: compute_accuracy),
ScalerLab/JudgeBench at e2c52c28 (utils/metrics.py: compute_final_metrics).
"""

import dataclasses
import json

import numpy as np
import pytest
import tiny_exports
from format_rows import BENCHMARKS as ROWS

from rmjax.batches import token_cache
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Preferences
from rmjax.data import __main__ as command
from rmjax.data.ledger import Audit
from rmjax.data.reading import records
from rmjax.evaluate import asking, benchmarks, evaluating
from rmjax.evaluate.rules import DOMAINS, JUDGE_BENCH, REWARD_BENCH, RMB
from rmjax.evaluate.rules import RM_BENCH as RM_SUBSETS
from rmjax.evaluate.scored import Scored, Traced
from rmjax.inference.reward_model import RewardModel


def scored(source, scores=None, right=1, name="", prompt=0, orders=None):
    """A group whose first `right` responses are better than the others."""
    k = len(scores) if scores is not None else len(orders)
    wins = np.zeros((k, k))
    wins[:right, right:] = 1
    ties = np.zeros((k, k))
    told = {"wins": wins, "ties": ties, "margin": ties, "tokens": np.ones(k, int), "orders": orders}
    scores = None if scores is None else np.asarray(scores, float)
    return Scored(f"test.jsonl:{prompt} ({name})", prompt, source, scores=scores, **told)


def values(found):
    return {name: x["value"] for name, x in found["metrics"].items()}


ORDER = (  # of rewardbench/constants.py: EXAMPLE_COUNTS
    *("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med", "mt-bench-hard"),
    *("math-prm", "refusals-dangerous", "refusals-offensive", "llmbar-natural", "llmbar-adver-neighbor"),
    *("llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual", "xstest-should-refuse"),
    *("xstest-should-respond", "donotanswer", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
)


def reward_bench():
    rng = np.random.default_rng(0)
    rows = [(subset, scores) for subset in ORDER for scores in rng.integers(0, 4, (7, 2))]
    return [scored(subset, scores, prompt=n) for n, (subset, scores) in enumerate(rows)]


def test_reward_bench():
    found = benchmarks.score(benchmarks.BENCHMARKS["reward_bench"], reward_bench())
    expected = {
        "Chat": 0.438148443735,
        "Chat Hard": 0.207706766917,
        "Safety": 0.505019305019,
        "Reasoning": 0.416666666667,
        "overall": 0.391885295585,
    }
    assert values(found) == pytest.approx(expected, abs=1e-9) and not found["missing"]
    assert len(found["subsets"]) == 23 and found["subsets"]["hep-go"]["count"] == 7
    assert all(x["low"] < x["value"] < x["high"] for x in found["metrics"].values())


def test_missing_subsets_are_told_and_have_no_official_number():
    groups = [said for said in reward_bench() if said.source not in ("mt-bench-easy", "hep-go")]
    groups += [scored("shp", [1, 0], prompt=1000)]
    found = benchmarks.score(benchmarks.BENCHMARKS["reward_bench"], groups)
    assert found["missing"] == ["mt-bench-easy", "hep-go"] and set(values(found)) == {"Chat Hard", "Safety"}
    assert "does not know: shp" in found["notes"][0] and "need a missing subset" in found["notes"][1]
    assert "hep-java 7 of 164" in found["notes"][2] and "math-prm 7 of 447" in found["notes"][2]
    assert found["subsets"]["alpacaeval-easy"]["count"] == 7  # what is there is measured


def test_reward_bench_2_with_ties_of_scores_and_the_ties_subset():
    rng = np.random.default_rng(1)
    groups = [
        scored(subset, scores, prompt=100 * s + n)
        for s, subset in enumerate(("Factuality", "Precise IF", "Math", "Safety", "Focus"))
        for n, scores in enumerate(rng.integers(0, 4, (9, 4)))
    ]
    for i in range(12):
        for kind, right in (("ref", 1), ("tied", 3)):
            scores = np.concatenate([rng.integers(2, 6, right), rng.integers(0, 4, 4)])
            scores = np.full(len(scores), 2) if i == 3 else scores  # all equal: 0 / 0
            groups.append(scored("Ties", scores, right, f"{kind}:{i}", prompt=5000 + i))
    found = benchmarks.score(benchmarks.BENCHMARKS["reward_bench_2"], groups)
    expected = {
        "Factuality": 0.259259259259,
        "Precise IF": 0.111111111111,
        "Math": 0.166666666667,
        "Safety": 0.361111111111,
        "Focus": 0.148148148148,
        "Ties": 0.192133924154,
        "overall": 0.206405036742,
    }
    assert values(found) == pytest.approx(expected, abs=1e-9)
    assert {name: x["count"] for name, x in found["subsets"].items()} == {
        **dict.fromkeys(("Factuality", "Precise IF", "Math", "Safety", "Focus"), 9),
        "Ties": 24,
    }
    orders = np.full((4, 4, 3), 1 / 3)
    with pytest.raises(ValueError, match="needs a score of every response"):
        benchmarks.score(benchmarks.BENCHMARKS["reward_bench_2"], [scored("Math", orders=orders)])


def test_ties_of_rows_with_one_id_without_a_twin_and_with_equal_answers():
    rows = [  # the scores, the right answers first
        *[("ref:0", [2, 1, 0], 1), ("tied:0", [3, 2.5, 1, 0], 2), ("ref:1", [1, 1, 0], 1)],
        *[("tied:1", [2, 2, 2, 1], 3), ("tied:1", [1.5, 1.25], 1), ("ref:2", [5, 0], 1), ("tied:3", [0, 4, 1], 2)],
        *[("ref:4", [3, 3], 1), ("tied:4", [3, 3, 3], 2), ("ref:5", [9, 1], 1), ("tied:5", [7, 7, 2], 2)],
    ]
    groups = [scored("Ties", scores, right, name, prompt=n) for n, (name, scores, right) in enumerate(rows)]
    found = benchmarks.score(benchmarks.BENCHMARKS["reward_bench_2"], groups)
    assert values(found) == {"Ties": pytest.approx(0.5625, abs=1e-12)} and found["subsets"]["Ties"]["count"] == 11
    assert found["missing"] == ["Factuality", "Precise IF", "Math", "Safety", "Focus"]
    with pytest.raises(ValueError, match="called ref:N or tied:N, found 'x'"):
        benchmarks.score(benchmarks.BENCHMARKS["reward_bench_2"], [scored("Ties", [1, 0], name="x")])


RM_BENCH = {  # easy, normal, hard, of the rows of test_rm_bench; safety is of the rows of both its subsets
    "chat": (0.242424242424, 0.363636363636, 0.363636363636),
    "code": (0.363636363636, 0.333333333333, 0.242424242424),
    "math": (0.424242424242, 0.363636363636, 0.363636363636),
    "safety": (0.375, 0.395833333333, 0.479166666667),
}
RM_BENCH_TOTAL = {  # what the same call gives in all
    **{"chat": 0.323232323232, "code": 0.313131313131, "math": 0.383838383838, "safety": 0.416666666667},
    **{"hard": 0.362215909091, "normal": 0.364109848485, "easy": 0.351325757576, "overall": 0.359217171717},
}


def rm_bench():
    """Eleven groups of each subset, five of the last."""
    rng = np.random.default_rng(2)
    sizes = {"chat": 11, "code": 11, "math": 11, "safety-refuse": 11, "safety-response": 5}
    order = ("chat", "code", "math", "safety-refuse", "safety-response")
    rows = [(subset, scores) for subset in order for scores in rng.integers(0, 5, (sizes[subset], 6))]
    return [scored(subset, scores, 3, prompt=n) for n, (subset, scores) in enumerate(rows)]


def test_rm_bench():
    found = benchmarks.score(benchmarks.BENCHMARKS["rm_bench"], rm_bench())
    official = values(found)
    for domain, levels in RM_BENCH.items():
        measured = [official[f"{domain}/{level}"] for level in ("easy", "normal", "hard")]
        assert measured == pytest.approx(levels, abs=1e-9)
    assert {name: official[name] for name in RM_BENCH_TOTAL} == pytest.approx(RM_BENCH_TOTAL, abs=1e-9)
    assert found["subsets"]["safety-response"]["count"] == 5


def test_rm_bench_matrix_has_the_chosen_style_before_the_rejected_one():
    # The chosen ones are as good as they are fancy, and so are the rejected ones: a model that looks at style alone.
    rows = [scored(subset, [1, 2, 3, 1, 2, 3], 3, prompt=n) for n, subset in enumerate(RM_SUBSETS)]
    official = values(benchmarks.score(benchmarks.BENCHMARKS["rm_bench"], rows))
    assert [official[level] for level in ("easy", "normal", "hard")] == [1, 0, 0]  # equal scores are wrong
    assert official["markdown over concise"] == 1 and official["concise over markdown"] == 0
    with pytest.raises(ValueError, match="3 chosen and 3 rejected responses, found 5"):
        benchmarks.score(benchmarks.BENCHMARKS["rm_bench"], [scored("chat", [1, 2, 3, 4, 5], 3)])


def test_rm_bench_without_one_half_of_safety():
    groups = [said for said in rm_bench() if said.source != "safety-response"]
    found = benchmarks.score(benchmarks.BENCHMARKS["rm_bench"], groups)
    assert found["missing"] == ["safety-response"]
    assert set(values(found)) == {
        f"{d}{x}" for d in ("chat", "math", "code") for x in ("", "/easy", "/normal", "/hard")
    }
    assert found["subsets"]["safety-refuse"]["count"] == 11


def judged(better_first, first, second, source, prompt):
    """A pair with one-hot verdicts of both orders, "A", "B" or "=", as the judge named them in each."""
    hot = {"A": [1.0, 0, 0], "B": [0, 1.0, 0], "=": [0, 0, 1.0]}
    orders = np.full((2, 2, 3), np.nan)
    orders[0, 1], orders[1, 0] = hot[first], hot[second]
    wins = np.zeros((2, 2))
    wins[(0, 1) if better_first else (1, 0)] = 1
    zeros = np.zeros((2, 2))
    return Scored(f"x:{prompt} (p)", prompt, source, wins, zeros, zeros, np.ones(2, int), orders=orders)


# How often o1-mini, asked as in Arena-Hard, said what of the 350 pairs of GPT-4o: the label, then what it named in
# each order ("AAB" is right in both). Counted from JudgeBench's own outputs/; its table has 65.71 for them overall.
O1_MINI = {
    "math": "A== 2, A=A 2, A=B 2, AA= 1, AAA 1, AAB 23, ABB 2, BAA 2, BAB 1, BB= 2, BBA 18",
    "reasoning": "A=A 1, A=B 2, AA= 1, AAA 11, AAB 31, ABA 3, ABB 6, B== 1, B=A 1, B=B 3, BAA 8, BAB 3,"
    "BB= 4, BBA 22, BBB 1",
    "coding": "A=B 2, AAA 4, AAB 15, ABA 1, ABB 1, B== 2, B=A 3, BAA 1, BB= 1, BBA 12",
    "knowledge": "A=A 1, A=B 1, AA= 2, AAA 13, AAB 42, ABA 18, ABB 5, B=A 4, BAA 18, BAB 6, BB= 1, BBA 40, BBB 3",
}


def test_judge_bench_of_a_judge_in_both_orders_is_the_published_number():
    groups = []
    for source, counts in O1_MINI.items():
        for item in counts.split(","):
            said, n = item.split()
            for _ in range(int(n)):
                groups.append(judged(said[0] == "A", said[1], said[2], source, len(groups)))
    found = values(benchmarks.score(benchmarks.BENCHMARKS["judge_bench"], groups))
    official = {"knowledge": 58.441558, "reasoning": 62.244898, "math": 82.142857, "coding": 78.571429}
    assert len(groups) == 350
    assert {name: 100 * x for name, x in found.items()} == pytest.approx({**official, "overall": 65.714286}, abs=1e-5)


def test_judge_bench_with_ties_of_verdicts():
    rng, groups = np.random.default_rng(4), []
    category = ("knowledge", "reasoning", "math", "coding")
    for n in range(60):
        subset, a_is_better = category[int(rng.integers(0, 4))], not rng.integers(0, 2)
        groups.append(judged(a_is_better, *("AB="[x] for x in rng.integers(0, 3, 2)), subset, n))
    found = benchmarks.score(benchmarks.BENCHMARKS["judge_bench"], groups)
    official = {"knowledge": 1 / 12, "reasoning": 3 / 11, "math": 7 / 20, "coding": 4 / 17, "overall": 0.25}
    assert values(found) == pytest.approx(official) and "more of both orders" in found["notes"][-1]


def test_judge_bench_of_scores_with_equal_ones():
    rng, groups = np.random.default_rng(3), []
    for n in range(60):
        subset, better = JUDGE_BENCH[int(rng.integers(0, 4))], int(rng.integers(0, 2))
        said = scored(subset, rng.integers(0, 3, 2), prompt=n)
        groups.append(dataclasses.replace(said, wins=said.wins if better == 0 else said.wins.T))
    found = values(benchmarks.score(benchmarks.BENCHMARKS["judge_bench"], groups))
    official = {"knowledge": 6 / 16, "reasoning": 3 / 14, "math": 3 / 14, "coding": 4 / 16, "overall": 16 / 60}
    assert found == pytest.approx(official)  # 22 of the pairs have equal scores
    assert sum(len(set(said.scores.tolist())) == 1 for said in groups) == 22


def test_rmb_needs_the_best_above_every_other_one():
    scores = {"Helpfulness/Chat/Discussion": [3, 2, 1], "Helpfulness/Code/Documentation": [3, 2, 3]}
    scores |= {"Harmlessness/S1": [3, 4], "Harmlessness/S2": [3, 3]}
    groups = [scored(name, scores.get(name, [2, 1]), prompt=n) for n, name in enumerate(RMB)]
    groups.append(scored("Harmlessness/S2", [3, 1], prompt=100))  # goals weigh rows, not scenarios
    found = benchmarks.score(benchmarks.BENCHMARKS["rmb_best_of_n"], groups)
    expected = {"Helpfulness": 36 / 37, "Harmlessness": 11 / 13, "overall": (36 / 37 + 11 / 13) / 2}
    assert values(found) == pytest.approx(expected) and not found["missing"] and len(found["subsets"]) == 49
    assert found["subsets"]["Helpfulness/Code/Documentation"]["value"] == 0
    assert found["subsets"]["Harmlessness/S2"] == pytest.approx({"count": 2, "value": 0.5, "low": 0, "high": 1})
    found = benchmarks.score(benchmarks.BENCHMARKS["rmb_pairwise"], groups[:37])
    assert set(values(found)) == {"Helpfulness"} and found["missing"] == list(RMB[37:])


def test_judges_run_the_benchmarks_of_pairs_by_both_orders():
    subsets = [name for section in REWARD_BENCH.values() for name in section]
    verdicts = ["AB", "BB", "BA", "=B", "=="]  # right in both orders, in one, in none, half and right, twice half
    groups = [judged(True, *verdicts[n % 5], subset, n) for n, subset in enumerate(subsets)]
    found = benchmarks.score(benchmarks.BENCHMARKS["reward_bench"], groups)
    assert [found["subsets"][name]["value"] for name in subsets[:5]] == [1, 0.5, 0, 0.75, 0.5]
    assert "overall" in found["metrics"] and "verdicts count half in each order" in found["notes"][-1]


def test_judges_give_the_matrix_of_rm_bench_and_the_best_of_n_of_rmb():
    scores = np.array([3.0, 2, 5, 1, 2, 4])
    asked = np.full((6, 6, 3), np.nan)  # the labelled pairs alone, in both orders
    for i, j in [(i, j) for i in range(3) for j in range(3, 6)] + [(j, i) for i in range(3) for j in range(3, 6)]:
        asked[i, j] = np.eye(3)[0 if scores[i] > scores[j] else 1 if scores[i] < scores[j] else 2]
    rows = [scored(name, scores, 3, prompt=n) for n, name in enumerate(RM_SUBSETS)]
    by_judge = [dataclasses.replace(said, scores=None, orders=asked) for said in rows]
    score = lambda name, groups: values(benchmarks.score(benchmarks.BENCHMARKS[name], groups))
    scored_by, judged_by = score("rm_bench", rows), score("rm_bench", by_judge)
    tied = {name for name in judged_by if judged_by[name] != scored_by[name]}
    assert judged_by["detailed over detailed"] == 0.5 and scored_by["detailed over detailed"] == 0  # an equal pair
    assert tied == {"overall", "normal", "detailed over detailed", *DOMAINS, *(f"{d}/normal" for d in DOMAINS)}
    best = [dataclasses.replace(scored(name, [2, 1, 0], prompt=n)) for n, name in enumerate(RMB)]
    orders = np.full((3, 3, 2), np.nan)
    orders[0, 1], orders[1, 0], orders[0, 2], orders[2, 0] = [1, 0], [0, 1], [1, 0], [1, 0]
    best = [dataclasses.replace(said, scores=None, orders=orders) for said in best]
    assert score("rmb_best_of_n", best)["overall"] == 0.5  # the second loser is beaten in one order of two


def test_the_table_is_parsed_and_names_what_was_meant():
    asked = benchmarks.parse("reward_bench, rm_bench=data/x.json")
    assert [(b.name, source) for b, source in asked] == [
        ("reward_bench", "hf://datasets/allenai/reward-bench/data/filtered-*.parquet"),
        ("rm_bench", "data/x.json"),
    ]
    own = "judge_bench=data/dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl"  # as JudgeBench calls its file
    ((_, source), (other, _)) = benchmarks.parse(f"{own},reward_bench")
    assert source == own.removeprefix("judge_bench=") and other.name == "reward_bench"
    for text, words in (
        ("rm_bench=x.json,rewardbench", "did you mean 'reward_bench'"),
        ("rewardbench", "did you mean 'reward_bench'"),
        ("rm_bench,rm_bench=x", "named twice"),
        ("rmb_pairwise", "give rmb_pairwise=SOURCE"),
    ):
        with pytest.raises(ValueError, match=words):
            benchmarks.parse(text)


def test_process_bench():
    """QwenLM/ProcessBench at e8024636, code/run_eval.py (main), on the same labels and predictions."""
    rng, groups = np.random.default_rng(3), []
    for name in ("gsm8k", "math", "olympiadbench", "omnimath"):
        label = rng.integers(-1, 4, 40)
        found = np.where(rng.random(40) < 0.5, label, rng.integers(-1, 4, 40))
        groups += [
            Traced(f"{name}.json:{i}", len(groups) + i, name, *map(int, x)) for i, x in enumerate(zip(label, found))
        ]
    found = benchmarks.score(benchmarks.BENCHMARKS["process_bench"], groups)
    expected = {
        **{"gsm8k": 0.6386554621848739, "math": 0.49032258064516127, "olympiadbench": 0.3714285714285714},
        **{"omnimath": 0.5538461538461539, "overall": 0.51356319202619},
        **{"gsm8k/wrong": 0.6129032258064516, "gsm8k/right": 0.6666666666666665},
        **{"math/wrong": 0.6333333333333333, "math/right": 0.4},
        **{"olympiadbench/wrong": 0.41935483870967744, "olympiadbench/right": 0.33333333333333326},
        **{"omnimath/wrong": 0.5142857142857142, "omnimath/right": 0.6},
    }
    assert values(found) == pytest.approx(expected, abs=1e-9) and not found["missing"]
    assert found["subsets"]["math"]["value"] == pytest.approx(expected["math"])
    assert all(x["low"] < x["value"] < x["high"] for x in found["metrics"].values())
    without = benchmarks.score(benchmarks.BENCHMARKS["process_bench"], groups[:80])
    assert without["missing"] == ["olympiadbench", "omnimath"] and "overall" not in without["metrics"]
    nothing = [Traced("a", i, "gsm8k", label, 7) for i, label in enumerate((-1, 2))]
    assert values(benchmarks.score(benchmarks.BENCHMARKS["process_bench"], nothing))["gsm8k"] == 0.0


@pytest.mark.parametrize("name", ["ppe_preference", "helpsteer3", "ppe_correctness"])
def test_pairs_weigh_the_same_and_ties_of_people_are_left_out(name):
    subsets = list(benchmarks.BENCHMARKS[name].subsets)
    rng, groups, hits = np.random.default_rng(4), [], {subset: [] for subset in subsets}
    for n in range(60):
        said = scored(subset := subsets[n % len(subsets)], rng.integers(0, 3, 4), prompt=n)
        wins = np.zeros((4, 4))
        for i, j in [(0, 1), (3, 2)][: n % 3]:  # of every third nothing is said
            wins[i, j] = 1
            hits[subset].append(said.scores[i] > said.scores[j])
        groups.append(dataclasses.replace(said, wins=wins))
    found = benchmarks.score(benchmarks.BENCHMARKS[name], groups)
    means = {subset: np.mean(of_subset) for subset, of_subset in hits.items()}
    every = np.concatenate(list(hits.values())).mean()
    overall = np.mean(list(means.values())) if name == "ppe_correctness" else every
    assert found["metrics"]["overall"]["value"] == pytest.approx(overall)
    assert {subset: x["value"] for subset, x in found["subsets"].items()} == pytest.approx(means)


READ = {  # source, id, responses, wins of the first
    "reward_bench": ("hep-go", "7", ["a", "b"], [0, 1]),
    "reward_bench_2": ("Ties", "tied:3", ["red", "blue", "dog", "cat"], [0, 0, 1, 1]),
    "rm_bench": ("safety-refuse", "9", ["a", "a b", "# a", "b", "b c", "# b"], [0, 0, 0, 1, 1, 1]),
    "judge_bench": ("knowledge", "e3", ["a", "b"], [0, 0]),
    "ppe_preference": ("human", "p1", ["a", "b"], [0, 0]),
    "ppe_correctness": ("test", "q1", [f"{i}." for i in range(32)], [0, 1, *[0] * 29, 1]),
    "helpsteer3": ("code", "", ["a", "b"], [0, 1]),
    "process_bench": ("gsm8k", "gsm8k-3", ["a\n\nb\n\nc"], [0]),
    "rmb_pairwise": ("Helpfulness/Chat/Discussion", "11", ["a", "b"], [0, 1]),
    "rmb_best_of_n": ("Harmlessness/S1", "26", ["a", "b", "c"], [0, 1, 1]),
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_as_published_and_none_is_lost(name, tmp_path):
    source, own, responses, wins = READ[name]
    path = write(tmp_path / "test.jsonl", ROWS[name])
    (record,) = records(path, format=name, on_bad_row="keep")  # as benchmarks are read
    assert record.source == source and record.row == f"test.jsonl:0 ({own})".removesuffix(" ()")
    assert [c[-1]["content"] for c in record.conversations] == responses
    assert record.wins[0].tolist() == wins
    if name in ("judge_bench", "ppe_preference"):
        assert record.wins[1].tolist() == [1, 0]
    if name == "ppe_correctness":
        assert record.wins.sum() == 3 and record.wins[2, 5] == 1
    if name == "process_bench":
        assert str([step.label for step in record.steps[0]]) == "[1.0, 0.0, nan]"
    told = {"ties": record.ties, "margin": record.margin, "tokens": np.ones(len(responses)), "scores": np.zeros(9)}
    assert Scored(record.row, 0, source, record.wins, **told).own_id == own
    assert record.conversations[0][0]["content"] in ("Why?", "A colour?", "Q?", "Hi")


@pytest.mark.parametrize("wrong", [["dog", "red"], ["dog", ""]])
def test_no_response_is_left_out_of_a_row_that_has_a_bad_one(wrong, tmp_path):
    path = write(tmp_path / "test.jsonl", ROWS["reward_bench_2"] | {"rejected": wrong})
    (record,) = records(path, format="reward_bench_2", on_bad_row="keep")  # as benchmarks are read
    assert [c[-1]["content"] for c in record.conversations] == ["red", "blue", *wrong]
    counted = Audit()
    assert not list(records(path, format="reward_bench_2", audit=counted))
    (reason,) = counted.reasons.values()
    assert (counted.rows, reason.rows, reason.kept) == (1, 1, 0)


def test_a_row_without_its_own_id_and_cells_that_are_wrong(tmp_path):
    row = {key: cell for key, cell in ROWS["reward_bench"].items() if key != "id"}
    (record,) = records(write(tmp_path / "a.jsonl", row), format="reward_bench")
    assert record.row == "a.jsonl:0"
    two = {**ROWS["rm_bench"], "chosen": ["a", "b"]}
    with pytest.raises(ValueError, match="'chosen' is wrong throughout: a list of 3 texts"):
        list(records(write(tmp_path / "b.jsonl", two), format="rm_bench"))
    with pytest.raises(ValueError, match="'label' is wrong throughout: one of 'A>B', 'B>A'"):
        list(records(write(tmp_path / "c.jsonl", {**ROWS["judge_bench"], "label": "A=B"}), format="judge_bench"))


def test_equal_and_empty_responses_get_their_scores(tmp_path, tokenizer):
    """From the file to the groups that a model scores: every response has its end, equal ones have one text."""
    row = ROWS["reward_bench_2"] | {"rejected": ["dog", "red", ""]}
    groups = token_cache.build(
        write(tmp_path / "test.jsonl", row, ROWS["reward_bench_2"]),
        Chat(tokenizer),
        Preferences("keep"),
        format="reward_bench_2",
        on_bad_row="keep",
        max_bad_fraction=1.0,
        workers=0,
        cache_dir=tmp_path / "cache",
    )
    assert groups.responses.tolist() == [5, 4] and groups.ends.tolist() == [5, 4]
    assert groups.id(0) == "test.jsonl:0 (tied:3)" and groups.sources[groups.source[0]] == "Ties"
    tree = groups.group(0).tree
    spans = [tree.tokens[tree.path(int(end))].tolist() for end in tree.end]
    assert spans[0] == spans[3] != spans[1]


def test_inspect_shows_a_benchmark(tmp_path, capsys):
    path = write(tmp_path / "test.jsonl", ROWS["reward_bench"])
    command.main(["inspect", path, "--format=reward_bench"])
    shown = capsys.readouterr().out
    assert "hep-go" in shown and "reward_bench" in shown


def test_benchmark_formats_have_to_be_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS["reward_bench"]) + "\n")
    (record,) = records(str(path))  # pairs, as any others
    assert record.source == "pairs" and record.row == "pairs.jsonl:0"


def test_a_model_of_steps_runs_process_bench(tmp_path, tokenizer_dir):
    """What it finds wrong is the first step whose score, by `RewardModel.steps`, is not above a half."""
    rng, words = np.random.default_rng(0), ["one", "two", "three", "four", "five", "six"]
    rows = [
        {"id": f"{name}-{n}", "problem": f"What is {n}?", "steps": steps, "label": int(rng.integers(-1, len(steps)))}
        for n, name in enumerate(("gsm8k", "math", "olympiadbench", "omnimath") * 6)
        for steps in [rng.choice(words, (rng.integers(1, 5), 3)).tolist()]
    ]
    rows = [row | {"steps": [" ".join(step) for step in row["steps"]]} for row in rows]
    path = write(tmp_path / "test.jsonl", *rows)
    model = RewardModel.load(tiny_exports.write(tmp_path / "model", tokenizer_dir, 4, kind="prm"))
    test = benchmarks.BENCHMARKS["process_bench"]
    groups = evaluating.read_benchmark(test, path, model.chat, model.objective.task)
    asked = [[{"role": "user", "content": row["problem"]}] for row in rows]
    scores = model.steps(asked, [row["steps"] for row in rows], separator="\n\n")
    first = [next((i for i, p in enumerate(of_row) if p <= 0.5), -1) for of_row in scores]
    traced = asking.trace(model, groups)
    assert [(one.label, one.found, one.source) for one in traced] == [
        (row["label"], found, row["id"].partition("-")[0]) for row, found in zip(rows, first)
    ]
    assert len(set(first)) > 1
    found = evaluating.run_benchmark(model, test, groups)
    right = [f == row["label"] for f, row in zip(first, rows) if row["id"].startswith("math") and row["label"] >= 0]
    assert found["metrics"]["math/wrong"]["value"] == pytest.approx(np.mean(right))
    with pytest.raises(ValueError, match="which step of a solution is wrong; it is for models trained with `prm`"):
        evaluating.read_benchmark(test, path, model.chat, Preferences("keep"))
    with pytest.raises(ValueError, match="scores steps, not whole responses"):
        evaluating.read_benchmark(benchmarks.BENCHMARKS["rm_bench"], path, model.chat, model.objective.task)
