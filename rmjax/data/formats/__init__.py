r"""What the columns of a row mean: each of FORMATS is a reader with the columns that it reads into records.

A format is recognised by its columns and, where columns overlap, by the first rows (`LOOK`), all of which
must agree. A column that is wrong in all of them is an error; a cell that is wrong is a BadRow, which the
audit counts. What the labels of a format mean stands in the module of its reader.

A row with several responses, or several records, of which some cannot be used loses those alone, and the audit counts
them.
"""

import ast
import contextlib
import dataclasses
import functools
import itertools
import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rmjax.data.formats import (
    benchmarks,
    conversations,
    judged,
    label_studio,
    pairs,
    public,
    ranked,
    scored,
    steps,
    stored,
    unlabelled,
)
from rmjax.data.formats import (
    columns as columns_of,
)
from rmjax.data.formats.cells import NAMING, Format, Reading, Row, holds, is_empty, named_only
from rmjax.data.formats.kinds import NUMBER, Kind, is_null, is_number, show
from rmjax.data.records import BadRow, Record
from rmjax.suggestions import closest, did_you_mean

__all__ = ["FORMATS", "LOOK", "Format", "Kind", "Layout", "check_carried", "detect", "parse_columns"]

parse_columns = columns_of.parse
check_carried = columns_of.check_carried

LOOK = 1000  # rows that decide the format

