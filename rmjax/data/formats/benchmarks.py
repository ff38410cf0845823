"""Rows of benchmarks as they are published. Their columns are those of pairs, so these formats have to be named.

A record's source is the benchmark's subset, and its row ends with the benchmark's own id: "test.jsonl:17 (tied:12)".
No response is ever left out, as the rules need all of them: a row with an empty response, or with two that are the
same, is a bad row, or whole where such rows are kept. Benchmarks are run so, since such rows count in their scores.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, Row, answer, common, messages, named_only, row_format, with_system
from rmjax.data.formats.kinds import MESSAGES, PROMPT, TEXT, TEXTS, Kind
from rmjax.data.records import Record, check_count, group

BETTER = {"A>B": (0, 1), "B>A": (1, 0)}
CATEGORIES = {  # run_judge.py of ScalerLab/JudgeBench tells them by these prefixes; the names are the paper's
    **{"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning"},
    **{"livebench-math": "math", "livecodebench": "coding"},
}
NAME = Kind("text or a whole number", lambda cell: isinstance(cell, str | int) and not isinstance(cell, bool))
THREE = Kind("a list of 3 texts", lambda cell: TEXTS.test(cell) and len(cell) == 3)
ANSWER = Kind("an object with `answer`", lambda cell: isinstance(cell, dict) and isinstance(cell.get("answer"), str))
RMB = {"conversation_input": MESSAGES, "category_path": TEXT}
JUDGE_BENCH_TEXTS = dict.fromkeys(("pair_id", "source", "question", "response_A", "response_B"), TEXT)


def _record(
    prompt: Any, right: Sequence[str], wrong: Sequence[str], subset: str, name: Any, row: Row, reading: Reading
) -> Record:
    """Every right response is better than every wrong one; among themselves nothing is said."""
    check_count(len(responses := [*right, *wrong]))
    wins = np.zeros((len(responses), len(responses)), np.float32)
    wins[: len(right), len(right) :] = 1
    labels = common(row, reading) | {"source": subset, "row": f"{reading.where} ({name})" if name else reading.where}
    if not reading.keep:
        labels["defects"] = None  # so that the row is bad as a whole
    turns = with_system(row, messages(prompt, "user"))  # as published: no text is taken for a transcript
    return group([[*turns, answer(text)] for text in responses], wins=wins, **labels)


@row_format("reward_bench", {"prompt": PROMPT, "chosen": TEXT, "rejected": TEXT, "subset": TEXT}, named_only)
def _reward_bench(row: Row, reading: Reading) -> Record:
    """RewardBench; only where it is named."""
    name = "" if row.get("id") is None else str(row["id"])  # rows are numbered from 0
    return _record(row["prompt"], [row["chosen"]], [row["rejected"]], row["subset"], name, row, reading)


@row_format(
    "reward_bench_2", {"id": TEXT, "prompt": PROMPT, "chosen": TEXTS, "rejected": TEXTS, "subset": TEXT}, named_only
)
def _reward_bench_2(row: Row, reading: Reading) -> Record:
    """RewardBench 2: every chosen one is better than every rejected one; only where it is named."""
    return _record(row["prompt"], row["chosen"], row["rejected"], row["subset"], row["id"], row, reading)


@row_format("rm_bench", {"id": NAME, "prompt": PROMPT, "chosen": THREE, "rejected": THREE, "domain": TEXT}, named_only)
def _rm_bench(row: Row, reading: Reading) -> Record:
    """RM-Bench: three styles of a right and of a wrong response; only where it is named."""
    return _record(row["prompt"], row["chosen"], row["rejected"], row["domain"], str(row["id"]), row, reading)


@row_format("judge_bench", {**JUDGE_BENCH_TEXTS, "label": kinds.one_of(*BETTER)}, named_only)
def _judge_bench(row: Row, reading: Reading) -> Record:
    """JudgeBench; only where it is named.

    The responses stay in their order, A first: judges see it so, and equal scores mean B.
    """
    subset = next((name for prefix, name in CATEGORIES.items() if row["source"].startswith(prefix)), row["source"])
    responses = [row["response_A"]], [row["response_B"]]
    record = _record(row["question"], *responses, subset, row["pair_id"], row, reading)
    wins = np.zeros((2, 2), np.float32)
    wins[BETTER[row["label"]]] = 1
    return dataclasses.replace(record, wins=wins)


@row_format("rmb_pairwise", {**RMB, "pair_uid": NAME, "chosen": ANSWER, "reject": ANSWER}, named_only)
def _rmb_pairwise(row: Row, reading: Reading) -> Record:
    """RMB's pairs; only where it is named."""
    return _rmb(row["chosen"], [row["reject"]], row["pair_uid"], row, reading)


@row_format(
    "rmb_best_of_n",
    {**RMB, "bon_uid": NAME, "bon_best": ANSWER, "loser_list": kinds.list_of(ANSWER, "objects with `answer`")},
    named_only,
)
def _rmb_best_of_n(row: Row, reading: Reading) -> Record:
    """RMB's best of N: the best is better than each loser; only where it is named."""
    return _rmb(row["bon_best"], row["loser_list"], row["bon_uid"], row, reading)


def _rmb(best: Any, others: Sequence[Any], name: Any, row: Row, reading: Reading) -> Record:
    """The subset is "Helpfulness/Chat/Discussion", the path without its first folder."""
    prompt = [{"role": m["role"], "content": m.get("content")} for m in messages(row["conversation_input"])]
    subset = row["category_path"].partition("/")[2] or row["category_path"]
    return _record(prompt, [best["answer"]], [each["answer"] for each in others], subset, str(name), row, reading)
