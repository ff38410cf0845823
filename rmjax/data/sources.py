"""Where rows come from: files, globs and directories, the Hugging Face hub, and made-up data.

A source is written as a path or as `scheme://...`; several are separated by commas. `SCHEMES` says what the
parts of a source are, `READERS` how a file of each kind is read. Rows are plain dicts; what they mean is for
`formats.py`.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl, urlsplit

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq

from rmjax.data import synthetic

Row = dict[str, Any]

# What `datasets.save_to_disk` writes beside the data.
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a source, or one made-up set.

    Attributes:
        name: short name; rows are called "name:17".
        rows: opens it and yields its rows.
        count: its number of rows, or None where only reading it all would tell.
        digest: SHA-256 of its contents.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    count: Callable[[], int | None]
    digest: Callable[[], str]


def split_spec(spec: str) -> list[str]:
    """Splits "a.jsonl, hf://datasets/o/n/b.parquet" at its commas, unless all of it is one existing path.

    Raises:
        ValueError: it names nothing.
    """
    if spec.strip() and os.path.exists(spec):
        return [spec]
    items = [item.strip() for item in spec.split(",") if item.strip()]
    if not items:
        raise ValueError("no data was named; give a file, a directory, a glob or hf://datasets/OWNER/NAME/...")
    return items


def source_name(item: str) -> str:
    """The name a source's rows carry: "owner/name" on the hub, else the file's name without its suffixes.

    >>> source_name("hf://datasets/o/n@main/data/*.parquet"), source_name("dir/train.jsonl.gz")
    ('o/n', 'train')
    """
    parts = urlsplit(item)
    if parts.scheme == "hf":
        owner_name = item.removeprefix("hf://").removeprefix("datasets/").split("/")[:2]
        return "/".join(owner_name).split("@")[0]
    if parts.scheme == "synthetic":
        return parts.netloc
    return Path(item).name.split(".")[0] or item


def open_source(spec: str) -> Iterator[tuple[str, Row]]:
    """Yields (row id, row) of every source in `spec`, in order; ids are "file.jsonl:17", counting from 0.

    Raises:
        FileNotFoundError: a path or glob that matches nothing.
        ValueError: no rows at all, a kind of file that is unknown, or contents that cannot be read (with the
            line).
    """
    for item in split_spec(spec):
        empty = True
        for part in parts(item):
            for i, row in enumerate(part.rows()):
                empty = False
                yield f"{part.name}:{i}", row
        if empty:
            raise ValueError(f"{item} has no rows")


def count_rows(spec: str) -> int | None:
    """Number of rows of all sources, or None where only reading them all would tell."""
    counts = [part.count() for item in split_spec(spec) for part in parts(item)]
    return None if None in counts else sum(cast(list[int], counts))


def fingerprint(spec: str) -> str:
    """SHA-256 over the names and contents of everything in `spec`, as hex."""
    found = [(source_name(item), part.name, part.digest()) for item in split_spec(spec) for part in parts(item)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def parts(item: str) -> list[Part]:
    """The files (or made-up set) of one source.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an unknown scheme.
    """
    scheme, separator, _ = item.partition("://")
    if not separator:
        return _local_parts(item)
    if scheme not in SCHEMES:
        raise ValueError(f"{item}: unknown scheme {scheme}://; known: local paths, {'://, '.join(SCHEMES)}://")
    return SCHEMES[scheme](item)


def _local_parts(item: str) -> list[Part]:
    path = Path(item).expanduser()
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and _kind(f) and f.name not in NOT_DATA]
        kinds = sorted({_kind(f) for f in files})
        if len(kinds) > 1:
            raise ValueError(f"{item} holds files of several kinds ({', '.join(kinds)}); choose with a glob")
    elif path.is_file():
        files = [path]
    else:
        files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
    if not files and path.is_dir():
        kinds_read = ", ".join(READERS)
        raise FileNotFoundError(f"{item} is a directory without any file that can be read: {kinds_read}, also with .gz")
    if not files:
        raise FileNotFoundError(f"{item}: no such file, and nothing matches it; looked from {Path.cwd()}")
    return [_file_part(f) for f in files]


@functools.cache  # one listing, so one state of the repository, per process
def _hub_parts(item: str) -> list[Part]:
    """Files of a hub repository; each is downloaded once, into the hub's own cache."""
    fs = huggingface_hub.HfFileSystem()
    path = item.removeprefix("hf://").rstrip("/")
    try:
        names = fs.glob(path) if glob.has_magic(path) else [path]
        if len(names) == 1 and fs.isdir(names[0]):
            names = [name for name in fs.find(names[0]) if not Path(name).name.startswith(".")]
        files = [name for name in sorted(names) if _kind(Path(name)) and Path(name).name not in NOT_DATA]
        local = [_download(fs, name) for name in files]
    except OSError as error:
        raise FileNotFoundError(f"{item}: the hub did not give it ({type(error).__name__}: {error})") from error
    if not local:
        raise FileNotFoundError(f"{item}: no {', '.join(READERS)} file there")
    return [_file_part(f) for f in local]


