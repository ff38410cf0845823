"""Where rows come from: files, the Hugging Face hub, buckets, databases, Python itself, and made-up data.

A source is written as a path or as `scheme://...`; several are separated by commas. `SCHEMES` says what the
parts of a source are, `files.READERS` how a file of each kind is read. Rows are plain dicts; what they mean is for
`formats`.
"""

import dataclasses
import datetime
import decimal
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from rmjax.data import synthetic
from rmjax.data.sources import buckets, database, files
from rmjax.data.sources.files import Row
from rmjax.runtime import passwords

# What `datasets.save_to_disk` writes beside the data.
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Words in a path that say which split a file belongs to.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a source, one table, or one made-up set.

    Attributes:
        name: short name; rows are called "name:17".
        rows: opens it and yields its rows.
        count: its number of rows, or None where only reading it all would tell.
        digest: SHA-256 of its contents.
        state: of files, what becomes another one whenever they are written to; else None.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    count: Callable[[], int | None]
    digest: Callable[[], str]
    state: Callable[[], Any] = lambda: None


def split_spec(spec: str) -> list[str]:
    """Splits "a.jsonl, hf://datasets/o/n/b.parquet" at its commas, but at none of a path that is there as it stands.

    SQL has commas too, so a source with `query=` reaches to the end of the text.

    Raises:
        ValueError: it names nothing.
    """
    if spec.strip() and os.path.exists(spec):
        return [spec]
    sql = re.search(r"[^,]*://[^,]*[?&]query=", spec)
    listed, rest = (spec[: sql.start()], [spec[sql.start() :]]) if sql else (spec, [])
    items = [item.strip() for item in [*_pieces(listed, ","), *rest] if item.strip()]
    if not items:
        raise ValueError("no data was named; give a file, a directory, a glob or hf://datasets/OWNER/NAME/...")
    return items


def _pieces(text: str, separator: str) -> list[str]:
    """Splits at separators, but at none inside of the name of an existing file or directory."""
    pieces, found = text.split(separator), []
    while pieces:
        ends = range(len(pieces), 1, -1)
        end = next((n for n in ends if _is_there(separator.join(pieces[:n]).strip(), separator)), 1)
        found.append(separator.join(pieces[:end]))
        pieces = pieces[end:]
    return found


def _is_there(path: str, separator: str) -> bool:
    """Whether the separators in a text belong to names that exist: a path, a glob below one, or aligned files."""
    if path.startswith("aligned://"):
        return all(map(os.path.isfile, _pieces(path.removeprefix("aligned://"), "+")))
    literal, pattern = _parted(path)
    below = glob.has_magic(pattern) and separator in literal and separator not in pattern
    return bool(literal) and (below or not pattern)


def _parted(path: str) -> tuple[str, str]:
    """The longest part of a path, from its beginning, that is there as it stands, and what follows: maybe a pattern."""
    parts = Path(path if os.path.exists(path) else os.path.expanduser(path)).parts
    there = next((n for n in range(len(parts), 0, -1) if os.path.exists(os.path.join(*parts[:n]))), 0)
    return os.path.join("", *parts[:there]), os.path.join("", *parts[there:])


def matching(path: str) -> list[Path]:
    """What is at a path, or what a glob matches, sorted; what is there as it stands is never a pattern.

    >>> matching("runs/lr=[1e-5]/*.jsonl")  # doctest: +SKIP
    [PosixPath('runs/lr=[1e-5]/a.jsonl')]
    """
    literal, pattern = _parted(path)
    if not pattern:
        return [Path(literal)]
    found = glob.glob(os.path.join(glob.escape(literal), pattern), recursive=True)
    return [Path(name) for name in dict.fromkeys(sorted(found))]


def source_name(item: str) -> str:
    """The name a source's rows carry: "owner/name" on the hub, a table, else the file's name without its suffixes.

    >>> source_name("hf://datasets/o/n@main/data/*.parquet"), source_name("dir/train.jsonl.gz")
    ('o/n', 'train')
    >>> source_name("helpful/*.jsonl")
    'helpful'
    """
    scheme, rest = _scheme(item), item.partition("://")[2]
    if not scheme:
        literal, rest = _parted(item)
        plain = [*Path(literal).parts, *(part for part in Path(rest).parts if not glob.has_magic(part))]
        return (plain[-1] if plain else item).split(".")[0] or item  # of a glob, the directory
    if scheme == "hf":
        return "/".join(rest.removeprefix("datasets/").split("/")[:2]).split("@")[0]
    if scheme == "aligned":
        return source_name(_pieces(rest, "+")[0])
    if scheme in buckets.PACKAGES:
        return source_name(rest)
    if SCHEMES.get(scheme) is _database_parts:
        return database.name(item)
    return rest.partition("?")[0]


