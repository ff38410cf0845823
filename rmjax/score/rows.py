"""The shapes of rows that a model can score, chosen by its contract and their columns; see `SHAPES`."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rmjax.data.records import BadRow, check_conversation
from rmjax.inference import contract

Row = dict[str, Any]
# Responses of a row are scored together, each rendered with its prompt, so that a row's memory grows with them: of
# 16,384 with 2,000 characters each and a prompt of as many it is about a gigabyte (an estimate).
MOST_RESPONSES = 16_384


@dataclasses.dataclass(frozen=True)
class Shape:
    """How rows of one shape are read and scored."""

    name: str
    needs: str  # the columns that a row needs, in words
    read: Callable[[Row], list[Any] | None]  # the prompt with each response; None where the columns are not there
    score: Callable[[Any, list[Row], list[list[Any]]], list[Row]]  # (model, rows, what `read` gave) to new columns
    added: Callable[[Sequence[str]], dict[str, pa.DataType]]  # their types, from the names of the model's outputs


def turns_of(prompt: Any) -> list[Any] | None:
    """The messages of a prompt, a text or a list of messages; None of anything else."""
    if not isinstance(prompt, str | list):
        return None
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _answered(row: Row, *texts: Any) -> list[Any] | None:
    turns = turns_of(row.get("prompt"))
    if turns is None or not texts or not all(isinstance(text, str) for text in texts):
        return None
    return [[*turns, {"role": "assistant", "content": text}] for text in texts]


def _conversation(row: Row) -> list[Any] | None:
    return [row["messages"]] if isinstance(row.get("messages"), list) else _answered(row, row.get("response"))


def _responses(row: Row) -> list[Any] | None:
    texts = row.get("responses")
    return _answered(row, *texts) if isinstance(texts, list) else None


def _pair(row: Row) -> list[Any] | None:
    """Texts after a prompt, or whole conversations, or the turns that follow the prompt; as training reads them."""
    sides: list[Any] = [row.get("chosen"), row.get("rejected")]
    if all(isinstance(side, list) for side in sides):
        turns = turns_of(row["prompt"]) if row.get("prompt") is not None else []
        return None if turns is None else [_joined(turns, side) for side in sides]
    return _answered(row, *sides)


def _joined(prompt: list[Any], side: list[Any]) -> list[Any]:
    """Whole conversations have the prompt already, or begin with a turn that cannot follow it."""
    role = lambda message: message.get("role") if isinstance(message, dict) else None
    asks_again = bool(prompt and side) and role(prompt[-1]) == "user" and role(side[0]) in ("system", "user")
    return side if side[: len(prompt)] == prompt or asks_again else [*prompt, *side]


def _separated(row: Row) -> list[str] | None:
    """The steps of a row as training reads them: each but the first begins with the separator."""
    texts = row.get("completions")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    separator = "\n" if row.get("separator") is None else str(row["separator"])
    return [separator * bool(i) + text for i, text in enumerate(texts)]


def _steps(row: Row) -> list[Any] | None:
    texts = _separated(row)
    return None if texts is None else _answered(row, "".join(texts))


# The columns that a row gets of what the model says of its responses, by the name that the model has for it.
Columns = Callable[[str, Sequence[Any]], Row]
_of_one: Columns = lambda name, values: {name: values[0]}
_of_all: Columns = lambda name, values: {"scores" if name == "score" else name: values}
_of_sides: Columns = lambda name, values: {f"{side}_{name}": x for side, x in zip(("chosen", "rejected"), values)}


def _scored(name: str, needs: str, read: Callable[[Row], list[Any] | None], columns: Columns) -> Shape:
    """A shape of rows whose responses are scored; those of a row share their prompt."""

    def score(model: Any, rows: list[Row], conversations: list[list[Any]]) -> list[Row]:
        values = model.values(list(itertools.chain(*conversations)))
        cuts = np.cumsum([len(responses) for responses in conversations])[:-1]
        new_rows: list[Row] = [{} for _ in rows]
        for name, x in values.items():
            for new_row, of_row in zip(new_rows, np.split(x, cuts)):
                new_row.update(columns(name, list(map(float, of_row))))
        return new_rows

    def added(names: Sequence[str]) -> dict[str, pa.DataType]:
        kinds = [columns(name, [NUMBER, NUMBER]) for name in names]
        return {name: NUMBERS if isinstance(x, list) else x for some in kinds for name, x in some.items()}

    return Shape(name, needs, read, score, added)


def _verdicts(model: Any, rows: list[Row], conversations: list[list[Any]]) -> list[Row]:
    return model.judge([a for a, _ in conversations], [b for _, b in conversations])


def _step_scores(model: Any, rows: list[Row], conversations: list[list[Any]]) -> list[Row]:
    prompts, texts = [whole[:-1] for (whole,) in conversations], [_separated(row) for row in rows]
    return [{"scores": values} for values in model.steps(prompts, texts, separator="")]


NUMBER, NUMBERS = pa.float64(), pa.list_(pa.float64())
RESPONSES = _scored("responses", "`prompt` and `responses` (a list of texts)", _responses, _of_all)
PAIR = _scored("pair", "`chosen` and `rejected`: texts with a `prompt`, or lists of {role, content}", _pair, _of_sides)
CONVERSATION = _scored(
    "conversation", "`messages` (a list of {role, content}), or `prompt` and `response`", _conversation, _of_one
)
VERDICTS = Shape(
    "verdicts",
    "`prompt`, `response_a` and `response_b`",
    lambda row: _answered(row, row.get("response_a"), row.get("response_b")),
    _verdicts,
    lambda names: dict.fromkeys(names, NUMBER),
)
STEPS = Shape(
    "steps", "`prompt` and `completions` (a list of texts)", _steps, _step_scores, lambda names: {"scores": NUMBERS}
)
SHAPES = (RESPONSES, PAIR, CONVERSATION)  # of a model that scores; the first row decides


def shape_of(model: str, first: Row) -> tuple[Shape, dict[str, pa.DataType]]:
    """The shape and new columns of rows, by the model's contract and the first row; ValueError if it has no scores."""
    from rmjax import objectives  # JAX takes seconds, which a mistake on the command line need not wait for

    terms = contract.find(model)
    names: Sequence[str] = ["score"]
    kinds: tuple[Shape, ...] = SHAPES
    if terms is not None:
        objective = objectives.make(terms["objective"])
        if objective.architecture == "CausalLM":
            raise ValueError(
                f"{model} is a judge that writes its verdicts: generate with transformers or a server, and read them "
                "with rmjax.judging.verdicts.parse_verdict; or ask it for verdicts with rmjax.evaluate"
            )
        if objective.architecture == "TokenClassification":
            kinds = (STEPS,)
        elif terms["objective"]["name"] == "pairwise":
            kinds = (VERDICTS,)
        if objective.labels:
            own = {name: np.array(value, np.float32) for name, value in terms["objective_params"].items()}
            names = list(objective.decode(np.zeros((1, len(objective.labels)), np.float32), own))
    shape = next((kind for kind in kinds if kind.read(first) is not None), kinds[-1])
    return shape, shape.added(names)