MODULES = (pairs, scored, judged, label_studio, ranked, steps, conversations, public, benchmarks, stored, unlabelled)
FORMATS: dict[str, Format] = {
    form.name: form for module in MODULES for form in vars(module).values() if isinstance(form, Format)
}
MISSHAPEN = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
# Columns of numbers that say where a row comes from, not how good it is.
COUNTERS = ("id", "idx", "index", "row", "turn", "turns", "seed", "length")
BETWEEN_OBJECTS = re.compile(r"\}\s*\n\s*\{")  # of numpy's arrays, which pandas prints without commas
# Columns that a format may have and that no score depends on: labels, where a row comes from, its weight in a loss.
UNSCORED = frozenset((*pairs.PAIR_LABELS, "ranks", "scores", "source", "weight"))
# Columns of a response, or of responses; a null there is an empty one.
RESPONSE = re.compile(r"chosen|rejected|completion|system_output|(response|prediction)[ _]?\w?")
Cells = Mapping[str, Sequence[Any]]  # of the first rows by column, without nulls


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    name: str  # the format, a name in FORMATS
    by_place: bool = False  # `preference` is a place in [1, 2], not a probability in [0, 1]
    attributes: tuple[str, ...] = ()  # the columns that are scores of the response, where the format looks for them
    names: columns_of.Names = ()  # what config.data.columns says
    unread: tuple[tuple[str, str], ...] = ()  # what of the first rows nobody reads: its path, and an example
    repeating: tuple[str, ...] = ()  # of these, the columns whose texts all stand in the conversations
    seen: tuple[str, ...] | None = None  # the columns that say something there; None looks at no others later
    strict: bool = True  # what is not read and looks like more than a note is refused
    labels: bool = True  # else the columns UNSCORED are not read, unless the format must have them
    carried: tuple[str, ...] = ()  # columns that go into Record.columns, under the names that config.data.columns gives

    def read(
        self,
        row: Row,
        *,
        source: str,
        where: str,
        keep: bool = False,
        defects: list[BadRow] | None = None,
        unread: dict[str, str] | None = None,
    ) -> Sequence[Record]:
        """Reads the records of one row (see Reading for the arguments), or raises BadRow.

        Where a row can have several records, their `row` ends with ".0", ".1", ... What was let through or left out of
        the row (a response of a ranking, a message of a tree) is added to `defects`. A column that is not read and was
        in none of the first rows is added to `unread`, with an example.
        """
        cells = columns_of.carried(columns_of.renamed(row, self.names), self.carried) if self.carried else {}
        row = self._arranged(row)
        reading = Reading(source, where, keep, self.by_place, self.attributes, defects)
        records = self._records(self._answered(row), reading)
        if late := [name for name in row if name not in self._seen and not is_empty(row[name])]:
            self._look_at_late(late, row, records, {} if unread is None else unread)
        if lost := [name for name in self.repeating if not _held(columns_of.cell_at(row, name), records)]:
            raise BadRow("not_read", f"{lost[0]} says more than the conversations; {NAMING}")
        if cells:
            records = [dataclasses.replace(record, columns=cells) for record in records]
        return records

    def named(self, row: Row) -> Row:
        """A row with its columns under the names that are documented; ratings of both sides keep theirs."""
        declared = FORMATS[self.name].declared - {"chosen_score"}
        return columns_of.arranged(columns_of.renamed(row, self.names), declared)

    def _arranged(self, row: Row) -> Row:
        form = FORMATS[self.name]
        row = columns_of.arranged(columns_of.renamed(row, self.names), form.declared)
        if self.labels:
            return row
        return {column: cell for column, cell in row.items() if column in form.columns or column not in UNSCORED}

    def _answered(self, row: Row) -> Row:
        """A row with "" for a response that is null."""
        columns = FORMATS[self.name].columns
        empty = [c for c in columns if c in row and is_null(row[c]) and RESPONSE.fullmatch(c)]
        return {**row, **dict.fromkeys(empty, "")} if empty else row

    def _records(self, row: Row, reading: Reading) -> Sequence[Record]:
        form = FORMATS[self.name]
        empty = [column for column in form.columns if row.get(column) == "" and RESPONSE.fullmatch(column)]
        for column, kind in form.columns.items():
            if column not in row:
                detail = f"it has no column {column!r} ({kind.words}); it has {', '.join(map(repr, row)) or 'none'}"
                raise BadRow("wrong_type", detail)
            if not kind.test(row[column]) and column not in empty:
                raise kind.wrong(column, row[column])
        try:
            records = form.read(row, reading)
        except MISSHAPEN as error:  # deep in a cell, where no kind looks
            detail = f"a cell is not built as in {form.name}: {type(error).__name__} {error}"
            raise BadRow("wrong_type", detail) from error
        except BadRow as bad:
            if empty and bad.reason == "wrong_type":  # no text to see a transcript in
                raise BadRow("empty_response", f"{empty[0]} is empty") from bad
            raise
        if isinstance(records, Record):
            return [records]
        return [dataclasses.replace(record, row=f"{record.row}.{i}") for i, record in enumerate(records)]

    @functools.cached_property
    def _seen(self) -> frozenset[str]:
        """Columns of which it is known whether they are read."""
        return FORMATS[self.name].declared.union(self.seen or ())

    def _look_at_late(self, late: Sequence[str], row: Row, records: Sequence[Record], unread: dict[str, str]) -> None:
        cells, _ = _unread_cells(self, [row]) if self.seen is not None else ({}, [])
        for name in filter(cells.__contains__, late):
            unread.setdefault(name, columns_of.example(row[name]))
            meaning = _meaning(self, name, cells[name], cells) if self.strict else ""
            if meaning and not (meaning == columns_of.CONTEXT and _held(row[name], records)):
                raise BadRow("not_read", f"{name} is not read and looks like {meaning}; {NAMING}")


def detect(
    rows: Sequence[Row],
    name: str = "auto",
    columns: str = "",
    unlabelled: Sequence[str] | None = None,
    carried: Sequence[str] = (),
) -> Layout:
    """Finds the format of a source from its first rows, or checks the one that is named.

    Args:
        rows: the first ones.
        name: of a format, or "auto".
        columns: what columns are, "prompt=trajectory,ignore=notes"; see config.data.columns.
        unlabelled: for rows that are to be scored: formats that are tried first, in this order, and recognised by their
            columns alone. Labels are not read then, and may be missing where a format has them in further columns.
        carried: columns that go into Record.columns where they are.

    Raises:
        ValueError: no format fits or several do, a column is wrong throughout, or one that looks like context, a label
            or media is not read; says what was seen and which format is closest.
    """
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"unknown data format {name!r}; known: {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    if not rows:
        raise ValueError("there are no rows to see a format in")
    labels = unlabelled is None
    names = columns_of.parse(columns)
    columns_of.check_names(rows, names)
    rows = [columns_of.renamed(row, names) for row in rows]
    form = FORMATS[name] if name != "auto" else _first_fit(rows, unlabelled or ()) or _only_fit(rows)
    layout = Layout(form.name, names=names, labels=labels, carried=tuple(carried))
    arranged = [layout._arranged(row) for row in rows]
    cells = _cells(arranged)
    _check_columns(form, cells)
    by_place = "preference" in form.optional and _by_place(cells.get("preference", []))
    strict = (not labels or form.agrees is not named_only) and name != "pair_plain"
    attributes = _attributes(form, cells) if form.scores and labels else ()
    return _looked_at(dataclasses.replace(layout, by_place=by_place, attributes=attributes, strict=strict), arranged)


