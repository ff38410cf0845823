"""Records of any source, one after the other, with what could not be read counted; no tokenizer is needed."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TextIO

from rmjax.data import formats, sources
from rmjax.data.ledger import Audit
from rmjax.data.records import BadRow, Record
from rmjax.runtime.progress import Progress

SHOWN_ROWS = 256  # between two looks at the clock

Rows = Iterator[tuple[str, sources.Row]]


def records(
    spec: str,
    *,
    format: str = "auto",
    columns: str = "",
    on_bad_row: str = "skip",
    audit: Audit | None = None,
    progress: TextIO | None = None,
) -> Iterator[Record]:
    """Yields the records of every source in `spec`, in order.

    Args:
        spec: what `sources.open_source` takes.
        format: a name in formats.FORMATS, or "auto" for each source.
        columns: what columns are, see config.data.columns.
        on_bad_row: "error" stops at the first row that cannot be used, "skip" counts it, "keep" counts it and yields
            it if its defect is in records.KEEPABLE.
        audit: counts rows, reasons, and records of each source.
        progress: the stream of the progress line.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: data that cannot be read, an unclear format, or a bad row (on_bad_row="error").
    """
    audit = Audit() if audit is None else audit
    for item in sources.split_spec(spec):
        layout, rows = open_rows(item, format, columns)
        audit.unread = {**dict(layout.unread), **audit.unread}
        for where, row in _shown(rows, item, progress):
            audit.rows += 1
            usable = read_row(layout, row, sources.source_name(item), where, on_bad_row == "keep", audit)
            if on_bad_row == "error":
                audit.check("error", 0.0)
            for record in usable:
                audit.sources[record.source] = audit.sources.get(record.source, 0) + 1
                yield record


def open_rows(
    item: str,
    format: str,
    columns: str = "",
    unlabelled: Sequence[str] | None = None,
    carried: Sequence[str] = (),
) -> tuple[formats.Layout, Rows]:
    """How one source is read, by its first rows (`formats.detect`), and all its rows; errors as of `records`."""
    rows = sources.open_source(item)
    first = list(itertools.islice(rows, formats.LOOK))
    try:
        layout = formats.detect([row for _, row in first], format, columns, unlabelled, carried)
    except ValueError as error:
        raise ValueError(f"{item}: {error}") from None
    return layout, itertools.chain(first, rows)


def read_row(
    layout: formats.Layout, row: sources.Row, source: str, where: str, keep: bool, audit: Audit
) -> Sequence[Record]:
    """The records of a row; the audit counts its defects, as kept if the row, or the rest of it, is used."""
    defects: list[BadRow] = []
    try:
        usable = layout.read(row, source=source, where=where, keep=keep, defects=defects, unread=audit.unread)
    except BadRow as bad:
        audit.add(bad.reason, where, bad.detail, bad.tokens)
        return []
    for defect in defects:
        audit.add(defect.reason, where, defect.detail, defect.tokens, kept=True)
    return usable


def _shown(rows: Rows, item: str, stream: TextIO | None) -> Rows:
    if stream is None:
        yield from rows
        return
    progress = Progress(lambda: sources.count_rows(item), f"{item}:", unit="rows", stream=stream)
    for done, row in enumerate(rows, 1):
        yield row
        if not done % SHOWN_ROWS:
            progress.step(done)
    progress.close()
