"""Sets of rows in the shape of public ones are detected, read and written back; so are the public ones, if present."""

import collections
import functools
import math

import numpy as np
import pytest
import small_sets
from small_sets import SETS
from test_store import assert_same, read_back

from rmjax.data import formats, sources, store
from rmjax.data.records import BadRow

# file, its format, rows, records, defects of whole rows, defects of parts
SMALL = {
    "comparisons.json.gz": ("comparisons", 24, 24, {}, {}),
    "trees.jsonl": ("ranked_tree", 10, 18, {}, {"no_label": 2}),
    "pairs.json": ("pair_conversations", 36, 36, {}, {}),
    "chinese_pairs.json": ("pair_conversations", 24, 24, {}, {}),
    "booleans.json": ("boolean", 24, 24, {}, {}),
    "pairs_of_texts.jsonl": ("pair_conversations", 24, 24, {}, {}),
    "votes.json": ("annotated_pair", 120, 110, {"wrong_type": 4, "empty_response": 6}, {}),
    "talk_axes.json": ("unieval", 24, 24, {}, {}),
    "axes.json": ("unieval", 24, 24, {}, {}),
    "judges.json.gz": ("prometheus", 24, 24, {}, {}),
    "attributes.jsonl": ("nemo_text", 8, 8, {}, {}),
}
PUBLIC = {
    "finegrained-rlhf/dev_feedback.json.gz": ("comparisons", 500, 500, {}, {}),
    "open-assistant/en_100_tree.jsonl": ("ranked_tree", 100, 211, {}, {"no_label": 1}),
    "llama-factory/dpo_en_demo.json": ("pair_conversations", 299, 299, {}, {}),
    "llama-factory/dpo_zh_demo.json": ("pair_conversations", 300, 300, {}, {}),
    "llama-factory/kto_en_demo.json": ("boolean", 300, 300, {}, {}),
    "medicalgpt/dpo_zh_500.jsonl": ("pair_conversations", 499, 499, {}, {}),
    "pandalm/testset-v1.json": ("annotated_pair", 999, 939, {"wrong_type": 6, "empty_response": 54}, {}),
    "unieval/topical_chat.json": ("unieval", 360, 360, {}, {}),
    "unieval/sfres.json": ("unieval", 1181, 1181, {}, {}),
    "unieval/sfhot.json": ("unieval", 875, 875, {}, {}),
    "prometheus/mt_bench_eval.json.gz": ("prometheus", 320, 320, {}, {}),
    "prometheus/vicuna_eval.json.gz": ("prometheus", 320, 320, {}, {}),
    "nemo-aligner/test-rm.jsonl": ("nemo_text", 8, 8, {}, {}),
}


def read_file(path, form="auto"):
    """The format, rows, records, defects of whole rows and of parts of rows."""
    rows = list(sources.open_source(str(path)))
    layout = formats.detect([row for _, row in rows[: formats.LOOK]], form)
    records, whole, parts = [], collections.Counter(), []
    for where, row in rows:
        try:
            records += layout.read(row, source=path.name, where=where, defects=parts)
        except BadRow as bad:
            whole[bad.reason] += 1
    return layout.name, len(rows), records, whole, collections.Counter(bad.reason for bad in parts)


@pytest.fixture(scope="session")
def read(small_sets):
    """What `read_file` says of a small set."""
    return functools.cache(lambda name, form="auto": read_file(small_sets / name, form))


def assert_kept(records, path):
    assert store.write(path, records) == len(records)
    for first, second in zip(records, read_back(path), strict=True):
        assert_same(first, second)


def test_every_set_is_read():
    assert SMALL.keys() == SETS.keys() == small_sets.PUBLIC.keys() and set(small_sets.PUBLIC.values()) <= PUBLIC.keys()


@pytest.mark.parametrize("name", SMALL)
def test_counts(read, name):
    form, rows, records, whole, parts = read(name)
    assert (form, rows, len(records), dict(whole), dict(parts)) == SMALL[name]


@pytest.mark.parametrize("name", SMALL)
def test_round_trip(read, name, tmp_path):
    assert_kept(read(name)[2], tmp_path / "r.parquet")


@pytest.mark.parametrize("name", PUBLIC)
def test_counts_of_public_files(public_file, name, tmp_path):
    form, rows, records, whole, parts = read_file(public_file(name))
    assert (form, rows, len(records), dict(whole), dict(parts)) == PUBLIC[name]
    assert_kept(records, tmp_path / "r.parquet")


def leaves(value, path=""):
    """Where something stands in a row, without the numbers of elements, and its type."""
    if isinstance(value, dict):
        return {(path, "object")}.union(*(leaves(item, f"{path}.{key}") for key, item in value.items()))
    if isinstance(value, list):
        return {(path, "list")}.union(*(leaves(item, f"{path}[]") for item in value))
    return {(path, type(value).__name__)}


