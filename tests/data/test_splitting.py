"""Splits: a prompt is on one side, shares are as exact as prompts allow, for all rows and for every kind of them."""

import numpy as np
import pytest

from rmjax.data import splitting
from rmjax.data.records import Step, group

SHARES = {"train": 0.8, "validation": 0.15, "test": 0.05}


def conversation(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def rows(seed, n=300, most=6):
    """n rows: hashes of prompts that serve 1 to `most` rows each, and kinds that mostly follow the prompt."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most + 1, n)
    prompts = np.repeat(rng.integers(0, 2**63, n).astype(np.uint64), sizes)[:n]
    labels = (prompts % np.uint64(5)).astype(int) if most > 1 else rng.integers(0, 5, n)
    kinds = [(f"source {int(p) % 3}", f"label {label}") for p, label in zip(prompts, labels)]
    return prompts, kinds


def shares_error(parts, here, shares, unit):
    """Largest distance of a part's rows from its share of them, in `unit` rows."""
    counts = np.bincount(parts[here], minlength=len(shares))
    return np.abs(counts - np.array(list(shares.values())) * here.sum()).max() / unit


@pytest.mark.parametrize("shares", [SHARES, {"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}, {"only": 1.0}])
def test_no_prompt_is_in_two_parts_and_shares_are_within_a_prompt(shares):
    for seed in range(40):
        prompts, kinds = rows(seed)
        parts = splitting.assign_parts(prompts, kinds, shares, seed)
        assert len(np.unique(np.stack([prompts, parts.astype(np.uint64)]), axis=1).T) == len(np.unique(prompts))
        largest = np.unique(prompts, return_counts=True)[1].max()
        assert shares_error(parts, np.ones(len(prompts), bool), shares, largest) < 1


@pytest.mark.parametrize("shares", [SHARES, {"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}])
def test_each_source_and_each_label_is_within_two_rows_where_prompts_are_single(shares):
    for seed in range(40):
        prompts, kinds = rows(seed, most=1)
        parts = splitting.assign_parts(prompts, kinds, shares, seed)
        assert shares_error(parts, np.ones(len(prompts), bool), shares, 1) < 1
        for wanted in [*set(kinds), *((source,) for source, _ in set(kinds))]:
            here = np.array([kind[: len(wanted)] == wanted for kind in kinds])
            assert shares_error(parts, here, shares, 1) < 2


def test_rare_kinds_are_not_left_to_chance():
    """Forty rare rows among 4,000: without strata, validation gets at most half its share one time in five."""
    prompts = np.arange(4000, dtype=np.uint64)
    kinds = [("s", "rare" if i % 100 == 0 else "usual") for i in range(4000)]
    rare = np.arange(4000) % 100 == 0
    for seed in range(20):
        parts = splitting.assign_parts(prompts, kinds, {"train": 0.9, "validation": 0.1}, seed)
        assert abs((parts[rare] == 1).sum() - 4) <= 1


def test_the_seed_decides_and_the_order_of_rows_does_not():
    prompts, kinds = rows(0)
    parts = splitting.assign_parts(prompts, kinds, SHARES, 3)
    np.testing.assert_array_equal(parts, splitting.assign_parts(prompts, kinds, SHARES, 3))
    assert (parts != splitting.assign_parts(prompts, kinds, SHARES, 4)).any()
    order = np.random.default_rng(1).permutation(len(prompts))
    again = splitting.assign_parts(prompts[order], [kinds[i] for i in order], SHARES, 3)
    np.testing.assert_array_equal(parts[order], again)


def test_a_prompt_has_the_kind_of_most_of_its_rows():
    """Prompts 0..9 have one odd row of three; by their majority they are two kinds of five, shared out alike."""
    prompts = np.repeat(np.arange(10, dtype=np.uint64), 3)
    kinds = [("s", "odd" if i % 3 == 0 else f"kind {i // 3 % 2}") for i in range(30)]
    parts = splitting.assign_parts(prompts, kinds, {"a": 0.8, "b": 0.2}, 0)[::3]
    assert [(parts[k::2] == 1).sum() for k in (0, 1)] == [1, 1]


def test_labels_of_records():
    two = [conversation("q", "long answer"), conversation("q", "short")]
    win, loss = np.array([[0, 1], [0, 0]]), np.array([[0, 0], [1, 0]])
    assert splitting.label_kind(group(two, wins=win)) == splitting.label_kind(group(two, wins=loss)) == "preference"
    assert splitting.label_kind(group(two, wins=win, margin=2.4 * win)) == "preference, margin 2"
    assert splitting.label_kind(group(two, ties=win + loss)) == "tie"
    three = [*two, conversation("q", "other")]
    assert splitting.label_kind(group(three, wins=np.triu(np.ones((3, 3)), 1))) == "ranking of 3"
    assert splitting.label_kind(group(two[:1], attributes={"help": [0.74], "verbosity": [3]})) == "help 0.7"
    assert splitting.label_kind(group(two[:1], attributes={"help": [float("nan")]})) == "help missing"
    right, wrong = Step(4, 1.0), Step(11, 0.0)
    assert splitting.label_kind(group(two[:1], steps=[[right]])) == "all steps right"
    assert splitting.label_kind(group(two[:1], steps=[[right, wrong]])) == "a step is wrong"
    assert splitting.label_kind(group(two[:1])) == "no label"


def test_the_table_counts_every_kind():
    kinds = [("a", "x")] * 6 + [("b", "x")] * 4
    lines = splitting.shares_table(kinds, np.array([0, 0, 0, 0, 0, 1, 0, 0, 1, 1]), {"train": 0.7, "test": 0.3})
    cells = [line.replace(" / ", "/").split() for line in lines]
    assert cells[1:] == [
        ["a/x", "5", "(83.3%)", "1", "(16.7%)"],
        ["b/x", "2", "(50.0%)", "2", "(50.0%)"],
        ["all", "7", "(70.0%)", "3", "(30.0%)"],
    ]
    few = splitting.shares_table(kinds, np.zeros(10, int), {"train": 1.0}, most=1)
    assert few[2].split() == ["1", "other", "kinds", "4", "(100.0%)"]


def test_shares_are_read_and_refused():
    assert splitting.parse_shares("train=0.8, dev-set=0.2") == {"train": 0.8, "dev-set": 0.2}
    for text in ("", "train", "train=0.8;test=0.2", "train=0.5,train=0.5", "train=1.0,test=0", "train=1.2.3"):
        with pytest.raises(ValueError, match="is no split; write names with their shares"):
            splitting.parse_shares(text)
    with pytest.raises(ValueError, match=r"add up to 0\.9, expected 1"):
        splitting.parse_shares("train=0.8,test=0.1")
