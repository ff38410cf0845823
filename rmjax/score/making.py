"""Makes rows from scored rows: the best of N, pairs, labels by scores, pairs within margins.

A pair's margin is the score of `chosen` minus that of `rejected`. Dropped rows are counted by the reason. A response is
never compared with itself, and scores that differ by no more than the computation can tell are equal.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from rmjax.jobs.parts import Row
from rmjax.score.rows import NUMBER, Asked

Counts = collections.Counter[str]
TEXT = pa.string()
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SIDES = ("chosen", "rejected")
STALE = ("preference", "preference_strength")  # columns that say which side is better: null after --relabel
MOST_PAIRED = 512  # responses of which all pairs are made: 130,816, and four times as many of twice the responses
REWARDS = ("score", "scores", "chosen_score", "rejected_score")  # what is normalized; attributes have scales
SPREADS = ("spread", "chosen_spread", "rejected_spread")  # distances of rewards, which have no mean to subtract


@dataclasses.dataclass(frozen=True)
class Options:
    """The rows to make from scored rows."""

    best_of_n: bool = False  # of rows with `responses`: the best one as `response`, with its score
    pairs: str = ""  # of rows with `responses`: "best_worst" or "all" pairs of which one has the higher score
    relabel: bool = False  # of pairs: the response of the higher score becomes `chosen`
    # Where pairs are made or relabelled: those whose scores differ by no more are dropped. It is at least the
    # resolution of the scores (RewardModel.resolution).
    tie_threshold: float = 0.0
    min_margin: float = -math.inf  # pairs of a smaller margin are dropped
    max_margin: float = math.inf  # pairs of a larger margin are dropped
    mean: float = 0.0  # is subtracted from rewards
    std: float = 1.0  # rewards are divided by it

    def check(self, shape: str) -> None:
        """Raises ValueError for a flag that means nothing for rows of this shape, and for impossible values."""
        of_responses, of_pairs = "rows with `responses`", "rows with `chosen` and `rejected`"
        ends_as_pairs = bool(self.pairs) or shape == "pair"
        refused = {
            ("--best_of_n", of_responses): self.best_of_n and shape != "responses",
            (f"--pairs={self.pairs}", of_responses): bool(self.pairs) and shape != "responses",
            ("--relabel", of_pairs): self.relabel and shape != "pair",
            ("--tie_threshold", "--pairs or --relabel"): self.tie_threshold != 0 and not (self.pairs or self.relabel),
            ("--min_margin", f"--pairs, or {of_pairs}"): self.min_margin > -math.inf and not ends_as_pairs,
            ("--max_margin", f"--pairs, or {of_pairs}"): self.max_margin < math.inf and not ends_as_pairs,
        }
        for (flag, goes_with), given in refused.items():
            if given:
                raise ValueError(f"{flag} goes with {goes_with}; the first row has the shape {shape!r}")
        if self.best_of_n and self.pairs:
            raise ValueError("--best_of_n and --pairs make different rows of a prompt; give one of them")
        if self.pairs not in ("", "best_worst", "all"):
            raise ValueError(f"--pairs={self.pairs} is none of best_worst, all")
        if not 0 <= self.tie_threshold < math.inf:
            raise ValueError(f"--tie_threshold={self.tie_threshold} must be a number that is not negative")
        if not self.min_margin <= self.max_margin:
            raise ValueError(f"--min_margin={self.min_margin} is above --max_margin={self.max_margin}")

    def kept(self, asked: Asked) -> Row:
        """The columns of a row that the output has, too; under the documented names where rows are made of them."""
        return asked.named if self.takes_responses or self.makes_margins else asked.row

    def check_row(self, where: str, row: Row) -> None:
        """Raises ValueError, with the row's name, where responses are no texts, or all their pairs are too many."""
        if not self.takes_responses:
            return
        responses = row["responses"] or []
        if not all(isinstance(response, str | None) for response in responses):
            raise ValueError(f"{where} has `responses` that are no texts, which --best_of_n and --pairs choose from")
        count = len(responses) if self.pairs == "all" else 0
        if count > MOST_PAIRED:
            raise ValueError(
                f"{where} has {count:,} responses, of which --pairs=all makes {count * (count - 1) // 2:,} pairs; "
                f"at most {MOST_PAIRED} responses can be paired so, --pairs=best_worst takes more"
            )

    @property
    def makes_margins(self) -> bool:  # the rows that come out are pairs
        return bool(self.pairs or self.relabel or self.min_margin > -math.inf or self.max_margin < math.inf)

    @property
    def takes_responses(self) -> bool:  # the column `responses` becomes others
        return self.best_of_n or bool(self.pairs)


def made_columns(
    added: Mapping[str, pa.DataType], options: Options, prompt: pa.DataType = TEXT
) -> dict[str, pa.DataType]:
    """The columns that the output has and the input has not, given the columns of scores that a row gets."""
    if options.best_of_n:
        return {"response": TEXT, **{_of_one(name): NUMBER for name in added}}
    if options.pairs:
        side = TEXT if pa.types.is_string(prompt) or pa.types.is_large_string(prompt) else TURNS
        scores = {f"{name}_{_of_one(score)}": NUMBER for score in added for name in SIDES}
        return {**dict.fromkeys(SIDES, side), **scores, "margin": NUMBER}
    return {**added, "margin": NUMBER} if options.makes_margins else dict(added)


