"""What became of the rows and what the groups look like, counted while reading, in a few lines."""

import copy
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import numpy as np

from rmjax.data.records import LEFT_OUT, REASONS
from rmjax.statistics import least_cases, least_hits

# Choices of the config or of those who label, and what its chat template does: no defects of the data.
CHOSEN = ("tie", "tree_too_long", "filter", "sample", "not_answered", *LEFT_OUT)
SHOWN_UNREAD = 12
REMEDY = {"over_long": "data.max_length", "tree_too_long": "plan.row_tokens"}


@dataclasses.dataclass
class Count:
    """Rows with one reason."""

    rows: int = 0
    kept: int = 0  # of them were used all the same (data.on_bad_row="keep"), or without the part that is wrong
    example: str = ""  # the first, "file.jsonl:17: what was found"
    tokens: int = 0  # the length that would take all of them, where length is the reason
    files: dict[str, int] = dataclasses.field(default_factory=dict)  # rows of each file


@dataclasses.dataclass
class Audit:
    """Counts of a build."""

    rows: int = 0  # that were read
    reasons: dict[str, Count] = dataclasses.field(default_factory=dict)  # by name in records.REASONS
    sources: dict[str, int] = dataclasses.field(default_factory=dict)  # groups of each source
    # Under each augmentation, how many groups it changed and how many it made of them.
    augmented: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    # Columns and keys that nobody reads ("history", "output[].critique"), each with the first of its cells, in short.
    unread: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str, tokens: int = 0, kept: bool = False) -> None:
        """Counts a row under a reason of records.REASONS; the first of each is its example."""
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}; known: {', '.join(REASONS)}")
        self._count(reason, Count(1, int(kept), f"{where}: {detail}", tokens, {where.rpartition(":")[0]: 1}))

    def add_all(self, reason: str, places: Sequence[str], detail: str, tokens: int = 0) -> None:
        """Counts many rows under a reason; `detail` is said of the first."""
        files = Counter(place.rpartition(":")[0] for place in places)
        self._count(reason, Count(len(places), 0, f"{places[0]}: {detail}", tokens, dict(files)))

    def merge(self, other: "Audit") -> None:
        """Adds the counts of other rows that come after these."""
        self.rows += other.rows
        self.sources = dict(Counter(self.sources) + Counter(other.sources))
        for name, (changed, new) in other.augmented.items():
            before = self.augmented.get(name, (0, 0))
            self.augmented[name] = before[0] + changed, before[1] + new
        for reason, count in other.reasons.items():
            self._count(reason, count)
        self.unread = {**other.unread, **self.unread}

    def _count(self, reason: str, more: Count) -> None:
        before = self.reasons.get(reason, Count())
        self.reasons[reason] = Count(
            before.rows + more.rows,
            before.kept + more.kept,
            before.example or more.example,
            max(before.tokens, more.tokens),
            dict(Counter(before.files) + Counter(more.files)),
        )

    def copy(self) -> "Audit":
        return copy.deepcopy(self)

    def unusable(self) -> int:
        """Rows lost to defects: not those that were kept, nor ties and trees that the config leaves out."""
        return sum(c.rows - c.kept for reason, c in self.reasons.items() if reason not in CHOSEN)

    def check(self, on_bad_row: str, max_bad_fraction: float) -> None:
        """Raises ValueError for more unusable rows than the config allows, with the reasons and what to change."""
        defective = sum(c.rows for reason, c in self.reasons.items() if reason not in CHOSEN)
        if on_bad_row == "error" and defective:  # none is let through, so those that are kept lost a part
            raise ValueError(
                f"{defective} of {self.rows} rows cannot be used; {self.reasons_text()}; repair them, or count and "
                "leave them out with config.data.on_bad_row='skip'"
            )
        bad = self.unusable()
        if bad > max_bad_fraction * self.rows:
            raise ValueError(
                f"{bad} of {self.rows} rows ({bad / self.rows:.1%}) cannot be used, config.data.max_bad_fraction "
                f"allows {max_bad_fraction:.1%}; {self.reasons_text()}; repair them, or allow more"
            )

    def reasons_text(self) -> str:
        return "; ".join(_reason_line(reason, count) for reason, count in self.reasons.items()) or "no bad rows"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Audit":
        data = json.loads(text)
        reasons = {name: Count(**count) for name, count in data["reasons"].items()}
        augmented = {name: (changed, made) for name, (changed, made) in data["augmented"].items()}
        return cls(data["rows"], reasons, data["sources"], augmented, data["unread"])


