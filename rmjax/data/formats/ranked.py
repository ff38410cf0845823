"""Rankings: K responses of one prompt, in whole or in part.

ranked              `ranks`: 1 (or 0) is the best, equal ranks tie, null was not ranked; or `scores`: the higher
                    the better, equal ones tie, null and -100 are missing. With both, the ranks compare.
ranked_answers      `answers`: [{`answer`, `rank`}], lower is better (Nectar)
ranked_tree         `prompt` is a message {`text`, `role`, `replies`}; the replies to each message, where all of
                    several have a `rank` (lower is better), are one record (OpenAssistant)
comparisons         `prediction 1..4` and `preference` over the pairs (12, 13, 14, 23, 24, 34): 1 or 2 is the better
                    one, 0 a tie, null not judged (Fine-Grained RLHF); they need not agree with any order
labelled_responses  `response_1`, `response_2`, ... with `rewards`: [..] or `reward_1`, `reward_2`, ...: gold scores
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.data.formats.cells import (
    COMMON,
    LIST,
    MESSAGES,
    NUMBER,
    NUMBERS,
    OBJECT,
    PROMPT,
    TEXT,
    Format,
    Kind,
    Reading,
    Row,
    answer,
    common,
    is_null,
    messages,
    one_of,
    optional,
    prompt_turns,
    score,
    show,
    with_system,
    wrong,
)
from rmjax.data.formats.pairs import is_transcript, transcript
from rmjax.data.formats.scored import scored
from rmjax.data.records import BadRow, Message, Record, compare, group

PAIRS_OF_FOUR = tuple(itertools.combinations(range(4), 2))
RESPONSE = re.compile(r"response_?(\d+)")
VERDICT = one_of(0, 1, 2)


def as_many(name: str, values: Sequence[Any], responses: Sequence[Any]) -> None:
    """Refuses lists that are not aligned.

    Raises:
        BadRow: `conflicting_label`.
    """
    if len(values) != len(responses):
        raise BadRow("conflicting_label", f"{len(values)} {name} for {len(responses)} responses")


def by_rank(conversations: Sequence[Any], ranks: Sequence[Any], row: Row, reading: Reading, **labels: Any) -> Record:
    """A group of which ranks are known, the lowest the best; ranks are no scores, so there are no margins."""
    as_many("ranks", ranks, conversations)
    compared = compare([-score(rank, "a rank") for rank in ranks])
    compared["margin"][:] = 0
    return group(conversations, **compared, **labels, **common(row, reading))


def _ranked(row: Row, reading: Reading) -> Record:
    prompt = prompt_turns(row, row["prompt"])
    conversations = [[*prompt, *messages(response)] for response in row["responses"]]
    ranks, scores = optional(row, "ranks", NUMBERS), optional(row, "scores", NUMBERS)
    if scores is not None:
        as_many("scores", scores, conversations)
    if ranks is None:
        return scored(conversations, [{"score": s} for s in scores or ()], row, reading)
    attributes = {} if scores is None else {"score": [score(s, "a score") for s in scores]}
    return by_rank(conversations, ranks, row, reading, attributes=attributes)


def _has_order(row: Row) -> bool:
    return NUMBERS.test(row.get("ranks")) or NUMBERS.test(row.get("scores"))


def _ranked_answers(row: Row, reading: Reading) -> Record:
    asked = row["prompt"]
    turns = transcript(asked) if is_transcript(asked) else messages(asked, "user")
    if turns[-1]["role"] == "assistant":  # a transcript ends with "Assistant:", which opens the answer's turn
        if turns[-1].get("content"):
            raise BadRow("wrong_type", f"the prompt ends with an assistant turn: {show(turns[-1]['content'])}")
        turns.pop()
    conversations = [[*with_system(row, turns), answer(a.get("answer"))] for a in row["answers"]]
    said = {name: cell for name, cell in row.items() if name != "source" or TEXT.test(cell)}  # Nectar's is a list
    return by_rank(conversations, [a["rank"] for a in row["answers"]], said, reading)


def _ranked_tree(row: Row, reading: Reading) -> list[Record]:
    made = []
    for history, replies in _asked(row["prompt"], []):
        ranks = [reply.get("rank") for reply in replies]
        if len(replies) < 2 or all(map(is_null, ranks)):
            continue
        try:
            if any(map(is_null, ranks)):
                raise BadRow("no_label", f"{sum(map(is_null, ranks))} of {len(replies)} replies have no rank")
            conversations = [with_system(row, [*history, _turn(reply)]) for reply in replies]
            made.append(by_rank(conversations, ranks, row, reading))
        except BadRow as bad:
            reading.leave_out(bad)
    if not made:
        raise BadRow("no_label", "no message of the tree has several ranked replies")
    return made


def _asked(node: Mapping[str, Any], history: Sequence[Message]) -> Iterator[tuple[list[Message], list[Any]]]:
    """Every message of a tree: the conversation up to it, and its replies."""
    turns = [*history, _turn(node)]
    replies = node.get("replies") or []
    yield turns, replies
    for reply in replies:
        yield from _asked(reply, turns)


def _turn(node: Mapping[str, Any]) -> Message:
    return messages({"role": node.get("role"), "content": node.get("text")})[0]


def _comparisons(row: Row, reading: Reading) -> Record:
    verdicts = row["preference"]
    as_many("verdicts", verdicts, PAIRS_OF_FOUR)
    wins, ties = np.zeros((4, 4)), np.zeros((4, 4))
    for (i, j), verdict in zip(PAIRS_OF_FOUR, verdicts):
        if is_null(verdict):
            continue
        if not VERDICT.test(verdict):
            raise wrong("preference", verdict, VERDICT)
        wins[i, j], wins[j, i], ties[i, j], ties[j, i] = verdict == 1, verdict == 2, verdict == 0, verdict == 0
    prompt = prompt_turns(row, _question(row))
    conversations = [[*prompt, answer(row[f"prediction {i}"])] for i in range(1, 5)]
    return group(conversations, wins=wins, ties=ties, **common(row, reading))


def _question(row: Row) -> str:
    """The question and, after it, the passages to answer from: [[title, sentence, ...], ...]."""
    passages = optional(row, "passages", LIST) or []
    paragraphs = [f"{title}\n{' '.join(sentences)}" for title, *sentences in passages]
    return "\n\n".join([row["question"], *paragraphs])


def _labelled_responses(row: Row, reading: Reading) -> Record:
    names = responses_of(row)
    rewards = row["rewards"] if row.get("rewards") is not None else [row.get(f"reward_{i}") for i in names]
    as_many("rewards", rewards, list(names))
    prompt = prompt_turns(row, row["prompt"])
    conversations = [[*prompt, *messages(row[column])] for column in names.values()]
    return scored(conversations, [{"score": reward} for reward in rewards], row, reading)


def responses_of(row: Row) -> dict[int, str]:
    """The columns `response_1`, `response_2`, ... (or `response1`, ...) that are not null, by number."""
    found = [(m, column) for column in row if (m := RESPONSE.fullmatch(column)) and not is_null(row[column])]
    return {int(m[1]): column for m, column in sorted(found, key=lambda item: int(item[0][1]))}


def _has_rewards(row: Row) -> bool:
    return NUMBERS.test(row.get("rewards")) or any(NUMBER.test(row.get(f"reward_{i}")) for i in responses_of(row))


TREE = Kind("a message {text, role, replies}", lambda c: OBJECT.test(c) and "replies" in c)
ANSWERS = Kind("a list of {answer, rank}", lambda c: MESSAGES.test(c) and all("rank" in a for a in c))

RANKED = (
    Format(
        "ranked",
        {"prompt": PROMPT, "responses": LIST},
        _ranked,
        _has_order,
        {**COMMON, "ranks": NUMBERS, "scores": NUMBERS},
        means="`ranks` (lower is better) or `scores` (higher is better), a list beside `responses`; equal is a tie",
    ),
    Format(
        "ranked_answers",
        {"prompt": PROMPT, "answers": ANSWERS},
        _ranked_answers,
        optional={name: kind for name, kind in COMMON.items() if name != "source"},
        means="Nectar's: each answer's `rank`, lower is better; `prompt` may be a transcript",
    ),
    Format(
        "ranked_tree",
        {"prompt": TREE},
        _ranked_tree,
        means="OpenAssistant's trees: the ranked replies (lower is better) to each message are a record",
    ),
    Format(
        "comparisons",
        {"question": TEXT, **{f"prediction {i}": TEXT for i in range(1, 5)}, "preference": LIST},
        _comparisons,
        optional={**COMMON, "passages": LIST},
        means="verdicts over the pairs (12, 13, 14, 23, 24, 34): 1 or 2 is the better one, 0 a tie, null no verdict",
    ),
    Format(
        "labelled_responses",
        {"prompt": PROMPT, "response_1": TEXT, "response_2": TEXT},
        _labelled_responses,
        _has_rewards,
        {**COMMON, "rewards": NUMBERS},
        means="`rewards` (a list), or `reward_1`, `reward_2`, ...: gold scores; equal ones tie",
    ),
)
