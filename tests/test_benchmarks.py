"""Benchmarks: each rule against numbers of the benchmark's own code, with equal scores and missing subsets; the rows.

Reference numbers were made by running the published functions on the scores that each test draws again:
allenai/reward-bench at 05a9005e (rewardbench/utils.py: calculate_scores_per_section, reroll_and_score_dataset,
process_single_model; constants.py), THU-KEG/RM-Bench at 73c52d7b (README.md: compute_accuracy), ScalerLab/JudgeBench
at e2c52c28 (utils/metrics.py: compute_final_metrics).
"""

import json

import numpy as np
import pytest
from format_rows import BENCHMARKS as ROWS

from rmjax.data.reading import records
from rmjax.evaluation import benchmarks
from rmjax.evaluation.rules import JUDGE_BENCH, REWARD_BENCH
from rmjax.evaluation.scored import Scored


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
    assert "needs all subsets" in found["notes"][1] and "does not know: shp" in found["notes"][0]
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
    orders = np.full((4, 4, 3), 1 / 3)
    with pytest.raises(ValueError, match="needs a score of every response"):
        benchmarks.score(benchmarks.BENCHMARKS["reward_bench_2"], [scored("Math", orders=orders)])


RM_BENCH = {  # easy, normal, hard
    "chat": (0.242424242424, 0.363636363636, 0.363636363636),
    "code": (0.363636363636, 0.333333333333, 0.242424242424),
    "math": (0.424242424242, 0.363636363636, 0.363636363636),
    "safety-refuse": (0.333333333333, 0.424242424242, 0.545454545455),
    "safety-response": (0.515151515152, 0.393939393939, 0.393939393939),
}


def test_rm_bench():
    rng = np.random.default_rng(2)
    rows = [(domain, scores) for domain in RM_BENCH for scores in rng.integers(0, 5, (11, 6))]
    groups = [scored(domain, scores, 3, prompt=n) for n, (domain, scores) in enumerate(rows)]
    found = benchmarks.score(benchmarks.BENCHMARKS["rm_bench"], groups)
    for domain, levels in RM_BENCH.items():
        measured = [found["subsets"][f"{domain}/{level}"]["value"] for level in ("easy", "normal", "hard")]
        assert measured == pytest.approx(levels, abs=1e-9)
    safety = np.mean([RM_BENCH["safety-refuse"], RM_BENCH["safety-response"]], 0)
    table = np.array([RM_BENCH["chat"], RM_BENCH["code"], RM_BENCH["math"], safety])
    official = values(found)
    # README, "Clarity on Avg Calculation": the overall number is the mean of the domains, and of the levels.
    assert [official[x] for x in ("chat", "code", "math", "safety")] == pytest.approx(table.mean(1), abs=1e-9)
    assert [official[x] for x in ("easy", "normal", "hard")] == pytest.approx(table.mean(0), abs=1e-9)
    assert official["overall"] == pytest.approx(table.mean(), abs=1e-9)


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
    "livebench-math": "A== 2, A=A 2, A=B 2, AA= 1, AAA 1, AAB 23, ABB 2, BAA 2, BAB 1, BB= 2, BBA 18",
    "livebench-reasoning": "A=A 1, A=B 2, AA= 1, AAA 11, AAB 31, ABA 3, ABB 6, B== 1, B=A 1, B=B 3, BAA 8, BAB 3,"
    "BB= 4, BBA 22, BBB 1",
    "livecodebench": "A=B 2, AAA 4, AAB 15, ABA 1, ABB 1, B== 2, B=A 3, BAA 1, BB= 1, BBA 12",
    "mmlu-pro": "A=A 1, A=B 1, AA= 2, AAA 13, AAB 42, ABA 18, ABB 5, B=A 4, BAA 18, BAB 6, BB= 1, BBA 40, BBB 3",
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