class GroupSet(Protocol):
    """The part of batches.groups.Groups that is read here."""

    audit: Audit
    lengths: np.ndarray
    unshared: np.ndarray
    longest: np.ndarray
    comparisons: np.ndarray
    longer_wins: np.ndarray
    prompt_ids: np.ndarray
    response_sets: np.ndarray
    label_ids: np.ndarray

    def __len__(self) -> int: ...

    def prompts_beside(self, other: Self) -> tuple[np.ndarray, np.ndarray]: ...


def length_auc(groups: GroupSet) -> float:
    """How often the longer of two responses, in tokens, is preferred; equally long counts one half."""
    return float(groups.longer_wins.sum() / max(groups.comparisons.sum(), 1))


def repeats(groups: GroupSet) -> tuple[int, int]:
    """Counts groups that repeat the conversations of one before (in any order), and sets of conversations with
    labels that contradict each other.
    """
    labelled = np.unique(np.stack([groups.response_sets, groups.label_ids], axis=1), axis=0)
    sets, labels = np.unique(labelled[:, 0], return_counts=True)
    return len(groups) - len(sets), int((labels > 1).sum())


def shared_prompts(train: GroupSet, validation: GroupSet) -> int:
    return len(np.intersect1d(*train.prompts_beside(validation)))


def accuracy_shown(prompts: int, least: float) -> str:
    """What so many prompts of validation data can show, for `config.gate.accuracy`."""
    needed = least_cases(least)
    data = f"validation data of {prompts:,} prompt{'s' * (prompts != 1)}"
    asked = f"an accuracy of at least {100 * least:.3g} % (config.gate.accuracy)"
    if prompts < needed:
        return f"{data} cannot show {asked}: that takes {needed:,}, if all are right"
    return f"{data} shows {asked} where about {least_hits(least, prompts):.1%} are right"


def lines(train: GroupSet, validation: GroupSet) -> list[str]:
    """The audit of a run's data for the terminal."""
    rows = [] if validation.audit is train.audit else rows_lines(validation.audit)
    shared = shared_prompts(train, validation)
    return [
        *rows_lines(train.audit),
        *rows,
        *_groups_lines("training", train),
        *_groups_lines("validation", validation),
        f"prompts in both training and validation: {shared}" + (" (their scores mislead)" if shared else ""),
    ]


def rows_lines(audit: Audit) -> list[str]:
    """How many rows were read, and a line for each reason why some were not used."""
    largest = sorted(audit.sources.items(), key=lambda item: -item[1])[:8]
    others = len(audit.sources) - len(largest)
    listed = ", ".join(f"{name} {count:,}" for name, count in largest) + (f" and {others} more" if others else "")
    return [
        f"data: {audit.rows:,} rows, {sum(audit.sources.values()):,} groups ({listed})",
        *(f"  {_reason_line(reason, count)}" for reason, count in audit.reasons.items()),
        *(f"  {name} made {new:,} groups of {changed:,}" for name, (changed, new) in audit.augmented.items()),
        *([f"  not read: {', '.join(unread_texts(audit.unread))}"] if audit.unread else []),
    ]


def unread_texts(unread: Mapping[str, str]) -> list[str]:
    """Each path with its example; of those after the first `SHOWN_UNREAD` the path alone."""
    shown = [f"{path} (e.g. {cell})" for path, cell in itertools.islice(unread.items(), SHOWN_UNREAD)]
    return shown + list(unread)[SHOWN_UNREAD:]


def _reason_line(reason: str, count: Count) -> str:
    kept = f" ({count.kept:,} kept)" if count.kept else ""
    remedy = f"; {REMEDY[reason]}={count.tokens} takes all of them" if count.tokens and reason in REMEDY else ""
    return f"{reason} {count.rows:,}{kept}: {REASONS[reason]}{remedy}; e.g. {count.example[:160]}"


def _groups_lines(name: str, groups: GroupSet) -> list[str]:
    median, p90, p99, most = np.quantile(groups.lengths, [0.5, 0.9, 0.99, 1.0])
    again, contradicting = repeats(groups)
    tokens = int(groups.lengths.sum())
    by_length = f"; length alone predicts the label with AUC {length_auc(groups):.3f}"
    return [
        f"{name}: {len(groups):,} groups with {len(np.unique(groups.prompt_ids)):,} prompts; {again:,} repeated, "
        f"{contradicting:,} contradicting" + (by_length if groups.comparisons.any() else ""),
        f"  {tokens:,} tokens ({groups.unshared.sum() / tokens:.2f} times that unshared); trees: median "
        f"{median:,.0f}, 90 % {p90:,.0f}, 99 % {p99:,.0f}, longest {most:,.0f}; longest conversation "
        f"{groups.longest.max():,}",
    ]