def test_columns_are_those_of_public_files(public_file):
    for name, public in small_sets.PUBLIC.items():
        rows = [row for _, row in sources.open_source(str(public_file(public)))]
        assert leaves(SETS[name]) <= leaves(rows), name


def test_comparisons_of_public_files(public_file):
    records = read_file(public_file("finegrained-rlhf/dev_feedback.json.gz"))[2]
    ties = sum((r.ties > 0).sum() for r in records) / 2
    assert ties == 384 and ties + sum(r.wins.sum() for r in records) == 3000
    records = read_file(public_file("open-assistant/en_100_tree.jsonl"))[2]
    assert sum(int(r.wins.sum()) for r in records) == 751 and not any(r.ties.any() for r in records)


def test_finegrained_comparisons(read):
    records, rows = read("comparisons.json.gz")[2], SETS["comparisons.json.gz"]
    verdicts = collections.Counter(v for row in rows for v in row["preference"])
    assert sum(verdicts.values()) == 6 * 24 and len(verdicts) == 3
    assert sum((r.ties > 0).sum() for r in records) == 2 * verdicts[0]
    assert sum(np.triu(r.wins).sum() for r in records) == verdicts[1]
    assert sum(np.tril(r.wins).sum() for r in records) == verdicts[2]
    for record, row in zip(records, rows):
        asked = record.conversations[0][0]["content"]
        assert asked.startswith(row["question"]) and all(p[0] in asked and p[-1] in asked for p in row["passages"])


def test_open_assistant_ranks(read):
    records = read("trees.jsonl")[2]
    assert sum(int(r.wins.sum()) for r in records) == 8 * 4 + 2 and not any(r.ties.any() for r in records)
    for record in records:
        assert {m["role"] for m in record.conversations[0]} == {"user", "assistant"}
        k = len(record.conversations)
        assert sorted(record.wins.sum(axis=1)) == list(range(k))  # a full order
        said = [conversation[-1]["content"] for conversation in record.conversations]
        if k == 3:  # ranks 1, 0, 2 in the order of the row
            best_first = [said[i].split()[-1] for i in np.argsort(-record.wins.sum(axis=1))]
            assert best_first == ["slowly.", "last.", "are."]


def test_kto_labels(read):
    labels = [r.attributes["label"][0] for r in read("booleans.json")[2]]
    assert labels == [float(row["label"]) for row in SETS["booleans.json"]] and 0 < sum(labels) < 24


def test_pandalm_votes(read):
    records = read("votes.json")[2]
    for record in records:
        shares = [record.wins[0, 1], record.wins[1, 0], record.ties[0, 1]]
        assert sum(shares) == pytest.approx(1, abs=1e-6) and record.agreement == pytest.approx(max(shares), abs=1e-6)
        row = SETS["votes.json"][int(record.row.rpartition(":")[2])]
        given = [row[f"annotator{i}"] for i in (1, 2, 3)]
        assert shares == pytest.approx([given.count(vote) / 3 for vote in (1, 2, 0)], abs=1e-6)
    assert len({record.conversations[0][0]["content"] for record in records}) == 24


@pytest.mark.parametrize("name", ["talk_axes.json", "axes.json"])
def test_unieval_axes(read, name):
    records = read(name)[2]
    for axis in SETS[name][0]["scores"]:
        values = [record.attributes[axis][0] for record in records]
        assert values == [row["scores"][axis] for row in SETS[name]] and len(set(values)) > 2
    assert all(record.attributes.keys() == SETS[name][0]["scores"].keys() for record in records)


def test_prometheus_ratings_and_feedback(read):
    name, rows = "judges.json.gz", SETS["judges.json.gz"]
    for record, row in zip(read(name)[2], rows):
        assert record.attributes["score"][0] == pytest.approx(np.mean(row["gpt4_score"]))
        assert 1 <= record.attributes["score"][0] <= 5
        asked, answered = (m["content"] for m in record.conversations[0])
        assert asked in row["instruction"] and answered in row["instruction"]
        assert "###" not in asked + answered
    _, count, written, whole, parts = read(name, "prometheus_judge")
    # Where two judges wrote the same words and rating, one of them is left out.
    assert count == 24 and sum(len(r.conversations) for r in written) == 3 * 24 - 6
    assert not whole and parts == {"identical_responses": 6}
    for record, row in zip(written, rows):
        assert record.conversations[0][-1]["content"].endswith(f"[RESULT] {row['gpt4_score'][0]}")


def test_nemo_attributes(read):
    for record, row in zip(read("attributes.jsonl")[2], SETS["attributes.jsonl"]):
        values = [v[0] for v in record.attributes.values()]
        np.testing.assert_equal(values, [math.nan if x == -100 else x for x in row["label"]])
        assert [math.isnan(v) for v in values] == [True] * 4 + [False] * 5
        content = record.conversations[0][-1]["content"]
        assert content and "extra_id" not in "".join(m["content"] for m in record.conversations[0])
        assert row["text"].endswith(f"<extra_id_1>Assistant\n{content}\n<extra_id_2>")
