"""Groups of token trees in a file: numbers of all of them in memory, trees and labels as views of a memory map.

`token_cache.py` writes these files. This module imports neither tokenizers nor jax.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rmjax.batches.augment import EVALUATION, TRAINING
from rmjax.batches.tasks import Task
from rmjax.batches.trees import Tree
from rmjax.data import prompts
from rmjax.data.ledger import Audit

INTS, FLOATS, HASHES = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.uint64())
NUMBERS = {  # one number per group, see Groups
    **{name: pa.int32() for name in ("lengths", "responses", "ends", "unshared", "longest", "prompt_characters")},
    **{name: pa.float32() for name in ("weights", "comparisons", "longer_wins", "margins", "agreements")},
    **{name: pa.uint64() for name in ("response_sets", "label_ids")},
    "uses": pa.int8(),
}
# Positions and visible_until are runs: (start, position, visible_until) of each. scored: (end, end_slot) of each.
# characters: of the text of each response of the record.
LISTS = ("tokens", "runs", "scored", "characters")
HISTORIES = "histories"  # of the record as it was read (data/prompts.py): two hashes of each
COLUMNS = "columns"  # Record.columns as JSON, where the task has some


def schema(task: Task) -> pa.Schema:
    """The columns of a cache file; the task's label fields are lists of float32 in C order."""
    lists = dict.fromkeys(LISTS, INTS) | {f"label/{name}": FLOATS for name in task.fields} | {HISTORIES: HASHES}
    columns = {COLUMNS: pa.large_string()} if carried(task) else {}
    return pa.schema({"id": pa.string(), "source": pa.string(), **lists, **NUMBERS, **columns})


def carried(task: Task) -> tuple[str, ...]:
    """The columns of the row that a task wants beside its labels."""
    return getattr(task, "columns", ())


