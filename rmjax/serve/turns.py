"""The turns and tools of a request, read as training reads those of a row; BadRow for what it refuses."""

from collections.abc import Mapping
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, common, prompt_turns
from rmjax.data.records import BadRow, Message


def read_prompts(name: str, given: Any) -> list[Any]:
    """Prompts, each a text or messages, of one or several of them."""
    given = [given] if isinstance(given, str) or kinds.MESSAGES.test(given) else given
    if not isinstance(given, list) or not given:
        raise _wrong(name, given, "a text, messages, or a list of either")
    return given


def read_turns(body: Mapping[str, Any], name: str, given: Any, kind: kinds.Kind = kinds.PROMPT) -> list[Message]:
    """The turns of a text or of messages, after the request's `system`."""
    if not kind.test(given):
        raise _wrong(name, given, kind.words)
    return prompt_turns(body, given)


def read_tools(body: Mapping[str, Any]) -> list[Any] | None:
    return common({"tools": body.get("tools")}, Reading("", ""))["tools"]


def _wrong(name: str, given: Any, expected: str) -> BadRow:
    found = "missing" if given is None else type(given).__name__  # to write it out may take seconds
    return BadRow("wrong_type", f"`{name}` is {found}, expected {expected}")
