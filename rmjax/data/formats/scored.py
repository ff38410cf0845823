"""Responses with scores of their own: named attributes, each on its source's scale.

A score that is null, NaN or -100 is missing (NaN in the record); the others of its row count. Several responses of
one row are compared with each other by their only attribute, or by the one named `score`, the higher the better: wins,
ties and margins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.formats import kinds
from rmjax.data.formats.cells import Reading, Row, answered, common, marked_turns, row_format, score
from rmjax.data.formats.conversations import answers_apart, completed_turns, whole_turns
from rmjax.data.formats.kinds import Kind
from rmjax.data.records import BadRow, Conversation, Record, compare, group

# The order of the nine scores in NeMo-Aligner's regression data.
NEMO_ATTRIBUTES = (
    *("quality", "toxicity", "humor", "creativity"),
    *("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
)
OUTPUT = Kind("an object {content, label}, or a list of them", lambda c: kinds.OBJECT.test(c) or kinds.MESSAGES.test(c))


def scored(
    conversations: Sequence[Conversation], scores: Sequence[Mapping[str, Any]], row: Row, reading: Reading
) -> Record:
    """The group of K responses with scores by name; the only ones, or those named `score`, compare the responses."""
    names = dict.fromkeys(name for response_scores in scores for name in response_scores)
    attributes = {name: [score(by_name.get(name), name) for by_name in scores] for name in names}
    overall = next(iter(attributes)) if len(attributes) == 1 else "score"
    compared = compare(attributes[overall]) if overall in attributes else {}
    return group(conversations, attributes=attributes, **compared, **common(row, reading))


@row_format(
    "scored_text",
    {"prompt": kinds.PROMPT, "response": kinds.TEXT},
    lambda row: not {"labels", "chosen", "rejected"} & set(row),
    scores=True,
)
def _scored_text(row: Row, reading: Reading) -> Record:
    """`score`, or several columns of numbers, each an attribute; null and -100 are missing."""
    scores = [{name: row.get(name) for name in reading.attributes}]
    return scored(answered(row, row["prompt"], [row["response"]]), scores, row, reading)


def _outputs(row: Row) -> Sequence[Any]:
    return [row["output"]] if isinstance(row["output"], Mapping) else row["output"]


def _has_label(output: Any) -> bool:
    return isinstance(output, Mapping) and isinstance(output.get("label"), Mapping)


@row_format("scored_output", {"input": kinds.PROMPT, "output": OUTPUT}, lambda row: all(map(_has_label, _outputs(row))))
def _scored_output(row: Row, reading: Reading) -> Record:
    """`output` is one or a list of {`content`, `label`: {attribute: number}}; `data_source`."""
    outputs = _outputs(row)
    if unlabelled := [output for output in outputs if not _has_label(output)]:
        raise BadRow("wrong_type", f"an output has no object `label`, found {sorted(unlabelled[0])}")
    conversations = answered(row, row["input"], [output.get("content") for output in outputs])
    labels = [output["label"] for output in outputs]
    return scored(conversations, labels, {"source": row.get("data_source"), **row}, reading)


@row_format("boolean", {"messages": kinds.MESSAGES, "label": kinds.BOOLEAN}, lambda row: not answers_apart(row))
def _boolean(row: Row, reading: Reading) -> Record:
    """True or false for the last turn: attribute `label`, 1 or 0."""
    return group([whole_turns(row)], attributes={"label": [row["label"]]}, **common(row, reading))


@row_format("boolean_text", {"prompt": kinds.PROMPT, "completion": kinds.PROMPT, "label": kinds.BOOLEAN})
def _boolean_text(row: Row, reading: Reading) -> Record:
    """The same with the prompt apart."""
    return group([completed_turns(row)], attributes={"label": [row["label"]]}, **common(row, reading))


@row_format("nemo_text", {"text": kinds.TEXT, "label": kinds.LIST}, lambda row: row["text"].startswith("<extra_id_"))
def _nemo_text(row: Row, reading: Reading) -> Record:
    """A rendered conversation with `<extra_id_1>` marks and nine scores; -100 is missing."""
    labels = row["label"]
    if len(labels) != len(NEMO_ATTRIBUTES):
        raise BadRow("wrong_type", f"label has {len(labels)} numbers, expected {len(NEMO_ATTRIBUTES)}")
    return scored([marked_turns(row["text"])], [dict(zip(NEMO_ATTRIBUTES, labels))], row, reading)
