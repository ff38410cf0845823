r"""What the columns of a row mean: one line of `FORMATS` per format, read into records.

A format is recognised by its columns and, where columns overlap, by the first rows (`LOOK`), all of which
must agree. A column that is wrong in all of them is an error; a cell that is wrong is a BadRow, which the
audit counts. What the labels of a format mean stands in the module of its reader.

A row with several responses, or several records, of which some cannot be used loses those alone: `Layout.read` says
what was left out, and the audit counts it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.formats.benchmarks import BENCHMARKS
from rmjax.data.formats.cells import NUMBER, Format, Kind, Reading, Row, is_null, is_number, show, wrong
from rmjax.data.formats.conversations import UNLABELLED
from rmjax.data.formats.judged import JUDGED
from rmjax.data.formats.label_studio import LABEL_STUDIO
from rmjax.data.formats.pairs import PAIRS
from rmjax.data.formats.public import PUBLIC
from rmjax.data.formats.ranked import RANKED
from rmjax.data.formats.scored import SCORED
from rmjax.data.formats.steps import STEPS
from rmjax.data.formats.stored import STORED
from rmjax.data.records import BadRow, Record
from rmjax.suggestions import closest, did_you_mean

__all__ = ["FORMATS", "LOOK", "Format", "Kind", "Layout", "detect", "lines"]

LOOK = 1000  # rows that decide the format

TABLES = (PAIRS, SCORED, JUDGED, LABEL_STUDIO, RANKED, STEPS, UNLABELLED, PUBLIC, BENCHMARKS, STORED)
FORMATS: dict[str, Format] = {form.name: form for table in TABLES for form in table}
MISSHAPEN = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
# Columns of numbers that say where a row comes from, not how good it is.
COUNTERS = ("id", "idx", "index", "row", "turn", "turns", "seed", "length")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of one source are read.

    Attributes:
        name: the format, a name in FORMATS.
        by_place: `preference` is a place in [1, 2], not a probability in [0, 1].
        attributes: the columns that are scores of the response, where the format looks for them.
    """

    name: str
    by_place: bool = False
    attributes: tuple[str, ...] = ()

    def read(
        self, row: Row, *, source: str, where: str, keep: bool = False, defects: list[BadRow] | None = None
    ) -> Sequence[Record]:
        """Reads the records of one row; where a row can have several, their `row` ends with ".0", ".1", ...

        Args:
            row: its cells by column.
            source: name of the source, where the row does not name one.
            where: where the row stands there.
            keep: defects that allow training (records.KEEPABLE) are let through.
            defects: takes what was let through and which parts (a response of a ranking, a message of a tree) were
                left out, each with its reason. Without it nothing is left out: the first bad part raises.

        Raises:
            BadRow: the row cannot be used.
        """
        form = FORMATS[self.name]
        for column, kind in form.columns.items():
            if not kind.test(row.get(column)):
                raise wrong(column, row.get(column), kind)
        reading = Reading(source, where, keep, self.by_place, self.attributes, defects)
        try:
            made = form.read(row, reading)
        except MISSHAPEN as error:  # deep in a cell, where no kind looks
            raise BadRow(
                "wrong_type", f"a cell is not built as in {form.name}: {type(error).__name__} {error}"
            ) from error
        if isinstance(made, Record):
            return [made]
        return [dataclasses.replace(record, row=f"{record.row}.{i}") for i, record in enumerate(made)]


def lines() -> list[str]:
    """Every format in one line each: its name, the columns it must have, and what they mean."""
    columns = lambda form: ", ".join(f"{name} ({kind.words})" for name, kind in form.columns.items())
    return [f"{form.name}: {columns(form)}; {form.means}" for form in FORMATS.values()]


def detect(rows: Sequence[Row], name: str = "auto") -> Layout:
    """Finds the format of a source from its first rows, or checks the one that is named.

    Raises:
        ValueError: no format fits or several do, or a column is wrong throughout; says what was seen and which
            format is closest.
    """
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"unknown data format {name!r}; known: {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    if not rows:
        raise ValueError("there are no rows to see a format in")
    columns = dict.fromkeys(column for row in rows for column in row)
    seen = {column: [row[column] for row in rows if not is_null(row.get(column))] for column in columns}
    if name == "auto":
        found = [form for form in FORMATS.values() if _fits(form, rows)]
        if len(found) != 1:
            raise ValueError(_unclear(found, rows, seen))
        form = found[0]
        if hidden := [c for c in form.columns if all(map(_is_conversation_text, seen[c]))]:
            raise ValueError(
                f"{' and '.join(map(repr, hidden))} hold conversations as JSON text (the first is "
                f"{show(seen[hidden[0]][0])}); write lists of messages, or name the format if they are meant as text"
            )
    else:
        form = FORMATS[name]
    for column, kind in (*form.columns.items(), *form.optional.items()):
        cells = seen.get(column, [])
        if not (cells or column not in form.columns):
            near = did_you_mean(column, [c for c in seen if c not in form.columns])
            raise ValueError(f"{form.name} needs a column {column!r} ({kind.words}); found {_columns(seen)}{near}")
        if cells and not any(map(kind.test, cells)):
            json_text = "; it holds JSON as text: write it as a list or object" if _parsed(cells[0]) is not None else ""
            raise ValueError(
                f"column {column!r} is wrong throughout: {kind.words} was expected, the first row has "
                f"{show(cells[0])}{json_text}"
            )
    return Layout(
        form.name,
        _by_place(seen.get("preference", [])) if "preference" in form.optional else False,
        _attributes(form, seen),
    )


