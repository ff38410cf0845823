"""The rows that are scored: the conversations that training's readers find in them, and the columns that they get."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from rmjax.data import reading
from rmjax.data.formats import FORMATS, Layout
from rmjax.data.records import BadRow, Conversation, has_response
from rmjax.data.sources import source_name, split_spec
from rmjax.jobs.inputs import Input
from rmjax.jobs.parts import Row

NUMBER, NUMBERS = pa.float64(), pa.list_(pa.float64())
# Why a row gets no score, where the file is as it should be: the job goes on, and counts it.
MARKED = ("empty_response", "no_label", "conflicting_label")
# Formats whose rows have one response, and those whose rows have a chosen and a rejected one; others have several.
ONE = (
    *("messages", "messages_completion", "scored_text", "boolean", "boolean_text", "nemo_text", "unieval"),
    *("prometheus", "stepwise", "stepwise_text", "shepherd_text", "unlabelled_steps"),
)
SIDES = ("reward_bench", *(name for name in FORMATS if name.startswith("pair_")))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row, and what a model is asked about it."""

    where: str  # "file.jsonl:17"
    row: Row
    named: Row  # with its columns under the names that are documented
    format: str
    conversations: Sequence[Conversation] = ()  # K whole ones: its responses, in order; () of a row without a score
    stops: Sequence[Sequence[int]] = ()  # of each the characters of its last turn up to the end of each step
    tools: Sequence[Any] | None = None
    unscored: Sequence[BadRow] = ()  # what gets no score, or was left out

    @property
    def usable(self) -> list[int]:
        """The responses that can be scored; the others are empty."""
        return [k for k, conversation in enumerate(self.conversations) if has_response(conversation)]

    @property
    def characters(self) -> int:
        """About how long its conversations are, all together."""
        return sum(len(message.get("content") or "") for turns in self.conversations for message in turns)


def open_source(input: Input, kind: "Kind", unread: dict[str, str] | None = None) -> Iterator[Asked]:
    """Reads the rows of a source for a kind of model. ValueError for one that cannot be read, with its name.

    What nobody reads is added to `unread`: its column or key, and an example.
    """
    unread = {} if unread is None else unread
    for item in split_spec(input.source):
        try:
            layout, named_rows = reading.open_rows(item, input.format, input.columns, kind.formats)
        except ValueError as error:
            needs = f"; to be scored without a label, a row needs {kind.needs}" if "data format" in str(error) else ""
            raise ValueError(f"{error}{needs}") from None
        for name, example in layout.unread:
            unread.setdefault(name, example)
        for where, row in named_rows:
            yield _read(layout, source_name(item), where, row, kind, unread)


def _read(layout: Layout, source: str, where: str, row: Row, kind: "Kind", unread: dict[str, str]) -> Asked:
    defects: list[BadRow] = []
    try:
        records = layout.read(row, source=source, where=where, keep=True, defects=defects, unread=unread)
    except BadRow as bad:
        if bad.reason not in MARKED:
            raise ValueError(f"{where}: {bad.detail}") from None
        return Asked(where, row, dict(layout.named(row)), layout.name, unscored=[bad])
    conversations = [list(conversation) for record in records for conversation in record.conversations]
    steps = [of_one for record in records for of_one in record.steps]
    if problem := kind.problem(len(conversations), len(steps)):
        raise ValueError(f"{where}: {problem}")
    stops = [[step.stop for step in of_one] for of_one in steps]
    told = [bad for bad in defects if bad.reason != "identical_responses"]  # these get equal scores
    return Asked(where, row, dict(layout.named(row)), layout.name, conversations, stops, records[0].tools, told)


# The columns that a row gets of what the model says of its responses, by the name that the model has for it.
Columns = Callable[[str, Sequence[Any]], Row]
_of_one: Columns = lambda name, values: {name: values[0]}
_of_all: Columns = lambda name, values: {"scores" if name == "score" else name: values}
_of_sides: Columns = lambda name, values: {f"{side}_{name}": x for side, x in zip(("chosen", "rejected"), values)}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The columns that rows get, which must be the same for all rows of a job."""

    name: str
    columns: Columns
    type: pa.DataType = NUMBER  # of one value

    def added(self, names: Sequence[str]) -> dict[str, pa.DataType]:
        """Their types, from the names of the model's outputs."""
        columns = [self.columns(name, [self.type, self.type]) for name in names]
        return {name: pa.list_(x[0]) if isinstance(x, list) else x for some in columns for name, x in some.items()}


