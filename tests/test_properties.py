"""Properties of records, trees, plans and rows, on inputs that hypothesis makes up."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmjax.batches import loader, packing
from rmjax.batches.groups import Group
from rmjax.batches.tasks import Preferences
from rmjax.batches.trees import build_tree
from rmjax.data.records import ROLES, BadRow, Record, check_conversation, group

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

# Few different tokens, so that sequences share prefixes, end inside each other and repeat.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=6)


# Trees


@FEW
@given(SEQUENCES)
def test_a_tree_holds_every_conversation_on_its_path(sequences):
    tree = build_tree(sequences)
    assert [x.tolist() for x in tree.sequences()] == sequences
    assert tree.end_slot.tolist() == list(range(len(sequences)))
    assert len(set(tree.end.tolist())) == len(sequences)
    for end, sequence in zip(tree.end.tolist(), sequences):
        path = tree.path(end)
        assert tree.positions[path].tolist() == list(range(len(sequence)))
        assert path[-1] == end and (np.diff(path) > 0).all()


@FEW
@given(SEQUENCES)
def test_a_token_sees_what_the_definition_says(sequences):
    """By brute force: j is visible to i if both are on one path from the root, and j is not after i."""
    tree = build_tree(sequences)
    n = len(tree)
    together = np.zeros((n, n), bool)
    for end in tree.end:
        path = tree.path(int(end))
        together[np.ix_(path, path)] = True
    i, j = np.indices((n, n))
    assert ((j <= i) & (i < tree.visible_until[None, :]) == together & (j <= i)).all()
    assert (tree.visible_until > np.arange(n)).all() and (tree.visible_until <= n).all()


@FEW
@given(SEQUENCES)
def test_a_tree_is_no_longer_than_its_conversations_and_leaves_are_their_own(sequences):
    tree = build_tree(sequences)
    assert max(map(len, sequences)) <= len(tree) <= sum(map(len, sequences))
    for end, sequence in zip(tree.end.tolist(), sequences):
        sharing = [other for other in tree.end.tolist() if end in tree.path(other)]
        assert sharing == [end], sequence  # what is scored belongs to one conversation alone


# Plans


@st.composite
def plans(draw):
    row = draw(st.integers(4, 40))
    lengths = np.array(draw(st.lists(st.integers(1, row), min_size=1, max_size=60)))
    ends = np.array(draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths))))
    of_step = {draw(st.sampled_from(["rows_per_step", "groups_per_step"])): draw(st.integers(1, 9))}
    arguments = {"row_tokens": row, "window": draw(st.integers(1, 70)), "seed": draw(st.integers(0, 5)), **of_step}
    return lengths, ends, arguments, draw(st.integers(1, 3))


@FEW
@given(plans())
def test_a_plan_shows_each_group_once_an_epoch_in_rows_that_hold_it(drawn):
    lengths, ends, arguments, epochs = drawn
    plan = packing.make_plan(lengths, ends, epochs=epochs, **arguments)
    assert sum(plan.epoch_steps) == plan.steps and len(plan.epoch_steps) == epochs
    starts = np.cumsum((0, *plan.epoch_steps))
    for start, stop in itertools.pairwise(starts):
        rows = [row for step in range(start, stop) for row in plan.rows(step)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= arguments["row_tokens"] for row in rows)
        full = [len(plan.rows(step)) for step in range(start, stop)]
        assert all(n == plan.rows_per_step for n in full[:-1]) and 0 < full[-1] <= plan.rows_per_step
    every = [row for step in range(plan.steps) for row in plan.rows(step)]
    assert plan.max_groups == max(map(len, every)) and plan.max_ends == max(ends[row].sum() for row in every)
    filled = epochs * lengths.sum() / (len(every) * arguments["row_tokens"])
    assert plan.fill == pytest.approx(filled) and plan.fill <= 1


@FEW
@given(plans())
def test_a_plan_is_determined_and_a_longer_run_begins_with_it(drawn):
    lengths, ends, arguments, epochs = drawn
    plan, again = (packing.make_plan(lengths, ends, epochs=epochs, **arguments) for _ in range(2))
    longer = packing.make_plan(lengths, ends, epochs=epochs + 1, **arguments)
    for step in range(plan.steps):
        rows = [row.tolist() for row in plan.rows(step)]
        assert rows == [row.tolist() for row in again.rows(step)] == [row.tolist() for row in longer.rows(step)]
    cut = plan.first(max(1, plan.steps // 2))
    for step in range(cut.steps):
        assert [row.tolist() for row in cut.rows(step)] == [row.tolist() for row in plan.rows(step)]


@FEW
@given(st.lists(st.integers(0, 2), min_size=3, max_size=40), st.lists(st.floats(0, 3), min_size=3, max_size=3))
def test_a_mixture_shows_groups_as_often_as_its_weights_say(source, weights):
    source, weights = np.array(source), np.array(weights)
    shown = np.concatenate([packing.draw(source, weights, 0, epoch) for epoch in range(4)])
    for k in range(3):
        members = np.flatnonzero(source == k)
        counts = np.bincount(shown, minlength=len(source))[members]
        if len(members):
            assert counts.max() - counts.min() <= 1  # none again before all have been
            assert counts.sum() == round(weights[k] * len(members) * 4)


# Rows of a batch


class Trees:
    """Groups for the loader."""

    fields = Preferences().fields

    def __init__(self, groups):
        self.trees = [build_tree(sequences) for sequences in groups]

    def group(self, index):
        k = len(self.trees[index].end)
        wins = np.triu(np.full((k, k), 0.5 + index, np.float32), 1)
        labels = {"wins": wins, "ties": np.zeros_like(wins), "margin": np.zeros_like(wins)}
        return Group(self.trees[index], labels, 1.0 + index, f"g:{index}")


@FEW
@given(st.lists(SEQUENCES.filter(lambda x: len(x) > 1), min_size=1, max_size=8), st.integers(0, 3))
def test_a_row_holds_its_trees_end_to_end_and_padding_sees_itself(groups, seed):
    made = Trees(groups)
    lengths, ends = (np.array(list(map(f, made.trees))) for f in (len, lambda tree: len(tree.end)))
    plan = packing.make_plan(lengths, ends, row_tokens=int(lengths.max()) + 5, rows_per_step=2, seed=seed)
    shape = loader.plan_shape(plan, int(ends.max()), micro_rows=2, row_devices=1, labels=made.fields)
    source = loader.StepSource(made, plan, shape, range(shape.rows))
    for step in range(plan.steps):
        batch = {name: x.reshape(-1, *x.shape[2:]) for name, x in source[step].items()}
        for r, members in enumerate(plan.rows(step)):
            at, scored = 0, 0
            for g, index in enumerate(members.tolist()):
                tree = made.trees[index]
                here = slice(at, at + len(tree))
                assert batch["tokens"][r, here].tolist() == tree.tokens.tolist()
                assert batch["positions"][r, here].tolist() == tree.positions.tolist()
                assert (batch["visible_from"][r, here] == at).all()
                assert (batch["visible_until"][r, here] == at + tree.visible_until).all()
                of_group = batch["end_group"][r] == g
                where = of_group & (batch["end"][r] >= 0)
                assert sorted(batch["end"][r][where].tolist()) == sorted((at + tree.end).tolist())
                assert batch["weight"][r, g] == 1.0 + index
                k = len(tree.end)
                np.testing.assert_array_equal(batch["wins"][r, g, :k, :k], made.group(index).labels["wins"])
                at, scored = at + len(tree), scored + k
            padding = np.arange(at, shape.tokens)
            assert (batch["visible_from"][r, at:] == padding).all()
            assert (batch["visible_until"][r, at:] == padding + 1).all()
            assert (batch["end"][r] >= 0).sum() == scored
            assert (batch["weight"][r, len(members) :] == 0).all()


# Records

TEXTS = st.one_of(st.text(max_size=6), st.none(), st.integers(), st.just("\ud800"))
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from([*ROLES, "king"]), "content": TEXTS}),
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), TEXTS, max_size=3),
    st.integers(),
)
CONVERSATIONS = st.one_of(st.lists(MESSAGES, max_size=4), TEXTS)


@settings(FEW, max_examples=200)
@given(CONVERSATIONS)
def test_a_conversation_is_whole_or_a_named_bad_row(conversation):
    try:
        checked = check_conversation(conversation)
    except BadRow as bad:
        assert bad.reason in ("wrong_type", "no_assistant_turn", "empty_response") and bad.detail
        return
    assert checked[-1]["role"] == "assistant" and all(message["role"] in ROLES for message in checked)
    assert checked[-1].get("tool_calls") or checked[-1]["content"].strip()
    for message in checked:
        (message.get("content") or "").encode()


ANSWERS = st.sampled_from(["yes", "no", "maybe", "", " "])


@settings(FEW, max_examples=100)
@given(st.lists(ANSWERS, min_size=1, max_size=5), st.booleans(), st.data())
def test_a_group_keeps_what_was_said_of_the_responses_it_keeps(answers, compared, data):
    k = len(answers)
    wins = np.triu(np.arange(1, k * k + 1, dtype=np.float32).reshape(k, k), 1) if compared else np.zeros((k, k))
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": a}] for a in answers]
    scores = data.draw(st.lists(st.floats(-5, 5), min_size=k, max_size=k))
    defects: list[BadRow] = []
    try:
        made = group(turns, wins=wins, attributes={"score": scores}, defects=defects)
    except BadRow as bad:
        assert bad.reason in ("empty_response", "identical_responses")
        return
    kept = [i for i, a in enumerate(answers) if a.strip() and a not in answers[:i]]
    assert isinstance(made, Record) and len(defects) == k - len(kept)
    assert [c[-1]["content"] for c in made.conversations] == [answers[i] for i in kept]
    assert made.attributes["score"] == tuple(scores[i] for i in kept)
    np.testing.assert_array_equal(made.wins, wins[np.ix_(kept, kept)])