def test_judge_bench_of_scores_counts_equal_ones_as_wrong():
    sources = list(JUDGE_BENCH.values())
    groups = [scored(f"{source}-x", [2, 1], prompt=n) for n, source in enumerate(sources)]
    groups += [scored("mmlu-pro-law", [1, 1], prompt=9), scored("mmlu-pro-law", [0, 1], prompt=10)]
    found = values(benchmarks.score(benchmarks.BENCHMARKS["judge_bench"], groups))
    assert found["knowledge"] == pytest.approx(1 / 3) and found["overall"] == pytest.approx(4 / 6)  # of all pairs


def test_rmb_needs_the_best_above_every_other_one():
    groups = [
        scored("Helpfulness/Chat", [3, 2, 1], prompt=0),
        scored("Helpfulness/Code", [3, 2, 3], prompt=1),
        scored("Harmlessness/S1", [3, 4], prompt=2),
        scored("Harmlessness/S2", [3, 1], prompt=3),
        scored("Harmlessness/S2", [3, 1], prompt=4),
    ]
    found = benchmarks.score(benchmarks.BENCHMARKS["rmb_best_of_n"], groups)
    assert values(found) == pytest.approx({"Helpfulness": 0.5, "Harmlessness": 2 / 3, "overall": (0.5 + 2 / 3) / 2})
    assert found["subsets"]["Helpfulness/Code"]["value"] == 0
    assert benchmarks.score(benchmarks.BENCHMARKS["rmb_pairwise"], groups[:1])["missing"] == ["Harmlessness"]


def test_judges_run_the_pairwise_benchmarks_by_both_orders_averaged():
    named = "".join("AB"[n % 2] for n in range(23))
    subsets = [name for section in REWARD_BENCH.values() for name in section]
    groups = [judged(True, first, "B", subset, n) for n, (subset, first) in enumerate(zip(subsets, named))]
    found = benchmarks.score(benchmarks.BENCHMARKS["reward_bench"], groups)
    assert found["subsets"][subsets[0]]["value"] == 1  # both orders name the first
    assert found["subsets"][subsets[1]]["value"] == 0.5  # they contradict each other


def test_the_table_is_parsed_and_names_what_was_meant():
    asked = benchmarks.parse("reward_bench, rm_bench=data/x.json")
    assert [(b.name, source) for b, source in asked] == [
        ("reward_bench", "hf://datasets/allenai/reward-bench/data/filtered-*.parquet"),
        ("rm_bench", "data/x.json"),
    ]
    for text, words in (
        ("rewardbench", "did you mean 'reward_bench'"),
        ("rm_bench,rm_bench=x", "named twice"),
        ("rmb_pairwise", "give rmb_pairwise=SOURCE"),
    ):
        with pytest.raises(ValueError, match=words):
            benchmarks.parse(text)


READ = {  # source, id, responses, wins of the first
    "reward_bench": ("hep-go", "7", ["a", "b"], [0, 1]),
    "reward_bench_2": ("Ties", "tied:3", ["red", "blue", "dog", "red"], [0, 0, 1, 1]),
    "rm_bench": ("safety-refuse", "9", ["a", "a b", "# a", "b", "b c", "# b"], [0, 0, 0, 1, 1, 1]),
    "judge_bench": ("mmlu-pro-law", "e3", ["a", "b"], [0, 0]),
    "rmb_pairwise": ("Helpfulness/Chat", "11", ["a", "b"], [0, 1]),
    "rmb_best_of_n": ("Harmlessness/S1", "26", ["a", "b", ""], [0, 1, 1]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_as_published_and_none_is_lost(name, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    source, own, responses, wins = READ[name]
    (record,) = records(str(path), format=name, on_bad_row="keep")  # as benchmarks are read
    assert record.source == source and record.row == f"test.jsonl:0 ({own})"
    assert [c[-1]["content"] for c in record.conversations] == responses
    assert record.wins[0].tolist() == wins
    if name == "judge_bench":
        assert record.wins[1].tolist() == [1, 0]
    said = Scored(record.row, 0, source, record.wins, record.ties, record.margin, np.ones(len(responses)), np.zeros(9))
    assert said.own_id == own


def test_benchmark_formats_have_to_be_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS["reward_bench"]) + "\n")
    (record,) = records(str(path))  # pairs, as any others
    assert record.source == "pairs" and record.row == "pairs.jsonl:0"
