"""What is made of scored rows: the best of N, pairs, labels by scores, and what margins leave.

A pair's margin is the score of `chosen` minus that of `rejected`. What is dropped is counted by its reason.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from rmjax.scoring.rows import NUMBER, Row

Counts = collections.Counter[str]
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make.

    Attributes:
        best_of_n: of rows with `responses`: the best one as `response`, with its score.
        pairs: of rows with `responses`: "best_worst" or "all" pairs of which one has the higher score; "" is none.
        relabel: of pairs: the response of the higher score becomes `chosen`.
        tie_threshold: pairs whose scores differ by no more are ties, and dropped where pairs are made or relabelled.
        min_margin: pairs of a smaller margin are dropped. max_margin: of a larger one.
        mean: is subtracted from scores. std: they are divided by it.
    """

    best_of_n: bool = False
    pairs: str = ""
    relabel: bool = False
    tie_threshold: float = 0.0
    min_margin: float = -math.inf
    max_margin: float = math.inf
    mean: float = 0.0
    std: float = 1.0

    def check(self, shape: str) -> None:
        """Makes sure that rows of this shape can be made so.

        Raises:
            ValueError: a flag that means nothing for them, or a value that cannot be.
        """
        pairs = self.pairs or self.relabel
        filtered = self.min_margin > -math.inf or self.max_margin < math.inf
        wrong = {
            "--best_of_n": self.best_of_n and shape != "responses",
            f"--pairs={self.pairs}": bool(self.pairs) and shape != "responses",
            "--relabel": self.relabel and shape != "pair",
            "--tie_threshold": self.tie_threshold != 0 and not pairs,
            "--min_margin and --max_margin": filtered and not (self.pairs or shape == "pair"),
        }
        needs = {"--relabel": "`chosen` and `rejected`", "--tie_threshold": "pairs (--pairs or --relabel)"}
        for flag, found in wrong.items():
            if found:
                more = "pairs (--pairs, or rows of `chosen` and `rejected`)" if "margin" in flag else "`responses`"
                raise ValueError(f"{flag} is for {needs.get(flag, more)}; these rows are of the shape {shape!r}")
        if self.best_of_n and self.pairs:
            raise ValueError("--best_of_n and --pairs make different rows of a prompt; give one of them")
        if self.pairs not in ("", "best_worst", "all"):
            raise ValueError(f"--pairs={self.pairs} is none of best_worst, all")
        if not self.tie_threshold >= 0:
            raise ValueError(f"--tie_threshold={self.tie_threshold} must not be negative")
        if not self.min_margin <= self.max_margin:
            raise ValueError(f"--min_margin={self.min_margin} is above --max_margin={self.max_margin}")

    @property
    def makes_pairs(self) -> bool:
        """Whether the rows that come out are pairs with a margin."""
        return bool(self.pairs or self.relabel or self.min_margin > -math.inf or self.max_margin < math.inf)


def columns(schema: pa.Schema, options: Options) -> pa.Schema:
    """The columns of what is made of scored rows of this schema."""
    text = pa.string()
    if options.best_of_n:
        return _without(schema, "responses", response=text, score=NUMBER)
    if options.pairs:
        scores = {f"{side}_score": NUMBER for side in ("chosen", "rejected")}
        side = text if pa.types.is_string(schema.field("prompt").type) else TURNS
        return _without(schema, "responses", chosen=side, rejected=side, **scores, margin=NUMBER)
    return _without(schema, "margin", margin=NUMBER) if options.makes_pairs else schema


def _without(schema: pa.Schema, gone: str, **more: pa.DataType) -> pa.Schema:
    kept = [f for f in schema if f.name not in (gone, "scores", *more) or (f.name == "scores" and gone == "margin")]
    listed = [f for f in kept if not (gone == "responses" and f.type == pa.list_(NUMBER))]
    return pa.schema([*listed, *(pa.field(name, type) for name, type in more.items())])


def make(row: Row, scores: Row, options: Options, counts: Counts) -> Iterator[Row]:
    """What becomes of a row and the columns of its scores; counts what is dropped, and what is turned around."""
    scores = {name: _normal(x, options) for name, x in scores.items()}
    if options.best_of_n:
        values = scores["scores"]
        best = max(range(len(values)), key=values.__getitem__)
        yield {**_rest(row, "responses"), "response": row["responses"][best], "score": values[best]}
    elif options.pairs:
        yield from _pairs(row, scores["scores"], options, counts)
    elif options.makes_pairs:
        yield from _judged({**row, **scores}, options, counts)
    else:
        yield {**row, **scores}


def _normal(x: Any, options: Options) -> Any:
    of = lambda value: (value - options.mean) / options.std
    return list(map(of, x)) if isinstance(x, list) else of(x)


def _rest(row: Row, *names: str) -> Row:
    return {name: x for name, x in row.items() if name not in names}


def _pairs(row: Row, scores: list[float], options: Options, counts: Counts) -> Iterator[Row]:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen = [(order[0], order[-1])] if len(order) > 1 else []
    if options.pairs == "all":
        chosen = [(i, j) for a, i in enumerate(order) for j in order[a + 1 :]]
    if not chosen:
        counts["single response"] += 1
    as_text = isinstance(row["prompt"], str)  # else turns, so that the rows are in a format that training reads
    side = lambda text: text if as_text else [{"role": "assistant", "content": text}]
    for i, j in chosen:
        sides = {"chosen": side(row["responses"][i]), "rejected": side(row["responses"][j])}
        told = {"chosen_score": scores[i], "rejected_score": scores[j], "margin": scores[i] - scores[j]}
        if _kept(told["margin"], options, counts):
            yield {**_rest(row, "responses"), **sides, **told}


def _judged(row: Row, options: Options, counts: Counts) -> Iterator[Row]:
    margin = row["chosen_score"] - row["rejected_score"]
    if options.relabel and margin < -options.tie_threshold:
        counts["relabelled"] += 1
        names = [name for name in row if name.startswith("chosen") and f"rejected{name[6:]}" in row]
        turned = {f"{a}{name[6:]}": row[f"{b}{name[6:]}"] for name in names for a, b in _BOTH}
        row, margin = {**row, **turned}, -margin
    if _kept(margin, options, counts):
        yield {**row, "margin": margin}


_BOTH = (("chosen", "rejected"), ("rejected", "chosen"))


def _kept(margin: float, options: Options, counts: Counts) -> bool:
    if (options.pairs or options.relabel) and abs(margin) <= options.tie_threshold:
        counts["dropped: tie"] += 1
        return False
    if margin < options.min_margin or margin > options.max_margin:
        counts["dropped: margin"] += 1
        return False
    return True
