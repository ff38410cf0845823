"""The pairs that a model gets wrong, to be read: cut where they are long, with the words that differ."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from rmjax.report.naming import number
from rmjax.report.section import Pair, Run

LONGEST = 4000  # characters of a text that are shown
COMPARED = 600  # words; finding what differs takes time with the square of them
ALIKE = 0.5  # texts less alike than this have no words marked: most would be


def wrong_pair(entry: Mapping[str, Any]) -> Pair | None:
    """One of "worst" of an evaluation; None where its texts are not known."""
    preferred, rejected = entry.get("preferred_text"), entry.get("rejected_text")
    if preferred is None or rejected is None:
        return None
    heading = f"The model gives the label a probability of {number(entry['probability'], True)}"
    if entry.get("difference") is not None:
        heading += f"; the preferred response gets {number(abs(entry['difference']))} less reward"
    place = " · ".join(str(x) for x in (entry["id"], entry.get("source")) if x)
    return Pair(heading, place, shorten(entry.get("prompt") or ""), *differing(shorten(preferred), shorten(rejected)))


def shorten(text: str) -> str:
    """The text, or its beginning with how much is left out."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def differing(first: str, second: str) -> tuple[list[Run], list[Run]]:
    """Splits two texts where they differ, by words.

    >>> differing("every old river", "every old garden")
    ([(True, 'every old '), (False, 'river')], [(True, 'every old '), (False, 'garden')])
    """
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second))
    whole = [(True, first)], [(True, second)]
    if max(len(a), len(b)) > COMPARED:
        return whole
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < ALIKE:
        return whole
    runs: tuple[list[Run], list[Run]] = [], []
    for kind, i, j, k, l in matcher.get_opcodes():
        for of, words in zip(runs, (a[i:j], b[k:l])):
            if words:
                of.append((kind == "equal", "".join(words)))
    return runs
