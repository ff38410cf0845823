"""The plan: which groups stand in which row of which step, from lengths alone.

A deterministic function of (seed, epoch), so the number of steps is exact before training starts and any step can be
rebuilt from its number, on any number of hosts.
"""

import bisect
import dataclasses
import hashlib
import itertools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of groups for every step of a run."""

    groups: np.ndarray  # int32; the groups of all rows, end to end
    row_start: np.ndarray  # int64 [rows + 1]; where each row's groups begin in `groups`
    step_start: np.ndarray  # int64 [steps + 1]; where each step's rows begin
    epoch_steps: tuple[int, ...]  # steps of each epoch
    steps_per_epoch: int  # steps of the first whole epoch; stays when the plan is cut
    rows_per_step: int  # rows of a full step; the last of an epoch may have fewer
    row_tokens: int  # length of a row
    fill: float  # share of the epoch's slots (the last step's padding rows apart) that hold a token
    max_groups: int  # most groups in any row
    max_ends: int  # most scored tokens in any row

    @property
    def steps(self) -> int:
        return len(self.step_start) - 1

    @property
    def groups_per_step(self) -> float:
        return len(self.groups) / max(self.steps, 1)

    def first(self, steps: int) -> "Plan":
        epochs = np.cumsum((0, *self.epoch_steps))
        rows = int(self.step_start[steps])
        return dataclasses.replace(
            self,
            groups=self.groups[: self.row_start[rows]],
            row_start=self.row_start[: rows + 1],
            step_start=self.step_start[: steps + 1],
            epoch_steps=tuple(min(b, steps) - a for a, b in itertools.pairwise(epochs.tolist()) if a < steps),
        )

    def digest(self, steps: int) -> str:
        """SHA-256, as hex, of the rows of the first `steps` steps."""
        rows = int(self.step_start[steps])
        parts = self.step_start[: steps + 1], self.row_start[: rows + 1], self.groups[: self.row_start[rows]]
        return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()

    def rows(self, step: int) -> list[np.ndarray]:
        """Group numbers of each row of a step; at most `rows_per_step` rows."""
        rows = range(self.step_start[step], self.step_start[step + 1])
        return [self.groups[self.row_start[r] : self.row_start[r + 1]] for r in rows]


def pack(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Packs trees of `lengths` into rows, best fit, longest first; returns rows of indices into `lengths`."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[i])
        best = bisect.bisect_left(room, (need, -1))
        if best == len(room):
            free, row = row_tokens, len(rows)
            rows.append([])
        else:
            free, row = room.pop(best)
        rows[row].append(i)
        if free > need:
            bisect.insort(room, (free - need, row))
    return rows


def draw(source: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The groups that an epoch of a weighted mixture shows, in the order of the data, some of them several times.

    The epochs walk through one fixed permutation of each source, over and over: with weight w an epoch goes w times
    its length, so a group is shown floor(w) or ceil(w) times in an epoch, and none again before all have been.

    Args:
        source: int [n] source of each group.
        weights: float [sources], not negative.
    """
    drawn = []
    for k, weight in enumerate(weights.tolist()):
        members = np.flatnonzero(source == k).astype(np.int32)
        start, stop = (round(weight * len(members) * e) for e in (epoch, epoch + 1))
        order = np.random.default_rng((seed, k, len(weights))).permutation(members)
        drawn.append(order[np.arange(start, stop) % max(len(members), 1)])
    return np.sort(np.concatenate(drawn))


def make_plan(
    lengths: np.ndarray,
    ends: np.ndarray,
    *,
    row_tokens: int,
    rows_per_step: int = 0,
    groups_per_step: int = 0,
    window: int = 2048,
    epochs: int = 1,
    seed: int | None = 0,
    source: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> Plan:
    """Plans `epochs` epochs: draw and shuffle groups, pack best-fit within windows, shuffle rows, cut into steps.

    Args:
        lengths: int [n] tokens of each group's tree.
        ends: int [n] scored tokens of each group.
        rows_per_step: rows of a step; 0 derives them so that a step has `groups_per_step` groups on average.
        window: groups that are packed together.
        epochs: how often every group is shown, where there are no weights.
        seed: of the shuffles; None keeps the given order of groups within the packing, for evaluation.
        source: int [n] source of each group, where there are weights.
        weights: float [sources] how often an epoch shows the groups of each; see `draw`.

    Raises:
        ValueError: no groups, a tree longer than a row, or an epoch without groups.
    """
    if not len(lengths):
        raise ValueError("there are no groups to plan")
    if lengths.max() > row_tokens:
        raise ValueError(f"a tree of {lengths.max()} tokens does not fit a row of {row_tokens}")
    rows: list[np.ndarray] = []
    step_start, epoch_steps = [0], []
    for epoch in range(epochs):
        if source is None or weights is None:
            order = np.arange(len(lengths), dtype=np.int32)
        else:
            order = draw(source, weights, seed or 0, epoch)
            if not len(order):
                raise ValueError(f"the weights {weights.tolist()} show no group in epoch {epoch}; raise them")
        rng = np.random.default_rng((seed or 0, epoch))
        if seed is not None:
            rng.shuffle(order)
        windows = (order[start : start + window] for start in range(0, len(order), window))
        packed = [members[row] for members in windows for row in pack(lengths[members], row_tokens)]
        if seed is not None:
            packed = [packed[i] for i in rng.permutation(len(packed))]
        if not rows_per_step:
            rows_per_step = max(1, round(groups_per_step * len(packed) / len(order)))
        step_start += [*range(len(rows) + rows_per_step, len(rows) + len(packed), rows_per_step)]
        rows.extend(packed)
        step_start.append(len(rows))
        epoch_steps.append(math.ceil(len(packed) / rows_per_step))
    sizes = np.array([len(row) for row in rows], np.int64)
    row_start = np.concatenate([[0], np.cumsum(sizes)])
    groups = np.concatenate(rows)
    return Plan(
        groups=groups,
        row_start=row_start,
        step_start=np.array(step_start, np.int64),
        epoch_steps=tuple(epoch_steps),
        steps_per_epoch=epoch_steps[0],
        rows_per_step=rows_per_step,
        row_tokens=row_tokens,
        fill=float(lengths[groups].sum() / (len(rows) * row_tokens)),
        max_groups=int(sizes.max()),
        max_ends=int(np.add.reduceat(ends[groups], row_start[:-1]).max()),
    )
