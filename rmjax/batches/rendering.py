"""Runs templates, which are programs of others: bounds their time and their text, and names what they raise."""

import ctypes
import os
import threading
import time
from collections.abc import Callable

import jinja2

from rmjax.data.records import BadRow

# How templates fail on a conversation: by refusing it, or by meeting what they did not expect.
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, LookupError, AttributeError),
    *(RuntimeError, TypeError, ValueError, MemoryError),
)
MOST_TEXT = 2**28  # characters of a rendering
MOST_SECONDS = 30.0  # of a rendering, which takes about a millisecond

_lock = threading.Lock()
_deadlines: dict[int, float] = {}  # of the renderings under way, by thread
_watch: threading.Thread | None = None


class TooSlow(RuntimeError):
    """A template is not done after MOST_SECONDS."""


def render(template: Callable[[], str], what: str = "") -> str:
    """What a template makes of a conversation.

    Args:
        template: renders it. Its loops are stopped after MOST_SECONDS; one call of a filter or an operator is not.
        what: put before the message of an error.

    Raises:
        BadRow: `template_error`: it fails, takes too long, or makes more than MOST_TEXT characters. Its cause is
            the template's own error.
    """
    try:
        text = _timed(template)
    except TEMPLATE_ERRORS as error:
        raise BadRow("template_error", f"{what}{type(error).__name__}: {error}") from error
    if len(text) > MOST_TEXT:
        raise BadRow("template_error", f"{what}it renders to {len(text):,} characters, the most is {MOST_TEXT:,}")
    return text


def _timed(template: Callable[[], str]) -> str:
    global _watch
    thread = threading.get_ident()
    try:
        with _lock:
            _deadlines[thread] = time.monotonic() + MOST_SECONDS
            if _watch is None:
                _watch = threading.Thread(target=_look, name="templates", daemon=True)
                _watch.start()
        try:
            return template()
        finally:
            with _lock:  # if the watch was faster, its TooSlow is raised in here, never after it
                _deadlines.pop(thread, None)
    except TooSlow:
        raise TooSlow(f"it is not done after {MOST_SECONDS:g} s") from None


def _look() -> None:
    while True:
        time.sleep(min(1.0, MOST_SECONDS / 4))
        with _lock:
            now = time.monotonic()
            for thread in [thread for thread, deadline in _deadlines.items() if now > deadline]:
                del _deadlines[thread]
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooSlow))


def _after_fork() -> None:
    global _lock, _watch
    _lock, _watch = threading.Lock(), None
    _deadlines.clear()


os.register_at_fork(after_in_child=_after_fork)
