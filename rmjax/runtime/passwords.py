"""Keeps passwords, tokens and keys out of what is printed and written.

The passwords in a config's URLs are removed as soon as there is a config, so that no log, config.json, error, report or
checkpoint can hold them; only opening a source gets them back:

    hide("postgresql://me:pa55@host/db?table=t")    ->  "postgresql://me:***@host/db?table=t"
    reveal("postgresql://me:***@host/db?table=t")   ->  "postgresql://me:pa55@host/db?table=t"
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

HIDDEN = "***"
# What stands before a password in a URL, the password, and what stands behind it.
_PATTERNS = (
    re.compile(r"([\w.+-]+://[^\s/?#,:@]*:)((?:(?!,[\w.+-]+://)[^\s@])+(?:@[^\s?#,@]*(?=@))*)(@[^\s/?#,@]*)"),
    re.compile(
        r"([\w.+-]+://[^\s,]*?[?&]\w*(?:password|passwd|pwd|token|secret|api_?key|access_?key)=)((?!\*{3})[^&#\s,]+)()",
        re.IGNORECASE,
    ),
)
_TOKEN = re.compile(r"\b(hf|sk|ghp|gho|github_pat|glpat|xox[abp])[_-][A-Za-z0-9_-]{16,}")
_NAMED = re.compile(r".*(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_?KEY)(_ID)?", re.IGNORECASE)  # variables
LEAST = 8  # characters of a variable's value; a shorter one may be any word
_taken: dict[str, str] = {}  # the parts of URLs that `hide` changed, by what it made of them


def hide(text: str) -> str:
    """The text with the passwords of its URLs replaced by `***`; this process remembers them for `reveal`."""

    def take(match: re.Match[str]) -> str:
        left = f"{match[1]}{HIDDEN}{match[3]}"
        if match[2] != HIDDEN:
            _taken[left] = match[0]
        return left

    return _without_passwords(text, take)


def reveal(text: str) -> str:
    """The text that `hide` was given, if this process hid it; else the text itself."""
    for left, whole in reversed(_taken.items()):
        text = text.replace(left, whole)
    return text


def masked(text: str) -> str:
    """A text for people: no passwords of URLs, no tokens, and no value of a variable that holds one."""
    text = _TOKEN.sub(HIDDEN, _without_passwords(text, lambda match: f"{match[1]}{HIDDEN}{match[3]}"))
    for name, value in os.environ.items():
        if len(value) >= LEAST and _NAMED.fullmatch(name):
            text = text.replace(value, HIDDEN)
    return text


def _without_passwords(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    before = None
    while before != text:  # a URL can have several
        before = text
        for pattern in _PATTERNS:
            text = pattern.sub(replace, text)
    return text


def hide_in(config: ConfigDict) -> ConfigDict:
    """Hides the passwords in all texts of a config, those in lists and below other keys too, in place; returns it."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            hide_in(value)
        elif (hidden := _hidden(value)) != value:
            config[key] = hidden
    return config


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, ConfigDict):
        return hide_in(value)
    if isinstance(value, Mapping):
        return {_hidden(key): _hidden(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_hidden, value))
    return value
