"""Judgements that are right, to be imitated; `python -m rmjax.data keep_right`.

    {"messages": [question], "label": "A", "responses": ["... <better>A</better>", ...], "verdicts": ["A", ...], ...}
    ->  {"messages": [question, {"role": "assistant", "content": "... <better>A</better>"}]}

Training on the samples that are right: Zelikman et al. 2022 (STaR), arXiv:2203.14465.
"""

import collections
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmjax.data import sources
from rmjax.runtime import files
from rmjax.runtime.command_line import check_writable

LISTS = ("messages", "responses", "verdicts", "finish")  # of what `rmjax.sample --judge` writes, beside `label`


def keep_right(source: str, output: Path, most: int = 0) -> collections.Counter[str]:
    """Writes a conversation, the question and the answer, for each judgement that is right and ended by itself.

    Args:
        source: what `python -m rmjax.sample --judge` has written.
        output: a .jsonl file.
        most: judgements that are kept of a question, the first ones; 0 keeps all.

    Returns:
        Counts: "questions"; of the judgements each is one of "kept", "right, beyond --most", "wrong", "unreadable" and
        "cut off"; and "without", questions of which none is right.

    Raises:
        ValueError: rows of another kind, or an output that cannot be used or is read.
    """
    _check_output(source, output)
    counts = collections.Counter[str]()
    output.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(output) as scratch, scratch.open("w", encoding="utf-8") as file:
        for item in sources.split_spec(source):
            for where, row in sources.open_source(item):
                for kept in _right(where, row, most, counts):
                    file.write(json.dumps({"messages": kept}) + "\n")
    return counts


def _right(where: str, row: sources.Row, most: int, counts: collections.Counter[str]) -> Iterator[Sequence[Any]]:
    """The conversations of a question that are kept."""
    lacking = [name for name in LISTS if not isinstance(row.get(name), list)]
    if lacking or row.get("label") is None:
        raise ValueError(
            f"{where} has no {', '.join(lacking or ['label'])}: expected a row that rmjax.sample --judge has written"
        )
    lists = [row[name] for name in LISTS[1:]]
    if len({len(values) for values in lists}) > 1:
        sizes = ", ".join(map(str, map(len, lists)))
        raise ValueError(f"{where} has {sizes} responses, verdicts and values of finish, which must be as many")
    right = 0
    for text, verdict, finish in zip(*lists):
        if (what := _outcome(verdict, finish, row["label"])) == "right":
            right += 1
            what = "kept" if not most or right <= most else "right, beyond --most"
        if what == "kept":
            yield [*row["messages"], {"role": "assistant", "content": text}]
        counts[what] += 1
    counts["questions"] += 1
    counts["without"] += not right


def _outcome(verdict: Any, finish: str, label: Any) -> str:
    if finish != "stop":
        return "cut off"
    if verdict is None:
        return "unreadable"
    return "right" if verdict == label else "wrong"


def lines(counts: collections.Counter[str], output: Path) -> list[str]:
    """What was kept, in words."""
    judged = [name for name in ("kept", "right, beyond --most", "wrong", "unreadable", "cut off") if counts[name]]
    total = sum(counts[name] for name in judged)
    told = "; ".join(f"{name} {counts[name]:,} ({counts[name] / total:.1%})" for name in judged)
    return [
        f"{total:,} judgements of {counts['questions']:,} questions: {told}" if total else "there are no judgements",
        f"{counts['without']:,} questions have no judgement that is right",
        f"{counts['kept']:,} conversations in {output}",
    ]


def _check_output(source: str, output: Path) -> None:
    if output.suffix != ".jsonl":
        raise ValueError(f"--output={output} must end in .jsonl")
    files.check_target(output, "--output")
    check_writable(output, "--output")
    local = [file for item in sources.split_spec(source) for file in sources.local_files(item)]
    if output.exists() and any(output.samefile(file) for file in local):
        raise ValueError(f"--output={output} is read as input; name another")
