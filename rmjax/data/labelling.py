"""Label Studio: tasks and a labelling configuration from records, for people to label again or for the first time.

The answers come back by Label Studio's JSON export, which is a format like any other (`formats/label_studio.py`).
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import SubElement

from rmjax.data.records import Message, Record
from rmjax.runtime import files
from rmjax.runtime.command_line import check_writable, leaving_nothing

KINDS = ("preference", "rating")
MOST_STARS = 10


def tasks(records: Iterable[Record], *, lowest: int = 1, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yields the tasks of records, for Label Studio's JSON import; labels that the records have are not in them.

    Responses are shown in random order, because that of the source often gives the label away ("chosen" comes
    first). The turns that all conversations of a record begin with are its prompt.

        {"data": {"prompt": [{"role": "user", "content": "hi"}],
                  "response_1": [{"role": "assistant", "content": "hello"}], "response_2": [...],
                  "source": "mine", "rmjax": {"row": "a.jsonl:17", "order": [1, 0], "lowest": 1}}}

    `lowest` is the score that one star stands for, `seed` that of the order.
    """
    for number, record in enumerate(records):
        conversations = record.conversations
        order = random.Random(f"{seed}/{number}").sample(range(len(conversations)), len(conversations))
        shared = _shared_turns(conversations)
        responses = {f"response_{n}": list(conversations[i][shared:]) for n, i in enumerate(order, 1)}
        values = {"source": record.source, "weight": record.weight, "tools": list(record.tools or ())}
        rest = {name: value for name, value in values.items() if value not in ("", 1.0, [])}
        notes = {"row": record.row, "order": order, "lowest": lowest}
        yield {"data": {"prompt": list(conversations[0][:shared]), **responses, **rest, "rmjax": notes}}


def labelling_config(
    kind: str, responses: int = 2, attributes: Sequence[str] = ("quality",), scale: tuple[int, int] = (1, 5)
) -> str:
    """The labelling configuration (XML) that goes with `tasks`.

    A "preference" says which of two responses is better, or a tie; by radio buttons, because Label Studio's own control
    for pairs (`Pairwise`) leaves no trace of a tie in its export. A "rating" gives stars to every attribute of every
    response; `scale` has the scores that one star and all stars stand for.

    Raises:
        ValueError: another kind, a preference between other than two, or a scale without 2 to 10 whole numbers.
    """
    low, high = scale
    if kind not in KINDS:
        raise ValueError(f"unknown kind of labelling {kind!r}; known: {', '.join(KINDS)}")
    if kind == "preference" and responses != 2:
        raise ValueError(f"a preference is between 2 responses, the tasks have {responses}; rate them, or make pairs")
    if kind == "rating" and not (1 <= high - low < MOST_STARS and attributes):
        given = f"got {list(attributes)} and {scale}"
        raise ValueError(f"a rating needs attributes and a scale of 2 to {MOST_STARS} whole numbers; {given}")
    view = ElementTree.Element("View", style="white-space: pre-wrap")  # else line breaks are not shown
    _turns(view, "prompt", "Conversation")
    side_by_side = SubElement(view, "View", style="display: flex; gap: 1em")
    for n in range(1, responses + 1):
        column = SubElement(side_by_side, "View", style="flex: 1")
        title = ("Left", "Right")[n - 1] if kind == "preference" else f"Response {n}"
        _turns(column, f"response_{n}", title)
        for name in attributes if kind == "rating" else ():
            SubElement(column, "Header", value=f"{name} (one star: {low}, all stars: {high})", size="5")
            stars = str(high - low + 1)
            SubElement(column, "Rating", name=f"{name}_{n}", toName=f"response_{n}", maxRating=stars, required="true")
    if kind == "preference":
        SubElement(view, "Header", value="Which response is better?")
        options = {"name": "preference", "toName": "prompt", "choice": "single-radio"}
        choices = SubElement(view, "Choices", options, showInline="true", required="true")
        for word in ("left", "right", "tie"):
            SubElement(choices, "Choice", value=word)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def write_project(
    directory: str | Path,
    records: Iterable[Record],
    kind: str = "preference",
    *,
    attributes: Sequence[str] = ("quality",),
    scale: tuple[int, int] = (1, 5),
    seed: int = 0,
) -> int:
    """Writes DIRECTORY/tasks.json, to be imported, and DIRECTORY/config.xml; returns the number of tasks.

    Raises:
        ValueError: records with other numbers of responses than the first, or what `labelling_config` raises.
    """
    records = iter(records)
    first = next(records, None)
    if first is None:
        raise ValueError("there are no records to label")
    responses = len(first.conversations)
    config = labelling_config(kind, responses, attributes, scale)
    directory = Path(directory).expanduser()
    check_writable(directory / "tasks.json", f"--output={directory}")
    written = 0
    with leaving_nothing(directory):
        with files.whole(directory / "tasks.json") as scratch, open(scratch, "w", encoding="utf-8") as file:
            same = _same_size(itertools.chain([first], records), responses)
            for written, task in enumerate(tasks(same, lowest=scale[0], seed=seed), 1):
                file.write("[\n" if written == 1 else ",\n")
                json.dump(task, file, ensure_ascii=False)
            file.write("\n]\n")
        files.write_whole(directory / "config.xml", config)
    return written


def _same_size(records: Iterable[Record], responses: int) -> Iterator[Record]:
    for record in records:
        if len(record.conversations) != responses:
            raise ValueError(
                f"{record.row} has {len(record.conversations)} responses, those before it {responses}; a project of "
                "Label Studio shows one number of them, so write them apart"
            )
        yield record


def _shared_turns(conversations: Sequence[Sequence[Message]]) -> int:
    """How many turns all conversations begin with; the last turn of each is its own."""
    together = zip(*(conversation[:-1] for conversation in conversations))
    return sum(1 for _ in itertools.takewhile(lambda turns: all(turn == turns[0] for turn in turns), together))


def _turns(parent: ElementTree.Element, name: str, title: str) -> None:
    SubElement(parent, "Header", value=title)
    shown = {"name": name, "value": f"${name}", "layout": "dialogue"}
    SubElement(parent, "Paragraphs", shown, nameKey="role", textKey="content")
