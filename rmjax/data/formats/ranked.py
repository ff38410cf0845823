"""Rankings: K responses of one prompt, in whole or in part."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import (
    Reading,
    Row,
    answered,
    common,
    messages,
    row_format,
    score,
    with_system,
    without,
)
from rmjax.data.formats.kinds import Kind, is_null
from rmjax.data.formats.scored import scored
from rmjax.data.formats.transcripts import is_transcript, transcript
from rmjax.data.records import BadRow, Message, Record, compare, group, require_as_many

PAIRS_OF_FOUR = tuple(itertools.combinations(range(4), 2))
RESPONSE = re.compile(r"response_?(\d+)")
TREE = Kind("a message {text, role, replies}", lambda c: kinds.OBJECT.test(c) and "replies" in c)
ANSWERS = Kind("a list of {answer, rank}", lambda c: kinds.MESSAGES.test(c) and all("rank" in a for a in c))


def by_rank(conversations: Sequence[Any], ranks: Sequence[Any], row: Row, reading: Reading, **labels: Any) -> Record:
    """A group of which ranks are known, the lowest the best; ranks are no scores, so there are no margins."""
    require_as_many("ranks", ranks, conversations)
    compared = compare([-score(rank, "a rank") for rank in ranks]) | {"margin": None}
    return group(conversations, **compared, **labels, **common(row, reading))


@row_format(
    "ranked",
    {"prompt": kinds.PROMPT, "responses": kinds.LIST},
    lambda row: kinds.NUMBERS.test(row.get("ranks")) or kinds.NUMBERS.test(row.get("scores")),
    optional={**kinds.COMMON, "ranks": kinds.NUMBERS, "scores": kinds.NUMBERS},
)
def _ranked(row: Row, reading: Reading) -> Record:
    """`ranks` (lower is better) or `scores` (higher is better), a list beside `responses`; equal is a tie.

    A null rank was not ranked; null and -100 are missing scores. With both, the ranks compare.
    """
    conversations = answered(row, row["prompt"], row["responses"])
    ranks, scores = kinds.NUMBERS.optional(row, "ranks"), kinds.NUMBERS.optional(row, "scores")
    if scores is not None:
        require_as_many("scores", scores, conversations)
    if ranks is None:
        return scored(conversations, [{"score": s} for s in scores or ()], row, reading)
    attributes = {} if scores is None else {"score": [score(s, "a score") for s in scores]}
    return by_rank(conversations, ranks, row, reading, attributes=attributes)


@row_format(
    "ranked_answers",
    {"prompt": kinds.PROMPT, "answers": ANSWERS},
    optional={name: kind for name, kind in kinds.COMMON.items() if name != "source"},
)
def _ranked_answers(row: Row, reading: Reading) -> Record:
    """Nectar's: each answer's `rank`, lower is better; `prompt` may be a transcript."""
    asked = row["prompt"]
    turns = transcript(asked) if is_transcript(asked) else messages(asked, "user")
    if turns[-1]["role"] == "assistant":  # a transcript ends with "Assistant:", which opens the answer's turn
        if turns[-1].get("content"):
            raise BadRow("wrong_type", f"the prompt ends with an assistant turn: {kinds.show(turns[-1]['content'])}")
        turns.pop()
    conversations = answered(row, turns, [each.get("answer") for each in row["answers"]])
    if not kinds.TEXT.test(row.get("source")):  # Nectar's is a list
        row = without(row, "source")
    return by_rank(conversations, [each["rank"] for each in row["answers"]], row, reading)


@row_format("ranked_tree", {"prompt": TREE})
def _ranked_tree(row: Row, reading: Reading) -> list[Record]:
    """OpenAssistant's trees: the ranked replies (lower is better) to each message are a record.

    `prompt` is a message {`text`, `role`, `replies`}, and so is each reply. All of several replies must have a `rank`.
    """
    records = []
    for history, replies in _messages_with_replies(row["prompt"], []):
        ranks = [reply.get("rank") for reply in replies]
        if len(replies) < 2 or all(map(is_null, ranks)):
            continue
        try:
            if any(map(is_null, ranks)):
                raise BadRow("no_label", f"{sum(map(is_null, ranks))} of {len(replies)} replies have no rank")
            conversations = [with_system(row, [*history, _turn(reply)]) for reply in replies]
            records.append(by_rank(conversations, ranks, row, reading))
        except BadRow as bad:
            if reading.defects is None:
                raise
            reading.defects.append(bad)
    if not records:
        raise BadRow("no_label", "no message of the tree has several ranked replies")
    return records


def _messages_with_replies(
    node: Mapping[str, Any], history: Sequence[Message]
) -> Iterator[tuple[list[Message], list[Any]]]:
    """Every message of a tree: the conversation up to it, and its replies."""
    turns = [*history, _turn(node)]
    replies = node.get("replies") or []
    yield turns, replies
    for reply in replies:
        yield from _messages_with_replies(reply, turns)


def _turn(node: Mapping[str, Any]) -> Message:
    return messages({"role": node.get("role"), "content": node.get("text")})[0]


@row_format(
    "comparisons",
    {"question": kinds.TEXT, **{f"prediction {i}": kinds.TEXT for i in range(1, 5)}, "preference": kinds.LIST},
    optional={**kinds.COMMON, "passages": kinds.LIST},
    left_out=("gold", "feedback"),
)
def _comparisons(row: Row, reading: Reading) -> Record:
    """Verdicts over the pairs (12, 13, 14, 23, 24, 34): 1 or 2 is the better one, 0 a tie, null no verdict.

    They need not agree with any order (Fine-Grained RLHF).
    """
    verdicts = row["preference"]
    require_as_many("verdicts", verdicts, PAIRS_OF_FOUR)
    wins, ties = np.zeros((4, 4)), np.zeros((4, 4))
    for (i, j), verdict in zip(PAIRS_OF_FOUR, verdicts):
        if is_null(verdict):
            continue
        if not kinds.VOTE.test(verdict):
            raise kinds.VOTE.wrong("preference", verdict)
        wins[i, j], wins[j, i], ties[i, j], ties[j, i] = verdict == 1, verdict == 2, verdict == 0, verdict == 0
    conversations = answered(row, _question(row), [row[f"prediction {i}"] for i in range(1, 5)])
    return group(conversations, wins=wins, ties=ties, **common(row, reading))


def _question(row: Row) -> str:
    """The question and, after it, the passages to answer from: [[title, sentence, ...], ...]."""
    passages = kinds.LIST.optional(row, "passages") or []
    paragraphs = [f"{title}\n{' '.join(sentences)}" for title, *sentences in passages]
    return "\n\n".join([row["question"], *paragraphs])


def responses_of(row: Row) -> dict[int, str]:
    """The columns `response_1`, `response_2`, ... (or `response1`, ...) that are not null, by number."""
    found = [(m, column) for column in row if (m := RESPONSE.fullmatch(column)) and not is_null(row[column])]
    return {int(m[1]): column for m, column in sorted(found, key=lambda item: int(item[0][1]))}


@row_format(
    "labelled_responses",
    {"prompt": kinds.PROMPT, "response_1": kinds.TEXT, "response_2": kinds.TEXT},
    lambda row: (
        kinds.NUMBERS.test(row.get("rewards"))
        or any(kinds.NUMBER.test(row.get(f"reward_{i}")) for i in responses_of(row))
    ),
    optional={**kinds.COMMON, "rewards": kinds.NUMBERS},
)
def _labelled_responses(row: Row, reading: Reading) -> Record:
    """`rewards` (a list), or `reward_1`, `reward_2`, ...: gold scores; equal ones tie."""
    names = responses_of(row)
    rewards = row["rewards"] if row.get("rewards") is not None else [row.get(f"reward_{i}") for i in names]
    require_as_many("rewards", rewards, list(names))
    conversations = answered(row, row["prompt"], [row[column] for column in names.values()])
    return scored(conversations, [{"score": reward} for reward in rewards], row, reading)