def refuse_equal_names(spec: str, why: str) -> None:
    """Makes sure that the sources of `spec` can be told apart by name.

    Raises:
        ValueError: two have the same; names them and what to do. `why` says what needs the names.
    """
    items: dict[str, str] = {}
    for item in split_spec(spec):
        name = source_name(item)
        if name in items:
            raise ValueError(
                f"{items[name]} and {item} are both called {name!r}, and {why} could not tell them apart; rename a "
                "file, or give each its own directory and name it by a glob"
            )
        items[name] = item


def open_source(spec: str) -> Iterator[tuple[str, Row]]:
    """Yields (row id, row) of every source in `spec`, in order; ids are "file.jsonl:17", counting from 0.

    Files of one source that have the same name are called by as many directories as tell them apart.

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


class Witness:
    """Tells, after sources were read, whether all that was read is what their fingerprint was taken of.

        witness = Witness(spec)
        ...  # open_source(spec) and whatever else reads it, once or more
        witness.check()

    Files are compared by their digests before and after, and by inode, size and times of change, which tell of a file
    that was changed and changed back; a file that was only touched is refused with them. The rows of databases and of
    Python are hashed as they are read, by open_source itself. The cost is a second digest, of files about
    1 GB/s on two cores (see cache_files.py), and of rows one more reading.

    Attributes:
        fingerprint: as `fingerprint` returns it, taken before.
    """

    def __init__(self, spec: str):
        self._spec, self._items = spec, split_spec(spec)
        for item in self._items:
            _watched[item] = set()
        self._before = self._states()
        self.fingerprint = fingerprint(spec)

    def _states(self) -> dict[str, Any]:
        found = [(item, part) for item in self._items for part in parts(item)]
        return {item if item.endswith(part.name) else f"{part.name} of {item}": part.state() for item, part in found}

    def check(self) -> None:
        """Compares.

        Raises:
            FileNotFoundError: a source is gone.
            ValueError: something was changed since; names it.
        """
        seen = {item: _watched.pop(item, set()) for item in self._items}
        same = fingerprint(self._spec) == self.fingerprint
        after = self._states()
        changed = [name for name in {**self._before, **after} if self._before.get(name) != after.get(name)]
        changed += [item for item, digests in seen.items() if len(digests) > 1]
        if not same or changed:
            raise ValueError(
                f"{', '.join(changed[:3]) or self._spec} changed while it was read, so what was read is not what its "
                "fingerprint says; nothing was kept of it: start again when nobody writes to it"
            )


_watched: dict[str, set[str]] = {}  # by source of a Witness: digests of all rows, of each time they were read


def _passing(item: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows; hashes them on their way if there is a Witness who wants to know."""
    if item not in _watched:
        yield from rows()
        return
    total = hashlib.sha256()
    for i, row in enumerate(rows()):
        total.update(_row_bytes(item, i, row))
        yield row
    _watched.setdefault(item, set()).add(total.hexdigest())


def parts(item: str) -> list[Part]:
    """The files (or tables, or made-up sets) of one source.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an unknown scheme.
    """
    scheme = _scheme(item)
    if not scheme:
        return _file_parts(_local_files(item))
    if scheme not in SCHEMES:
        raise ValueError(f"{item}: unknown scheme {scheme}://; known: local paths, {'://, '.join(SCHEMES)}://")
    return SCHEMES[scheme](item)


def _scheme(item: str) -> str:
    """What stands before "://", less the driver of a database ("postgresql+psycopg2"); "" for a path."""
    scheme, separator, _ = item.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][\w+.-]*", scheme):
        return ""
    name = scheme.partition("+")[0]
    return name if name in SCHEMES or not os.path.exists(item) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Files, here, on the hub and in buckets
# ---------------------------------------------------------------------------------------------------------------------


