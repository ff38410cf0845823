"""Filters, samples and weights: what a run takes of its data, and how often."""

import json
import re

import numpy as np
import pytest

from rmjax import config as config_lib
from rmjax import objectives
from rmjax.batches import packing, prepare, select, token_cache
from rmjax.batches.chat import Chat
from rmjax.batches.tasks import Preferences
from rmjax.data import ledger

SOURCES = {"owner/name": 60, "plain": 40}


def rows():
    """100 pairs with 25 prompts, four rows each, in two sources; sizes, margins and weights differ."""
    for i in range(100):
        source = "owner/name" if i < 60 else "plain"
        yield {
            "prompt": f"question {i // 4} " + "word " * (i // 4),
            "chosen": f"yes {i} " + "word " * (i % 7),
            "rejected": f"no {i} " + "word " * (i % 5),
            "margin": i % 3,
            "weight": 1 + i % 2,
            "source": source,
        }


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(path)


@pytest.fixture
def groups(tokenizer, tmp_path, data):
    return token_cache.build(data, Chat(tokenizer), Preferences(), workers=0, cache_dir=tmp_path / "cache")


def numbers(groups):
    """Row numbers of the groups."""
    return [int(groups.id(i).rpartition(":")[2]) for i in range(len(groups))]


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ("margin >= 1", lambda i, g: i % 3 >= 1),
        ("source == 'plain'", lambda i, g: i >= 60),
        ("source in ['plain', 'other'] and margin != 2", lambda i, g: i >= 60 and i % 3 != 2),
        ("source not in ['plain']", lambda i, g: i < 60),
        ("length < 60 or weight == 2", lambda i, g: g.longest[i] < 60 or i % 2 == 1),
        ("not (20 < tokens <= 70)", lambda i, g: not 20 < g.lengths[i] <= 70),
        ("prompt_characters > 60", lambda i, g: len(f"question {i // 4} " + "word " * (i // 4)) > 60),
        ("tokens * 2 > length + 80 & responses == 2", lambda i, g: g.lengths[i] * 2 > g.longest[i] + 80),
    ],
)
def test_a_filter_keeps_what_python_would(groups, text, keeps):
    filtered = select.filtered(groups, text)
    expected = [i for i in range(100) if keeps(i, groups)]
    assert 0 < len(expected) < 100 and numbers(filtered) == expected
    count = filtered.audit.reasons["filter"]
    assert count.rows == 100 - len(expected) and count.files == {"rows.jsonl": count.rows}
    assert filtered.audit.unusable() == 0 and not groups.audit.reasons
    np.testing.assert_array_equal(filtered.group(0).tree.tokens, groups.group(expected[0]).tree.tokens)


def test_a_filters_example_says_what_was_found(groups):
    filtered = select.filtered(groups, "margin > 0 and source != 'plain'")
    assert filtered.audit.reasons["filter"].example == "rows.jsonl:0: margin 0.0, source owner/name"
    assert any("filter 60: config.data.filter leaves it out" in line for line in ledger.lines(filtered, filtered))
    assert select.filtered(groups, " ") is groups and select.filtered(groups, "margin >= 0") is groups


def test_unknown_agreement_is_neither_more_nor_less(groups):
    with pytest.raises(ValueError, match="is true of none of 100 groups"):
        select.filtered(groups, "agreement > 0.6")
    assert len(select.filtered(groups, "agreement > 0.6 or margin == 1")) == 33


def test_thresholds_are_compared_as_the_numbers_they_are_written_as(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "margin": 0.1}) + "\n" for row in rows()))
    groups = token_cache.build(str(path), Chat(tokenizer), Preferences(), workers=0, cache_dir=tmp_path / "cache")
    assert len(select.filtered(groups, "margin >= 0.1")) == len(select.filtered(groups, "margin == 0.1")) == 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length < @limit", "is no expression"),
        ("length <", "is no expression"),
        ("lenght < 3", "'lenght' is no field; did you mean 'length'?"),
        ("__import__('os').system('true')", "is no comparison of fields"),
        ("source.str.len() > 3", "is no comparison of fields"),
        ("length if margin else tokens", "is no comparison of fields"),
        ("[x for x in source]", "is no comparison of fields"),
        ("margin is None", "is no comparison of fields"),
        ("length", "is not true or false of each group"),
        ("1 < 2", "is not true or false of each group"),
        ("source < 3", "cannot be evaluated"),
    ],
)
def test_what_is_no_filter_is_refused(groups, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        select.filtered(groups, text)
    assert "config.data.filter=" in str(error.value)
    if "no " in message:
        assert all(field in str(error.value) for field in select.FIELDS)


def test_a_sample_is_by_prompt_and_fixed(groups):
    sampled = select.sampled(groups, "owner/name=10, plain=50%", seed=1)
    kept = numbers(sampled)
    assert len([i for i in kept if i < 60]) == 12  # three prompts of four rows: two would be too few
    assert len([i for i in kept if i >= 60]) == 20
    assert all(kept.count(i) == 1 and {i // 4 * 4 + j for j in range(4)} <= set(kept) for i in kept)
    assert numbers(select.sampled(groups, "owner/name=10, plain=50%", seed=1)) == kept == sorted(kept)
    assert numbers(select.sampled(groups, "owner/name=10, plain=50%", seed=2)) != kept
    assert sampled.audit.reasons["sample"].rows == 68 and sampled.audit.unusable() == 0


def test_smaller_samples_are_parts_of_larger_ones(groups):
    kept = [set(numbers(select.sampled(groups, text, seed=0))) for text in ("10%", "40%", "plain=0,40%", "100%", "999")]
    assert kept[0] < kept[1] < kept[3] == kept[4] == set(range(100))
    assert kept[2] == {i for i in kept[1] if i < 60}


@pytest.mark.parametrize("text", ["owner/name", "plain=-1", "plain=1.5", "plain=101%", "plain=1,plain=2", "=3", "1,,2"])
def test_what_is_no_sample_is_refused(groups, text):
    with pytest.raises(ValueError, match=r"config\.data\.sample="):
        select.sampled(groups, text, seed=0)


@pytest.mark.parametrize("call", [lambda g, t: select.sampled(g, t, 0), lambda g, t: select.weights(g.sources, t)])
def test_an_unknown_source_is_named_with_the_known_ones(groups, call):
    with pytest.raises(
        ValueError, match=r"no source 'owner/nam'; did you mean 'owner/name'\?; there is owner/name, pla"
    ):
        call(groups, "owner/nam=2")


def test_weights_are_1_where_nothing_is_said(groups):
    assert select.weights(groups.sources, "owner/name=0.25").tolist() == [0.25, 1.0]
    for text in ("2", "plain=x", "plain=-1", "plain=inf", "plain=50%"):
        with pytest.raises(ValueError, match=r"config\.data\.weights="):
            select.weights(groups.sources, text)


def shown(groups, weights, epochs, seed=0):
    """How often each epoch shows each group, [epochs, n]."""
    draws = [packing.draw(groups.source, np.array(weights), seed, epoch) for epoch in range(epochs)]
    return np.array([np.bincount(drawn, minlength=len(groups)) for drawn in draws])


def test_an_epoch_shows_each_source_as_often_as_its_weight_says(groups):
    counts = shown(groups, [0.25, 2.5], epochs=8)
    first, second = counts[:, :60], counts[:, 60:]
    assert (first.sum(axis=1) == 15).all() and (second.sum(axis=1) == 100).all()
    assert set(np.unique(first)) == {0, 1} and set(np.unique(second)) == {2, 3}
    # Nothing again before all have been shown.
    assert (first[:4].sum(axis=0) == 1).all() and (first[4:].sum(axis=0) == 1).all()
    assert (second[:2].sum(axis=0) == 5).all() and (counts.sum(axis=0)[60:] == 20).all()


def test_a_fraction_that_does_not_divide_still_adds_up(groups):
    counts = shown(groups, [0.37, 1.61], epochs=10)
    assert counts[:, :60].sum() == round(3.7 * 60) and counts[:, 60:].sum() == round(16.1 * 40)
    running = np.cumsum(counts, axis=0)
    for part in (slice(60), slice(60, 100)):
        assert (running[:, part].max(axis=1) - running[:, part].min(axis=1) <= 1).all()
    assert not np.array_equal(shown(groups, [0.37, 1.61], 1, seed=1), counts[:1])
    assert (shown(groups, [0.0, 1.0], 3)[:, :60] == 0).all()


def plan_of(groups, **kwargs):
    options = {"row_tokens": 256, "groups_per_step": 8, "window": 32, "seed": 3} | kwargs
    return packing.make_plan(groups.lengths, groups.ends, source=groups.source, **options)


def test_the_plan_holds_what_the_epochs_draw_and_its_steps_are_exact(groups):
    weights = np.array([0.25, 2.5])
    plan = plan_of(groups, weights=weights, epochs=3)
    at = 0
    for epoch, steps in enumerate(plan.epoch_steps):
        rows = np.concatenate([row for step in range(at, at + steps) for row in plan.rows(step)])
        np.testing.assert_array_equal(np.sort(rows), packing.draw(groups.source, weights, 3, epoch))
        at += steps
    assert at == plan.steps and abs(plan.groups_per_step - 8) < 2
    # A longer plan begins with the same steps, so a run that is resumed or prolonged sees the same rows.
    longer = plan_of(groups, weights=weights, epochs=5)
    for step in range(plan.steps):
        assert all(np.array_equal(a, b) for a, b in zip(plan.rows(step), longer.rows(step), strict=True))


def test_weights_of_one_are_no_weights(groups):
    plain, weighted = plan_of(groups, epochs=2), plan_of(groups, weights=np.ones(2), epochs=2)
    np.testing.assert_array_equal(plain.groups, weighted.groups)
    np.testing.assert_array_equal(plain.step_start, weighted.step_start)
    with pytest.raises(ValueError, match="show no group in epoch 0"):
        plan_of(groups, weights=np.zeros(2))


def config_of(data, cache_dir, **keys):
    config = config_lib.defaults()
    config.data.train, config.data.cache_dir, config.data.workers = data, str(cache_dir), 0
    config.data.validation_fraction, config.plan.row_tokens = 0.2, 256
    for key, value in keys.items():
        config.data[key] = value
    return config


def read(config, tokenizer):
    return prepare.read_groups(config, Chat(tokenizer), objectives.make(config.objective).task)


def test_a_run_filters_both_sides_and_samples_training_alone(data, tokenizer, tmp_path, monkeypatch):
    train, _ = read(config_of(data, tmp_path), tokenizer)
    monkeypatch.setattr(token_cache, "_tokenize", lambda *a, **k: pytest.fail("tokenized again"))
    config = config_of(data, tmp_path, filter="margin > 0", sample="plain=8", weights="plain=3")
    fewer, checked = read(config, tokenizer)
    assert set(numbers(fewer)) < set(numbers(train)) and all(i % 3 for i in numbers(fewer) + numbers(checked))
    assert not set(fewer.prompt_ids) & set(checked.prompt_ids)
    config.data.sample = ""
    assert numbers(read(config, tokenizer)[1]) == numbers(checked)
    lines = ledger.lines(fewer, checked)
    assert sum(line.startswith("data: ") for line in lines) == 1
    assert any("filter 34:" in line for line in lines) and any("sample " in line for line in lines)
    config.data.sample, config.data.validation = "plain=8", data
    _, whole = read(config, tokenizer)
    assert len(whole) == 66 and "sample" not in whole.audit.reasons


def test_the_plan_says_what_an_epoch_shows(data, tokenizer, tmp_path):
    config = config_of(data, tmp_path, weights="owner/name=0.5,plain=2")
    groups, _ = read(config, tokenizer)
    have = np.bincount(groups.source)
    plan = prepare.plan_training(config, groups)
    drawn = round(0.5 * have[0]), 2 * have[1]
    share = [f"{n / sum(drawn):.1%}" for n in drawn]
    expected = f"plain {drawn[1]} of {have[1]} ({share[1]}), owner/name {drawn[0]} of {have[0]} ({share[0]})"
    assert prepare.describe_plan(groups, plan)[-1] == f"an epoch shows: {expected}"
    config.data.weights = "owner/nam=2"
    with pytest.raises(ValueError, match="there is no source 'owner/nam'"):
        prepare.plan_training(config, groups)


@pytest.mark.parametrize(
    "keys", [{"filter": "lengths < 3"}, {"sample": "x"}, {"weights": "2"}, {"augment": "al_pairs"}]
)
def test_mistakes_are_found_before_anything_is_read(data, tmp_path, keys):
    with pytest.raises(ValueError, match=rf"config\.data\.{next(iter(keys))}="):
        prepare.check_sources(config_of(data, tmp_path, **keys))
