"""Columns by the names that the readers know, and what of a row nobody reads.

A source's columns get their names in two steps: what `config.data.columns` says (`parse`, `renamed`), and the names
that public sets use for the prompt and what belongs to it, and for the ratings of both sides (`arranged`). What is then
asked for is noted while the first rows are read (`noted`), so the columns and keys that nobody asked for are known
(`unread`), whatever the format.
"""

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rmjax.data import sources
from rmjax.data.formats.cells import Row, is_dialogue, is_empty, texts_in
from rmjax.data.formats.kinds import is_null, is_number, show
from rmjax.data.records import BadRow
from rmjax.suggestions import did_you_mean

Names = tuple[tuple[str, str], ...]  # (what a column is, its own name), in the order of config.data.columns

IGNORE = "ignore"
CONTEXT, LABEL = "context", "a label"
SYSTEMS = ("system_prompt", "system_message", "system_instruction")
DIALOGUES = ("messages", "trajectory", "conversation", "dialogue", "dialog")
QUESTIONS = ("question", "query", "instruction", "problem", "user_prompt", "user_message", "user")
HISTORIES = ("conversation_history", "chat_history", "dialogue_history", "previous_turns")
ABOUT = ("input", "passage", "passages", "document", "documents", "background")
ALIASES = {  # the first that a row has; one that stands for the prompt where nothing else does is beside it elsewhere
    "prompt": (*DIALOGUES, *QUESTIONS, "input", "context", "history"),
    "system": SYSTEMS,
    "history": HISTORIES,
    "context": ABOUT,
    "principle": ("principles", "rubric", "rubrics", "criteria", "criterion"),
}
RATINGS = ("score", "rating", "reward", "grade")  # of both sides, in the order in which one is taken
SIDES = {"chosen", "rejected", "reject", "accepted", "a", "b", "0", "1", "2", "better", "worse", "winner", "loser"}
# The last word of a name says what a column holds.
CONTEXTS = {word for names in ALIASES.values() for name in names for word in [name.split("_")[-1]]} - {"user", "turns"}
CONTEXTS |= {"prompt", "system", "history", "context", "prompts", "questions", "histories", "contexts", "conversations"}
LABELS = {word + plural for word in (*RATINGS, "label", "preference", "margin", "vote", "rank") for plural in ("", "s")}
LABELS |= {"winner", "preferred"}
MEDIA = {word + plural for word in ("image", "audio", "video", "picture", "photo") for plural in ("", "s")}
MEDIA |= {"img", "pixels", "tool", "tools", "functions"}
COUNTS = {"id", "ids", "idx", "index", "length", "len", "tokens", "words", "chars", "turns", "count", "num", "time"}
NOTES = {"model", "source", "dataset", "date", "url", "name", "type", "category", "domain", "license", "path", "split"}
NOTES |= {"note", "comment", "rationale", "explanation", "reason", "reasoning", "feedback", "critique", "statement"}
NOTES |= {"notes", "comments", "elaboration", "annotator", "labeler", "tag", "tags", "task", "title", "error"}
NOTES |= {"app", "language", "lang", "keyword", "keywords", "subset", "author", "authors"}
PROSE = 4  # words; or twice as many letters as four have, of scripts that have no spaces


# ----------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------


def parse(text: str) -> Names:
    """Reads what columns are; ValueError for what is none.

    >>> parse("prompt=trajectory, ignore=notes")
    (('prompt', 'trajectory'), ('ignore', 'notes'))
    """
    pairs = [(target.strip(), own.strip()) for target, _, own in (part.partition("=") for part in text.split(","))]
    pairs = pairs if text.strip() else []
    targets = [target for target, _ in pairs if target != IGNORE]
    if not all(target and own for target, own in pairs) or len(targets) != len(set(targets)):
        raise ValueError(
            f"config.data.columns={text!r} does not say what columns are; write what each is and its own name, as in "
            f"prompt=trajectory,system=system_prompt, and {IGNORE}=NAME for one that is left out"
        )
    return tuple(pairs)


def check_names(rows: Sequence[Row], names: Names) -> None:
    """Raises ValueError where a name is of no column, or a column would take the place of another."""
    for target, own in names:
        there = [cell_at(row, own) is not None for row in rows]
        kept = [not is_null(cell_at(row, target)) for row in rows]
        if target != IGNORE and not any(there) and not any(kept):
            known = dict.fromkeys(name for row in rows for name in row)
            raise ValueError(
                f"config.data.columns: there is no column {own!r} to be {target!r}; found "
                f"{', '.join(known)}{did_you_mean(own, known)}"
            )
        if any(there) and any(kept) and target not in (IGNORE, own) and target not in [name for _, name in names]:
            raise ValueError(
                f"config.data.columns: {own!r} is to be {target!r}, and there is a column {target!r}; say what that "
                f"one is, or leave it out with {IGNORE}={target}"
            )