def _of_one(name: str) -> str:
    return "score" if name == "scores" else name


def make_rows(row: Row, scores: Row, options: Options, counts: Counts, resolution: float = 0.0) -> Iterator[Row]:
    """The rows made from a row and its columns of scores; counts dropped rows and swapped pairs.

    Scores that differ by up to `resolution`, in the model's units, are equal. A score that is not finite (from
    overflowing weights, say) is null, and nothing is chosen by it. An empty response has none (None): the others of its
    row are chosen from, and a pair with one is left out.
    """
    known = all(map(math.isfinite, _numbers(scores)))
    scores = {name: _value(name, x, options) for name, x in scores.items()}
    if not known:
        counts["without a finite score"] += 1
    if not (options.takes_responses or options.makes_margins):
        yield {**row, **scores}
    elif known and options.takes_responses:
        row, scores = _answered(row, scores)
        if row["responses"]:
            yield from (_pairs if options.pairs else _best)(row, scores, options, counts, resolution / options.std)
    elif known and None not in scores.values():
        yield from _judged({**row, **scores}, options, counts, resolution / options.std)


def _numbers(value: Any) -> Iterator[float]:
    """The scores that are there: None is that of an empty response."""
    if isinstance(value, dict | list):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _numbers(x)
    elif value is not None:
        yield value


def _answered(row: Row, scores: Row) -> tuple[Row, Row]:
    """A row without its empty responses, and their scores."""
    kept = [i for i, x in enumerate(scores["scores"] or ()) if x is not None]
    kept_scores = {name: [x[i] for i in kept] for name, x in scores.items() if kept}
    return {**row, "responses": [row["responses"][i] for i in kept]}, kept_scores


def _value(name: str, x: Any, options: Options) -> Any:
    if isinstance(x, list):
        return [_value(name, value, options) for value in x]
    if x is None or not math.isfinite(x):
        return None
    if name in SPREADS:
        return x / options.std
    return (x - options.mean) / options.std if name in REWARDS else x


def _best(row: Row, scores: Row, options: Options, counts: Counts, equal: float) -> Iterator[Row]:
    best = int(np.argmax(np.array(scores["scores"]) >= max(scores["scores"]) - equal))  # the first of equal ones
    yield {**_rest(row), "response": row["responses"][best], **{_of_one(name): x[best] for name, x in scores.items()}}


def _rest(row: Row) -> Row:
    return {name: x for name, x in row.items() if name != "responses"}


def _pairs(row: Row, scores: Row, options: Options, counts: Counts, equal: float) -> Iterator[Row]:
    values, first = scores["scores"], {text: i for i, text in reversed([*enumerate(row["responses"])])}
    order = sorted(sorted(first.values()), key=lambda i: -values[i])
    which = [(order[0], order[-1])] if len(order) > 1 else []
    if options.pairs == "all":
        which = [(i, j) for a, i in enumerate(order) for j in order[a + 1 :]]
    if not which:
        counts["dropped: single response" if len(values) < 2 else "dropped: tie"] += 1
    elif len(values) > len(order):
        counts["repeated responses"] += len(values) - len(order)
    as_text = isinstance(row["prompt"], str)  # else turns, so that the rows are in a format that training reads
    side = lambda text: text if as_text else [{"role": "assistant", "content": text}]
    for both in which:
        texts = {name: side(row["responses"][i]) for name, i in zip(SIDES, both)}
        side_scores = {f"{name}_{_of_one(score)}": x[i] for score, x in scores.items() for name, i in zip(SIDES, both)}
        margin = values[both[0]] - values[both[1]]
        if _kept(margin, options, counts, equal):
            yield {**_rest(row), **texts, **side_scores, "margin": margin}


def _judged(row: Row, options: Options, counts: Counts, equal: float) -> Iterator[Row]:
    margin = 0.0 if row["chosen"] == row["rejected"] else row["chosen_score"] - row["rejected_score"]
    if options.relabel and margin < -max(options.tie_threshold, equal):
        counts["relabelled"] += 1
        row, margin = _turned(row), -margin
    if _kept(margin, options, counts, equal):
        stale = [name for name in STALE if name in row] if options.relabel else []
        yield {**row, **dict.fromkeys(stale), "margin": margin}


def _turned(row: Row) -> Row:
    """Swaps chosen and rejected in all columns that exist for both: `chosen_score`, `score_chosen`, `chosen-model`."""
    others = {name: name.replace("chosen", "rejected").replace("Chosen", "Rejected") for name in row}
    both = [(name, other) for name, other in others.items() if other != name and other in row]
    return {**row, **{to: row[of] for pair in both for to, of in (pair, pair[::-1])}}


def _kept(margin: float, options: Options, counts: Counts, equal: float) -> bool:
    if (options.pairs or options.relabel) and abs(margin) <= max(options.tie_threshold, equal):
        counts["dropped: tie"] += 1
        return False
    if not options.min_margin <= margin <= options.max_margin:
        counts["dropped: margin"] += 1
        return False
    return True
