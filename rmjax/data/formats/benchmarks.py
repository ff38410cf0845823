"""Rows of benchmarks as they are published. Their columns are those of pairs, so these formats have to be named.

A record's source is the benchmark's subset, and its row ends with the benchmark's own id: "test.jsonl:17 (tied:12)".

reward_bench       `chosen` and `rejected` texts for a `prompt`; `subset`, `id`
reward_bench_2     lists of `chosen` and `rejected` texts, the right ones first; `subset`, `id` ("tied:12" in Ties)
rm_bench           three `chosen` and three `rejected` texts, of one content each in three styles; `domain`, `id`
judge_bench        `response_A`, `response_B` to a `question`, `label` "A>B" or "B>A"; here `source` is the subset
rmb_pairwise       `chosen` and `reject` ({`answer`}) after `conversation_input`; `category_path`, `pair_uid`
rmb_best_of_n      `bon_best` and `loser_list` in the same way; `bon_uid`
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.data.formats.cells import (
    LIST,
    MESSAGES,
    OBJECT,
    PROMPT,
    TEXT,
    TEXTS,
    Format,
    Kind,
    Reading,
    Row,
    answer,
    common,
    one_of,
    prompt_turns,
)
from rmjax.data.records import BadRow, Message, Record, group

LABELS = {"A>B": (0, 1), "B>A": (1, 0)}


def _record(
    prompt: Sequence[Message], right: Sequence[Any], wrong: Sequence[Any], subset: Any, name: Any, reading: Reading
) -> Record:
    """Every right response is better than every wrong one; among themselves nothing is said."""
    responses = [*right, *wrong]
    wins = np.zeros((len(responses), len(responses)), np.float32)
    wins[: len(right), len(right) :] = 1
    if not reading.keep and len(set(map(str, responses))) < len(responses):
        raise BadRow("identical_responses", "some responses are the same")
    told = {**common({}, reading), "source": str(subset), "row": f"{reading.where} ({name})"}
    return group([[*prompt, answer(text)] for text in responses], wins=wins, **told)


def _reward_bench(row: Row, reading: Reading) -> Record:
    return _record(
        prompt_turns({}, row["prompt"]), [row["chosen"]], [row["rejected"]], row["subset"], row.get("id", ""), reading
    )


def _reward_bench_2(row: Row, reading: Reading) -> Record:
    turns = prompt_turns({}, row["prompt"])
    return _record(turns, row["chosen"], row["rejected"], row["subset"], row["id"], reading)


def _rm_bench(row: Row, reading: Reading) -> Record:
    for column in ("chosen", "rejected"):
        if len(row[column]) != 3:
            raise BadRow("wrong_type", f"{column} has {len(row[column])} responses, expected one in each of 3 styles")
    turns = prompt_turns({}, row["prompt"])
    return _record(turns, row["chosen"], row["rejected"], row["domain"], row["id"], reading)


def _judge_bench(row: Row, reading: Reading) -> Record:
    """The responses stay in their order, A first: judges see it so, too."""
    record = _record(
        prompt_turns({}, row["question"]),
        [row["response_A"]],
        [row["response_B"]],
        row["source"],
        row["pair_id"],
        reading,
    )
    better, worse = LABELS[row["label"]]
    wins = np.zeros((2, 2), np.float32)
    wins[better, worse] = 1
    return dataclasses.replace(record, wins=wins)


def _scenario(path: str) -> str:
    """The goal and the scenario: "Helpfulness/Chat" of "Pairwise_set/Helpfulness/Chat/Discussion"."""
    return "/".join(path.split("/")[1:3])


def _rmb(best: str, losers: Callable[[Row], list[Mapping[str, Any]]], name: str) -> Callable[[Row, Reading], Record]:
    def read(row: Row, reading: Reading) -> Record:
        turns = [{"role": m["role"], "content": m["content"]} for m in row["conversation_input"]]
        wrong = [loser["answer"] for loser in losers(row)]
        return _record(turns, [row[best]["answer"]], wrong, _scenario(row["category_path"]), row[name], reading)

    return read


NAMED = lambda row: False
_TEXT_OR_NUMBER = Kind("a name", lambda cell: isinstance(cell, str | int) and not isinstance(cell, bool))
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
        {"id": _TEXT_OR_NUMBER, "prompt": PROMPT, "chosen": TEXTS, "rejected": TEXTS, "domain": TEXT},
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
            "label": one_of(*LABELS),
        },
        _judge_bench,
        NAMED,
        means="JudgeBench; only where it is named",
    ),
    Format(
        "rmb_pairwise",
        {**_SET, "pair_uid": _TEXT_OR_NUMBER, "chosen": OBJECT, "reject": OBJECT},
        _rmb("chosen", lambda row: [row["reject"]], "pair_uid"),
        NAMED,
        means="RMB's pairs; only where it is named",
    ),
    Format(
        "rmb_best_of_n",
        {**_SET, "bon_uid": _TEXT_OR_NUMBER, "bon_best": OBJECT, "loser_list": LIST},
        _rmb("bon_best", lambda row: row["loser_list"], "bon_uid"),
        NAMED,
        means="RMB's best of N: the best is better than each loser; only where it is named",
    ),
)