def renamed(row: Row, names: Names) -> Row:
    """A row with the columns called what they are; `a.b` is the key b of the object in the column a."""
    taken = []
    for target, own in names:
        row, cell = _take(row, own)
        taken.append((target, cell))
    for target, cell in taken:
        if target != IGNORE and cell is not None:
            row = _put(row, target, cell)
    return row


def cell_at(row: Row, name: str) -> Any:
    """The cell of a column, or of a key of an object in it: "data.context"; None where it is not there."""
    return _take(row, name)[1]


def carried(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """The cells of these columns that are not null, as JSON has them; BadRow (`wrong_type`) for what it has not.

    >>> carried({"reference": "yes", "meta": {"tests": (1, 2)}}, ("reference", "meta.tests", "note"))
    {'reference': 'yes', 'meta.tests': [1, 2]}
    """
    cells = {name: cell for name in names if not is_null(cell := cell_at(row, name))}
    for name, cell in cells.items():
        try:
            cells[name] = json.loads(json.dumps(cell, default=_plain))
        except (TypeError, ValueError, RecursionError):
            raise BadRow("wrong_type", f"{name} is {show(cell)}, expected text, numbers, lists or objects") from None
    return cells


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        raise TypeError
    return sources.plain(value)


def check_carried(rows: Sequence[Row], names: Sequence[str], columns: str) -> None:
    """Raises ValueError for columns to be carried that no row has; says which there are.

    `columns` is config.data.columns.
    """
    rows = [renamed(row, parse(columns)) for row in rows]
    for name in names:
        if all(is_null(cell_at(row, name)) for row in rows):
            known = dict.fromkeys(name for row in rows for name in row)
            raise ValueError(
                f"the column {name!r} is missing or null in its first {len(rows)} rows; found {', '.join(known)}"
                f"{did_you_mean(name, [column for column in known if column != name])}"
            )


def _take(row: Row, name: str) -> tuple[Row, Any]:
    """The row without a column, and its cell; None where it is not there."""
    if name in row:
        return {key: cell for key, cell in row.items() if key != name}, row[name]
    outer, _, inner = name.partition(".")
    if inner and isinstance(row.get(outer), Mapping):
        rest, cell = _take(row[outer], inner)
        return {**row, outer: rest}, cell
    return row, None


def _put(row: Row, name: str, cell: Any) -> Row:
    outer, _, inner = name.partition(".")
    if inner and isinstance(row.get(outer), Mapping):
        return {**row, outer: _put(row[outer], inner, cell)}
    return {**row, name: cell}


def arranged(row: Row, declared: Collection[str]) -> Row:
    """A row with the columns that a format reads under the names that it declares, from those of public sets.

    >>> arranged({"Question": "hi", "chosen-rating": 5, "rejected-rating": 2}, ("prompt", "chosen_score"))
    {'prompt': 'hi', 'chosen_score': 5, 'rejected_score': 2}
    """
    there = tuple(name for name, cell in row.items() if not is_empty(cell))
    own_names = _own_names(there, frozenset(declared))
    if not own_names:
        return row
    target_of = {own: target for target, own in own_names.items()}
    return {target_of.get(name, name): cell for name, cell in row.items() if name in target_of or name not in own_names}


@functools.lru_cache(4096)
def _own_names(there: tuple[str, ...], declared: frozenset[str]) -> dict[str, str]:
    """The column that is taken for each name that a format reads."""
    own_names: dict[str, str] = {}
    by_lower = {str(name).lower().replace("-", "_"): name for name in reversed(there) if name not in declared}
    for target, aliases in ALIASES.items():
        reads = target not in declared if target in ("history", "context") else target in declared
        for alias in (target, *aliases) if reads and target not in there else ():
            if (name := by_lower.get(alias)) is not None and name not in own_names.values():
                own_names[target] = name
                break
    if "chosen_score" in declared and not {"chosen_score", "rejected_score"} <= set(there):
        own_names |= _ratings(there)
    return own_names


def _ratings(there: Sequence[str]) -> dict[str, str]:
    """The columns that rate both sides, as `chosen_score` and `rejected_score`."""
    by_words = {tuple(words(name)): name for name in sorted(there, key=len, reverse=True)}
    for rating in RATINGS:
        for name in (n for n in reversed(by_words) if {rating, "chosen"} <= set(n) and n[-1] not in COUNTS | NOTES):
            other = tuple("rejected" if word == "chosen" else word for word in name)
            if other in by_words:
                return {"chosen_score": by_words[name], "rejected_score": by_words[other]}
    return {}


def words(name: Any) -> list[str]:
    """The words of a name: "chosen-rating", "chosen_rating" and "chosenRating" have two."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_A-Za-z]+", str(name))]


# ----------------------------------------------------------------------------------------------------
# What nobody reads
# ----------------------------------------------------------------------------------------------------


class _Noted(dict[str, Any]):
    """A row, or an object in it, that notes which of its cells were asked for."""

    def __init__(self, cells: Mapping[str, Any], path: str, asked: set[str]):
        super().__init__({name: _noted(cell, _join(path, name), asked) for name, cell in cells.items()})
        self._path, self._asked = path, asked

    def __getitem__(self, name: str) -> Any:
        self._asked.add(_join(self._path, name))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(_join(self._path, name))
        return super().get(name, default)

    def items(self) -> Any:
        if self._path:  # whoever goes through all of an object takes it whole; rows are copied so
            self._asked.add(_join(self._path, "*"))
        return super().items()


def _join(path: str, name: Any) -> str:
    """The path of a key; in a tree, that of the first level: `replies[].text` stands for those below too."""
    if f".{path}".endswith(f".{name}[]"):
        return path.removesuffix("[]")
    return f"{path}.{name}" if path else str(name)


def _noted(cell: Any, path: str, asked: set[str]) -> Any:
    if isinstance(cell, Mapping):
        return _Noted(cell, path, asked)
    return [_noted(each, f"{path}[]", asked) for each in cell] if isinstance(cell, list) else cell


def noted(row: Row, asked: set[str]) -> Row:
    """A copy of a row that adds the paths of cells that are asked for: "output", "output[].label"."""
    return _Noted(row, "", asked)


def unread(row: Row, asked: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The path and the cell of all of a row that is not empty and was not asked for, outermost."""
    return _unread(row, "", asked)


def _unread(cell: Any, path: str, asked: Collection[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(cell, list):
        for each in cell:
            if isinstance(each, list | Mapping):
                yield from _unread(each, f"{path}[]", asked)
    elif isinstance(cell, Mapping) and _join(path, "*") not in asked:
        for name, inner in cell.items():
            if is_empty(inner):
                continue
            if (inner_path := _join(path, name)) in asked:
                if name != "tools":  # which are taken whole
                    yield from _unread(inner, inner_path, asked)
            else:
                yield inner_path, inner


def meaning(path: str, cells: Sequence[Any], others: Collection[str]) -> str:
    """What a column that is not read looks like: "context", "a label", "media or tools", or "" for a note.

    `others` are all columns that are not read: numbers that stand beside both responses are labels.
    """
    if "[]" in path:
        return ""
    name = words(path.rpartition(".")[2]) or [path]
    if {name[0], name[-1]} & MEDIA or any(isinstance(cell, bytes) for cell in cells):
        return "media or tools"
    if name[-1] in COUNTS:
        return ""
    if any(map(is_dialogue, cells)) or (name[-1] in CONTEXTS and any(map(texts_in, cells))):
        return CONTEXT
    if "." in path:
        return ""
    if name[-1] in LABELS or (all(map(is_number, cells)) and _has_other_side(name, others)):
        return LABEL
    prose = sum(any(map(_is_prose, texts_in(cell))) for cell in cells)
    return CONTEXT if name[-1] not in NOTES and 10 * prose > len(cells) else ""


def _has_other_side(name: Sequence[str], others: Collection[str]) -> bool:
    """Whether another column has this name but for the side."""
    differing = (
        [(x, y) for x, y in zip(name, other) if x != y] for other in map(words, others) if len(other) == len(name)
    )
    return any(len(pairs) == 1 and set(pairs[0]) <= SIDES for pairs in differing)


def _is_prose(text: str) -> bool:
    spoken = [word for word in text.split() if any(map(str.isalpha, word))]  # a date and a time are none
    return len(spoken) >= PROSE or (len(text) >= 4 * PROSE and not text.isascii())


def example(cell: Any) -> str:
    return show(cell).partition(" ")[2]