@dataclasses.dataclass(frozen=True)
class Group:
    """One group: tree, float32 labels by the fields of its task (without G), weight, row id, columns of the task."""

    tree: Tree
    labels: dict[str, np.ndarray]
    weight: float
    id: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Groups:
    """Random access to groups in a cache file, or to a selection of them. n groups.

    Attributes:
        fingerprint: of the data, the chat and the options it was built with.
        origin: fingerprint of the data alone, `sources.fingerprint`.
        fields: the label fields of the task and their axes.
        source: int32 [n] which of `sources`, their names, each group is from.
    """

    lengths: np.ndarray  # int32 [n] tokens of each tree
    responses: np.ndarray  # int32 [n] responses of each group, K
    ends: np.ndarray  # int32 [n] scored tokens
    unshared: np.ndarray  # int32 [n] tokens of the responses' conversations, each counted whole
    longest: np.ndarray  # int32 [n] tokens of the longest conversation
    prompt_characters: np.ndarray  # int32 [n] characters of the prompt's text: all messages but the last of response 0
    weights: np.ndarray  # float32 [n]
    comparisons: np.ndarray  # float32 [n] pairs of responses of which one is preferred
    # float32 [n] those in which it is the longer one, in tokens (characters where a sequence holds more than one
    # response); equally long counts one half
    longer_wins: np.ndarray
    margins: np.ndarray  # float32 [n] the largest known margin in the group; 0 without any
    agreements: np.ndarray  # float32 [n] share of the annotators who gave the label; NaN where it is not known
    prompt_ids: np.ndarray  # uint64 [n], equal for groups of one prompt (data/prompts.py) in all of the file
    response_sets: np.ndarray  # uint64 [n] hash of the set of conversations, whatever their order
    # uint64 [n] hash of who is preferred to whom; equal sets with other labels contradict each other
    label_ids: np.ndarray
    uses: np.ndarray  # int8 [n] what each serves for: augment.ANY, TRAINING or EVALUATION

    def __init__(self, store: "Store", indices: np.ndarray, fingerprint: str, origin: str, audit: Audit):
        self._store, self._indices = store, indices
        self.fingerprint, self.origin, self.audit = fingerprint, origin, audit
        self.fields, self.sources, self.source = store.fields, store.sources, store.source[indices]
        for name in NUMBERS:
            setattr(self, name, store.numbers[name][indices])
        self.prompt_ids = store.prompt_ids[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def group(self, index: int) -> Group:
        """One group; its arrays are read-only views of the file where they can be."""
        return self._store.group(int(self._indices[index]))

    def id(self, index: int) -> str:
        """The row a group came from, "file.jsonl:17"."""
        return self._store.id(int(self._indices[index]))

    def ids(self) -> list[str]:
        """The row of every group."""
        return self._store.ids(self._indices)

    def select(self, indices: Sequence[int] | np.ndarray) -> "Groups":
        chosen = self._indices[np.asarray(indices, np.int64)]
        return Groups(self._store, chosen, self.fingerprint, self.origin, self.audit)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list of every group, end to end, and int64 [n + 1] where each begins: `scored`, `runs`, `characters`,
        `label/FIELD`."""
        values, starts, sizes = self._store.column(name)
        starts, sizes = starts[self._indices], sizes[self._indices]
        begin = np.concatenate([[0], np.cumsum(sizes)])
        return values[np.repeat(starts - begin[:-1], sizes) + np.arange(begin[-1])], begin

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The tokens of the groups, a part of the file at a time: end to end, int64 [m + 1] where each of m groups
        begins, and the numbers of these groups."""
        for values, starts, sizes, rows in self._store.batches("tokens"):
            mine = np.flatnonzero((self._indices >= rows.start) & (self._indices < rows.stop))
            if len(mine):
                at = self._indices[mine] - rows.start
                begin = np.concatenate([[0], np.cumsum(sizes[at])])
                yield values[np.repeat(starts[at] - begin[:-1], sizes[at]) + np.arange(begin[-1])], begin, mine

    def prompts_beside(self, other: "Groups") -> tuple[np.ndarray, np.ndarray]:
        """`prompt_ids` of both sets, which can be compared whether they are of one file or not."""
        if self._store is other._store:
            return self.prompt_ids, other.prompt_ids
        found = [(values.reshape(-1, 2), begin // 2) for values, begin in (x.column(HISTORIES) for x in (self, other))]
        return prompts.ids_of_both(*found)

    def sample(self, count: int, seed: int) -> "Groups":
        """A fixed random choice of at most `count` groups, in their order."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.select(np.sort(order[:count]))

    def fitting(self, row_tokens: int) -> "Groups":
        """The groups whose tree fits a row; the others are counted as `tree_too_long`. None at all is a ValueError."""
        too_long = self.lengths > row_tokens
        if too_long.all():
            raise ValueError(
                f"no tree fits a row of {row_tokens} tokens (config.plan.row_tokens); the shortest has "
                f"{self.lengths.min()}, the longest {self.lengths.max()}"
            )
        first, longest = int(self.lengths[too_long.argmax()]), int(self.lengths.max())
        detail = f"{first} tokens, plan.row_tokens is {row_tokens}"
        return self.without(too_long, "tree_too_long", detail, longest)

    def without(self, left_out: np.ndarray, reason: str, detail: str, tokens: int = 0) -> "Groups":
        """The groups that are not `left_out`, bool [n]; the others are counted under `reason`."""
        if not left_out.any():
            return self
        audit = self.audit.copy()
        audit.add_all(reason, self._store.ids(self._indices[left_out]), detail, tokens)
        return Groups(self._store, self._indices[~left_out], self.fingerprint, self.origin, audit)

    def audited(self, audit: Audit) -> "Groups":
        return Groups(self._store, self._indices, self.fingerprint, self.origin, audit)


class Store:
    """A cache file, memory-mapped: the numbers of all groups in memory, the rest as views of the map."""

    def __init__(self, path: Path, task: Task):
        self.fields, self._carries = dict(task.fields), bool(carried(task))
        self._path, self._file = path, open(path, "rb")  # noqa: SIM115  (as long as the map)
        self._bytes = os.fstat(self._file.fileno()).st_size
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = map(reader.get_batch, range(reader.num_record_batches))
        self._table = pa.Table.from_batches([batch for batch in batches if batch.num_rows])
        self._ids = self._table["id"].chunks
        self._starts = np.cumsum([0, *map(len, self._ids)])  # of the batches
        self.numbers = {name: np.concatenate(list(map(_view, self._table[name].chunks))) for name in NUMBERS}
        views = lambda cells: tuple(map(_view, (cells.offsets, cells.values)))
        names = [*LISTS, HISTORIES, *(f"label/{name}" for name in self.fields)]
        self._lists = {name: [views(cells) for cells in self._table[name].chunks] for name in names}
        hashes, starts, sizes = self.column(HISTORIES)  # all there are, end to end
        self.prompt_ids = prompts.ids(hashes.reshape(-1, 2), np.append(starts, starts[-1] + sizes[-1]) // 2)
        source = self._table["source"].combine_chunks().dictionary_encode()
        self.sources, self.source = source.dictionary.to_pylist(), _view(source.indices)

    def __len__(self) -> int:
        return len(self._table)

    def ids(self, indices: np.ndarray) -> list[str]:
        """The rows of many groups; a call takes time for all that the file holds."""
        return self._table["id"].take(indices).to_pylist()

    def id(self, index: int) -> str:
        batch, row = self._place(index)
        return self._ids[batch][row].as_py()

    def _place(self, index: int) -> tuple[int, int]:
        """The batch that a group is in, and where in it."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return batch, index - int(self._starts[batch])

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All values of a list column, and for each group where its own begin and how many they are."""
        views = self._lists[name]
        before = np.cumsum([0] + [len(values) for _, values in views])
        starts = np.concatenate([offsets[:-1].astype(np.int64) + n for (offsets, _), n in zip(views, before)])
        sizes = np.concatenate([np.diff(offsets).astype(np.int64) for offsets, _ in views])
        return np.concatenate([values for _, values in views]), starts, sizes

    def batches(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, range]]:
        """A list column batch by batch: its values, where those of each of the batch's groups begin, how many they are,
        and which groups these are."""
        for (offsets, values), first in zip(self._lists[name], self._starts.tolist()):
            sizes = np.diff(offsets).astype(np.int64)
            yield values, offsets[:-1].astype(np.int64), sizes, range(first, first + len(sizes))

    def group(self, index: int) -> Group:
        """One group, unless the file was cut off meanwhile: to touch the map there would kill the process (SIGBUS)."""
        if os.fstat(self._file.fileno()).st_size < self._bytes:
            raise RuntimeError(
                f"{self._path} was cut off while a run read it; the same command builds it again and goes on from the "
                "last checkpoint"
            )
        batch, row = self._place(index)
        # Copied at once: a view is touched later, when the file may be cut off after all.
        views = {name: batches[batch] for name, batches in self._lists.items()}
        cells = {name: x[offsets[row] : offsets[row + 1]].copy() for name, (offsets, x) in views.items()}
        tokens = cells["tokens"]
        starts, positions, until = cells["runs"].reshape(-1, 3).T
        sizes = np.diff(starts, append=np.int32(len(tokens)))
        positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(positions - starts, sizes)
        end, end_slot = cells["scored"].reshape(-1, 2).T
        tree = Tree(tokens, positions, np.repeat(until, sizes), end, end_slot)
        axis_size: dict[Any, Any] = {"K": int(self.numbers["responses"][index]), "E": len(end), "T": len(tree)}
        labels: dict[str, np.ndarray] = {
            name: cells[f"label/{name}"].reshape([axis_size.get(axis, axis) for axis in axes if axis != "G"])
            for name, axes in self.fields.items()
        }
        columns = json.loads(self._table[COLUMNS].chunk(batch)[row].as_py()) if self._carries else {}
        return Group(tree, labels, float(self.numbers["weights"][index]), self._ids[batch][row].as_py(), columns)


def _view(numbers: Any) -> np.ndarray:
    """Arrow's numbers as numpy's, read-only. `to_numpy` imports pandas, which takes half a second of every start."""
    return np.from_dlpack(numbers)


def for_training(groups: Groups) -> Groups:
    """All but those that augmentation replaced."""
    return groups.select(np.flatnonzero(groups.uses != EVALUATION))


def draw_prompts(
    prompt_ids: np.ndarray, amount: float, rng: np.random.Generator, counted: np.ndarray | None = None
) -> np.ndarray:
    """Draws prompts until they have `amount` groups, of the groups `counted` (bool [n]): which groups are theirs."""
    prompts, inverse = np.unique(prompt_ids, return_inverse=True)
    counts = np.bincount(inverse, counted)
    order = rng.permutation(len(prompts))
    before = np.cumsum(counts[order]) - counts[order]  # groups of the prompts drawn before each
    drawn = np.zeros(len(prompts), bool)
    drawn[order[before < amount]] = True
    return drawn[inverse]


def split(groups: Groups, fraction: float, seed: int) -> tuple[Groups, Groups]:
    """Splits off about `fraction` of the groups for validation; all groups of a prompt are on one side."""
    original = groups.uses != TRAINING
    chosen = draw_prompts(groups.prompt_ids, fraction * original.sum(), np.random.default_rng(seed), original)
    train = np.flatnonzero(~chosen & (groups.uses != EVALUATION))
    validation = np.flatnonzero(chosen & original)
    if not len(train) or not len(validation):
        raise ValueError(
            f"data.validation_fraction={fraction} of {len(groups)} groups with {len(np.unique(groups.prompt_ids))} "
            "different prompts leaves training or validation without any; give data.validation, or another fraction"
        )
    return groups.select(train), groups.select(validation)
