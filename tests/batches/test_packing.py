"""The plan: every group once an epoch, rows that fit and are full, steps that can be rebuilt."""

import time

import numpy as np
import pytest

from rmjax.batches import loader, packing
from rmjax.batches.groups import Group
from rmjax.batches.random_groups import RandomGroups, read_lengths
from rmjax.batches.tasks import Preferences
from rmjax.batches.trees import build_tree
from rmjax.config import defaults


def plan_of(lengths, **kwargs):
    options = {"row_tokens": 64, "rows_per_step": 3, "window": 16, "seed": 0} | kwargs
    return packing.make_plan(np.asarray(lengths), np.full(len(lengths), 2), **options)


def test_every_group_once_per_epoch_and_rows_fit():
    lengths = np.random.default_rng(0).integers(1, 65, 300)
    plan = plan_of(lengths, epochs=3)
    assert sum(plan.epoch_steps) == plan.steps
    step = 0
    for epoch_steps in plan.epoch_steps:
        rows = [row for s in range(step, step + epoch_steps) for row in plan.rows(s)]
        assert sorted(np.concatenate(rows)) == list(range(300))
        assert all(lengths[row].sum() <= 64 for row in rows)
        assert all(len(plan.rows(s)) == 3 for s in range(step, step + epoch_steps - 1))
        step += epoch_steps
    epochs = [
        np.concatenate([g for s in range(a, b) for g in plan.rows(s)])
        for a, b in [(0, 5), (plan.epoch_steps[0], plan.epoch_steps[0] + 5)]
    ]
    assert not np.array_equal(*[e[:50] for e in epochs])


def test_same_seed_same_plan_other_seed_other_plan():
    lengths = np.random.default_rng(1).integers(1, 65, 100)
    assert np.array_equal(plan_of(lengths, seed=3).groups, plan_of(lengths, seed=3).groups)
    assert not np.array_equal(plan_of(lengths, seed=3).groups, plan_of(lengths, seed=4).groups)


def test_groups_per_step_is_a_mean():
    plan = plan_of(np.full(1000, 8), rows_per_step=0, groups_per_step=24)
    assert plan.rows_per_step == 3 and abs(plan.groups_per_step - 24) < 0.2


def test_first_cuts_the_plan():
    plan = plan_of(np.random.default_rng(2).integers(1, 65, 100), epochs=2)
    cut = plan.first(plan.epoch_steps[0] + 2)
    assert cut.steps == plan.epoch_steps[0] + 2 and cut.epoch_steps == (plan.epoch_steps[0], 2)
    for step in range(cut.steps):
        assert all(np.array_equal(a, b) for a, b in zip(cut.rows(step), plan.rows(step), strict=True))


def test_errors_name_the_trouble():
    with pytest.raises(ValueError, match="no groups"):
        plan_of([])
    with pytest.raises(ValueError, match="65 tokens does not fit a row of 64"):
        plan_of([3, 65])


@pytest.mark.parametrize("name", ["hh", "long"])
@pytest.mark.parametrize("row_tokens", [4096, 8192])
def test_rows_of_real_lengths_are_97_percent_full(name, row_tokens):
    lengths = RandomGroups(read_lengths(name), vocabulary=100).lengths
    kept = lengths[lengths <= row_tokens]
    assert len(kept) >= len(lengths) - 2  # two trees of `long` exceed 4,096
    assert plan_of(kept, row_tokens=row_tokens, window=defaults().plan.window).fill >= 0.97


def test_a_million_groups_are_planned_in_seconds():
    lengths = np.random.default_rng(0).integers(20, 2000, 1_000_000)
    start = time.perf_counter()
    plan = plan_of(lengths, row_tokens=8192, window=2048)
    assert plan.fill > 0.97 and time.perf_counter() - start < 60


class Groups:
    """Pairs with known tokens."""

    fields = Preferences().fields

    def __init__(self, n, seed=0):
        rng = np.random.default_rng(seed)
        self.trees = []
        for _ in range(n):
            prompt = rng.integers(1, 50, rng.integers(1, 10)).tolist()
            self.trees.append(
                build_tree([prompt + rng.integers(50, 99, rng.integers(1, 10)).tolist() for _ in range(2)])
            )
        self.lengths = np.array([len(t) for t in self.trees])

    def group(self, i):
        win = np.array([[0, 1], [0, 0]], np.float32)
        labels = {"wins": win, "ties": np.zeros_like(win), "margin": win * i}
        return Group(self.trees[i], labels, 1.0 + i, "")


def make_batches(groups, row_devices=1, micro_rows=2):
    plan = plan_of(groups.lengths, rows_per_step=4)
    shape = loader.plan_shape(plan, 2, micro_rows=micro_rows, row_devices=row_devices, labels=groups.fields)
    return plan, shape, loader.StepSource(groups, plan, shape, range(shape.rows))


def test_batches_hold_every_tree_where_the_plan_says():
    groups = Groups(60)
    plan, shape, source = make_batches(groups)
    assert (shape.micro, shape.rows) == (2, 2)
    seen = []
    for step in range(plan.steps):
        batch = source[step]
        assert all(
            x.shape == (shape.micro, *shape.fields()[n][0]) and x.dtype == shape.fields()[n][1]
            for n, x in batch.items()
        )
        for r, row in enumerate(plan.rows(step)):
            flat = {name: x[divmod(r, shape.rows)] for name, x in batch.items()}
            for g, i in enumerate(row):
                ends = flat["end"][flat["end_group"] == g]
                for end, slot, sequence in zip(
                    ends, flat["end_slot"][flat["end_group"] == g], groups.trees[i].sequences()
                ):
                    index = np.arange(64)
                    sees = (flat["visible_from"][end] <= index) & (index <= end) & (end < flat["visible_until"])
                    assert flat["tokens"][sees].tolist() == sequence.tolist()
                    assert flat["positions"][sees].tolist() == list(range(len(sequence)))
                    assert slot in (0, 1)
                assert flat["weight"][g] == 1.0 + i and flat["margin"][g, 0, 1] == i
                seen.append(i)
        empty = {name: x.reshape(-1, *x.shape[2:])[len(plan.rows(step)) :] for name, x in batch.items()}
        assert (empty["end"] == -1).all() and (empty["weight"] == 0).all()
        assert (empty["visible_until"] == np.arange(64) + 1).all()
    assert sorted(seen) == list(range(60))


def test_processes_read_their_own_rows_of_the_same_batch():
    groups = Groups(60)
    plan, shape, whole = make_batches(groups, row_devices=2, micro_rows=1)
    halves = [loader.StepSource(groups, plan, shape, [i]) for i in range(2)]
    for step in range(plan.steps):
        for name, x in whole[step].items():
            assert np.array_equal(x, np.concatenate([half[step][name] for half in halves], axis=1))


def test_rows_are_padded_to_what_devices_can_split():
    plan = plan_of(np.full(50, 30), rows_per_step=5)
    shape = loader.plan_shape(plan, 2, micro_rows=1, row_devices=4)
    assert shape.rows % 4 == 0 and shape.micro * shape.rows >= 5
