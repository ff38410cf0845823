"""What was probably meant by a name that does not exist."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`; "" if none is like it."""
    return next(iter(difflib.get_close_matches(name, known, 1)), "")


def did_you_mean(name: str, known: Iterable[str], form: str = "{!r}") -> str:
    """The end of an error message, "; did you mean 'learning_rate'?", or ""; `form` is how the name is written."""
    near = closest(name, known)
    return f"; did you mean {form.format(near)}?" if near else ""
