"""Compiled programs in the user's cache folder, so that the next run starts sooner; tokenized data is there too."""

import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

MOST_BYTES = 4 * 2**30  # of compiled programs; those longest unused go first
LEAST_SECONDS = 0.1  # what compiles faster than this is as fast as it is read
ABANDONED_SECONDS = 60  # no program takes so long to write
KEPT = re.compile(r".+-[0-9a-f]{64}-(cache|atime)")  # files of JAX's cache
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def user_cache(cache_dir: str | Path = "") -> Path:
    """The user's cache folder: `cache_dir`, by default $XDG_CACHE_HOME/rmjax or ~/.cache/rmjax. Makes nothing."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmjax"
    return Path(cache_dir).expanduser() if cache_dir else default


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_programs(cache_dir: str | Path = "") -> Path | None:
    """Keeps compiled programs in the user's cache folder, by JAX's own persistent cache; call it before any compiles.

    JAX tells programs apart by its version, the flags and the devices, a CPU's instruction set included. How XLA cuts
    a CPU program into threads depends on the number of cores too, so each number has a folder of its own. Programs
    that are read are the very ones that were written, so a run that goes on continues bit for bit; on a GPU more
    surely than without, where timings choose kernels anew each time.

    A folder that the user has chosen (JAX_COMPILATION_CACHE_DIR) stays, as does a cache that is switched off
    (JAX_ENABLE_COMPILATION_CACHE=false). Whoever can write to the folder can run code here, so it must be the user's
    own, below folders in which nobody else can put another in its place. A folder of the user's that others could
    write to is closed to them, and its programs are compiled anew.

    Returns:
        The folder; None where the user's own settings stay, or where it cannot be written or is not the user's alone
        (one log line).
    """
    import jax

    config: Any = jax.config  # whose keys the type checker does not know
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    folder = user_cache(cache_dir) / "xla" / f"{cores()}-cores"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _drop_unfinished(folder)
    except OSError as error:
        logging.warning("every run compiles anew, for compiled programs cannot be kept: %s", error)
        return None
    config.update("jax_compilation_cache_dir", str(folder))
    limits = {
        "jax_compilation_cache_max_size": MOST_BYTES,
        "jax_persistent_cache_min_compile_time_secs": LEAST_SECONDS,
    }
    for key, value in limits.items():
        if key.upper() not in os.environ:
            config.update(key, value)
    return folder


def _make_private(folder: Path) -> None:
    """Closes a folder of programs to others; OSError where they could still put another in its place."""
    ours = os.getuid()
    for path, status in _on_the_way(folder.parent.parent.absolute()):
        mode, owner = status.st_mode, status.st_uid
        open_to_all = mode & stat.S_IWOTH and not mode & stat.S_ISVTX and not stat.S_ISLNK(mode)
        if open_to_all or owner not in (0, ours):
            why = "everybody can write to it" if open_to_all else f"it belongs to user {owner}"
            raise PermissionError(f"{path} is no safe place for programs: {why}")
    opened = False
    for path in (folder.parent, folder):  # rmjax made both
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode) or status.st_uid != ours:
            raise PermissionError(f"{path} is a link, or belongs to another user, who could put programs there")
        if status.st_mode & OTHERS_WRITE:
            path.chmod(0o700)
            opened = True
    if opened:
        for program in _programs(folder):
            program.unlink(missing_ok=True)


def _on_the_way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All folders and links that lead to a path, itself last, with their lstat."""
    here, rest = Path(path.anchor), list(path.parts[1:])
    yield here, here.lstat()
    for _ in range(1000):  # links can go round in circles
        if not rest:
            return
        step = rest.pop(0)
        here = here.parent if step == ".." else here / step
        status = here.lstat()
        yield here, status
        if stat.S_ISLNK(status.st_mode):
            target = Path(os.readlink(here))
            rest[:0] = target.parts[1:] if target.is_absolute() else target.parts
            here = Path(target.anchor) if target.is_absolute() else here.parent
    raise OSError(f"{path}: too many links")


def _programs(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if KEPT.fullmatch(path.name)]


def _drop_unfinished(folder: Path) -> None:
    """Deletes what killed processes left: without the time of its last use JAX can neither read nor evict a program."""
    for program in _programs(folder):
        if program.name.endswith("-cache"):
            used = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not used.exists() and time.time() - program.stat().st_mtime > ABANDONED_SECONDS:
                program.unlink(missing_ok=True)
