"""Rows of benchmarks as they are published. Their columns are those of pairs, so these formats have to be named.

A record's source is the benchmark's subset, and its row ends with the benchmark's own id: "test.jsonl:17 (tied:12)".
No response is ever left out, as the rules need all of them: a row with an empty response, or with two that are the
same, is a bad row, or whole where such rows are kept. Benchmarks are run so, since such rows count in their scores.

reward_bench       `chosen` and `rejected` texts for a `prompt`; `subset`, `id`
reward_bench_2     lists of `chosen` and `rejected` texts, the right ones first; `subset`, `id` ("tied:12" in Ties)
rm_bench           three `chosen` and three `rejected` texts, of one content each in three styles; `domain`, `id`
judge_bench        `response_A`, `response_B` to a `question`, `label` "A>B" or "B>A"; `source` tells the subset
rmb_pairwise       `chosen` and `reject` ({`answer`}) after `conversation_input`; `category_path`, `pair_uid`
rmb_best_of_n      `bon_best` and `loser_list` in the same way; `bon_uid`
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rmjax.data.formats.cells import (
    MESSAGES,
    PROMPT,
    TEXT,
    TEXTS,
    Format,
    Kind,
    Reading,
    Row,
    answer,
    common,
    list_of,
    messages,
    one_of,
    prompt_turns,
)
from rmjax.data.records import Message, Record, check_count, group

BETTER = {"A>B": (0, 1), "B>A": (1, 0)}
CATEGORIES = {  # run_judge.py of ScalerLab/JudgeBench tells them by these prefixes; the names are the paper's
    **{"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning"},
    **{"livebench-math": "math", "livecodebench": "coding"},
}


def _record(
    prompt: Sequence[Message],
    right: Sequence[str],
    wrong: Sequence[str],
    subset: str,
    name: Any,
    row: Row,
    reading: Reading,
) -> Record:
    """Every right response is better than every wrong one; among themselves nothing is said."""
    check_count(len(responses := [*right, *wrong]))
    wins = np.zeros((len(responses), len(responses)), np.float32)
    wins[: len(right), len(right) :] = 1
    told = common(row, reading) | {"source": subset, "row": f"{reading.where} ({name})" if name else reading.where}
    if not reading.keep:
        told["defects"] = None  # so that the row is bad as a whole
    return group([[*prompt, answer(text)] for text in responses], wins=wins, **told)


def _reward_bench(row: Row, reading: Reading) -> Record:
    turns, name = prompt_turns(row, row["prompt"]), row.get("id")
    named = "" if name is None else str(name)  # rows are numbered from 0
    return _record(turns, [row["chosen"]], [row["rejected"]], row["subset"], named, row, reading)


def _reward_bench_2(row: Row, reading: Reading) -> Record:
    turns = prompt_turns(row, row["prompt"])
    return _record(turns, row["chosen"], row["rejected"], row["subset"], row["id"], row, reading)


def _rm_bench(row: Row, reading: Reading) -> Record:
    turns = prompt_turns(row, row["prompt"])
    return _record(turns, row["chosen"], row["rejected"], row["domain"], str(row["id"]), row, reading)


def _judge_bench(row: Row, reading: Reading) -> Record:
    """The responses stay in their order, A first: judges see it so, and equal scores mean B."""
    subset = next((name for prefix, name in CATEGORIES.items() if row["source"].startswith(prefix)), row["source"])
    turns, a, b = prompt_turns(row, row["question"]), row["response_A"], row["response_B"]
    record = _record(turns, [a], [b], subset, row["pair_id"], row, reading)
    wins = np.zeros((2, 2), np.float32)
    wins[BETTER[row["label"]]] = 1
    return dataclasses.replace(record, wins=wins)


def _rmb(best: str, others: str, name: str) -> Callable[[Row, Reading], Record]:
    """Reader of a layout of RMB; the subset is "Helpfulness/Chat/Discussion", the path without what it begins with."""

    def read(row: Row, reading: Reading) -> Record:
        said = [{"role": m["role"], "content": m.get("content")} for m in messages(row["conversation_input"])]
        wrong = row[others] if isinstance(row[others], list) else [row[others]]
        texts = [each["answer"] for each in wrong]
        subset = row["category_path"].partition("/")[2] or row["category_path"]
        return _record(prompt_turns(row, said), [row[best]["answer"]], texts, subset, str(row[name]), row, reading)

    return read


NAMED = lambda row: False
NAME = Kind("text or a whole number", lambda cell: isinstance(cell, str | int) and not isinstance(cell, bool))
THREE = Kind("a list of 3 texts", lambda cell: TEXTS.test(cell) and len(cell) == 3)
ANSWER = Kind("an object with `answer`", lambda cell: isinstance(cell, dict) and isinstance(cell.get("answer"), str))
ANSWERS = list_of(ANSWER, "objects with `answer`")
_SET = {"conversation_input": MESSAGES, "category_path": TEXT}
BENCHMARKS = (
    Format(
        "reward_bench",
        {"prompt": PROMPT, "chosen": TEXT, "rejected": TEXT, "subset": TEXT},
        _reward_bench,
        NAMED,
        means="RewardBench; only where it is named",
    ),
    Format(
        "reward_bench_2",
        {"id": TEXT, "prompt": PROMPT, "chosen": TEXTS, "rejected": TEXTS, "subset": TEXT},
        _reward_bench_2,
        NAMED,
        means="RewardBench 2: every chosen one is better than every rejected one; only where it is named",
    ),
    Format(
        "rm_bench",
        {"id": NAME, "prompt": PROMPT, "chosen": THREE, "rejected": THREE, "domain": TEXT},
        _rm_bench,
        NAMED,
        means="RM-Bench: three styles of a right and of a wrong response; only where it is named",
    ),
    Format(
        "judge_bench",
        {
            "pair_id": TEXT,
            "source": TEXT,
            "question": TEXT,
            "response_A": TEXT,
            "response_B": TEXT,
            "label": one_of(*BETTER),
        },
        _judge_bench,
        NAMED,
        means="JudgeBench; only where it is named",
    ),
    Format(
        "rmb_pairwise",
        {**_SET, "pair_uid": NAME, "chosen": ANSWER, "reject": ANSWER},
        _rmb("chosen", "reject", "pair_uid"),
        NAMED,
        means="RMB's pairs; only where it is named",
    ),
    Format(
        "rmb_best_of_n",
        {**_SET, "bon_uid": NAME, "bon_best": ANSWER, "loser_list": ANSWERS},
        _rmb("bon_best", "loser_list", "bon_uid"),
        NAMED,
        means="RMB's best of N: the best is better than each loser; only where it is named",
    ),
)