def _cells(rows: Sequence[Row]) -> Cells:
    columns = dict.fromkeys(column for row in rows for column in row)
    return {column: [row[column] for row in rows if not is_null(row.get(column))] for column in columns}


def _looked_at(layout: Layout, rows: Sequence[Row]) -> Layout:
    """The layout with what of the first rows (arranged) nobody reads; ValueError for what a strict one refuses."""
    cells, readable = _unread_cells(layout, rows)
    meanings = {path: _meaning(layout, path, cells[path], cells) for path in cells}
    held = lambda path: all(_held(columns_of.cell_at(row, path), records) for row, records in readable)
    repeating = tuple(p for p, meaning in meanings.items() if meaning == columns_of.CONTEXT and held(p))
    unread = {path: columns_of.example(found[0]) for path, found in cells.items()}
    refused = {p: meaning for p, meaning in meanings.items() if meaning and p not in repeating}
    if refused and layout.strict:
        found = ", ".join(f"{path} ({meaning}, {unread[path]})" for path, meaning in refused.items())
        ignored = ",".join(f"{columns_of.IGNORE}={path}" for path in refused)
        raise ValueError(
            f"not read as {layout.name}: {found}; name what a column is, as in config.data.columns="
            f'"prompt=COLUMN" (or --columns), or leave out what is not meant to be read: "{ignored}"; '
            f"{layout.name} reads {', '.join(sorted({*FORMATS[layout.name].declared, 'history', 'context'}))}"
        )
    seen = tuple(dict.fromkeys(column for row in rows for column, cell in row.items() if not is_empty(cell)))
    repeating = repeating if layout.strict else ()
    return dataclasses.replace(layout, unread=tuple(unread.items()), repeating=repeating, seen=seen)


def _unread_cells(
    layout: Layout, rows: Sequence[Row]
) -> tuple[dict[str, list[Any]], list[tuple[Row, Sequence[Record]]]]:
    """The cells of rows (arranged) that nobody asks for in any of them, by path; and the readable rows and records."""
    carried = {path for name in layout.carried for path in itertools.accumulate(name.split("."), "{}.{}".format)}
    asked = {*FORMATS[layout.name].declared, *layout.attributes, *carried}
    reading = Reading("", "", keep=True, by_place=layout.by_place, attributes=layout.attributes, defects=[])
    readable = []
    for row in rows:
        with contextlib.suppress(BadRow, RecursionError):
            readable.append((row, layout._records(columns_of.noted(layout._answered(row), asked), reading)))
    found: dict[str, list[Any]] = {}
    for row, _ in readable:
        for path, cell in columns_of.unread(row, asked):
            found.setdefault(path, []).append(cell)
    if systems := [row["system"] for row, records in readable if not _held(row.get("system"), records)]:
        found["system"] = systems  # a conversation's own stays
    ratings = [name for name in pairs.SCORES if name in asked and not all(is_null(row.get(name)) for row in rows)]
    if len(ratings) == 1:  # of one side alone, which makes no margin
        found[ratings[0]] = [row[ratings[0]] for row in rows if not is_null(row.get(ratings[0]))]
    return found, readable


def _meaning(layout: Layout, path: str, cells: Sequence[Any], others: Collection[str]) -> str:
    if path.partition(".")[0] in ("system", *FORMATS[layout.name].left_out):
        return ""
    meaning = columns_of.meaning(path, cells, others)
    return "" if meaning == columns_of.LABEL and not layout.labels else meaning


def _held(cell: Any, records: Sequence[Record]) -> bool:
    return is_empty(cell) or holds([record.conversations for record in records], cell)