def _file_parts(paths: Sequence[Path]) -> list[Part]:
    return [_file_part(name, path) for name, path in zip(_short_names(paths), paths)]


def _file_part(name: str, path: Path) -> Part:
    if not files.kind(path):
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(files.READERS)}, each also with .gz")
    bind = functools.partial
    return Part(
        name, bind(files.read, path), bind(files.count, path), bind(files.digest, path), bind(files.state, path)
    )


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    for length in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def local_files(item: str) -> list[Path]:
    """The files of a source that are on this machine; [] for one that is elsewhere.

    Raises:
        FileNotFoundError: nothing is there.
    """
    scheme, rest = _scheme(item), item.partition("://")[2]
    if scheme == "aligned":
        return [file for piece in _pieces(rest, "+") for file in local_files(piece)]
    return [] if scheme else _local_files(item)


def _local_files(item: str) -> list[Path]:
    item = passwords.reveal(item)  # a directory may be called like a URL
    path = Path(item if os.path.exists(item) else os.path.expanduser(item))
    if path.is_dir():
        found = [f.relative_to(path) for f in sorted(path.rglob("*")) if f.is_file()]
        chosen = [path / f for f in _only_data(item, found)]
    else:
        chosen = [file for file in matching(item) if file.is_file()]
    if not chosen and path.is_dir():
        kinds = ", ".join(files.READERS)
        raise FileNotFoundError(f"{item} is a directory without any file that can be read: {kinds}, also with .gz")
    if not chosen:
        raise FileNotFoundError(f"{item}: no such file, and nothing matches it; looked from {Path.cwd()}")
    return chosen


def _only_data(item: str, paths: Sequence[Path]) -> list[Path]:
    """The files of a directory that are read when the directory is named, if they belong together."""
    data = [path for path in paths if files.kind(path) and path.name not in NOT_DATA]
    kinds = sorted({files.kind(path) for path in data})
    if len(kinds) > 1:
        raise ValueError(f"{item} holds files of several kinds ({', '.join(kinds)}); choose with a glob")
    words = {word for path in data for word in re.split(r"[^a-z]+", str(path).lower())}
    splits = [split for split, names in SPLITS.items() if words.intersection(names)]
    if len(splits) > 1:
        raise ValueError(f"{item} holds several splits ({', '.join(splits)}); choose one with a glob")
    return data


@functools.cache  # one listing, so one state of the repository, per process
def _hub_files(item: str) -> list[Path]:
    """Files of a hub repository; each is downloaded once, into the hub's own cache."""
    fs = huggingface_hub.HfFileSystem()
    try:
        local = [_download(fs, name) for name in _remote_names(fs, item.removeprefix("hf://").rstrip("/"), item)]
    except OSError as error:
        raise FileNotFoundError(f"{item}: {_hub_advice(item, error)}") from error
    if not local:
        raise FileNotFoundError(f"{item}: no {', '.join(files.READERS)} file there")
    return local


def _remote_names(fs: Any, path: str, item: str) -> list[str]:
    """The data files of a path, a glob or a directory on an fsspec file system; what is there is never a pattern."""
    if glob.has_magic(path) and not fs.exists(path):
        there = next((parent for parent in _parents(path) if glob.has_magic(parent) and fs.isdir(parent)), "")
        found = [Path(name) for name in fs.glob(glob.escape(there) + path[len(there) :])]
        return sorted(str(f) for f in found if files.kind(f) and f.name not in NOT_DATA)
    if fs.isdir(path):
        found = [Path(name).relative_to(path) for name in sorted(fs.find(path))]
        return [str(path / f) for f in _only_data(item, [f for f in found if not f.name.startswith(".")])]
    return [path]


