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
from rmjax.data.formats.public import by_strength_chat
from rmjax.data.formats.steps import joined_steps
from rmjax.data.records import BadRow, Record, check_count, group

BETTER = {"A>B": (0, 1), "B>A": (1, 0)}
CATEGORIES = {  # run_judge.py of ScalerLab/JudgeBench tells them by these prefixes; the names are the paper's
    **{"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning"},
    **{"livebench-math": "math", "livecodebench": "coding"},
}
NAME = Kind("text or a whole number", lambda cell: isinstance(cell, str | int) and not isinstance(cell, bool))
THREE = Kind("a list of 3 texts", lambda cell: TEXTS.test(cell) and len(cell) == 3)
ANSWER = Kind("an object with `answer`", lambda cell: isinstance(cell, dict) and isinstance(cell.get("answer"), str))
WHOLE = Kind("a whole number", lambda cell: isinstance(cell, int) and not isinstance(cell, bool))
NUMBERS = kinds.list_of(Kind("", lambda cell: isinstance(cell, bool | int | float)), "numbers")
PLACES = kinds.list_of(Kind("", lambda cell: isinstance(cell, list) and len(cell) == 2), "pairs of places")
WINNERS = {"model_a": (0, 1), "model_b": (1, 0), "tie": None, "tie (bothbad)": None}
PPE = {"mmlupro": "mmlu_pro", "math": "math", "gpqa": "gpqa", "ifeval": "ifeval", "mbppplus": "mbpp_plus"}
PPE_RESPONSES = [f"response_{i + 1}" for i in range(32)]
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


@row_format("helpsteer3", {**by_strength_chat.columns, "domain": TEXT}, named_only)
def _helpsteer3(row: Row, reading: Reading) -> Record:
    """HelpSteer3's preferences by their domain; only where it is named."""
    record = by_strength_chat.read(row, reading)
    assert isinstance(record, Record)
    return dataclasses.replace(record, source=row["domain"].lower())


@row_format(
    "ppe_preference",
    {"question_id": NAME, "prompt": TEXT, "response_1": TEXT, "response_2": TEXT, "winner": kinds.one_of(*WINNERS)},
    named_only,
)
def _ppe_preference(row: Row, reading: Reading) -> Record:
    """PPE's votes of people; only where it is named. The responses stay in their order; a tie is labelled as one."""
    responses = [row["response_1"]], [row["response_2"]]
    record = _record(row["prompt"], *responses, "human", str(row["question_id"]), row, reading)
    wins, ties = np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)
    if better := WINNERS[row["winner"]]:
        wins[better] = 1
    else:
        ties[[0, 1], [1, 0]] = 1
    return dataclasses.replace(record, wins=wins, ties=ties)


@row_format(
    "ppe_correctness",
    {
        **{"question_id": NAME, "prompt": TEXT, "scores": NUMBERS, "sampled_conflict_pairs": PLACES},
        **dict.fromkeys(PPE_RESPONSES, TEXT),
    },
    named_only,
)
def _ppe_correctness(row: Row, reading: Reading) -> Record:
    """PPE's 32 answers to a question with an answer; only where it is named.

    Compared are the pairs of `sampled_conflict_pairs`, whose `scores` differ. Which of the five sets it is of, only
    the name of the data says.
    """
    name = "".join(c for c in reading.source.lower() if c.isalnum())
    subset = next((subset for part, subset in PPE.items() if part in name), reading.source)
    responses = [row[column] for column in PPE_RESPONSES]
    record = _record(row["prompt"], responses, [], subset, str(row["question_id"]), row, reading)
    wins, scores = np.zeros((len(responses),) * 2, np.float32), row["scores"]
    for pair in row["sampled_conflict_pairs"]:
        if not all(isinstance(k, int) and 0 <= k < min(len(scores), len(responses)) for k in pair):
            raise BadRow("conflicting_label", f"the pair {pair} is none of {len(responses)} responses with scores")
        i, j = sorted(pair, key=lambda k: -scores[k])
        if scores[i] == scores[j]:
            raise BadRow("conflicting_label", f"the pair {pair} has equal scores")
        wins[i, j] = 1
    return dataclasses.replace(record, wins=wins)


@row_format("process_bench", {"id": TEXT, "problem": TEXT, "steps": TEXTS, "label": WHOLE}, named_only)
def _process_bench(row: Row, reading: Reading) -> Record:
    """ProcessBench: a solution whose first wrong step is `label`, -1 if none is; only where it is named.

    Its paragraphs are joined by a blank line, and those after the first wrong one are not judged.
    """
    first, count = row["label"], len(row["steps"])
    if not -1 <= first < count:
        raise BadRow("conflicting_label", f"the first wrong step is {first}, of {count} steps")
    labels: list[Any] = [1] * count if first < 0 else [1] * first + [0] + [None] * (count - first - 1)
    text, steps = joined_steps(row["steps"], labels, "\n\n")
    told = common(row, reading) | {"source": row["id"].rpartition("-")[0], "row": f"{reading.where} ({row['id']})"}
    turns = with_system(row, messages(row["problem"], "user"))
    return group([[*turns, answer(text)]], steps=[steps], **told)
