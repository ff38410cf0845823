"""Judges that write, asked by sampling: K judgements of each question, what one says, and what votes of several say.

    records -> questions -> K judgements each -> verdicts -> metrics

A verdict that cannot be read is a verdict of its own: it counts as wrong, and is in no vote and no mean. Voting over
sampled judgements: Liu et al. 2025 (DeepSeek-GRM), arXiv:2504.02495.

Shape letters: Q questions, K judgements of a question.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rmjax.data import ledger, prompts, reading
from rmjax.data.records import BadRow, Message, Record
from rmjax.evaluate import moments
from rmjax.evaluate.estimates import Estimates
from rmjax.inference.judgements import Judge
from rmjax.inference.sampler import LENGTH
from rmjax.judging import verdicts
from rmjax.judging.verdicts import BETTER, SCORE, VERDICTS
from rmjax.judging.writing import Writing
from rmjax.statistics import ranks

UNREADABLE = len(VERDICTS)  # the code of a verdict, after A, B and tie
EXAMPLES = 20  # of judgements that cannot be read


@dataclasses.dataclass(frozen=True)
class Question:
    """What a judge is asked once: about a pair in one order, or about a response.

    Attributes:
        asked: the user's turn.
        label: of a pair its verdict as a place in VERDICTS, of a response its rating.
        pair: a number that the two orders of a pair share.
        record: the number of the record.
    """

    asked: Message
    label: float
    pair: int
    record: int
    weight: float


def measured(
    judge: Judge,
    source: str,
    *,
    format: str = "auto",
    columns: str = "",
    progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> dict[str, Any]:
    """Asks a judge about labelled data, and measures what it writes.

    Args:
        judge: its `drawing.responses` are K.
        source, format, columns: of the data.
        progress: is told how many questions there are, and then how many are done.

    Returns:
        Values of kind "judgements": "groups" (questions), "question_too_long" (questions that are not asked, since the
        model has no room for one about the pair, or the response), "prompts", "metrics" (see `of_pairs` and
        `of_ratings`) and "examples", judgements that could not be read.

    Raises:
        ValueError: nothing is labelled, or the model has no room for any question.
    """
    audit, histories, places = ledger.Audit(), list[list[tuple[int, int]]](), list[str]()
    questions: list[Question] = []
    for record in reading.records(source, format=format, columns=columns, audit=audit):
        try:
            of_one = list(ask(record, judge.task, len(histories)))
        except BadRow as bad:
            audit.add(bad.reason, record.row, bad.detail)
            continue
        if of_one:
            histories.append(prompts.histories(record))
            places.append(record.row)
        questions += of_one
    asked = _with_room(judge, questions, places, audit)
    if audit.reasons or audit.unread:
        print(*ledger.rows_lines(audit), sep="\n", file=sys.stderr)
    if not questions:
        raise ValueError(f"{source}: no row has a label that this judge writes")
    if not asked:
        raise ValueError(f"{source}: there is no question that the model has room for; {audit.reasons_text()}")
    too_long, questions = len(questions) - len(asked), asked
    found = judge.judgements([q.asked for q in questions], range(len(questions)), progress(len(questions)))
    estimates = Estimates(prompts.ids(*prompts.flat(histories))[[question.record for question in questions]])
    label, weight = (np.array([getattr(q, name) for q in questions], np.float64) for name in ("label", "weight"))
    if judge.task.target == "pair":
        codes = _array(found, lambda x: VERDICTS.index(x.verdict.value) if x.verdict.kind == BETTER else UNREADABLE)
        right = of_pairs(estimates, codes, label.astype(int), np.array([q.pair for q in questions]), weight)
        unreadable = codes == UNREADABLE
    else:
        values = _array(found, lambda x: x.verdict.value if x.verdict.kind == SCORE else math.nan)
        right = of_ratings(estimates, values, label, weight)
        unreadable = np.isnan(values)
    tokens, cut_off = (
        _array(found, lambda x: len(x.written.tokens)),
        _array(found, lambda x: x.written.finish == LENGTH),
    )
    at, each = np.repeat(np.arange(len(tokens)), tokens.shape[1]), np.repeat(weight, tokens.shape[1])
    estimates.share("unreadable", at, unreadable.ravel(), each)
    estimates.share("cut_off", at, cut_off.ravel(), each)
    estimates.mean("judgement_tokens", at, tokens.ravel(), each)
    moments.add_correlation(estimates, "length_and_right", at, tokens.ravel(), right.ravel())
    examples = (
        {"question": question.asked["content"], "judgement": x.written.text, "why": x.verdict.value}
        for question, of_one in zip(questions, found)
        for x in of_one
        if x.verdict.kind == "unparseable"
    )
    return {
        "kind": "judgements",
        "groups": len(questions),
        "question_too_long": too_long,
        "prompts": estimates.prompts,
        "metrics": {str(name): estimate for name, estimate in estimates.all().items()},
        "examples": list(itertools.islice(examples, EXAMPLES)),
    }


def _with_room(
    judge: Judge, questions: Sequence[Question], places: Sequence[str], audit: ledger.Audit
) -> list[Question]:
    """The questions about pairs, or responses, whose every question the model has room for; the audit names the others.

    Args:
        places: of each record its file and row.
    """
    reasons = judge.no_room([question.asked for question in questions])
    without = {question.pair: why for question, why in zip(questions, reasons) if why}
    left = [question for question in questions if question.pair not in without]
    others = {q.record: without[q.pair] for q in reversed(questions) if q.pair in without}
    still = {question.record for question in left}
    for record in sorted(others):
        audit.add("question_too_long", places[record], others[record], kept=record in still)
    return left


def ask(record: Record, task: Writing, number: int) -> Iterator[Question]:
    """The questions about a record; BadRow where one cannot be asked. Pairs without a strict majority are not asked."""
    if task.target == "pair":
        for place, (i, j, said) in enumerate(verdicts.labelled_pairs(record)):
            shares = said if task.ties else said[:2]
            if (shares == shares.max()).sum() > 1:
                continue
            label = int(shares.argmax())
            pair = record.conversations[i], record.conversations[j]
            asked = verdicts.ask_in_both_orders(task.template, *pair, task.ties)
            for turn, verdict in zip(asked, (label, verdicts.SWAPPED[label])):
                yield Question(turn, verdict, (number << 16) + place, number, record.weight)
        return
    (name,) = task.attributes or tuple(record.attributes)[:1]
    ends = (verdicts.number_text(task.scale[0]), verdicts.number_text(task.scale[1]))
    for k, (*history, last) in enumerate(record.conversations):
        rating = record.attributes.get(name, (math.nan,) * (k + 1))[k]
        if not math.isnan(rating):
            shown = [verdicts.text_of(last)]
            turn = verdicts.ask(task.template, "score", history, shown, attributes=[name], scale=ends)
            yield Question(turn, rating, (number << 16) + k, number, record.weight)


def of_pairs(
    estimates: Estimates, codes: np.ndarray, label: np.ndarray, pair: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Adds the metrics of verdicts on pairs.

    accuracy is that of one judgement, vote_2, vote_4, ... that of the vote of so many, over all subsets of the K that
    were drawn: the verdict of more than half of those that can be read, else a tie. A tie counts half where one side is
    labelled better, and a vote of nothing that can be read is wrong. consistency: whether the votes of all K about both
    orders name the same response, or both a tie; first_position: the share of A among A and B; tie_rate: of ties among
    what can be read.

    Args:
        estimates: of the prompt of each question.
        codes: int [Q, K], places in VERDICTS, or UNREADABLE.
        label: int [Q], places in VERDICTS.
        pair: int [Q], equal for the two orders of a pair, which follow each other.
        weight: float [Q].

    Returns:
        float [Q, K], how right each is.
    """
    q, k = codes.shape
    at, each = np.repeat(np.arange(q), k), np.repeat(weight, k)
    right = worth(codes, label[:, None])
    estimates.share("accuracy", at, right.ravel(), each)
    counts = np.stack([(codes == code).sum(1) for code in range(UNREADABLE + 1)], 1)
    for n in (2**i for i in range(1, k.bit_length())):
        chances = vote_chances(counts, n)
        by_code = worth(np.arange(UNREADABLE + 1)[None], label[:, None])
        estimates.share(f"vote_{n}", np.arange(q), (chances * by_code).sum(1), weight)
    votes = vote_chances(counts, k).argmax(1)
    first, second = votes[::2], votes[1::2]
    assert (pair[::2] == pair[1::2]).all()
    same = np.array([*verdicts.SWAPPED, -1])[first] == second
    estimates.share("consistency", np.arange(0, q, 2), same, weight[::2])
    readable, sided = (codes != UNREADABLE).ravel(), (codes < 2).ravel()
    if sided.any():
        estimates.share("first_position", at[sided], (codes == 0).ravel()[sided], each[sided])
    if readable.any():
        estimates.share("tie_rate", at[readable], (codes == 2).ravel()[readable], each[readable])
    return right