def _download(fs: huggingface_hub.HfFileSystem, name: str) -> Path:
    at: Any = fs.resolve_path(name)
    return Path(
        huggingface_hub.hf_hub_download(at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision)
    )


def _synthetic_parts(item: str) -> list[Part]:
    """`synthetic://NAME?key=value&...`; values are read as JSON where they can be, else as text."""
    url = urlsplit(item)
    arguments = {key: _value(text) for key, text in parse_qsl(url.query)}
    rows = functools.partial(synthetic.rows, url.netloc, **arguments)

    def digest() -> str:
        code = b"".join(file.read_bytes() for file in sorted(Path(synthetic.__file__).parent.glob("*.py")))
        return hashlib.sha256(item.encode() + code).hexdigest()

    return [Part(url.netloc, rows, lambda: None, digest)]


SCHEMES: dict[str, Callable[[str], list[Part]]] = {"hf": _hub_parts, "synthetic": _synthetic_parts}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, .gz aside; "" when none of READERS."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS else ""


def _file_part(path: Path) -> Part:
    if not _kind(path):
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(READERS)}, each also with .gz")
    read, count = READERS[_kind(path)]
    rows, counted = functools.partial(_checked, read, path), functools.partial(count, path)
    return Part(path.name, rows, counted, functools.partial(_file_digest, path))


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(read: Callable[[Path], Iterator[Row]], path: Path) -> Iterator[Row]:
    """Reads a file; what the libraries say about broken ones gets the file's name."""
    try:
        yield from read(path)
    except (pa.ArrowInvalid, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as {_kind(path)}: {error}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.endswith(".gz") else open(path, "rb")


def _read_parquet(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _count_parquet(path: Path) -> int:
    with _open(path) as file:
        return pq.ParquetFile(file).metadata.num_rows


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Both of Arrow's layouts: the file with a footer, and the stream that `datasets` writes."""
    with _open(path) as file:
        has_footer = file.read(6) == b"ARROW1"
        file.seek(0)
        if not has_footer:
            yield from pa.ipc.open_stream(file)
            return
        reader = pa.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _read_arrow(path: Path) -> Iterator[Row]:
    for batch in _arrow_batches(path):
        for start in range(0, batch.num_rows, 1024):
            yield from batch.slice(start, 1024).to_pylist()


def _count_arrow(path: Path) -> int:
    return sum(batch.num_rows for batch in _arrow_batches(path))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                yield _object(_parse(text, f"{path}, line {number}"), f"{path}, line {number}")


def _count_jsonl(path: Path) -> int:
    with _open(path) as file:
        return sum(bool(line.strip()) for line in file)


def _read_json(path: Path) -> Iterator[Row]:
    """A JSON array of objects, one object of equally long columns, or (often so named) JSON lines."""
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] == "{" and error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if isinstance(data, dict):
        data = _columns_to_rows(data, str(path))
    if not isinstance(data, list):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected a list of objects or columns")
    for i, row in enumerate(data):
        yield _object(row, f"{path}, item {i}")


def _columns_to_rows(columns: dict[str, Any], where: str) -> list[Row]:
    """{"a": [1, 2], "b": [3, 4]} -> [{"a": 1, "b": 3}, {"a": 2, "b": 4}]."""
    lengths = {k: len(v) if isinstance(v, list) else type(v).__name__ for k, v in columns.items()}
    if not lengths or len(set(lengths.values())) > 1 or not all(isinstance(n, int) for n in lengths.values()):
        raise ValueError(f"{where} is one object, so its values must be equally long columns; found {lengths}")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}): {text[:80]!r}") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, expected an object")
    return value


# suffix: how rows are read, and how they are counted without reading them all (None: they cannot be).
READERS: dict[str, tuple[Callable[[Path], Iterator[Row]], Callable[[Path], int | None]]] = {
    ".parquet": (_read_parquet, _count_parquet),
    ".arrow": (_read_arrow, _count_arrow),
    ".jsonl": (_read_jsonl, _count_jsonl),
    ".json": (_read_json, lambda path: None),
}
