"""Benchmarks of reward models, one row each: where their data is, how it is read, and by which rule it is scored."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax.evaluation.bootstrap import estimate
from rmjax.evaluation.rules import JUDGE_BENCH, REWARD_BENCH, REWARD_BENCH_2, RM_BENCH, RMB, RULES, Rule
from rmjax.evaluation.scored import Scored


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: of the row.
        source: where its data is, as sources.open_source takes it; "" has to be named.
        format: how its rows are read, a name in formats.FORMATS.
        rule: its official rule; None is that of its labels' metrics.
        subsets: those that its official number is made of; a subset may have parts, "Helpfulness/Chat".
        paper: where it is described.
        what: it in a few words, and its official number.
        pairwise: whether a judge of two responses can run it.
    """

    name: str
    source: str
    format: str
    rule: Rule | None
    subsets: tuple[str, ...]
    paper: str
    what: tuple[str, str]
    pairwise: bool = True


_SUBSETS = tuple(name for section in REWARD_BENCH.values() for name in section)
_TABLE = (
    Benchmark(
        "reward_bench",
        "hf://datasets/allenai/reward-bench/data/filtered-*.parquet",
        "reward_bench",
        RULES["reward_bench"],
        _SUBSETS,
        "arXiv:2403.13787",
        ("2,985 pairs in 23 subsets", "mean of Chat, Chat Hard, Safety and Reasoning; equal scores are wrong"),
    ),
    Benchmark(
        "reward_bench_2",
        "hf://datasets/allenai/reward-bench-2/data/test-*.parquet",
        "reward_bench_2",
        RULES["reward_bench_2"],
        REWARD_BENCH_2,
        "arXiv:2506.01937",
        ("best of four, and Ties", "mean of six subsets; equal highest scores share"),
        pairwise=False,
    ),
    Benchmark(
        "rm_bench",
        "hf://datasets/THU-KEG/RM-Bench/total_dataset.json",
        "rm_bench",
        RULES["rm_bench"],
        RM_BENCH,
        "arXiv:2410.16184",
        ("3 x 3 styles: easy, normal, hard", "mean of chat, code, math and safety over the three levels"),
    ),
    Benchmark(
        "judge_bench",
        "hf://datasets/ScalerLab/JudgeBench/data/gpt-*.parquet",
        "judge_bench",
        RULES["judge_bench"],
        tuple(JUDGE_BENCH.values()),
        "arXiv:2410.12784",
        ("350 pairs of hard questions", "share of pairs in which both orders together name the better one"),
    ),
    Benchmark(
        "rmb_pairwise",
        "",
        "rmb_pairwise",
        RULES["rmb_pairwise"],
        RMB,
        "arXiv:2410.09893",
        ("RMB's pairs", "mean of Helpfulness and Harmlessness"),
    ),
    Benchmark(
        "rmb_best_of_n",
        "",
        "rmb_best_of_n",
        RULES["rmb_best_of_n"],
        RMB,
        "arXiv:2410.09893",
        ("RMB's best of N", "the same; right where the best is above every other one"),
    ),
    Benchmark(
        "helpsteer2",
        "hf://datasets/nvidia/HelpSteer2/validation.jsonl.gz",
        "scored_text",
        None,
        (),
        "arXiv:2406.08673",
        ("1,038 responses with five ratings", "errors, correlations and kappa of each attribute (`pointwise` models)"),
        pairwise=False,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def parse(text: str) -> list[tuple[Benchmark, str]]:
    """Benchmarks with their sources, of "reward_bench,rm_bench=FILE".

    Raises:
        ValueError: a name that is not in the table, twice the same, or no source.
    """
    found: dict[str, tuple[Benchmark, str]] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, source = item.partition("=")
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no benchmark {name!r}, only {', '.join(BENCHMARKS)}{hint}")
        if name in found:
            raise ValueError(f"the benchmark {name} is named twice")
        benchmark = BENCHMARKS[name]
        if not (source or benchmark.source):
            raise ValueError(f"{name} has no usual place on the hub; give {name}=SOURCE, a directory or a glob")
        found[name] = (benchmark, source or benchmark.source)
    return list(found.values())


def score(benchmark: Benchmark, groups: Sequence[Scored]) -> dict[str, Any]:
    """The official numbers of a benchmark, with 95 % intervals by the bootstrap over the prompts of each subset.

    Returns:
        "groups"; "metrics": the official numbers by name, "overall" among them, each with "value", "low" and "high";
        without those that need a subset that is not there. "subsets": the mean of each measure of the rule, with its
        "count". "missing": the subsets that are not there. "notes": what to know of it.

    Raises:
        ValueError: groups that the rule cannot score, or none.
    """
    if benchmark.rule is None:
        raise ValueError(f"{benchmark.name} has no rule; its numbers are those of its attributes")
    outcomes = list(benchmark.rule.outcomes(groups))
    if not outcomes:
        raise ValueError(f"{benchmark.name}: its data has no group that can be scored")
    names = list(dict.fromkeys(name for name, _, _ in outcomes))
    at = np.array([names.index(name) for name, _, _ in outcomes])
    prompt = np.array([p for _, p, _ in outcomes], np.uint64)
    rows, m = np.arange(len(outcomes)), len(names)
    sums = np.zeros((len(outcomes), 2 * m))
    sums[rows, at], sums[rows, m + at] = [value for *_, value in outcomes], 1
    official: list[str] = []

    def statistics(totals: np.ndarray) -> np.ndarray:
        means = {name: totals[..., k] / totals[..., m + k] for k, name in enumerate(names)}
        combined = benchmark.rule.combine(means)  # type: ignore[union-attr]
        official[:] = combined
        parts = [*means.values(), *combined.values()]
        return np.stack([np.broadcast_to(x, totals.shape[:-1]) for x in parts], -1)

    found = estimate(sums, prompt, statistics, strata=at)
    counts = np.bincount(at, minlength=m).tolist()
    metrics = dict(zip(official, found[m:]))
    seen = {said.source for said in groups}
    missing = [s for s in benchmark.subsets if not any(source.startswith(s) for source in seen)]
    others = sorted(s for s in seen if not any(s.startswith(known) for known in benchmark.subsets))
    notes = [f"subsets that the official number does not know: {', '.join(others)}"] * bool(others)
    if missing:
        notes.append("the official number needs all subsets; there is none without the missing ones")
    return {
        "groups": len(groups),
        "metrics": {name: x for name, x in metrics.items() if x["value"] is not None},
        "subsets": {name: {"count": n, **x} for name, n, x in zip(names, counts, found) if name not in metrics},
        "missing": missing,
        "notes": notes,
    }
