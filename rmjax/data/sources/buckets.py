"""Data in buckets, gs://BUCKET/... and s3://BUCKET/..., by fsspec: copied into the user's cache and read there."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from rmjax.runtime import compile_cache, files, passwords

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # what fsspec reads them with


def copies(item: str, names: Callable[[Any, str, str], list[str]]) -> list[Path]:
    """The files of a source, here; each state of one is copied once.

    Args:
        item: the source.
        names: (file system, path on it, item) to the names of its files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the store's package is not installed, or it does not let us read.
    """
    try:
        fs, path = fsspec.core.url_to_fs(passwords.reveal(item))
        return [_copy(fs, name) for name in names(fs, path.rstrip("/"), item)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{item}: there is no such file or bucket") from error
    except ImportError as error:
        package = PACKAGES[item.partition("://")[0]]
        raise ValueError(f"{item} needs the package {package}; install it with pip") from error
    except ValueError:
        raise
    except Exception as error:  # each store has errors of its own: credentials, permissions, the network
        raise ValueError(f"{item} could not be read ({type(error).__name__}: {error}); are you logged in?") from error


def _copy(fs: Any, name: str) -> Path:
    state = hashlib.sha256(f"{fs.unstrip_protocol(name)} {fs.ukey(name)}".encode()).hexdigest()[:32]
    copy = compile_cache.user_cache() / "buckets" / state / Path(name).name
    if not copy.is_file() or copy.stat().st_size != fs.size(name):  # an earlier version's, cut by a power cut
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:  # another process may copy the same
            made = Path(scratch, copy.name)
            fs.get_file(name, str(made))
            files.sync(made)
            made.replace(copy)
        files.sync(copy.parent)
    return copy