def _parents(path: str) -> list[str]:
    """The directories above a path on a file system that is not ours, the longest first."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


@functools.cache  # one listing, so one state of the bucket, per process
def _bucket_files(item: str) -> list[Path]:
    if not (local := buckets.copies(item, _remote_names)):
        raise FileNotFoundError(f"{item}: no {', '.join(files.READERS)} file there")
    return local


def _download(fs: "huggingface_hub.HfFileSystem", name: str) -> Path:
    at: Any = fs.resolve_path(name)
    return Path(
        huggingface_hub.hf_hub_download(at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision)
    )


def _hub_advice(item: str, error: BaseException) -> str:
    """What the hub's error means, and what to do."""
    kinds = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)  # the first is one of the second, too
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__
    at = re.match(r"hf://(datasets/)?[^/@]+/[^/@]+", item)
    page = "https://huggingface.co/" + (at[0] if at else item).removeprefix("hf://")
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, GatedRepoError):
        return f"the repository is gated; accept its terms at {page}, then {log_in}"
    if isinstance(cause, RepositoryNotFoundError):
        return f"no such repository, or a private one; look at {page}, and if it is yours, {log_in}"
    if isinstance(cause, RevisionNotFoundError):
        return f"no such revision; the branches and tags are at {page}/tree/main"
    return f"the hub did not give it ({type(error).__name__}: {error}); its files are at {page}/tree/main"


# ---------------------------------------------------------------------------------------------------------------------
# Aligned files: `aligned://prompts.json+responses.json+rewards.json`
# ---------------------------------------------------------------------------------------------------------------------


def _aligned_parts(item: str) -> list[Part]:
    """One part: row i of every file, merged into one row."""
    pieces = _pieces(item.removeprefix("aligned://"), "+")
    paths = []
    for piece in pieces:
        found = _hub_files(piece) if piece.startswith("hf://") else _local_files(piece)
        if len(found) != 1:
            raise ValueError(f"{item}: {piece} is {len(found)} files, expected one")
        paths += found
    if len(paths) < 2:
        raise ValueError(f"{item}: expected several files, joined by +")
    digest = lambda: hashlib.sha256("".join(map(files.digest, paths)).encode()).hexdigest()
    name = "+".join(_short_names(paths))
    bind = functools.partial
    states = lambda: [files.state(path) for path in paths]
    return [Part(name, bind(_zipped, item, paths), bind(files.count, paths[0]), digest, states)]


def _zipped(item: str, paths: Sequence[Path]) -> Iterator[Row]:
    for i, cells in enumerate(itertools.zip_longest(*(files.read(path, _columns_of) for path in paths))):
        if None in cells:
            counts = [f"{path.name} {sum(1 for _ in files.read(path, _columns_of))}" for path in paths]
            raise ValueError(f"{item}: aligned files must have equally many rows, found {', '.join(counts)}")
        row: Row = {}
        for path, more in zip(paths, cells):
            for column in row.keys() & more.keys():
                if row[column] != more[column]:
                    raise ValueError(f"{item}, row {i}: {path.name} and a file before it differ in {column!r}")
            row |= more
        yield row


def _columns_of(value: Any, where: str) -> Row:
    """An object is columns; what else stands in a file gets the name that formats have for it.

    >>> _columns_of("hi", ""), _columns_of(["yo", "oh"], ""), _columns_of([0.5, 2], "")
    ({'prompt': 'hi'}, {'response_1': 'yo', 'response_2': 'oh'}, {'rewards': [0.5, 2]})
    """
    if isinstance(value, dict):
        return value
    kinds = {type(x) for x in value} if isinstance(value, list) else set()
    if isinstance(value, str) or kinds == {dict}:
        return {"prompt": value}
    if kinds == {str}:
        return {f"response_{i}": text for i, text in enumerate(value, 1)}
    if kinds and kinds <= {int, float}:
        return {"rewards": value}
    expected = "an object, text or messages (the prompt), a list of texts (responses), or of numbers (rewards)"
    raise ValueError(f"{where} is {str(value)[:60]!r}, expected {expected}")


# ---------------------------------------------------------------------------------------------------------------------
# Databases, Python and made-up data
# ---------------------------------------------------------------------------------------------------------------------


def _database_parts(item: str) -> list[Part]:
    at = database.locate(item)
    rows = functools.partial(_passing, item, at.rows)
    return [Part(at.name, rows, at.count, lambda: _digest_rows(item, at.rows()))]


