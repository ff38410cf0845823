"""Which folders are rmjax's own, so that it deletes and replaces nothing that is somebody else's.

A folder that rmjax writes into has a marker, `.rmjax.json`: what it is for, the id of its run, and what is needed to
tell rmjax's files in it from others. A folder that is not empty and has none is refused.

    kind          folder                   beside "run"
    run           --workdir
    checkpoints   config.checkpoint.dir    config and workdir of the run, who holds it, the steps it has begun
    export        an export                size and digest of each file that was written
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from rmjax.runtime import files

MARKER, VERSION = ".rmjax.json", 1
LOCK = "lock"
# Names that make no folder somebody else's: our lock, and what file systems put at the top of a volume.
NOBODYS = (LOCK, "lost+found")
DIGESTED = 2**20  # bytes; larger files of an export are told by their size alone, which takes no time


def new_id() -> str:
    return uuid.uuid4().hex


def read_marker(directory: str | os.PathLike, kind: str) -> dict[str, Any] | None:
    """The marker of a folder, None where there is none; ValueError for a damaged one, or a folder of another kind."""
    path = epath.Path(directory) / MARKER
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_bytes())
        marked_kind, _ = values["kind"], str(values["run"])
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}, expected {VERSION}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}). If {directory} is yours to write to, delete that file and start again"
        ) from None
    if marked_kind != kind:
        raise ValueError(
            f"{directory} is a folder of rmjax of the kind {marked_kind!r}, expected {kind!r}; name another"
        )
    return values


def write_marker(directory: str | os.PathLike, kind: str, run: str, **values: Any) -> None:
    write_text(epath.Path(directory) / MARKER, json.dumps({"version": VERSION, "kind": kind, "run": run, **values}))


def change_marker(directory: str | os.PathLike, kind: str, **changes: Any) -> None:
    """Replaces values of a folder's marker, which need not exist yet; the others stay."""
    values = {**(read_marker(directory, kind) or {}), **changes}
    write_marker(directory, kind, **{name: x for name, x in values.items() if name not in ("version", "kind")})


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file whole, here or in a bucket, where an object appears whole or not at all."""
    if "://" in str(path):
        path.write_text(text)
    else:
        files.write_whole(path, text)


def require_ours(
    directory: str | os.PathLike, kind: str, flag: str, older: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Checks that a folder may be written to: it has its marker, which is returned, or is empty or new (None).

    ValueError, with `flag`, where it holds something else. `older` says whether its files were written by a version of
    rmjax that made no markers.
    """
    marker = read_marker(directory, kind)
    path = epath.Path(directory)
    if marker is not None or not path.exists():
        return marker
    if not path.is_dir():
        raise ValueError(f"{flag}={directory} is a file; name a directory")
    others = sorted(x.name for x in path.iterdir() if x.name not in NOBODYS and not x.name.endswith(files.SCRATCH))
    if others and not older():
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(
            f"{flag}={directory} is not empty ({shown}) and has no {MARKER}, so it is not rmjax's own; name an empty "
            "or a new directory. (rmjax deletes and replaces files only in folders that it has marked)"
        )
    return None


@contextlib.contextmanager
def new_directory(directory: Path, kind: str, run: str) -> Iterator[Path]:
    """A directory to write into that gets its name, synced, when all went well, and replaces an older one of ours.

    The new one is written beside the old. Files in the old one that rmjax did not write there are kept: they move into
    the new one, and one that was changed by hand since, and has a successor, becomes NAME.kept. ValueError where
    something else is in the way.
    """
    directory = directory.resolve()  # the folder that a link leads to is replaced, not the link
    partial, old = (directory.with_name(f".{directory.name}.{what}") for what in ("partial", "old"))
    _finish_swap(directory, old)
    if os.path.lexists(partial):
        if partial.is_symlink() or not (_is_empty(partial) or read_marker(partial, kind)):
            raise _in_the_way(partial)
        remove_tree(partial)
    partial.mkdir(parents=True)
    write_marker(partial, kind, run, files={})
    try:
        yield partial
        written = {path.name: _description(path) for path in sorted(partial.iterdir()) if path.name != MARKER}
        write_marker(partial, kind, run, files=written)
        files.sync_tree(partial)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(partial)
        raise
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    files.sync(directory.parent)
    _finish_swap(directory, old)


def _finish_swap(directory: Path, old: Path) -> None:
    """Completes a replacement, even one that a killed process began; ValueError where the old folder is no export."""
    if not os.path.lexists(old):
        return
    if old.is_symlink() or not old.is_dir():
        raise _in_the_way(old)
    marker = read_marker(old, "export")
    if marker is None and not _is_empty(old) and not (old / OLDER_CONTRACT).is_file():
        raise _in_the_way(old)
    if not directory.exists():
        old.rename(directory)
        return
    last = (MARKER, OLDER_CONTRACT)  # by which a folder is known as ours, so that a kill on the way loses nothing
    for path in sorted(old.iterdir(), key=lambda path: (path.name == MARKER, path.name in last, path.name)):
        if path.name == MARKER or _is_ours(path, marker):
            path.unlink()
            continue
        target, number = directory / path.name, 1
        while os.path.lexists(target):
            target = directory / f"{path.name}.kept{'' if number == 1 else number}"
            number += 1
        path.rename(target)
        if target.name != path.name:
            logging.warning("%s was changed since it was written; it is now %s", path.name, target)
    old.rmdir()
    files.sync(directory)


def _is_empty(directory: Path) -> bool:
    """Whether a folder holds nothing but what a kill left of its marker on the way to its name."""
    return directory.is_dir() and all(path.name == f".{MARKER}{files.SCRATCH}" for path in directory.iterdir())


def _in_the_way(path: Path) -> ValueError:
    return ValueError(f"{path} is in the way and is not rmjax's own; move it away")


OLDER_CONTRACT = "reward_contract.json"
# Files of an export of a version that wrote no marker.
OLDER_EXPORT = {
    *("config.json", "model.safetensors", "model.safetensors.index.json", "reward_contract.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja"),
}


def _is_ours(path: Path, marker: Mapping[str, Any] | None) -> bool:
    """Whether rmjax wrote this very file of a folder."""
    if path.is_dir() or path.is_symlink():
        return False
    if marker is None:
        return path.name in OLDER_EXPORT or (path.name.startswith("model-") and path.suffix == ".safetensors")
    return path.name in marker["files"] and marker["files"][path.name] == _description(path)


def _description(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "sha256": files.sha256(path) if size <= DIGESTED else None}


def note_change(directory: Path, name: str) -> None:
    """Notes that rmjax itself has written a file of a finished folder once more."""
    with contextlib.suppress(ValueError):
        if (marker := read_marker(directory, "export")) and name in marker["files"]:
            change_marker(directory, "export", files={**marker["files"], name: _description(directory / name)})


def remove_tree(directory: Path) -> None:
    """Deletes a folder that is rmjax's own, its marker last, so that it stays recognizable until nothing is left."""
    for path in directory.iterdir():
        if path.name == MARKER:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (directory / MARKER).unlink(missing_ok=True)
    directory.rmdir()


def remove(paths: Collection[Path]) -> None:
    """Deletes files, and directories where they are empty; what cannot be deleted stays."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
