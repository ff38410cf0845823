"""How far annotators agree: Cohen's and Fleiss' kappa, Krippendorff's alpha (the extra `agreement`).

All are 1 where everybody says the same and 0 where agreement is what chance gives. They are computed by statsmodels and
by the package krippendorff; what is ours is how answers are put together for them.
"""

import collections
import contextlib
import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.data import formats, sources
from rmjax.data.formats import judged, kinds, label_studio
from rmjax.data.reading import open_rows
from rmjax.data.records import BadRow
from rmjax.suggestions import install

Answers = Mapping[str, float]  # of one question on one item, by person


@dataclasses.dataclass(frozen=True)
class Summary:
    """Agreement on one question."""

    question: str  # "preference", or the name of an attribute
    items: int  # pairs or responses that two people or more gave an answer on
    people: int  # who answered
    cohen: float  # mean over all pairs of people with items in common (Light 1971); of attributes, quadratic weights
    fleiss: float  # over the items with the most frequent number of answers; answers are categories
    alpha: float  # over all items; nominal for preferences, interval for attributes

    def __str__(self) -> str:
        figures = (("Cohen's kappa", self.cohen), ("Fleiss' kappa", self.fleiss), ("Krippendorff's alpha", self.alpha))
        text = ", ".join(f"{name} {value:.3f}" for name, value in figures)
        return f"agreement on {self.question}: {text} ({self.items:,} items, {self.people:,} annotators)"


def cohen_kappa(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, *, quadratic: bool) -> float:
    """Cohen's kappa of the N answers of two raters (Cohen 1960); NaN where both gave the same one throughout.

    With `quadratic` weights (Cohen 1968) a disagreement counts as the square of the difference of the answers.
    """
    values, codes = np.unique(np.stack([first, second]), return_inverse=True)
    table = np.zeros((len(values), len(values)))
    np.add.at(table, tuple(codes.reshape(2, -1)), 1)
    weights = np.square(values[:, None] - values[None, :]) if quadratic else None
    kappa = _package("statsmodels.stats.inter_rater").cohens_kappa
    return float(kappa(table, weights=weights, return_results=False)) if len(values) > 1 else math.nan


def fleiss_kappa(counts: Any) -> float:
    """Fleiss' kappa (1971) of [items, categories] counts of ratings, equally many of each item; NaN of one category."""
    counts = np.asarray(counts)
    kappa = _package("statsmodels.stats.inter_rater").fleiss_kappa
    return float(kappa(counts)) if (counts.sum(0) > 0).sum() > 1 else math.nan


def krippendorff_alpha(ratings: Any, level: str) -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability") of [raters, items] numbers.

    A rating is NaN where a rater did not rate an item. The result is NaN where all ratings are the same, or none is of
    an item that another rated too. The level is "nominal", "ordinal", "interval" or "ratio".
    """
    ratings = np.asarray(ratings, np.float64)
    shared = ratings[:, (~np.isnan(ratings)).sum(0) > 1]
    alpha = _package("krippendorff").alpha
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return math.nan
    return float(alpha(reliability_data=shared, level_of_measurement=level))


def summarise(question: str, items: Sequence[Answers]) -> Summary:
    """Agreement on a question, from the answers to it on each item; ImportError where a package is missing."""
    items = [answers for answers in items if len(answers) > 1]
    people = sorted({person for answers in items for person in answers})
    verdict = question == "preference"
    ratings = np.array([[answers.get(person, math.nan) for answers in items] for person in people])
    ratings = ratings.reshape(-1, len(items))
    kappas = []
    for first, second in itertools.combinations(ratings, 2):
        both = ~np.isnan(first) & ~np.isnan(second)
        if both.any():
            kappas.append(cohen_kappa(first[both], second[both], quadratic=not verdict))
    kappas = [kappa for kappa in kappas if not math.isnan(kappa)]
    usual = max(collections.Counter(map(len, items)).items(), key=lambda item: (item[1], item[0]), default=(0, 0))[0]
    values = sorted({value for answers in items for value in answers.values()})
    counts = [[list(a.values()).count(value) for value in values] for a in items if len(a) == usual]
    return Summary(
        question,
        len(items),
        len(people),
        sum(kappas) / len(kappas) if kappas else math.nan,
        fleiss_kappa(counts) if counts else math.nan,
        krippendorff_alpha(ratings, "nominal" if verdict else "interval") if items else math.nan,
    )


def _votes(row: Mapping[str, Any]) -> list[tuple[str, Answers]]:
    votes = {name: row[name] for name in row if judged.VOTER.fullmatch(name) and kinds.VOTE.test(row[name])}
    return [("preference", votes)]


# The formats that say who gave which answer: the answers of a row, each to its question.
ANSWERS: dict[str, Callable[[Mapping[str, Any]], Sequence[tuple[str, Answers]]]] = {
    "annotated_pair": _votes,
    "label_studio": label_studio.answers_by_question,
}


def summaries(spec: str, format: str = "auto", columns: str = "") -> list[Summary]:
    """Agreement on every question that several people answered in the sources of `spec`; [] where there is none.

    Rows that the format cannot read are left out; the audit counts them. Errors are those of `summarise` and
    `reading.open_rows`.
    """
    by_question: dict[str, list[Answers]] = {}
    for item in sources.split_spec(spec):
        layout, rows = open_rows(item, format, columns)
        for _, row in rows if layout.name in ANSWERS else ():
            with contextlib.suppress(BadRow, *formats.MISSHAPEN):
                for question, answers in ANSWERS[layout.name](row):
                    by_question.setdefault(question, []).append(answers)
    return [summarise(q, items) for q, items in by_question.items() if any(len(answers) > 1 for answers in items)]


def lines(spec: str, format: str = "auto", columns: str = "") -> list[str]:
    """`summaries` as text, or what to install."""
    try:
        return [str(summary) for summary in summaries(spec, format, columns)]
    except ImportError as error:
        return [str(error)]


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"agreement of annotators needs {package}: {install('agreement')}") from error
