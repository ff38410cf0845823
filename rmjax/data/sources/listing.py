"""The files of a source: a path, a directory or a glob, on this machine, on the Hugging Face hub or in a bucket.

Remote file systems are fsspec's. Local files are found by Python's own glob, because fsspec's local file system follows
no link to a directory, makes every name absolute, and takes a directory called `~me` for somebody's home.
"""

import functools
import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import fsspec
import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rmjax.data.sources import files, folders
from rmjax.runtime import compile_cache, notes, passwords
from rmjax.runtime.files import sync

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # what fsspec reads buckets with
KINDS = ", ".join(files.READERS)
# What the hub says itself; the first is one of the second, too.
ANSWERS = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError)
LOCAL = SimpleNamespace(
    exists=os.path.exists,
    isdir=os.path.isdir,
    isfile=os.path.isfile,
    find=lambda path: [str(file) for file in sorted(Path(path).rglob("*")) if file.is_file()],
    glob=functools.partial(glob.glob, recursive=True),
    cat_file=lambda path: Path(path).read_bytes(),
)


def split_pieces(text: str, separator: str) -> list[str]:
    """Splits at separators, but not inside the name of an existing file or directory."""
    pieces, joined = text.split(separator), []
    while pieces:
        ends = range(len(pieces), 1, -1)
        end = next((n for n in ends if _is_one_name(separator.join(pieces[:n]).strip(), separator)), 1)
        joined.append(separator.join(pieces[:end]))
        pieces = pieces[end:]
    return joined


def _is_one_name(path: str, separator: str) -> bool:
    """Whether the separators in a text belong to names that exist: a path, a glob below one, or aligned files."""
    if path.startswith("aligned://"):
        return all(map(os.path.isfile, split_pieces(path.removeprefix("aligned://"), "+")))
    literal, pattern = split_pattern(_at_home(path))
    below = glob.has_magic(pattern) and separator in literal and separator not in pattern
    return bool(literal) and (below or not pattern)


def split_pattern(path: str, exists: Callable[[str], bool] = os.path.exists) -> tuple[str, str]:
    """The longest part of a path, from its beginning, that exists as it stands, and the rest: maybe a pattern."""
    parts = Path(path).parts
    end = next((n for n in range(len(parts), 0, -1) if exists(os.path.join(*parts[:n]))), 0)
    return os.path.join("", *parts[:end]), os.path.join("", *parts[end:])


def _at_home(path: str) -> str:
    return path if os.path.exists(path) else os.path.expanduser(path)


def glob_name(path: str) -> str:
    """The last part of a local path that is no pattern: of a glob, the directory."""
    literal, rest = split_pattern(_at_home(path))
    plain = [*Path(literal).parts, *(part for part in Path(rest).parts if not glob.has_magic(part))]
    return plain[-1] if plain else path


def local_files(item: str) -> list[Path]:
    """The files of a source that is a path on this machine; errors as of `remote_files`."""
    path = _at_home(passwords.reveal(item))  # a directory may be called like a URL
    if paths := [Path(name) for name in _data_files(LOCAL, path, item) if os.path.isfile(name)]:
        real: dict[Path, Path] = {}
        for place in paths:
            if (first := real.setdefault(place.resolve(), place)) != place:
                raise ValueError(f"{item} holds one file as {first.name} and as {place.name}; {folders.ONE}")
        return paths
    if os.path.isdir(path):
        others = sorted(os.listdir(path))
        found = f"; found {', '.join(others[:4])}{''.join(map(files.advice, others[:1]))}" if others else ""
        raise FileNotFoundError(
            f"{item} is a directory without any file that can be read: {KINDS}, also with .gz{found}"
        )
    raise FileNotFoundError(f"{item}: no such file, and nothing matches it; looked from {Path.cwd()}")


@functools.cache  # one listing, so one state of the repository or bucket, per process
def remote_files(item: str) -> list[Path]:
    """The files of a source on the hub or in a bucket, copied to this machine once.

    Where the hub does not answer, those of its files that its cache on this machine has.

    Raises:
        FileNotFoundError: nothing is there, or the hub does not give it.
        ValueError: a directory of files that do not belong together, or a bucket that cannot be read.
    """
    try:
        fs, path = fsspec.core.url_to_fs(passwords.reveal(item))
        if isinstance(fs, huggingface_hub.HfFileSystem):
            fs.resolve_path(path)  # without it a hub that does not answer seems to be one that lacks the file
        paths = [_local_copy(fs, name) for name in _data_files(fs, path.rstrip("/"), item)]
    except Exception as error:  # each store has errors of its own: credentials, permissions, the network
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise
        paths = _cached_files(item, error)
        if not paths:
            raise _explained(item, error) from error
    if not paths:
        raise FileNotFoundError(f"{item}: no {KINDS} file there")
    return paths


