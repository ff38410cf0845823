"""Files that survive a power cut: written beside their place, synced, then renamed; and the ends of files that grow.

A rename alone is not enough: after a power cut a file may have its new name and none of its bytes. So the bytes are
synced first, then renamed, then the directory is synced. Scratch files are never opened through a link.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCRATCH = ".rmjax-partial"  # suffix of a file on its way to its name; the next writing of the same file replaces it


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A scratch path that becomes `path`, synced, if the block ends well; after an error `path` is as it was."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}{SCRATCH}")
    try:
        scratch.unlink(missing_ok=True)
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield scratch
        sync(scratch)
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: str | os.PathLike, data: str | bytes) -> Path:
    """Writes a file, whole and synced, or not at all; text as UTF-8. Returns its path."""
    with whole(path) as scratch:
        scratch.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


def write_json(path: str | os.PathLike, values: Any, indent: int | None = 1) -> Path:
    """Writes JSON that ends with a newline, whole and synced; a number that is not finite is an error."""
    return write_whole(path, json.dumps(values, indent=indent, allow_nan=False) + "\n")


def missing_directories(directory: Path) -> list[Path]:
    """The directory and those of its parents that do not exist, the innermost first."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def sha256(path: Any) -> str:
    """SHA-256 of a file, as hex; `path` may be in a bucket (epath)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | os.PathLike) -> None:
    """Sends a file's bytes, or a directory's names, to the disk; OSError where the bytes could not be written.

    Some file systems refuse that for directories (network mounts, FUSE): there a name is as durable as they make it.
    """
    directory = os.path.isdir(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not directory:
            raise
    finally:
        os.close(handle)


def sync_tree(directory: str | os.PathLike[str]) -> None:
    """Sends everything below a directory, and the directory itself, to the disk. Links are not followed."""
    for folder, _, names in os.walk(os.fspath(directory)):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                sync(path)
        sync(folder)


def whole_lines(data: bytes, keep: Callable[[Any], bool] = lambda value: True) -> tuple[bytes, bytes]:
    """Splits a JSON-lines file after a power cut: the lines before the first damaged one, and the rest.

    `keep` says whether a line's JSON value can belong to the file; the first that cannot begins the rest.
    """
    end = 0
    for line in data.splitlines(keepends=True):
        try:
            good = line.endswith(b"\n") and keep(json.loads(line))
        except (ValueError, RecursionError, LookupError, TypeError):
            good = False
        if not good:
            break
        end += len(line)
    return data[:end], data[end:]


def check_target(path: str | os.PathLike, flag: str) -> None:
    """Raises ValueError, with `flag`, unless nothing has this name, or a plain file, which may be replaced.

    A link would be replaced while its target stays.
    """
    path = Path(path)
    if path.is_symlink():
        raise ValueError(f"{flag}: {path} is a link to {os.readlink(path)}; name that file itself, or remove the link")
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no plain file"
        raise ValueError(f"{flag}: {path} is {kind}; name another")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; [] where there is none."""
    kept = whole_lines(path.read_bytes())[0] if path.exists() else b""
    return [json.loads(line) for line in kept.splitlines()]
