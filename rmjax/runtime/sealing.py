"""Directories sealed with a manifest: size and SHA-256 of every other file, written last and compared before use.

    manifest.json    {"files": {"d/0": {"bytes": 7, "sha256": "..."}, ...}}

A directory without a manifest was never finished; one whose files differ from it is damaged. Here or in a bucket.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from rmjax.runtime import files, ownership

MANIFEST = "manifest.json"
SMALL = 2**20  # bytes; files up to here are digested even where reading whole directories would take too long
HASH_THREADS = 4


def seal_directory(directory: epath.Path) -> None:
    """Writes the manifest over all files, after what they have written is on the disk."""
    sync_directory(directory)
    names = sorted((path / name).relative_to(directory).as_posix() for path, _, ls in directory.walk() for name in ls)
    names = [name for name in names if name != MANIFEST]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        _write_manifest(directory, dict(zip(names, pool.map(lambda name: _entry(directory / name), names))))


def seal_file(directory: epath.Path, name: str) -> None:
    """Adds a file of a sealed directory to its manifest, or brings its entry up to date."""
    _write_manifest(directory, {**sealed_files(directory), name: _entry(directory / name)})


def sealed_files(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries by name; raises whatever is wrong with it."""
    return json.loads((directory / MANIFEST).read_text())["files"]


def find_damage(directory: epath.Path, deep: bool) -> str | None:
    """The damage of a directory, naming the file; None where it is whole. `deep` digests large files too."""
    try:
        entries = sealed_files(directory)
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so the save was never finished"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"

    def check(name: str) -> str | None:
        path, (size, digest) = directory / name, expected[name]
        try:
            if (now := path.stat().length) != size:
                return f"{name} has {now} bytes, expected {size}"
            if (deep or size <= SMALL) and files.sha256(path) != digest:
                return f"{name} has other contents than were saved (SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read: {error}"
        return None

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return next(filter(None, pool.map(check, expected)), None)


def sync_directory(directory: epath.Path) -> None:
    """Sends all that is below a directory to the disk; an object in a bucket is durable once it is there."""
    if "://" not in str(directory) and directory.exists():
        files.sync_tree(directory)


def _write_manifest(directory: epath.Path, entries: dict[str, dict[str, Any]]) -> None:
    ownership.write_text(directory / MANIFEST, json.dumps({"files": entries}, indent=1))


def _entry(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": files.sha256(path)}
