"""Benchmarks of reward models, one row each: where their data is, how it is read, and by which rule it is scored."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.evaluate.bootstrap import estimate
from rmjax.evaluate.rules import REWARD_BENCH, RMB, RULES, Outcome, Rule
from rmjax.evaluate.scored import Scored
from rmjax.suggestions import did_you_mean


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: of the row.
        source: where its data is, as sources.open_source takes it; "" has to be named.
        format: how its rows are read, a name in formats.FORMATS.
        rule: its official rule; None is that of its labels' metrics.
        subsets: those that its official number is made of, with the rows of each in the public set; None where that is
            not known.
        paper: where it is described.
        what: it in a few words, and its official number.
        pairwise: whether a judge of two responses can run it.
    """

    name: str
    source: str
    format: str
    rule: Rule | None
    subsets: Mapping[str, int | None]
    paper: str
    what: tuple[str, str]
    pairwise: bool = True


_REWARD_BENCH = {name: n for section in REWARD_BENCH.values() for name, n in section.items()} | {"math-prm": 447}
_TABLE = (
    Benchmark(
        "reward_bench",
        "hf://datasets/allenai/reward-bench/data/filtered-*.parquet",
        "reward_bench",
        RULES["reward_bench"],
        _REWARD_BENCH,
        "arXiv:2403.13787",
        ("2,985 pairs in 23 subsets", "mean of Chat, Chat Hard, Safety and Reasoning; equal scores are wrong"),
    ),
    Benchmark(
        "reward_bench_2",
        "hf://datasets/allenai/reward-bench-2/data/test-*.parquet",
        "reward_bench_2",
        RULES["reward_bench_2"],
        {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102},
        "arXiv:2506.01937",
        ("best of four, and Ties", "mean of six subsets; equal highest scores share"),
        pairwise=False,
    ),
    Benchmark(
        "rm_bench",
        "hf://datasets/THU-KEG/RM-Bench/total_dataset.json",
        "rm_bench",
        RULES["rm_bench"],
        {"chat": 129, "code": 228, "math": 529, "safety-refuse": 284, "safety-response": 157},
        "arXiv:2410.16184",
        ("3 x 3 styles: easy, normal, hard", "mean of chat, code, math and safety over the three levels"),
    ),
    Benchmark(
        "judge_bench",
        "hf://datasets/ScalerLab/JudgeBench/data/gpt-*.jsonl",
        "judge_bench",
        RULES["judge_bench"],
        {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42},
        "arXiv:2410.12784",
        ("350 pairs of hard questions", "share of pairs in which both orders together name the better one"),
    ),
    Benchmark(
        "rmb_pairwise",
        "",
        "rmb_pairwise",
        RULES["rmb_pairwise"],
        dict.fromkeys(RMB),
        "arXiv:2410.09893",
        ("RMB's pairs, 49 scenarios", "mean of Helpfulness and Harmlessness"),
    ),
    Benchmark(
        "rmb_best_of_n",
        "",
        "rmb_best_of_n",
        RULES["rmb_best_of_n"],
        dict.fromkeys(RMB),
        "arXiv:2410.09893",
        ("RMB's best of N", "the same; right where the best is above every other one"),
    ),
    Benchmark(
        "helpsteer2",
        "hf://datasets/nvidia/HelpSteer2/validation.jsonl.gz",
        "scored_text",
        None,
        {},
        "arXiv:2406.08673",
        ("1,038 responses with five ratings", "errors, correlations and kappa of each attribute (`pointwise` models)"),
        pairwise=False,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def sources_of(benchmarks: str) -> list[str]:
    """The sources that `config.eval.benchmarks` names."""
    return [source for _, source in parse(benchmarks)] if benchmarks else []


def parse(text: str) -> list[tuple[Benchmark, str]]:
    """Benchmarks with their sources, of "reward_bench,rm_bench=FILE".

    A source may have commas, as JudgeBench's own files do: what follows one and is a path belongs to it.

    Raises:
        ValueError: a name that is not in the table, twice the same, or no source.
    """
    found: dict[str, str] = {}
    last = ""
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, source = item.partition("=")
        if name not in BENCHMARKS and found.get(last) and any(mark in item for mark in "./*"):
            found[last] += f",{item}"
            continue
        if name not in BENCHMARKS:
            hint = did_you_mean(name, BENCHMARKS)
            raise ValueError(f"there is no benchmark {name!r}, only {', '.join(BENCHMARKS)}{hint}")
        if name in found:
            raise ValueError(f"the benchmark {name} is named twice")
        found[name], last = source, name
    for name, source in found.items():
        if not (source or BENCHMARKS[name].source):
            raise ValueError(f"{name} has no usual place on the hub; give {name}=SOURCE, a directory or a glob")
    return [(BENCHMARKS[name], source or BENCHMARKS[name].source) for name, source in found.items()]


def score(benchmark: Benchmark, groups: Sequence[Scored]) -> dict[str, Any]:
    """The official numbers of a benchmark, with 95 % intervals by the bootstrap over the prompts of each subset.

    Returns:
        "groups"; "metrics": the official numbers by name, "overall" among them, each with "value", "low" and "high",
        without those that need a subset that is not there; "subsets": what each subset scores, with its "count";
        "missing": the subsets that are not there; "notes": what to know of it.

    Raises:
        ValueError: groups that the rule cannot score, or none.
    """
    rule = benchmark.rule
    if rule is None:
        raise ValueError(f"{benchmark.name} has no rule; its numbers are those of its attributes")
    if not groups:
        raise ValueError(f"{benchmark.name}: its data has no group that can be scored")
    counts = Counter(said.source for said in groups)
    missing = [name for name in benchmark.subsets if name not in counts]
    sums, prompt, strata, measures = _sums(list(rule.outcomes(groups)))
    metrics = [name for name in rule.combine({}) if not set(rule.needs.get(name, benchmark.subsets)) & set(missing)]
    subsets = [name for name in (*benchmark.subsets, *sorted(counts)) if name in counts]
    wanted = list(dict.fromkeys([*metrics, *subsets]))
    found = dict(zip(wanted, estimate(sums, prompt, _statistics(rule, measures, wanted), strata=strata)))
    return {
        "groups": len(groups),
        "metrics": {name: found[name] for name in metrics},
        "subsets": {name: {"count": counts[name], **found[name]} for name in dict.fromkeys(subsets)},
        "missing": missing,
        "notes": _notes(benchmark, rule, counts, missing, groups[0].orders is not None),
    }


def _sums(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Value and count of every measure, side by side, [n, 2 M]; prompt and measure [n] of each; the measures."""
    measures = list(dict.fromkeys(name for name, *_ in outcomes))
    index = {name: k for k, name in enumerate(measures)}
    at = np.array([index[name] for name, *_ in outcomes], np.int64)
    rows, m = np.arange(len(outcomes)), len(measures)
    sums = np.zeros((len(outcomes), 2 * m))
    sums[rows, at], sums[rows, m + at] = [value for *_, value in outcomes], 1
    return sums, np.array([prompt for _, prompt, _ in outcomes], np.uint64), at, measures


def _statistics(rule: Rule, measures: Sequence[str], wanted: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Of totals [..., 2 M] the official numbers and the subsets' means that are wanted, [..., q]."""

    def of(totals: np.ndarray) -> np.ndarray:
        m = len(measures)
        means = {name: totals[..., k] / totals[..., m + k] for k, name in enumerate(measures)}
        all_of_them = {**means, **rule.combine(means)}
        parts = [all_of_them.get(name, np.nan) for name in wanted]
        return np.stack([np.broadcast_to(x, totals.shape[:-1]) for x in parts], -1)

    return of


def _notes(
    benchmark: Benchmark, rule: Rule, counts: Mapping[str, int], missing: Sequence[str], judged: bool
) -> list[str]:
    """What is unlike the official run, in sentences."""
    notes = []
    if others := sorted(set(counts) - set(benchmark.subsets)):
        notes.append(f"subsets that the official number does not know: {', '.join(others)}")
    if missing:
        notes.append("official numbers that need a missing subset are not given")
    sizes = {name: n for name, n in benchmark.subsets.items() if n is not None and name in counts}
    if unlike := [f"{name} {counts[name]:,} of {n:,}" for name, n in sizes.items() if counts[name] != n]:
        notes.append(f"not the rows of the public set: {', '.join(unlike)}")
    return [*notes, rule.judges] if judged else notes