def _attributes(form: Format, seen: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """The columns of numbers that are scores.

    Raises:
        ValueError: the format needs some and there are none.
    """
    if not form.scores:
        return ()
    known = {*form.columns, *form.optional, *COUNTERS}
    mostly = lambda cells: 2 * sum(map(is_number, cells)) > len(cells)  # a wrong cell is a bad row, not another column
    found = [c for c, cells in seen.items() if c not in known and not c.endswith("_id") and mostly(cells)]
    if not found:
        raise ValueError(f"{form.name} needs a column of numbers that are scores, as `score`; found {_columns(seen)}")
    return tuple(found)


def _by_place(cells: Sequence[Any]) -> bool:
    """Whether `preference` is in [1, 2].

    Sets that write a tie as 0 (or -1) beside 1 and 2 are refused, not guessed.
    """
    values = [cell for cell in cells if NUMBER.test(cell)]
    if any(v > 1 for v in values) and any(v < 1 for v in values):
        raise ValueError(
            f"preference runs from {min(values)} to {max(values)}; expected a probability in [0, 1] that `chosen` is "
            "better, or the place of the better one in [1, 2] (1 is `chosen`); a tie is 0.5 or 1.5"
        )
    return any(v > 1 for v in values)


def _fits(form: Format, rows: Sequence[Row]) -> bool:
    """Whether some row has every cell of the right kind, and all such rows agree."""
    usable = [row for row in rows if all(kind.test(row.get(c)) for c, kind in form.columns.items())]
    return bool(usable) and all(map(form.agrees, usable))


def _unclear(found: Sequence[Format], rows: Sequence[Row], seen: Mapping[str, list[Any]]) -> str:
    """Why no format, or more than one, fits; in a sentence or two."""
    what = f"{len(rows)} rows with the columns {_columns(seen)}"
    if found:
        names = ", ".join(form.name for form in found)
        return f"ambiguous data format: {what} fit {names}; name one with config.data.format"
    if as_text := _written_as_text(rows):
        return f"unknown data format: {what}; {as_text}"
    mixed = [form.name for form in FORMATS.values() if any(_fits(form, [row]) for row in rows)]
    if mixed:
        why = f"the rows do not agree (some are {', some '.join(mixed)}); name one with config.data.format"
        return f"unknown data format: {what}; {why}, or read them as several sources"
    return f"unknown data format: {what}. {_closest(seen)}; rename columns, or see the table of formats in docs/data.md"


def _closest(seen: Mapping[str, list[Any]]) -> str:
    """The format that shares most columns, and what it lacks."""
    has = lambda column, kind: column in seen and any(map(kind.test, seen[column]))
    part = lambda column, kind: 1.0 if has(column, kind) else 0.4 if column in seen or closest(column, seen) else 0.0
    fit = lambda form: sum(part(*item) for item in form.columns.items())
    sure = lambda form: 0.8 if fit(form) == len(form.columns) else 1.0  # its columns are there, its rows differ
    form = max(FORMATS.values(), key=lambda form: sure(form) * fit(form) / (len(form.columns) + len(seen)))
    lacks = []
    for column, kind in form.columns.items():
        if column in seen and not has(column, kind):
            lacks.append(f"{column!r} as {kind.words}, not as {show(next(iter(seen[column]), None))}")
        elif column not in seen:
            lacks.append(f"{column!r} ({kind.words}{did_you_mean(column, [c for c in seen if c not in form.columns])})")
    needs = f"which needs {' and '.join(lacks)}" if lacks else f"but its rows differ: {form.means}"
    return f"Closest is {form.name}, {needs}"


def _written_as_text(rows: Sequence[Row]) -> str:
    """Says which columns hold JSON as text, if some format would fit without; else ""."""
    parsed = [{c: _parsed(cell) if _parsed(cell) is not None else cell for c, cell in row.items()} for row in rows]
    columns = [c for c in parsed[0] if parsed[0][c] is not rows[0][c]]
    fits = [form.name for form in FORMATS.values() if columns and _fits(form, parsed)]
    if not fits:
        return ""
    names, first = ", ".join(map(repr, columns)), show(rows[0][columns[0]])
    return f"{names} hold JSON as text (the first is {first}); write lists and objects, and this is {fits[0]}"


def _parsed(cell: Any) -> Any:
    """The list or object that a text is JSON of; None if it is not."""
    if not isinstance(cell, str) or cell.strip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return None


def _is_conversation_text(cell: Any) -> bool:
    turns = _parsed(cell)
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(t, dict) and {"role", "from"} & set(t) for t in turns)
    )


def _columns(seen: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{c} ({type(v[0]).__name__ if v else 'null'})" for c, v in seen.items()) or "none"
