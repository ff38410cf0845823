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
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from rmjax.data.sources import files
from rmjax.runtime import compile_cache, passwords
from rmjax.runtime.files import sync

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # what fsspec reads buckets with
KINDS = ", ".join(files.READERS)
# What `datasets.save_to_disk` writes beside the data.
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Words in a path that say which split a file belongs to.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
LOCAL = SimpleNamespace(
    exists=os.path.exists,
    isdir=os.path.isdir,
    isfile=os.path.isfile,
    find=lambda path: [str(file) for file in sorted(Path(path).rglob("*")) if file.is_file()],
    glob=functools.partial(glob.glob, recursive=True),
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
        return paths
    if os.path.isdir(path):
        raise FileNotFoundError(f"{item} is a directory without any file that can be read: {KINDS}, also with .gz")
    raise FileNotFoundError(f"{item}: no such file, and nothing matches it; looked from {Path.cwd()}")


@functools.cache  # one listing, so one state of the repository or bucket, per process
def remote_files(item: str) -> list[Path]:
    """The files of a source on the hub or in a bucket, copied to this machine once.

    Raises:
        FileNotFoundError: nothing is there, or the hub does not give it.
        ValueError: a directory of files that do not belong together, or a bucket that cannot be read.
    """
    try:
        fs, path = fsspec.core.url_to_fs(passwords.reveal(item))
        paths = [_local_copy(fs, name) for name in _data_files(fs, path.rstrip("/"), item)]
    except Exception as error:  # each store has errors of its own: credentials, permissions, the network
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise
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
        return [name for name in names if _is_data(Path(name))] or names
    literal = literal or "." * (not pattern)  # the directory "." has no parts
    if pattern or not fs.isdir(literal):
        return [path]
    return [os.path.join(literal, name) for name in _belonging_together(item, literal, fs.find(literal))]


def _is_data(path: Path) -> bool:
    return bool(files.kind(path)) and path.name not in NOT_DATA


def _belonging_together(item: str, directory: str, names: Sequence[str]) -> list[Path]:
    """The files that are read when a directory is named, relative to it; hidden ones are not."""
    paths = [Path(name).relative_to(directory) for name in names]
    data = [path for path in paths if _is_data(path) and not any(part.startswith(".") for part in path.parts)]
    kinds = sorted({files.kind(path) for path in data})
    if len(kinds) > 1:
        raise ValueError(f"{item} holds files of several kinds ({', '.join(kinds)}); choose with a glob")
    words = {word for path in data for word in re.split(r"[^a-z]+", str(path).lower())}
    splits = [split for split, synonyms in SPLITS.items() if words.intersection(synonyms)]
    if len(splits) > 1:
        raise ValueError(f"{item} holds several splits ({', '.join(splits)}); choose one with a glob")
    return data


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
    kinds = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)  # the first is one of the second, too
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__
    repository = re.match(r"hf://(datasets/)?[^/@]+/[^/@]+", item)
    page = "https://huggingface.co/" + (repository[0] if repository else item).removeprefix("hf://")
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(cause, GatedRepoError):
        return f"the repository is gated; accept its terms at {page}, then {log_in}"
    if isinstance(cause, RepositoryNotFoundError):
        return f"no such repository, or a private one; look at {page}, and if it is yours, {log_in}"
    if isinstance(cause, RevisionNotFoundError):
        return f"no such revision; the branches and tags are at {page}/tree/main"
    return f"the hub did not give it ({type(error).__name__}: {error}); its files are at {page}/tree/main"
