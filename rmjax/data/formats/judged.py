"""Two responses and who won, by one judge or by several.

Who won is written in many ways, and they contradict each other, so each format has its own:

    judged_pair       `metadata.preferred`: "A", "B" or "tie"
    annotated_pair    `annotator1`, `annotator2`, ...: 1 or 2 the better response, 0 a tie, null no vote; wins and ties
                      are shares of the votes, agreement is the largest of them
"""

import re
from typing import Any

from rmjax.data.formats.cells import (
    COMMON,
    MESSAGES,
    NUMBER,
    OBJECT,
    PROMPT,
    TEXT,
    Format,
    Reading,
    Row,
    answer,
    common,
    is_null,
    one_of,
    optional,
    prompt_turns,
    show,
    wrong,
)
from rmjax.data.records import BadRow, Record, group, pair

PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}
VOTE = one_of(0, 1, 2)
VOTER = re.compile(r"annotator_?\d+")


def _judged_pair(row: Row, reading: Reading) -> Record:
    preferred = row["metadata"].get("preferred")
    if not isinstance(preferred, str) or preferred.lower() not in PREFERRED:
        raise BadRow("wrong_type", f"metadata.preferred is {show(preferred)}, expected 'A', 'B' or 'tie'")
    if len(row["output"]) != 2:
        raise BadRow("wrong_type", f"output has {len(row['output'])} responses, expected 2")
    strength = optional(row["metadata"], "preference_strength", NUMBER)
    prompt = prompt_turns(row, row["input"])
    first, second = ([*prompt, answer(output.get("content"))] for output in row["output"])
    margin = abs(float(strength or 0))
    return pair(first, second, preference=PREFERRED[preferred.lower()], margin=margin, **common(row, reading))


def _annotated_pair(row: Row, reading: Reading) -> Record:
    votes = [row[column] for column in row if VOTER.fullmatch(column) and not is_null(row[column])]
    if not votes:
        raise BadRow("no_label", "no annotator voted")
    if bad := [vote for vote in votes if not VOTE.test(vote)]:
        raise wrong("an annotator's vote", bad[0], VOTE)
    prompt = prompt_turns(row, instruction(row))
    return voted([[*prompt, answer(row[c])] for c in ("response1", "response2")], votes, row, reading)


def voted(conversations: Any, votes: list[Any], row: Row, reading: Reading) -> Record:
    """A pair with votes (1 and 2 the better one, 0 a tie); wins and ties are shares of the votes."""
    first, second, tie = (votes.count(v) / len(votes) for v in (1, 2, 0))
    wins, ties, agreement = [[0, first], [second, 0]], [[0, tie], [tie, 0]], max(first, second, tie)
    return group(conversations, wins=wins, ties=ties, agreement=agreement, **common(row, reading))


def instruction(row: Row) -> str:
    """`instruction` and, after a blank line, `input` where there is one."""
    extra = optional(row, "input", TEXT) or ""
    return f"{row['instruction']}\n\n{extra}" if extra.strip() else row["instruction"]


JUDGED = (
    Format(
        "judged_pair",
        {"input": PROMPT, "output": MESSAGES, "metadata": OBJECT},
        _judged_pair,
        lambda row: "preferred" in row["metadata"] and not any("label" in output for output in row["output"]),
        means='two {`content`}; `metadata` has `preferred`: "A", "B" or "tie", and `preference_strength`: the margin',
    ),
    Format(
        "annotated_pair",
        {"instruction": TEXT, "response1": TEXT, "response2": TEXT},
        _annotated_pair,
        lambda row: any(map(VOTER.fullmatch, row)),
        optional={**COMMON, "input": TEXT},
        means="`annotator1..n`: 1 or 2 is the better response, 0 a tie; shares of the votes, and agreement",
    ),
)
