"""Two responses and who won, by one judge or by several.

Who won is written in many ways, and they contradict each other, so each format has its own.
"""

import math
import re
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, Row, answered, common, row_format
from rmjax.data.records import BadRow, Record, group, pair

PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}
VOTER = re.compile(r"annotator_?\d+")


def _is_judged(row: Row) -> bool:
    return "preferred" in row["metadata"] and not any("label" in output for output in row["output"])


@row_format("judged_pair", {"input": kinds.PROMPT, "output": kinds.MESSAGES, "metadata": kinds.OBJECT}, _is_judged)
def _judged_pair(row: Row, reading: Reading) -> Record:
    """Two {`content`}; `metadata` has `preferred`: "A", "B" or "tie", and `preference_strength`: the margin."""
    preferred = row["metadata"].get("preferred")
    if not isinstance(preferred, str) or preferred.lower() not in PREFERRED:
        raise BadRow("wrong_type", f"metadata.preferred is {kinds.show(preferred)}, expected 'A', 'B' or 'tie'")
    if len(row["output"]) != 2:
        raise BadRow("wrong_type", f"output has {len(row['output'])} responses, expected 2")
    strength = kinds.NUMBER.optional(row["metadata"], "preference_strength")
    first, second = answered(row, row["input"], [output.get("content") for output in row["output"]])
    margin = math.nan if strength is None else abs(float(strength))
    return pair(first, second, preference=PREFERRED[preferred.lower()], margin=margin, **common(row, reading))


@row_format(
    "annotated_pair",
    {"instruction": kinds.TEXT, "response1": kinds.TEXT, "response2": kinds.TEXT},
    lambda row: any(map(VOTER.fullmatch, row)),
    optional={**kinds.COMMON, "input": kinds.TEXT},
)
def _annotated_pair(row: Row, reading: Reading) -> Record:
    """`annotator1..n`: 1 or 2 is the better response, 0 a tie; shares of the votes, and agreement.

    `input`, where there is one, follows `instruction` after a blank line.
    """
    votes = [row[column] for column in row if VOTER.fullmatch(column) and not kinds.is_null(row[column])]
    if not votes:
        raise BadRow("no_label", "no annotator voted")
    if bad := [vote for vote in votes if not kinds.VOTE.test(vote)]:
        raise kinds.VOTE.wrong("an annotator's vote", bad[0])
    extra = kinds.TEXT.optional(row, "input") or ""
    prompt = f"{row['instruction']}\n\n{extra}" if extra.strip() else row["instruction"]
    return voted(answered(row, prompt, [row["response1"], row["response2"]]), votes, row, reading)


def voted(conversations: Any, votes: list[Any], row: Row, reading: Reading, **labels: Any) -> Record:
    """A pair with votes (kinds.VOTE); wins and ties are shares of the votes, agreement the largest of them."""
    first, second, tie = (votes.count(v) / len(votes) for v in (1, 2, 0))
    wins, ties, agreement = [[0, first], [second, 0]], [[0, tie], [tie, 0]], max(first, second, tie)
    return group(conversations, wins=wins, ties=ties, agreement=agreement, **labels, **common(row, reading))
