"""What a language model learns to write: assistant turns as they are, or a judge's verdicts on a record's responses."""

import dataclasses
from collections.abc import Mapping, Sequence

from rmjax.batches.tasks import Axes, Example, Span
from rmjax.data.records import BadRow, Conversation, Record
from rmjax.judging import verdicts

TEMPLATES = {"messages": "", "score": "judge_score", "pair": "judge_pair"}  # by target; packaged, see verdicts.py


@dataclasses.dataclass(frozen=True)
class Writing:
    """Conversations whose assistant turns are learnt word for word; each is one group of K = 1.

    A turn is its text and what the template puts after it up to the token that ends it, tool calls for example; one
    without text is not learnt. Of `target`:

    messages    the record's own conversation, and of several the preferred ones: those that beat another one and that
                none beats. Where nothing is said of pairs, each of them.
    score       each response's rating, as a judge writes it
    pair        each pair's verdict, as a judge writes it
    """

    turns: str = "all"  # whether "all" assistant turns are learnt, or the "last"
    target: str = "messages"
    template: str = ""  # text of the judging question, for "score" and "pair"
    attributes: tuple[str, ...] = ()  # what is rated; () is all that the record has
    scale: tuple[float, float] = (1.0, 5.0)  # lowest and highest rating
    ties: bool = True  # whether a verdict may be "tie"; if not, ties are left out
    both_orders: bool = False  # show each pair twice, with the responses in either order

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise ValueError(f"turns={self.turns!r} is none of all, last")
        if self.target not in TEMPLATES:
            raise ValueError(f"target={self.target!r} is none of {', '.join(TEMPLATES)}")
        if self.target != "messages":
            verdicts.check_template(self.template, self.target)

    @property
    def fields(self) -> Mapping[str, Axes]:
        """`loss_weight`: the record's weight at each token whose next one is learnt, else 0; `verdict`: the same
        where that one is part of a verdict in the form of verdicts.py.
        """
        return dict.fromkeys(("loss_weight", "verdict"), ("T",))

    def examples(self, record: Record) -> Sequence[Example | BadRow]:
        rated = self.attributes or tuple(record.attributes)
        conversations = self._conversations(record)
        examples: list[Example | BadRow] = []
        for i, conversation in enumerate(conversations):
            if isinstance(conversation, BadRow):
                examples.append(conversation)
                continue
            learnt = self._learnt(conversation, record.weight)
            judged = self._verdicts(conversation, rated, record.weight)
            tools = record.tools if self.target == "messages" else None
            name = str(i) if len(conversations) > 1 else ""
            spans = {"loss_weight": (learnt,), "verdict": (judged,)}
            examples.append(Example((conversation,), spans=spans, tools=tools, name=name))
        return examples

    def _conversations(self, record: Record) -> Sequence[Conversation | BadRow]:
        if self.target == "score":
            return verdicts.score_conversations(record, self.template, scale=self.scale, attributes=self.attributes)
        if self.target == "pair":
            return verdicts.better_conversations(record, self.template, ties=self.ties, both_orders=self.both_orders)
        return preferred(record)

    def _learnt(self, conversation: Conversation, weight: float) -> tuple[Span, ...]:
        n = len(conversation)
        turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        texts = {i: conversation[i].get("content") or "" for i in (turns if self.turns == "all" else turns[-1:])}
        return tuple(Span(i - n, 0, len(text), weight) for i, text in texts.items() if text)

    def _verdicts(self, conversation: Conversation, rated: Sequence[str], weight: float) -> tuple[Span, ...]:
        text = conversation[-1].get("content") or ""
        kinds = [(verdicts.SCORE, ""), (verdicts.BETTER, "")]
        if self.target == "score" and len(rated) > 1:
            kinds = [(verdicts.SCORE, name) for name in rated]
        spans = (verdicts.parse_verdict(text, kind, tag=tag).span for kind, tag in kinds)
        return tuple(Span(-1, *span, weight) for span in spans if span)


def check_judge(task: object) -> Writing:
    """The task of a judge that writes a verdict or one rating; ValueError for another."""
    if not isinstance(task, Writing) or task.target == "messages" or len(task.attributes) > 1:
        raise ValueError("only judges that write a verdict or one rating (`sft` with a target) are asked by sampling")
    return task


def preferred(record: Record) -> Sequence[Conversation | BadRow]:
    """The conversations of a record that beat another one and that none beats; all where nothing is said of pairs.

    A BadRow (`labelled_bad`) stands for one that a yes-or-no label, or a step of it, calls bad.

    Raises:
        BadRow: `tie`: pairs were judged, and there is no such conversation; or all are bad.
    """
    beats = record.wins > record.wins.T
    if not record.wins.any() and not record.ties.any():
        bad = BadRow("labelled_bad", "the response, or one of its steps, was judged bad")
        return verdicts.some_good([bad if _is_bad(record, i) else c for i, c in enumerate(record.conversations)])
    best = [c for i, c in enumerate(record.conversations) if beats[i].any() and not beats[:, i].any()]
    if not best:
        raise BadRow("tie", "no response is preferred to the others")
    return best


def _is_bad(record: Record, i: int) -> bool:
    steps = record.steps[i] if record.steps else ()
    yes_or_no = record.attributes.get("label", ()) if set(record.attributes) == {"label"} else ()
    return any(step.label < 0.5 for step in steps) or any(label < 0.5 for label in yes_or_no[i : i + 1])
