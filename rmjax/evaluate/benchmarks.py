"""Benchmarks of reward models, one row each: where their data is, how it is read, and by which rule it is scored."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.evaluate.estimates import bootstrap
from rmjax.evaluate.rules import HELPSTEER3, NO_SHARES, PPE, REWARD_BENCH, RMB, RULES, Outcome, Rule
from rmjax.evaluate.scored import Scored, Traced
from rmjax.suggestions import did_you_mean


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A row of the table; its official rule is that of its name, or without one that of its labels' metrics."""

    name: str
    source: str  # where its data is, as sources.open_source takes it; "" has to be named
    subsets: Mapping[str, int | None]  # what the official number is made of, with its rows in the public set, if known
    format: str = ""  # how its rows are read, a name in formats.FORMATS; "" is its own name

    @property
    def rule(self) -> Rule | None:
        return RULES.get(self.name)


_REWARD_BENCH = {name: n for section in REWARD_BENCH.values() for name, n in section.items()} | {"math-prm": 447}
_REWARD_BENCH_2 = {"Factuality": 475, "Precise IF": 160, "Math": 183, "Safety": 450, "Focus": 495, "Ties": 102}
_RM_BENCH = {"chat": 129, "code": 228, "math": 529, "safety-refuse": 284, "safety-response": 157}
_JUDGE_BENCH = {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42}
_PROCESS_BENCH = {"gsm8k": 400, "math": 1000, "olympiadbench": 1000, "omnimath": 1000}
_HUB = "hf://datasets"
_PPE = ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
_PPE_CORRECTNESS = ",".join(f"{_HUB}/lmarena-ai/PPE-{name}-Best-of-K/data/train-*.parquet" for name in _PPE)
_PPE_PREFERENCE = f"{_HUB}/lmarena-ai/PPE-Human-Preference-V1/data/test-*.parquet"
_TABLE = (  # docs/evaluation.md says what each is
    Benchmark("reward_bench", f"{_HUB}/allenai/reward-bench/data/filtered-*.parquet", _REWARD_BENCH),
    Benchmark("reward_bench_2", f"{_HUB}/allenai/reward-bench-2/data/test-*.parquet", _REWARD_BENCH_2),
    Benchmark("rm_bench", f"{_HUB}/THU-KEG/RM-Bench/total_dataset.json", _RM_BENCH),
    Benchmark("judge_bench", f"{_HUB}/ScalerLab/JudgeBench/data/gpt-*.jsonl", _JUDGE_BENCH),
    Benchmark("rmb_pairwise", "", dict.fromkeys(RMB)),
    Benchmark("rmb_best_of_n", "", dict.fromkeys(RMB)),
    Benchmark("ppe_preference", _PPE_PREFERENCE, {"human": 16_038}),
    Benchmark("ppe_correctness", _PPE_CORRECTNESS, dict.fromkeys(PPE)),
    Benchmark("helpsteer3", f"{_HUB}/nvidia/HelpSteer3/preference/validation.jsonl.gz", dict.fromkeys(HELPSTEER3)),
    Benchmark("process_bench", f"{_HUB}/Qwen/ProcessBench/*.json", _PROCESS_BENCH),
    Benchmark("helpsteer2", f"{_HUB}/nvidia/HelpSteer2/validation.jsonl.gz", {}, format="scored_text"),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def sources_of(benchmarks: str) -> list[str]:
    """The sources that `config.eval.benchmarks` names."""
    return [source for _, source in parse(benchmarks)] if benchmarks else []


def parse(text: str) -> list[tuple[Benchmark, str]]:
    """Benchmarks with their sources, of "reward_bench,rm_bench=FILE".

    A source may have commas, as JudgeBench's own files do: what follows one and is a path belongs to it. A name that is
    not in the table, is there twice, or has no source is a ValueError.
    """
    named: dict[str, str] = {}
    last = ""
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, source = item.partition("=")
        if name not in BENCHMARKS and named.get(last) and any(mark in item for mark in "./*"):
            named[last] += f",{item}"
            continue
        if name not in BENCHMARKS:
            hint = did_you_mean(name, BENCHMARKS)
            raise ValueError(f"there is no benchmark {name!r}, only {', '.join(BENCHMARKS)}{hint}")
        if name in named:
            raise ValueError(f"the benchmark {name} is named twice")
        named[name], last = source, name
    for name, source in named.items():
        if not (source or BENCHMARKS[name].source):
            raise ValueError(f"{name} has no usual place on the hub; give {name}=SOURCE, a directory or a glob")
    return [(BENCHMARKS[name], source or BENCHMARKS[name].source) for name, source in named.items()]


def score(benchmark: Benchmark, groups: Sequence[Scored] | Sequence[Traced]) -> dict[str, Any]:
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
    subsets = list(dict.fromkeys(name for name in (*benchmark.subsets, *sorted(counts)) if name in counts))
    wanted = list(dict.fromkeys([*metrics, *subsets]))

    def statistics(totals: np.ndarray) -> np.ndarray:
        """Of totals [..., 2 M] the official numbers and the subsets' means that are wanted, [..., q]."""
        m = len(measures)
        means = {name: totals[..., k] / totals[..., m + k] for k, name in enumerate(measures)}
        numbers = {**means, **rule.combine(means)}
        return np.stack([np.broadcast_to(numbers.get(name, np.nan), totals.shape[:-1]) for name in wanted], -1)

    shares = [(k, len(measures) + k) for k, name in enumerate(measures) if name not in NO_SHARES]
    estimates = dict(zip(wanted, bootstrap(sums, prompt, statistics, strata, shares)))
    return {
        "groups": len(groups),
        "metrics": {name: estimates[name] for name in metrics},
        "subsets": {name: {"count": counts[name], **estimates[name]} for name in subsets},
        "missing": missing,
        "notes": _notes(benchmark, counts, missing) + [rule.judges] * (groups[0].orders is not None),
    }


def _sums(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Value and count of every measure, side by side, [n, 2 M]; prompt and measure [n] of each; the measures."""
    names, prompts, values = zip(*outcomes)
    measures = list(dict.fromkeys(names))
    index = {name: k for k, name in enumerate(measures)}
    measure, rows, m = np.array([index[name] for name in names]), np.arange(len(names)), len(measures)
    sums = np.zeros((len(names), 2 * m))
    sums[rows, measure], sums[rows, m + measure] = values, 1
    return sums, np.array(prompts, np.uint64), measure, measures


def _notes(benchmark: Benchmark, counts: Mapping[str, int], missing: Sequence[str]) -> list[str]:
    """What is unlike the official run, in sentences."""
    notes = []
    if others := sorted(set(counts) - set(benchmark.subsets)):
        notes.append(f"subsets that the official number does not know: {', '.join(others)}")
    if missing:
        notes.append("official numbers that need a missing subset are not given")
    sizes = {name: n for name, n in benchmark.subsets.items() if n is not None and name in counts}
    if unlike := [f"{name} {counts[name]:,} of {n:,}" for name, n in sizes.items() if counts[name] != n]:
        notes.append(f"not the rows of the public set: {', '.join(unlike)}")
    return notes