def count_characters(row: Row, shape: Shape) -> int:
    """About how long the conversations of a row are, all together."""
    messages = itertools.chain(*(shape.read(row) or ()))
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    return sum(len(content) for content in contents if isinstance(content, str))


def check_row(where: str, row: Row, shape: Shape, added: Collection[str]) -> None:
    """Raises ValueError, with the row's name, where it cannot be scored or has a column that is `added`."""
    try:
        for conversation in _conversations(row, shape, added):
            check_conversation(conversation)
    except BadRow as bad:
        raise ValueError(f"{where}: {bad.detail}") from None
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def _conversations(row: Row, shape: Shape, added: Collection[str]) -> list[Any]:
    if taken := [name for name in added if name in row]:
        raise ValueError(f"has a column `{taken[0]}` already; rename it, the output has its scores there")
    for name in ("system", "tools"):
        if row.get(name):
            raise ValueError(f"has a column `{name}`, which is not read; write it into `messages`, or drop the column")
    if shape is RESPONSES and isinstance(row.get("responses"), list) and len(row["responses"]) > MOST_RESPONSES:
        raise ValueError(
            f"has {len(row['responses']):,} responses, more than {MOST_RESPONSES:,}, which are scored together; write "
            "several rows of the same prompt"
        )
    if (conversations := shape.read(row)) is None:
        raise ValueError(f"has columns {', '.join(sorted(row)) or 'none'}; expected {shape.needs}")
    return conversations
