"""Batches: the plan's rows as arrays of static shape, read ahead by threads, one sharded array per field."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np

from rmjax.batches.groups import Group, Groups
from rmjax.batches.packing import Plan
from rmjax.batches.tasks import Axes
from rmjax.sharding import assemble

Batch = dict[str, np.ndarray]
Sums = dict[str, Any]  # see objectives/sums.py


class BatchSource(Protocol):
    """What the training loop takes its batches from, in order of the steps: a plan (`PlannedBatches`) is one."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        ...

    def batch(self, step: int, params: Any) -> dict[str, jax.Array]:
        """The batch of a step on the devices, arrays [M, B, ...]; see `Shape.fields`.

        `params` are the parameters that the step starts from.
        """
        ...

    def sums(self, step: int) -> Sums:
        """What was measured when the batch of a step was made; {} of most."""
        ...

    def check(self, step: int, sums: Sums) -> None:
        """Refuses a step whose sums show that its batch was not what it should be; most have nothing to refuse."""
        ...

    def digest(self, steps: int) -> str:
        """Fingerprint of what the first `steps` steps are trained on; a resumed run compares it."""
        ...

    def names(self, step: int) -> list[str]:
        """Ids of the groups of a step."""
        ...


class GroupSource(Protocol):
    """Random access to groups by number."""

    def group(self, index: int) -> Group: ...


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of every batch of a plan."""

    micro: int  # micro-batches of a step, M
    rows: int  # rows of a micro-batch over all devices, B; a multiple of the devices that split rows
    tokens: int  # T
    groups: int  # G
    ends: int  # E
    responses: int  # K
    labels: tuple[tuple[str, Axes], ...] = ()  # the label fields of the task and their axes (`tasks.py`)

    def fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape (without M) and dtype of every field."""
        sizes = {"T": self.tokens, "G": self.groups, "E": self.ends, "K": self.responses}
        shape = lambda axes: (self.rows, *(sizes.get(axis, axis) for axis in axes))
        return {
            **dict.fromkeys(("tokens", "positions", "visible_from", "visible_until"), (shape("T"), np.int32)),
            **dict.fromkeys(("end", "end_group", "end_slot"), (shape("E"), np.int32)),
            "weight": (shape("G"), np.float32),
            **{name: (shape(axes), np.float32) for name, axes in self.labels},
        }


def plan_shape(
    plan: Plan, responses: int, *, micro_rows: int, row_devices: int, labels: Mapping[str, Axes] | None = None
) -> Shape:
    """The shape of a plan's batches, in equal micro-batches of at most `micro_rows` rows on each of `row_devices`."""
    per_device = math.ceil(np.diff(plan.step_start).max() / row_devices)
    micro = math.ceil(per_device / micro_rows)
    rows = math.ceil(per_device / micro) * row_devices
    fields = tuple((labels or {}).items())
    return Shape(micro, rows, plan.row_tokens, plan.max_groups, plan.max_ends, responses, fields)


def rounded(shape: Shape) -> Shape:
    """The shape with groups, ends and responses rounded up to powers of two, so that few shapes are compiled."""
    up = lambda n: 1 << (n - 1).bit_length()
    return dataclasses.replace(shape, groups=up(shape.groups), ends=up(shape.ends), responses=up(shape.responses))


def empty_rows(shape: Shape, rows: int) -> Batch:
    """`rows` rows of padding: every token sees only itself, no scored tokens, no weight."""
    batch = {name: np.zeros((rows, *s[1:]), dtype) for name, (s, dtype) in shape.fields().items()}
    batch["visible_from"][:] = np.arange(shape.tokens)
    batch["visible_until"][:] = np.arange(shape.tokens) + 1
    for name in ("end", "end_group", "end_slot"):
        batch[name][:] = -1
    return batch


def fill_row(batch: Batch, b: int, groups: Sequence[Group], labels: Sequence[tuple[str, Axes]] = ()) -> None:
    """Lays groups and their labels end to end into row `b` of a batch of padding."""
    start = e = 0
    for g, group in enumerate(groups):
        tree = group.tree
        stop, e_stop = start + len(tree), e + len(tree.end)
        if stop > batch["tokens"].shape[1] or e_stop > batch["end"].shape[1] or g >= batch["weight"].shape[1]:
            raise ValueError(f"row {b} cannot hold its {len(groups)} groups: the plan was made from other data")
        places: dict[Any, Any] = {"G": g, "E": slice(e, e_stop), "T": slice(start, stop)}
        batch["tokens"][b, start:stop] = tree.tokens
        batch["positions"][b, start:stop] = tree.positions
        batch["visible_from"][b, start:stop] = start
        batch["visible_until"][b, start:stop] = tree.visible_until + start
        batch["end"][b, e:e_stop] = tree.end + start
        batch["end_group"][b, e:e_stop] = g
        batch["end_slot"][b, e:e_stop] = tree.end_slot
        batch["weight"][b, g] = group.weight
        for name, axes in labels:
            inner = group.labels[name].shape[1 - len(axes) :] if len(axes) > 1 else ()
            batch[name][(b, places[axes[0]], *map(slice, inner))] = group.labels[name]
        start, e = stop, e_stop


