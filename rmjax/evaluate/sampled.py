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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rmjax.batches.groups import Groups
from rmjax.data import ledger, prompts, reading
from rmjax.data.records import Message, Record
from rmjax.evaluate import moments
from rmjax.evaluate.estimates import Estimates
from rmjax.inference.judgements import Judge, Judgement
from rmjax.inference.sampler import LENGTH, Prompt
from rmjax.judging import verdicts
from rmjax.judging.asked import labelled_questions, labels_of
from rmjax.judging.verdicts import BETTER, SCORE, VERDICTS
from rmjax.judging.writing import Writing
from rmjax.statistics import ranks

UNREADABLE = len(VERDICTS)  # the code of a verdict, after A, B and tie
EXAMPLES = 20  # of judgements that cannot be read


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a set.

    Attributes:
        asked: the user's turn.
        label: see `asked.Question`.
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
    progress: Callable[[str, int], Callable[[int], None]] = lambda name, total: lambda done: None,
) -> dict[str, Any]:
    """Asks a judge about labelled data, and measures what it writes.

    Args:
        judge: its `drawing.responses` are K.
        source, format, columns: of the data.
        progress: is told what is asked for and of how many questions, and then how many are done.

    Returns:
        Values of kind "judgements": "groups" (questions), "question_too_long" (questions that are not asked, since the
        model has no room for one about the pair, or the response), "prompts", "metrics" (see `of_pairs`, `of_ratings`
        and `beside_greedy`) and "examples", judgements that could not be read.

    Raises:
        ValueError: nothing is labelled, or the model has no room for any question.
    """
    audit, histories, places = ledger.Audit(), list[list[tuple[int, int]]](), list[str]()
    questions: list[Question] = []
    for record in reading.records(source, format=format, columns=columns, audit=audit):
        if of_one := ask(record, judge.task, len(histories), audit):
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
    prompt = prompts.ids(*prompts.flat(histories))[[question.record for question in questions]]
    label, weight = (np.array([getattr(q, name) for q in questions], np.float64) for name in ("label", "weight"))
    pair = np.array([q.pair for q in questions])

    def measure(judge: Judge, name: str) -> dict[str, Any]:
        tell = progress(name, len(questions))
        found = judge.judgements([q.asked for q in questions], range(len(questions)), tell)
        texts = [q.asked["content"] for q in questions]
        return values(judge.task, found, texts, label, weight, pair, prompt, too_long)

    return beside_greedy(judge, measure)


def beside_greedy(judge: Judge, measure: Callable[[Judge, str], dict[str, Any]]) -> dict[str, Any]:
    """The measures of a judge with `accuracy_greedy`, that of its likeliest answers, so that a change of the instrument
    shows; `measure` is given a judge and what its answers are called."""
    found = measure(judge, f"{judge.drawing.responses} samples")
    found["metrics"]["accuracy_greedy"] = measure(judge.greedy(), "likeliest")["metrics"]["accuracy"]
    return found


def of_groups(judge: Judge, groups: Groups, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
    """The same about questions as groups (`judging.asked.Questions`); None if `stop` is true before the end."""
    asked, label, pair = [], [], []
    for n in range(len(groups)):
        group = groups.group(n)
        asked += group.tree.sequences()
        label += labels_of(group.labels).tolist()
        pair += [n] * len(group.tree.end)
    found = judge.answers([Prompt(ids.tolist(), row) for row, ids in enumerate(asked)], stop=stop)
    if found is None:
        return None
    texts = [judge.model.chat.tokenizer.decode(ids.tolist()) for ids in asked]
    at = np.array(pair)
    weight = groups.weights[at].astype(np.float64)
    return values(judge.task, found, texts, np.array(label, np.float64), weight, at, groups.prompt_ids[at])


def values(
    task: Writing,
    found: Sequence[Sequence[Judgement]],
    texts: Sequence[str],
    label: np.ndarray,
    weight: np.ndarray,
    pair: np.ndarray,
    prompt: np.ndarray,
    too_long: int = 0,
) -> dict[str, Any]:
    """The measures of judgements, K of each question; see `measured`.

    Args:
        texts: the questions.
        label, weight: float [Q]; see Question.
        pair: int [Q], see `of_pairs`.
        prompt: [Q], equal for questions that are drawn together (estimates.py).
        too_long: questions that were not asked.
    """
    estimates = Estimates(prompt)
    if task.target == "pair":
        codes = _array(found, lambda x: VERDICTS.index(x.verdict.value) if x.verdict.kind == BETTER else UNREADABLE)
        right = of_pairs(estimates, codes, label.astype(int), pair, weight)
        unreadable = codes == UNREADABLE
    else:
        ratings = _array(found, lambda x: x.verdict.value if x.verdict.kind == SCORE else math.nan)
        right = of_ratings(estimates, ratings, label, weight)
        unreadable = np.isnan(ratings)
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
        {"question": text, "judgement": x.written.text, "why": x.verdict.value}
        for text, of_one in zip(texts, found)
        for x in of_one
        if x.verdict.kind == "unparseable"
    )
    return {
        "kind": "judgements",
        "groups": len(texts),
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


def ask(record: Record, task: Writing, number: int, audit: ledger.Audit) -> list[Question]:
    """The questions about a record, whose number is given; the audit counts what has no label, and what cannot be
    asked."""
    questions, bad = labelled_questions(record, task)
    pair = lambda question: (number << 16) + question.place
    found = [Question(q.asked, q.label, pair(q), number, record.weight) for q in questions]
    for one in bad[:1]:
        audit.add(one.reason, record.row, one.detail, kept=bool(found))
    return found


def of_pairs(
    estimates: Estimates, codes: np.ndarray, label: np.ndarray, pair: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Adds the metrics of verdicts on pairs.

    accuracy is that of one judgement, vote_2, vote_4, ... that of the vote of so many, over all subsets of the K that
    were drawn: the verdict of more than half of those that can be read, else a tie. A tie counts half where one side is
    labelled better, and a vote of nothing that can be read is wrong. ece: how far the share of a vote's majority, of
    what can be read, is from how often it is right. consistency: whether the votes of all K about both orders name the
    same response, or both a tie; first_position: the share of A among A and B; tie_rate: of ties among what can be
    read.

    Args:
        estimates: of the prompt of each question.
        codes: int [Q, K], places in VERDICTS, or UNREADABLE.
        label: int [Q], places in VERDICTS.
        pair: int [Q], equal for the two orders of a pair, which follow each other; without them no consistency.
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
    decided = np.flatnonzero(votes < 2)
    if k > 1 and len(decided):
        share = counts[decided, votes[decided]] / counts[decided, :UNREADABLE].sum(1)
        moments.add_ece(estimates, decided, share, worth(votes, label)[decided], weight[decided], 0.5)
    if len(pair) > 1 and pair[0] == pair[1]:
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