def worth(code: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How right a verdict is, 0 to 1."""
    return np.where(code == label, 1.0, np.where((code == 2) & (label != 2), 0.5, 0.0))


def vote_chances(counts: np.ndarray, n: int) -> np.ndarray:
    """How likely each verdict is that of n judgements drawn from all: [Q, 4] of counts [Q, 4]; see `of_pairs`."""
    total = int(counts[0].sum())
    chances = np.zeros(counts.shape)
    choose = np.array([[math.comb(all_of, some) for some in range(n + 1)] for all_of in range(total + 1)], np.float64)
    for drawn in itertools.product(range(n + 1), repeat=UNREADABLE):
        *_, unreadable = some = (*drawn, n - sum(drawn))
        if unreadable < 0:
            continue
        ways = np.prod([choose[counts[:, code], some[code]] for code in range(UNREADABLE + 1)], axis=0)
        majority = [code for code in range(2) if 2 * some[code] > n - unreadable]
        verdict = UNREADABLE if unreadable == n else majority[0] if majority else 2
        chances[:, verdict] += ways
    return chances / math.comb(total, n)


def of_ratings(estimates: Estimates, values: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Adds the metrics of ratings.

    accuracy: one rating is the label; mae of one rating, and mae_of_mean of the mean of the K; spearman and pearson of
    that mean. Of what cannot be read nothing is in means, errors and correlations.

    Args:
        estimates: of the prompt of each question.
        values: float [Q, K], NaN where a rating cannot be read.
        label: float [Q].
        weight: float [Q].

    Returns:
        float [Q, K], how right each is.
    """
    q, k = values.shape
    at, each = np.repeat(np.arange(q), k), np.repeat(weight, k)
    right = (values == label[:, None]).astype(np.float64)
    estimates.share("accuracy", at, right.ravel(), each)
    readable = ~np.isnan(values)
    known, some = readable.ravel(), readable.any(1)
    if some.any():
        error = np.abs(values - label[:, None]).ravel()
        estimates.mean("mae", at[known], error[known], each[known])
        mean = np.nanmean(values[some], axis=1)
        where = np.flatnonzero(some)
        estimates.mean("mae_of_mean", where, np.abs(mean - label[some]), weight[some])
        moments.add_correlation(estimates, "pearson", where, mean, label[some])
        moments.add_correlation(estimates, "spearman", where, ranks(mean), ranks(label[some]))
    return right


def _array(rows: Iterable[Sequence[Any]], value: Callable[[Any], Any]) -> np.ndarray:
    return np.array([[value(x) for x in row] for row in rows])