@dataclasses.dataclass(frozen=True)
class StepSource:
    """The plan as a random-access source of Grain: step number in, this process's rows out."""

    groups: GroupSource
    plan: Plan
    shape: Shape
    local: Sequence[int]  # the rows of each micro-batch that this process holds, ascending

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> Batch:
        """Arrays [M, local rows, ...] of one step."""
        return fill(self.plan.rows(int(step)), self.groups, self.shape, self.local)


def fill(rows: Sequence[Sequence[int] | np.ndarray], groups: GroupSource, shape: Shape, local: Sequence[int]) -> Batch:
    """Arrays [M, local rows, ...] of rows of groups, by their numbers; `local` are the rows of each micro-batch that
    this process holds, ascending."""
    if len(rows) > shape.micro * shape.rows:
        raise ValueError(f"{len(rows)} rows do not fit into {shape.micro} micro-batches of {shape.rows}")
    micro_batches = []
    for m in range(shape.micro):
        batch = empty_rows(shape, len(local))
        for b, r in enumerate(m * shape.rows + place for place in local):
            if r < len(rows):
                fill_row(batch, b, [groups.group(int(i)) for i in rows[r]], shape.labels)
        micro_batches.append(batch)
    return {name: np.stack([batch[name] for batch in micro_batches]) for name in micro_batches[0]}


def placed(
    rows: Sequence[Sequence[int]], groups: GroupSource, shape: Shape, sharding: jax.sharding.NamedSharding
) -> dict[str, jax.Array]:
    """The same on the devices, arrays [M, B, ...] with B split by `sharding` ([B])."""
    local = local_rows(sharding, shape.rows)
    batch = fill(rows, groups, shape, local)
    return {name: _placed(x, local, shape.rows, _stacked(sharding)) for name, x in batch.items()}


def abstract_batch(shape: Shape, sharding: jax.sharding.NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    placed = _stacked(sharding)
    return {n: jax.ShapeDtypeStruct((shape.micro, *s), d, sharding=placed) for n, (s, d) in shape.fields().items()}


def _stacked(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """The sharding of [M, B, ...] where that of [B, ...] is given."""
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec))


def local_rows(sharding: jax.sharding.NamedSharding, rows: int) -> list[int]:
    """The rows of a batch that this process's devices hold, ascending; there may be gaps, and several may hold one."""
    slices = [index[0] for index in sharding.addressable_devices_indices_map((rows,)).values() if index]
    return sorted({row for part in slices for row in range(rows)[part]})


def _placed(x: np.ndarray, local: Sequence[int], rows: int, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """[M, B, ...] on the devices from this process's rows of it [M, len(local), ...]."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        wanted = range(rows)[index[1]]  # those of one device have no gaps
        first = local.index(wanted.start)
        return x[:, first : first + len(wanted)]

    return assemble((x.shape[0], rows, *x.shape[2:]), sharding, part)


def batches(
    groups: GroupSource, plan: Plan, shape: Shape, sharding: jax.sharding.NamedSharding, start: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batch of each step from `start`, as arrays [M, B, ...] with B split by `sharding` ([B]).

    Four steps are read ahead by two threads. (Grain's reader processes need parsed absl flags, so they fail in
    notebooks; filling rows is memory copies, which threads do as well.)
    """
    local, stacked = local_rows(sharding, shape.rows), _stacked(sharding)
    dataset = grain.MapDataset.source(StepSource(groups, plan, shape, local))[start:]
    for batch in dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)):
        yield {name: _placed(x, local, shape.rows, stacked) for name, x in batch.items()}


class PlannedBatches:
    """The batches of a plan, read ahead by threads (see `batches`)."""

    def __init__(self, groups: Groups, plan: Plan, shape: Shape, sharding: jax.sharding.NamedSharding):
        self.steps = plan.steps
        self._groups, self._plan = groups, plan
        self._from = lambda step: batches(groups, plan, shape, sharding, step)
        self._ahead: Iterator[dict[str, jax.Array]] = iter(())  # the batches from step `_next` on
        self._next = plan.steps

    def batch(self, step: int, params: Any) -> dict[str, jax.Array]:
        if step != self._next:
            self._ahead = self._from(step)
        self._next = step + 1
        return next(self._ahead)

    def sums(self, step: int) -> Sums:
        return {}

    def check(self, step: int, sums: Sums) -> None:
        pass

    def digest(self, steps: int) -> str:
        return self._plan.digest(steps)

    def names(self, step: int) -> list[str]:
        return [self._groups.id(int(i)) for row in self._plan.rows(step) for i in row]
