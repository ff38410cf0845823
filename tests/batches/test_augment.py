"""More training groups from those that are there: their labels, what validation sees, and how they are counted."""

import json

import numpy as np
import pytest

from rmjax.batches import augment, token_cache
from rmjax.batches import groups as groups_lib
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Preferences
from rmjax.data import ledger
from rmjax.data.formats import Layout


def ranked(i, ranks, weight=1.0):
    responses = [f"answer {i} {'word ' * k}" for k in range(len(ranks))]
    return {"prompt": f"question {i}", "responses": responses, "ranks": list(ranks), "weight": weight}


ROWS = [
    ranked(0, (1, 2, 3)),
    ranked(1, (2, 1, 2), weight=2.0),
    ranked(2, (2, 1)),
    *(ranked(i, (1, 2, 3, 4)) for i in range(3, 40)),
]


def record_of(row, where="f:0"):
    return Layout("ranked").read(row, source="s", where=where)[0]


@pytest.fixture
def build(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def call(*names, ties="keep", chat=None, **kwargs):
        options = {"workers": 0, "cache_dir": tmp_path / "cache", "augmentations": names, **kwargs}
        return token_cache.build(str(path), chat or Chat(tokenizer), Preferences(ties), **options)

    return call


def test_the_pairs_of_a_ranking():
    record = record_of(ranked(1, (2, 1, 2), weight=2.0))
    pairs = augment.all_pairs(record)
    assert [pair.row for pair in pairs] == ["f:0#0-1", "f:0#0-2", "f:0#1-2"]
    assert [pair.wins.tolist() for pair in pairs] == [[[0, 0], [1, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]
    assert [pair.ties.tolist() for pair in pairs] == [[[0, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 0], [0, 0]]]
    assert [pair.weight for pair in pairs] == [2.0] * 3
    assert pairs[2].conversations == record.conversations[1:]


def test_pairs_of_which_nothing_is_said_are_not_made():
    record = record_of(ranked(0, (1, 2, 3, 4)))
    silent = np.zeros((4, 4), np.float32)
    silent[2, 0] = 1.0
    partial = type(record)(record.conversations, silent, silent * 0, silent * 3)
    (pair,) = augment.all_pairs(partial)
    assert pair.wins.tolist() == [[0, 0], [1, 0]] and pair.margin[1, 0] == 3
    nothing = type(record)(record.conversations, silent * 0, silent * 0, silent * 0)
    assert augment.all_pairs(nothing) == [nothing]
    (pair,) = augment.all_pairs(record_of(ranked(2, (2, 1))))
    assert len(pair.conversations) == 2 and pair.row == "f:0"


def test_a_swap_turns_responses_and_labels():
    record = record_of(ranked(0, (1, 2, 3)))
    same, other = augment.swap(record)
    assert same is record and other.row == "f:0#swap" and other.conversations == record.conversations[::-1]
    np.testing.assert_array_equal(other.wins, record.wins[::-1, ::-1])
    assert augment.swap(record.select([0]))[0].conversations == record.conversations[:1]


@pytest.mark.parametrize(
    ("text", "message"), [("al_pairs", "did you mean 'all_pairs'"), ("swap,swap", "names 'swap' twice")]
)
def test_what_is_no_augmentation_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        augment.parse(text)


def ids(groups, uses=(augment.ANY, augment.TRAINING, augment.EVALUATION)):
    return [groups.id(i) for i in range(len(groups)) if groups.uses[i] in uses]


def test_training_sees_pairs_and_validation_the_rankings(build):
    plain, groups = build(), build("all_pairs")
    assert len(plain) == 40 and (plain.uses == augment.ANY).all() and plain.fingerprint != groups.fingerprint
    train = groups_lib.for_training(groups)
    assert set(train.responses) == {2} and len(train) == 3 + 3 + 1 + 37 * 6
    assert ids(train)[:4] == [f"rows.jsonl:0#{pair}" for pair in ("0-1", "0-2", "1-2")] + ["rows.jsonl:1#0-1"]
    # The same rows are split off as without augmentation, as they were read.
    for seed in (0, 1):
        train, validation = groups_lib.split(groups, 0.25, seed)
        before, expected = groups_lib.split(plain, 0.25, seed)
        assert ids(validation) == ids(expected)
        np.testing.assert_array_equal(validation.responses, expected.responses)
        assert {name.partition("#")[0] for name in ids(train)} == set(ids(before))
        assert set(train.responses) == {2} and ledger.shared_prompts(train, validation) == 0
    by_id = {name: plain.group(i) for i, name in enumerate(ids(plain))}
    for i in range(0, len(train), 17):
        row, _, pair = train.id(i).partition("#")
        if pair:
            sequences = by_id[row].tree.sequences()
            expected = [sequences[int(k)].tolist() for k in pair.split("-")]
            assert [path.tolist() for path in train.group(i).tree.sequences()] == expected


def test_what_augmentation_made_is_counted(build):
    groups = build("all_pairs", "swap")
    assert groups.audit.augmented == {"all_pairs": (39, 3 + 3 + 37 * 6), "swap": (229, 229)}
    assert groups.audit.sources == {"rows": 2 * 229}
    lines = ledger.lines(*groups_lib.split(groups, 0.2, 0))
    assert "  all_pairs made 228 groups of 39" in lines and "  swap made 229 groups of 229" in lines
    assert ledger.Audit.from_json(groups.audit.to_json()) == groups.audit
    again = build("all_pairs", "swap")  # from the file
    assert again.audit == groups.audit and ids(again, [augment.TRAINING]) == ids(groups, [augment.TRAINING])


def test_swaps_are_in_training_alone(build):
    groups = build("swap")
    train, validation = groups_lib.split(groups, 0.25, 0)
    assert not any("#" in name for name in ids(validation))
    assert sorted(ids(train)) == sorted(name + end for name in ids(train) if "#" not in name for end in ("", "#swap"))
    assert len(train) + 2 * len(validation) == len(groups) == 80


def test_a_row_counts_once_however_many_of_its_pairs_fail(build, tokenizer):
    skipped = build("all_pairs", ties="skip")
    assert {name: count.rows for name, count in skipped.audit.reasons.items()} == {"tie": 1}
    assert "rows.jsonl:1#0-2" not in ids(skipped)
    longest = build().longest
    groups = build("all_pairs", chat=Chat(tokenizer, max_length=int(longest[3]) - 1), max_bad_fraction=1.0)
    assert groups.audit.reasons["over_long"].rows == int((longest >= longest[3]).sum())
    assert "rows.jsonl:3#0-1" in ids(groups) and "rows.jsonl:3" not in ids(groups)