RESPONSES, PAIR, ONE_RESPONSE = Shape("responses", _of_all), Shape("pair", _of_sides), Shape("conversation", _of_one)
SEVERAL = Shape("several", _of_all)  # as RESPONSES, but not in a column of that name
VERDICTS = Shape("verdicts", _of_one)
STEPS = Shape("steps", lambda name, values: {"scores": values[0]}, NUMBERS)
STEPS_OF_SEVERAL = Shape("steps of several", lambda name, values: {"scores": values}, NUMBERS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is asked of rows for a kind of model, and how."""

    formats: Sequence[str]  # that rows without labels have, by their columns alone, the first that fits
    needs: str  # the same in words
    names: Sequence[str]  # of what the model says
    shape: Callable[[str], Shape]  # by the format of rows
    left_out: Callable[[Any, Asked], set[str]]  # what of a row a model is not shown, by names in records.LEFT_OUT
    problem: Callable[[int, int], str]  # what is wrong with so many responses, and responses with steps; else ""
    ask: Callable[[Any, Sequence[Asked], "Kind"], list[dict[str, list[Any]]]]  # values [K] of each row, by name

    def score(self, model: Any, asked: Sequence[Asked]) -> list[Row]:
        """The new columns of rows; null where there is no response.

        Raises:
            ValueError: a conversation that cannot be scored, with its row; or a model with other outputs.
        """
        new_rows: list[Row] = []
        for one, values in zip(asked, self.ask(model, asked, self)):
            shape = self.shape(one.format)
            if not one.conversations:
                new_rows.append(dict.fromkeys(shape.added(self.names)))
                continue
            new_rows.append({c: x for name, of_all in values.items() for c, x in shape.columns(name, of_all).items()})
        return new_rows


def _values(model: Any, asked: Sequence[Asked], kind: Kind) -> list[dict[str, list[Any]]]:
    def call(at: Sequence[tuple[int, int]]) -> dict[str, Any]:
        tools = [asked[i].tools for i, _ in at]
        more = {"tools": tools} if any(tools) else {}
        return model.values([asked[i].conversations[k] for i, k in at], **more)

    return _in_place(asked, kind, [(i, k) for i, one in enumerate(asked) for k in one.usable], call)


def _step_scores(model: Any, asked: Sequence[Asked], kind: Kind) -> list[dict[str, list[Any]]]:
    def call(at: Sequence[tuple[int, int]]) -> dict[str, Any]:
        conversations = [asked[i].conversations[k] for i, k in at]
        stops, tools = [asked[i].stops[k] for i, k in at], [asked[i].tools for i, _ in at]
        return {"score": model.steps_at(conversations, stops, tools=tools)}

    return _in_place(asked, kind, [(i, k) for i, one in enumerate(asked) for k in one.usable], call)


def _verdicts(model: Any, asked: Sequence[Asked], kind: Kind) -> list[dict[str, list[Any]]]:
    def call(at: Sequence[tuple[int, int]]) -> dict[str, Any]:
        first, second = zip(*(asked[i].conversations for i, _ in at))
        said = model.judge(first, second)
        return {name: [one[name] for one in said] for name in said[0]}

    return _in_place(asked, kind, [(i, 0) for i, one in enumerate(asked) if len(one.usable) == 2], call)


def _in_place(
    asked: Sequence[Asked], kind: Kind, at: Sequence[tuple[int, int]], call: Callable[[Any], dict[str, Any]]
) -> list[dict[str, list[Any]]]:
    """Puts what a model says of some responses, (row, response), where they stand; None stands for the others."""
    from rmjax.inference.reward_model import BadConversation

    try:
        said = call(at) if at else dict.fromkeys(kind.names, ())
    except BadConversation as bad:
        raise ValueError(f"{asked[at[bad.index][0]].where}: {bad.detail}") from None
    values: list[dict[str, list[Any]]] = [{n: [None] * len(one.conversations) for n in said} for one in asked]
    for name, x in said.items():
        for (i, k), value in zip(at, x, strict=True):
            values[i][name][k] = list(map(float, value)) if isinstance(value, list) else float(value)
    return values


def _left_out(model: Any, asked: Asked) -> set[str]:
    return {bad.reason for turns in asked.conversations for bad in model.chat.left_out(turns, asked.tools)}


def _scoring_shape(format: str) -> Shape:
    if format in ONE:
        return ONE_RESPONSE
    return PAIR if format in SIDES else RESPONSES if format == "ranked" else SEVERAL


def _two(responses: int, steps: int) -> str:
    return "" if responses == 2 else f"it has {responses} responses; a judge of pairs compares two"


def _all_with_steps(responses: int, steps: int) -> str:
    return "" if responses == steps else "it has no steps; the model scores steps"


SCORING = Kind(
    ("ranked", "messages", "messages_completion", "scored_text", "unlabelled_pair"),
    "`messages`, or `prompt` and `response`, `responses`, or `chosen` and `rejected`",
    ["score"],
    _scoring_shape,
    _left_out,
    lambda responses, steps: "",
    _values,
)
JUDGING = Kind(
    ("unlabelled_pair",),
    "`prompt`, `response_a` and `response_b`, or `chosen` and `rejected`",
    ["A", "B"],
    lambda format: VERDICTS,
    lambda model, asked: {"tools_left_out"} if asked.tools else set(),  # see judging/verdicts.py
    _two,
    _verdicts,
)
STEPWISE = Kind(
    ("unlabelled_steps",),
    "`prompt` and `completions` (a list of texts)",
    ["score"],
    lambda format: STEPS if format in ONE else STEPS_OF_SEVERAL,
    _left_out,
    _all_with_steps,
    _step_scores,
)
