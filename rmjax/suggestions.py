"""What was probably meant by a name that does not exist."""

import difflib
import functools
import importlib.metadata
import re
import shlex
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`; "" if none is like it."""
    return next(iter(difflib.get_close_matches(name, known, 1)), "")


def did_you_mean(name: str, known: Iterable[str], form: str = "{!r}") -> str:
    """The end of an error message, "; did you mean 'learning_rate'?", or ""; `form` is how the name is written."""
    near = closest(name, known)
    return f"; did you mean {form.format(near)}?" if near else ""


@functools.cache
def install(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml needs, as the end of an error message.

    It names the packages: rmjax need not have been installed from an index, where its name may be another project's.
    """
    try:
        required = importlib.metadata.requires("rmjax") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    ours = [line.partition(";")[0].strip() for line in required if re.search(rf"extra == .{extra}.$", line)]
    packages = [shlex.quote(name) for name in ours if not name.startswith("rmjax")]
    if not packages:
        return f"install the extra [{extra}] of rmjax's checkout"
    return f"pip install {' '.join(packages)}"
