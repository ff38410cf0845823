"""Any source to Parquet files of records (`store.py`), whole or split; `python -m rmjax.data convert` and `split`.

Files that this has written before, by what they say of themselves, are replaced when all new ones are whole; others are
never touched. The parts of a split come together: if one cannot have its name, the old ones are back in their places,
and after a kill or a power cut parts are missing, and never of two splits.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rmjax.data import prompts, reading, sources, splitting, store
from rmjax.data.ledger import Audit
from rmjax.data.records import Record
from rmjax.runtime import files as durable
from rmjax.runtime.command_line import check_writable, leaving_nothing

WHOLE = "records"  # the file in a directory when nothing is split


def convert(
    source: str, output: Path, audit: Audit, *, shares: Mapping[str, float] | None = None, seed: int = 0, **options: Any
) -> tuple[dict[Path, int], list[str]]:
    """Writes the records of a source; every file appears whole, and only when all are.

    Args:
        source: what `sources.open_source` takes.
        output: a file that ends with .parquet, or a directory, which a split needs.
        audit: counts rows, reasons, and records of each source.
        shares: of each part, see `splitting.parse_shares`; the parts become PART.parquet.
        seed: of the split.
        **options: of `reading.records`.

    Returns:
        Records of each file; and, of a split, a table of how the kinds of rows are shared out.

    Raises:
        FileNotFoundError: a source is not there.
        FileExistsError: `output` holds something that was not written by this, or a link.
        ValueError: data that cannot be read, no record at all, or a part without any.
    """
    files = output_files(output, shares)
    for item in sources.split_spec(source):
        read = {Path(item).resolve(), *(file.resolve() for file in sources.local_files(item))}
        if own := [file for file in files if not read.isdisjoint((file.resolve(), *file.resolve().parents))]:
            raise ValueError(f"--output: {own[0]} would be written into the source {item}; name another")
    records = reading.records(source, audit=audit, **options)
    kinds: list[tuple[str, ...]] = []
    histories: list[list[tuple[int, int]]] = []

    def noted() -> Iterator[Record]:
        for record in records:
            histories.append(prompts.histories(record))
            kinds.append((record.source, splitting.label_kind(record)))
            yield record

    directory = files[0].parent
    with leaving_nothing(directory), tempfile.TemporaryDirectory(prefix=".convert.", dir=directory) as scratch:
        whole = Path(scratch) / (files[0].name + durable.SCRATCH)  # which no reader takes for data, if it is left there
        count = store.write(whole, noted() if shares else records)
        if not count:
            raise ValueError(f"{source}: none of its {audit.rows} rows could be used; {audit.reasons_text()}")
        if not shares:
            _place([whole], files, Path(scratch))
            return {files[0]: count}, []
        prompt_ids = prompts.ids(*prompts.flat(histories))
        parts = splitting.assign_parts(prompt_ids, kinds, shares, seed)
        counts = np.bincount(parts, minlength=len(shares)).tolist()
        if empty := [name for name, n in zip(shares, counts) if not n]:
            raise ValueError(f"{source}: {len(np.unique(prompt_ids))} prompts leave nothing for {', '.join(empty)}")
        new_files = [Path(scratch) / "parts" / (file.name + durable.SCRATCH) for file in files]
        _divide(whole, new_files, parts)
        _place(new_files, files, Path(scratch))
    return dict(zip(files, counts)), splitting.shares_table(kinds, parts, shares)


def output_files(output: Path, shares: Mapping[str, float] | None) -> list[Path]:
    """The files to write.

    Raises:
        FileExistsError: one of them was not written by this, is a link, or the directory holds other files.
        ValueError: a split into one file, or a place that cannot be written to.
    """
    if output.suffix == ".parquet" and not output.is_dir():
        if shares:
            raise ValueError(f"--output={output} is one file, a split needs a directory")
        files = [output]
    else:
        if output.is_file():
            raise FileExistsError(f"--output={output} is a file; name one that ends with .parquet, or a directory")
        files = [output / f"{name}.parquet" for name in shares or (WHOLE,)]
        others = sorted(path for path in output.glob("[!.]*") if path not in files)
        if others:  # a directory is read as one source, so what else is there would be mixed in
            raise FileExistsError(f"--output={output} holds {others[0].name}; give an empty or a new directory")
    check_writable(files[0], f"--output={output}")
    _require_ours(files)
    return files


def _require_ours(files: Iterable[Path]) -> None:
    for file in filter(os.path.lexists, files):
        if file.is_symlink():
            raise FileExistsError(f"--output: {file} is a link to {os.readlink(file)}; name that, or remove the link")
        if not _ours(file):
            raise FileExistsError(f"--output: {file} is there already and was not written by this; name another")


def _ours(file: Path) -> bool:
    """Whether a file has records as this writes them, by what it says of itself."""
    with contextlib.suppress(pa.ArrowException, OSError):
        return (pq.read_schema(file).metadata or {}).get(b"rmjax", b"").startswith(b"records ")
    return False


def _place(new_files: list[Path], files: list[Path], scratch: Path) -> None:
    """Gives all new files their names, or none.

    The old ones are put aside before the first: a kill in between must not leave parts of two splits, in which a prompt
    may stand on both sides.
    """
    for new in new_files:
        durable.sync(new)
    _require_ours(files)  # again: reading took its time
    if len(files) == 1:
        new_files[0].replace(files[0])
    else:
        _place_parts(new_files, files, scratch)
    durable.sync(files[0].parent)


def _place_parts(new_files: list[Path], files: list[Path], scratch: Path) -> None:
    aside = [(file, scratch / f"old-{i}{durable.SCRATCH}") for i, file in enumerate(files) if file.exists()]
    placed: list[Path] = []
    try:
        for file, old in aside:
            file.replace(old)
        if aside:
            durable.sync(files[0].parent)
        for new, file in zip(new_files, files):
            new.replace(file)
            placed.append(file)
    except BaseException:
        for file in placed:
            file.unlink(missing_ok=True)
        for file, old in aside:
            if old.exists():
                old.replace(file)
        raise


def _divide(whole: Path, new_files: list[Path], parts: np.ndarray) -> None:
    """Writes each part's records of the whole file, in their order."""
    new_files[0].parent.mkdir()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(pq.ParquetFile(whole))
        writers = [
            stack.enter_context(pq.ParquetWriter(file, source.schema_arrow, compression="zstd")) for file in new_files
        ]
        start = 0
        for batch in source.iter_batches(store.ROW_GROUP):
            here = parts[start : start + len(batch)]
            start += len(batch)
            for i, writer in enumerate(writers):
                if (here == i).any():
                    writer.write_batch(batch.filter(pa.array(here == i)))