def _first_fit(rows: Sequence[Row], names: Sequence[str]) -> Format | None:
    """The first format that some row has the columns of; None for pairs, which may have the columns of others, too."""
    if any({"chosen", "rejected"} <= row.keys() for row in rows):
        return None
    rows_with_text = [_with_text(row) for row in rows]  # a column of which all responses are empty is there, too
    tries = ((FORMATS[name], some) for some in (rows, rows_with_text) for name in names)
    whole = lambda form, row: form.name != "messages" or not conversations.asks_apart(row)
    return next((form for form, some in tries if any(whole(form, row) for row in _usable(form, some))), None)


def _with_text(row: Row) -> Row:
    """A row with "" for each response that is null."""
    empty = [column for column, cell in row.items() if is_null(cell) and RESPONSE.fullmatch(column)]
    return {**row, **dict.fromkeys(empty, "")} if empty else row


def _only_fit(rows: Sequence[Row]) -> Format:
    label_studio.refuse_flat_export(_cells(rows))
    fitting = [form for form in FORMATS.values() if _fits(form, rows)]
    if len(fitting) != 1:
        raise ValueError(_unclear(fitting, rows, _cells(rows)))
    cells = _cells([columns_of.arranged(row, fitting[0].declared) for row in rows])
    texts = [c for c in dict.fromkeys((*fitting[0].columns, "prompt", "context")) if cells.get(c)]
    if hidden := [c for c in texts if all(map(_is_conversation_text, cells[c]))]:
        raise ValueError(
            f"{' and '.join(map(repr, hidden))} hold conversations as text (the first is "
            f"{show(cells[hidden[0]][0])}); write lists of messages, or name the format if they are meant as text"
        )
    return fitting[0]


def _check_columns(form: Format, cells: Cells) -> None:
    for column, kind in (*form.columns.items(), *form.optional.items()):
        values = cells.get(column, [])
        if not values and column in cells and column in form.columns:
            raise ValueError(f"column {column!r} is null throughout; {form.name} needs it ({kind.words})")
        if not values and column in form.columns:
            near = did_you_mean(column, [c for c in cells if c not in form.columns])
            raise ValueError(f"{form.name} needs a column {column!r} ({kind.words}); found {_columns(cells)}{near}")
        if values and not any(map(kind.test, values)):
            as_text = "" if _parsed(values[0]) is None else "; it holds a list or object as text: write it as such"
            if column in form.optional:
                as_text += f'; or leave the column out with "{columns_of.IGNORE}=NAME" in config.data.columns'
            raise ValueError(
                f"column {column!r} is wrong throughout: {kind.words} was expected, the first row has "
                f"{show(values[0])}{as_text}"
            )


def _attributes(form: Format, cells: Cells) -> tuple[str, ...]:
    """The columns of numbers that are scores; ValueError where there are none."""
    known = {*form.columns, *form.optional, *COUNTERS}
    mostly = lambda values: 2 * sum(map(is_number, values)) > len(values)  # a wrong cell is a bad row
    scores = [c for c, values in cells.items() if c not in known and not c.endswith("_id") and mostly(values)]
    if not scores:
        raise ValueError(f"{form.name} needs a column of numbers that are scores, as `score`; found {_columns(cells)}")
    return tuple(scores)


def _by_place(preferences: Sequence[Any]) -> bool:
    """Whether `preference` is in [1, 2].

    Sets that write a tie as 0 (or -1) beside 1 and 2 are refused, not guessed.
    """
    values = [cell for cell in preferences if NUMBER.test(cell)]
    if any(v > 1 for v in values) and any(v < 1 for v in values):
        raise ValueError(
            f"preference runs from {min(values)} to {max(values)}; expected a probability in [0, 1] that `chosen` is "
            "better, or the place of the better one in [1, 2] (1 is `chosen`); a tie is 0.5 or 1.5"
        )
    return any(v > 1 for v in values)


def _fits(form: Format, rows: Sequence[Row]) -> bool:
    """Whether some row has every cell of the right kind, and all such rows agree."""
    usable = _usable(form, rows)
    return bool(usable) and all(map(form.agrees, usable))