class _Registered:
    """An iterable, or a function that makes one, under a name."""

    def __init__(self, name: str, rows: Iterable[Row] | Callable[[], Iterable[Row]], version: str | None):
        self.name, self._rows, self.version = name, rows, version
        self._last: Iterator[Row] | None = None

    def rows(self) -> Iterator[Row]:
        """Yields the rows, from the first one each time."""
        made = self._rows() if callable(self._rows) else self._rows
        if iter(made) is made and made is self._last:
            raise ValueError(f"python://{self.name}: {_ONCE}")
        self._last = made if iter(made) is made else None
        for i, row in enumerate(made):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {i} of python://{self.name} is a {type(row).__name__}, expected a dict")
            yield dict(row)

    def count(self) -> int | None:
        """Number of rows, where it can be told."""
        return len(self._rows) if isinstance(self._rows, Sequence) else None

    def digest(self) -> str:
        """Of the version, or else of all rows."""
        if self.version is not None:
            return hashlib.sha256(self.version.encode()).hexdigest()
        return _digest_rows(f"python://{self.name}", self.rows())


_ONCE = (
    "the rows can be read only once, but are read several times; give a list, or a function that makes a new generator"
)
_REGISTERED: dict[str, _Registered] = {}


def register(name: str, rows: Iterable[Row] | Callable[[], Iterable[Row]], version: str | None = None) -> None:
    """Gives rows that are made in Python a name, so that `config.data.train = "python://NAME"` reads them.

    Every process of a run registers them itself; the processes that tokenize get the rows from it. A name that is
    registered again stands for the new rows.

        rmjax.data.register("mine", [{"prompt": "hi", "chosen": "hello", "rejected": "no"}])

    Args:
        name: letters, digits, ".", "_" and "-".
        rows: dicts of any format, in anything that can be iterated twice (a list, a data set), or a function that
            returns them.
        version: says whether the rows are those of an earlier run, so that what was tokenized then can be used;
            without it all rows are hashed, at the start of every run.

    Raises:
        ValueError: another kind of name, or an iterator, which could be read only once.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r} cannot be the name of a source; use letters, digits, '.', '_' and '-'")
    if not callable(rows) and iter(rows) is rows:
        raise ValueError(f"python://{name}: {_ONCE}")
    _REGISTERED[name] = _Registered(name, rows, version)


def _python_parts(item: str) -> list[Part]:
    name = item.removeprefix("python://")
    if name not in _REGISTERED:
        known = ", ".join(_REGISTERED) or "none"
        raise ValueError(f"{item}: nothing has that name; call rmjax.data.register({name!r}, rows); known: {known}")
    found = _REGISTERED[name]
    rows = found.rows if found.version is not None else functools.partial(_passing, item, found.rows)
    return [Part(name, rows, found.count, found.digest)]


def _digest_rows(item: str, rows: Iterable[Row]) -> str:
    """SHA-256 over rows in their order."""
    total = hashlib.sha256()
    for i, row in enumerate(rows):
        total.update(_row_bytes(item, i, row))
    if item in _watched:
        _watched[item].add(total.hexdigest())
    return total.hexdigest()


def _row_bytes(item: str, i: int, row: Row) -> bytes:
    try:
        return json.dumps(row, sort_keys=True, default=plain).encode("utf-8", "surrogatepass") + b"\n"
    except TypeError as error:
        advice = "give register() a version" if item.startswith("python://") else "leave its column out"
        raise ValueError(f"row {i} of {item} cannot be hashed ({error}); {advice}") from error


def plain(value: Any) -> Any:
    """What JSON does not know, as something that is the same in every process."""
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    if isinstance(value, bytes | datetime.date | datetime.time | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"a value is of type {type(value).__name__}")


def _synthetic_parts(item: str) -> list[Part]:
    """`synthetic://NAME?key=value&...`; values are read as JSON where they can be, else as text."""
    url = urlsplit(item)
    arguments = {key: _value(text) for key, text in parse_qsl(url.query)}
    rows = functools.partial(synthetic.rows, url.netloc, **arguments)

    def digest() -> str:
        code = b"".join(file.read_bytes() for file in sorted(Path(synthetic.__file__).parent.glob("*.py")))
        return hashlib.sha256(item.encode() + code).hexdigest()

    return [Part(url.netloc, rows, lambda: int(arguments.get("n", synthetic.OPTIONS["n"])), digest)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


SCHEMES: dict[str, Callable[[str], list[Part]]] = {
    "hf": lambda item: _file_parts(_hub_files(item)),
    **dict.fromkeys(buckets.PACKAGES, lambda item: _file_parts(_bucket_files(item))),
    "sqlite": _database_parts,
    "postgresql": _database_parts,
    "python": _python_parts,
    "aligned": _aligned_parts,
    "synthetic": _synthetic_parts,
}