def _data_files(fs: Any, path: str, item: str) -> list[str]:
    """The files at a path, in a directory or of a glob on a file system; what exists as it stands is no pattern."""
    exists = lambda part: fs.isdir(part) or fs.exists(part)
    # A parent without magic is never a pattern, so nobody needs to ask whether it is there.
    literal, pattern = split_pattern(path, lambda part: (part != path and not glob.has_magic(part)) or exists(part))
    if glob.has_magic(pattern):
        matches = sorted(set(fs.glob(os.path.join(glob.escape(literal), pattern))))
        names = [name for name in matches if fs.isfile(name)]
        return folders.data_files(fs, item, literal, names, whole=False)
    literal = literal or "." * (not pattern)  # the directory "." has no parts
    if pattern or not fs.isdir(literal):
        return [path]
    return folders.data_files(fs, item, literal, fs.find(literal), whole=True)


def _local_copy(fs: Any, name: str) -> Path:
    """A file of the hub in the hub's own cache, one of a bucket in the user's; each state of it is copied once."""
    if isinstance(fs, huggingface_hub.HfFileSystem):
        place: Any = fs.resolve_path(name)
        options = {"repo_type": place.repo_type, "revision": place.revision}
        return Path(huggingface_hub.hf_hub_download(place.repo_id, place.path_in_repo, **options))
    state = hashlib.sha256(f"{fs.unstrip_protocol(name)} {fs.ukey(name)}".encode()).hexdigest()[:32]
    copy = compile_cache.user_cache() / "buckets" / state / Path(name).name
    if not copy.is_file() or copy.stat().st_size != fs.size(name):  # an earlier version's, cut by a power cut
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:  # another process may copy the same
            partial = Path(scratch, copy.name)
            fs.get_file(name, str(partial))
            sync(partial)
            partial.replace(copy)
        sync(copy.parent)
    return copy


def _cached_files(item: str, error: Exception) -> list[Path]:
    """The files of a source on the hub that were downloaded before, if the error is that the hub does not answer."""
    place = re.fullmatch(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?/?(.*)", item)
    if not place or _answer(error):
        return []
    kind, repository, revision, path = place.groups()
    options: dict[str, Any] = {"repo_type": kind and kind.removesuffix("s"), "revision": revision and unquote(revision)}
    try:  # no pattern: it would refuse a folder of which not all files were ever asked for
        snapshot = huggingface_hub.snapshot_download(repository, allow_patterns=[], local_files_only=True, **options)
    except Exception:
        return []
    paths = [Path(name) for name in _data_files(LOCAL, os.path.join(snapshot, path), item) if os.path.isfile(name)]
    if paths:
        notes.tell(
            f"the hub cannot be reached ({type(error).__name__}), so {item} is what its cache on this machine has: "
            f"{len(paths)} files of revision {Path(snapshot).name}"
        )
    return paths


def _answer(error: BaseException | None) -> BaseException | None:
    """The hub's own answer among the causes of an error; None where it gave none."""
    while error is not None and not isinstance(error, ANSWERS):
        error = error.__cause__
    return error


def _explained(item: str, error: Exception) -> Exception:
    """A store's error in words that say what to do."""
    scheme = item.partition("://")[0]
    if scheme == "hf":
        return FileNotFoundError(f"{item}: {_hub_advice(item, error)}")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{item}: there is no such file or bucket")
    if isinstance(error, ImportError):
        return ValueError(f"{item} needs the package {PACKAGES[scheme]}; install it with pip")
    return ValueError(f"{item} could not be read ({type(error).__name__}: {error}); are you logged in?")


def _hub_advice(item: str, error: BaseException) -> str:
    """What the hub's error means, and what to do."""
    cause = _answer(error)
    repository = re.match(r"hf://(datasets/)?[^/@]+/[^/@]+", item)
    page = "https://huggingface.co/" + (repository[0] if repository else item).removeprefix("hf://")
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, GatedRepoError):
        return f"the repository is gated; accept its terms at {page}, then {log_in}"
    if isinstance(cause, RepositoryNotFoundError):
        return f"no such repository, or a private one; look at {page}, and if it is yours, {log_in}"
    if isinstance(cause, RevisionNotFoundError):
        return f"no such revision; the branches and tags are at {page}/tree/main"
    if cause is None:
        return (
            f"the hub cannot be reached ({type(error).__name__}: {error}), and its cache on this machine has no such "
            "file; download it where there is a network (`hf download`), or name a copy on this machine"
        )
    return f"the hub did not give it ({type(error).__name__}: {error}); its files are at {page}/tree/main"
