"""Responses with scores of their own: named attributes, each on its source's scale.

A score that is null, NaN or -100 is missing (NaN in the record); the others of its row count. Several responses of
one row are compared with each other by their only attribute, or by the one named `score`, the higher the better: wins,
ties and margins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.formats.cells import (
    BOOLEAN,
    LIST,
    MESSAGES,
    OBJECT,
    PROMPT,
    TEXT,
    Format,
    Kind,
    Reading,
    Row,
    answer,
    common,
    marked_turns,
    messages,
    prompt_turns,
    score,
    with_system,
)
from rmjax.data.records import BadRow, Conversation, Record, compare, group


def scored(
    conversations: Sequence[Conversation], scores: Sequence[Mapping[str, Any]], row: Row, reading: Reading
) -> Record:
    """The group of K responses with scores, each response's by name."""
    names = dict.fromkeys(name for of_one in scores for name in of_one)
    attributes = {name: [score(of_one.get(name), name) for of_one in scores] for name in names}
    return group(conversations, attributes=attributes, **compared(attributes), **common(row, reading))


def compared(attributes: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What scores say of pairs (see records.compare): those named `score`, or the only ones; else nothing."""
    overall = next(iter(attributes)) if len(attributes) == 1 else "score"
    return compare(attributes[overall]) if overall in attributes else {}


def _scored_text(row: Row, reading: Reading) -> Record:
    conversation = [*prompt_turns(row, row["prompt"]), answer(row["response"])]
    return scored([conversation], [{name: row.get(name) for name in reading.attributes}], row, reading)


def _scored_output(row: Row, reading: Reading) -> Record:
    outputs = [row["output"]] if isinstance(row["output"], Mapping) else row["output"]
    labels = []
    for output in outputs:
        if not isinstance(output.get("label"), Mapping):
            raise BadRow("wrong_type", f"an output has no object `label`, found {sorted(output)}")
        labels.append(output["label"])
    prompt = prompt_turns(row, row["input"])
    conversations = [[*prompt, answer(output.get("content"))] for output in outputs]
    return scored(conversations, labels, {"source": row.get("data_source"), **row}, reading)


def _boolean(row: Row, reading: Reading) -> Record:
    conversation = with_system(row, messages(row["messages"]))
    return group([conversation], attributes={"label": [row["label"]]}, **common(row, reading))


def _boolean_text(row: Row, reading: Reading) -> Record:
    conversation = [*prompt_turns(row, row["prompt"]), *messages(row["completion"])]
    return group([conversation], attributes={"label": [row["label"]]}, **common(row, reading))


def _has_labels(row: Row) -> bool:
    outputs = [row["output"]] if isinstance(row["output"], Mapping) else row["output"]
    return all(isinstance(output, Mapping) and isinstance(output.get("label"), Mapping) for output in outputs)


OUTPUT = Kind("an object {content, label}, or a list of them", lambda c: OBJECT.test(c) or MESSAGES.test(c))

# The order of the nine scores in NeMo-Aligner's regression data.
NEMO_ATTRIBUTES = (
    *("quality", "toxicity", "humor", "creativity"),
    *("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
)


def _nemo_text(row: Row, reading: Reading) -> Record:
    labels = row["label"]
    if len(labels) != len(NEMO_ATTRIBUTES):
        raise BadRow("wrong_type", f"label has {len(labels)} numbers, expected {len(NEMO_ATTRIBUTES)}")
    return scored([marked_turns(row["text"])], [dict(zip(NEMO_ATTRIBUTES, labels))], row, reading)


SCORED = (
    Format(
        "scored_text",
        {"prompt": PROMPT, "response": TEXT},
        _scored_text,
        lambda row: not {"labels", "chosen", "rejected"} & set(row),
        scores=True,
        means="`score`, or several columns of numbers, each an attribute; null and -100 are missing",
    ),
    Format(
        "scored_output",
        {"input": PROMPT, "output": OUTPUT},
        _scored_output,
        _has_labels,
        means="`output` is one or a list of {`content`, `label`: {attribute: number}}; `data_source`",
    ),
    Format(
        "boolean",
        {"messages": MESSAGES, "label": BOOLEAN},
        _boolean,
        means="true or false for the last turn: attribute `label`, 1 or 0",
    ),
    Format(
        "boolean_text",
        {"prompt": PROMPT, "completion": PROMPT, "label": BOOLEAN},
        _boolean_text,
        means="the same with the prompt apart",
    ),
    Format(
        "nemo_text",
        {"text": TEXT, "label": LIST},
        _nemo_text,
        lambda row: row["text"].startswith("<extra_id_"),
        means="a rendered conversation with `<extra_id_1>` marks and nine scores; -100 is missing",
    ),
)
