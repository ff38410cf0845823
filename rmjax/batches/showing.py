"""What `python -m rmjax.data inspect` shows: the columns of a source, and records as people read them."""

import contextlib
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rmjax.data.formats import LOOK
from rmjax.data.formats.kinds import is_null, is_number
from rmjax.data.records import Record

LONGEST = 600  # characters of a text that are shown
MARKS = ("⟦", "⟧")  # around a scored token


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of the first rows: name, types of the cells, nulls, and the range of numbers."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    wide = max(map(len, names), default=0)
    lines = []
    for name in names:
        cells = [row[name] for row in rows if not is_null(row.get(name))]
        kinds = " or ".join(dict.fromkeys(map(kind, cells))) or "nothing"
        numbers = [cell for cell in cells if is_number(cell)]
        between = f", {min(numbers):g} to {max(numbers):g}" if numbers else ""
        missing = f", {len(rows) - len(cells):,} of {len(rows):,} null or missing" if len(cells) < len(rows) else ""
        lines.append(f"  {name:{wide}}  {kinds}{between}{missing}")
    return lines


def kind(cell: Any) -> str:
    """What a cell is.

    >>> kind([{"role": "user", "content": "hi"}]), kind('{"a": 1}'), kind([1, 2.5])
    ('list of {role, content}', 'text (JSON of {a})', 'list of number')
    """
    if isinstance(cell, bool):
        return "true/false"
    if isinstance(cell, int | float):
        return "number"
    if isinstance(cell, str):
        return f"text{_as_json(cell)}"
    if isinstance(cell, Mapping):
        names = list(cell)
        return "{" + ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") + "}"
    if isinstance(cell, list):
        return "list of " + (" or ".join(dict.fromkeys(map(kind, cell[:20]))) or "nothing")
    return "null" if cell is None else type(cell).__name__


def _as_json(text: str) -> str:
    with contextlib.suppress(json.JSONDecodeError):
        if text.lstrip()[:1] in ("[", "{"):
            return f" (JSON of {kind(json.loads(text))})"
    return ""


def record(shown: Record) -> list[str]:
    lines = [f"{shown.row}  (source {shown.source}, {_said(shown)})"]
    first = shown.conversations[0]
    shared = all(c[:-1] == first[:-1] for c in shown.conversations)
    if shared:
        lines += _turns(first[:-1])
    for i, conversation in enumerate(shown.conversations):
        lines.append(f"  response {i + 1} of {len(shown.conversations)}{_about(shown, i)}")
        lines += _turns(conversation[-1:] if shared else conversation)
    return lines


def _said(shown: Record) -> str:
    agreement = [f"agreement {shown.agreement:.2g}"] if shown.agreement == shown.agreement else []
    tools = [f"{len(shown.tools)} tools"] if shown.tools else []
    return ", ".join([f"weight {shown.weight:g}", *agreement, *tools])


def _about(shown: Record, i: int) -> str:
    others = range(len(shown.conversations))
    said = []
    for j in others:
        share, other = float(shown.wins[i, j]), float(shown.wins[j, i])
        margin = float(shown.margin[i, j])
        how = [f"by {margin:g}"] * (margin == margin) + [f"at {share:.2g}"] * bool(other)
        if share > other:
            said.append(" ".join([f"better than {j + 1}", *how]))
        if shown.ties[i, j]:
            said.append(f"equal to {j + 1}" + (f" at {shown.ties[i, j]:.2g}" if share or other else ""))
    for name, values in shown.attributes.items():
        said.append(f"{name} {values[i]:g}" if values[i] == values[i] else f"{name} missing")
    if shown.steps:
        labels = ["?" if step.label != step.label else f"{step.label:g}" for step in shown.steps[i]]
        said.append(f"steps {' '.join(labels)}")
    return f": {', '.join(said)}" if said else ""


def _turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each message with its role, wrapped to the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for message in messages:
        extra = {key: value for key, value in message.items() if key not in ("role", "content")}
        text = shorten(message.get("content") or "") + (f" {json.dumps(extra, ensure_ascii=False)}" if extra else "")
        head, indent = f"    {message['role']:9} | ", f"    {'':9} | "
        for line in text.splitlines() or [""]:
            pieces = textwrap.wrap(line, width, initial_indent=head, subsequent_indent=indent) or [head]
            yield from map(str.rstrip, pieces)
            head = indent


def shorten(text: str, longest: int = LONGEST) -> str:
    """Leaves out the middle of a long text and says how much.

    >>> shorten("abcdefghij", 4)
    'ab [... 6 more characters ...] ij'
    """
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} more characters ...] {text[-half:]}"


def rendering(chat: Any, shown: Record) -> list[str]:
    """Each conversation as the model reads it, with its number of tokens and its scored tokens (the record's steps)
    marked."""
    from rmjax.batches.tasks import Example, Steps

    example = Steps().examples(shown)[0] if shown.steps else Example(shown.conversations, tools=shown.tools)
    (group,) = chat.groups([example], keep=True)
    if isinstance(group, Exception):
        raise group
    lines = list(dict.fromkeys(f"  {bad.reason}: {bad.detail}" for bad in group.left_out))
    for k, conversation in enumerate(shown.conversations):
        text = chat.render(conversation, shown.tools)
        encoding = chat.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(encoding["offset_mapping"][0])
        scored = group.tree.positions[group.tree.end[group.tree.end_slot == k]]
        lines.append(f"  response {k + 1}: {len(offsets):,} tokens, {MARKS[0]}scored{MARKS[1]}")
        marked, done = "", 0
        for start, stop in offsets[np.sort(scored)].tolist():
            marked += shorten(text[done:start]) + MARKS[0] + text[start:stop].replace("\n", "\\n") + MARKS[1]
            done = stop
        lines += textwrap.indent(marked + shorten(text[done:]), "    | ", lambda _: True).splitlines()
    return lines


def first_row(row: Mapping[str, Any]) -> list[str]:
    return [
        f"    {name} = {shorten(json.dumps(cell, ensure_ascii=False, default=str), 300)}" for name, cell in row.items()
    ]


def looked_at(rows: int) -> str:
    return f"the first {rows:,} rows" if rows == LOOK else f"{rows:,} rows"