def _usable(form: Format, rows: Sequence[Row]) -> list[Row]:
    rows = [columns_of.arranged(row, form.declared) for row in rows]
    return [row for row in rows if all(kind.test(row.get(c)) for c, kind in form.columns.items())]


def _unclear(fitting: Sequence[Format], rows: Sequence[Row], cells: Cells) -> str:
    """Why no format, or more than one, fits."""
    data = f"{len(rows)} rows with the columns {_columns(cells)}"
    if fitting:
        names = ", ".join(form.name for form in fitting)
        return f"ambiguous data format: {data} fit {names}; name one with config.data.format"
    if advice := _text_advice(rows):
        return f"unknown data format: {data}; {advice}"
    if mixed := [form.name for form in FORMATS.values() if any(_fits(form, [row]) for row in rows)]:
        why = f"the rows do not agree (some are {', some '.join(mixed)}); name one with config.data.format"
        return f"unknown data format: {data}; {why}, or read them as several sources"
    texts = all(any(map(kind.test, cells.get(c, ()))) for c, kind in FORMATS["pair_plain"].columns.items())
    plain = "name the format pair_plain if there is no prompt, " if texts else ""
    return (
        f"unknown data format: {data}. {_closest(cells)}; say which column is what, as in "
        f'config.data.columns="prompt=COLUMN" (or --columns), {plain}or see the table of formats in docs/data.md'
    )


def _closest(cells: Cells) -> str:
    """The format that shares most columns, and what it lacks."""
    right = lambda column, kind: any(map(kind.test, cells.get(column, ())))
    near = lambda column: column in cells or closest(column, cells)

    def likeness(form: Format) -> float:
        shared = sum(1.0 if right(c, kind) else 0.4 if near(c) else 0.0 for c, kind in form.columns.items())
        complete = shared == len(form.columns)  # then its rows differ, so another format is more likely
        return (0.8 if complete else 1.0) * shared / (len(form.columns) + len(cells))

    complete = lambda form: all(right(c, kind) for c, kind in form.columns.items())
    form = max((form for form in FORMATS.values() if form.agrees is not named_only or complete(form)), key=likeness)
    lacks = []
    for column, kind in form.columns.items():
        if column not in cells:
            lacks.append(
                f"{column!r} ({kind.words}{did_you_mean(column, [c for c in cells if c not in form.columns])})"
            )
        elif not right(column, kind):
            lacks.append(f"{column!r} as {kind.words}, not as {show(next(iter(cells[column]), None))}")
    named = form.agrees is named_only
    otherwise = "which has to be named" if named else f"but its rows differ: {form.means}"
    needs = f"which needs {' and '.join(lacks)}" if lacks else otherwise
    return f"Closest is {form.name}, {needs}"


def _text_advice(rows: Sequence[Row]) -> str:
    """Names the columns that hold lists or objects as text, if some format would fit without; else ""."""
    parsed = [{c: cell if (value := _parsed(cell)) is None else value for c, cell in row.items()} for row in rows]
    columns = [c for c in parsed[0] if parsed[0][c] is not rows[0][c]]
    fitting = [form.name for form in FORMATS.values() if columns and _fits(form, parsed)]
    if not fitting:
        return ""
    names, first = ", ".join(map(repr, columns)), show(rows[0][columns[0]])
    return (
        f"{names} hold JSON or Python as text (the first is {first}); write lists and objects, and this is {fitting[0]}"
    )


def _parsed(cell: Any) -> Any:
    """The list or object that a text is JSON of, or that Python prints so; None if it is neither."""
    if not isinstance(cell, str) or cell.strip()[:1] not in ("[", "{"):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(cell)
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in texts that are no Python
        return ast.literal_eval(BETWEEN_OBJECTS.sub("}, {", cell.strip()))
    return None


def _is_conversation_text(cell: Any) -> bool:
    turns = [parsed] if isinstance(parsed := _parsed(cell), dict) else parsed
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(t, dict) and {"role", "from"} & set(t) for t in turns)
    )


def _columns(cells: Cells) -> str:
    return ", ".join(f"{c} ({type(v[0]).__name__ if v else 'null'})" for c, v in cells.items()) or "none"
