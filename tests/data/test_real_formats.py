"""Every set of real rows is detected, read with the counts of its description, and survives a round trip."""

import collections
import functools
import gzip
import json
import math

import numpy as np
import pytest
from test_store import assert_same, read_back

from rmjax.data import formats, sources, store
from rmjax.data.records import BadRow

# file, its format, rows, records, defects of whole rows, defects of parts
SETS = {
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


@pytest.fixture(scope="session")
def read(shared_data):
    """Records, defects of whole rows and of parts of rows, by file and format."""

    @functools.cache
    def call(name, form="auto"):
        rows = list(sources.open_source(str(shared_data / name)))
        layout = formats.detect([row for _, row in rows[: formats.LOOK]], form)
        records, whole, parts = [], collections.Counter(), []
        for where, row in rows:
            try:
                records += layout.read(row, source=name, where=where, defects=parts)
            except BadRow as bad:
                whole[bad.reason] += 1
        return layout.name, len(rows), records, whole, collections.Counter(bad.reason for bad in parts)

    return call


def raw(shared_data, name):
    """The rows, read without any of our code."""
    data = (shared_data / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    return json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.parametrize("name", SETS)
def test_counts(read, name):
    form, rows, records, whole, parts = read(name)
    assert (form, rows, len(records), dict(whole), dict(parts)) == SETS[name]


@pytest.mark.parametrize("name", SETS)
def test_round_trip(read, name, tmp_path):
    records = read(name)[2]
    assert store.write(tmp_path / "r.parquet", records) == len(records)
    for first, second in zip(records, read_back(tmp_path / "r.parquet"), strict=True):
        assert_same(first, second)


def test_finegrained_comparisons(read, shared_data):
    name = "finegrained-rlhf/dev_feedback.json.gz"
    records, rows = read(name)[2], raw(shared_data, name)
    verdicts = collections.Counter(v for row in rows for v in row["preference"])
    assert sum(verdicts.values()) == 3000 and verdicts[0] == 384
    assert sum((r.ties > 0).sum() for r in records) == 2 * 384
    assert sum(np.triu(r.wins).sum() for r in records) == verdicts[1]
    assert sum(np.tril(r.wins).sum() for r in records) == verdicts[2]
    for record, row in zip(records, rows):
        asked = record.conversations[0][0]["content"]
        assert asked.startswith(row["question"]) and all(p[0] in asked and p[-1] in asked for p in row["passages"])


def test_open_assistant_ranks(read):
    records = read("open-assistant/en_100_tree.jsonl")[2]
    assert sum(int(r.wins.sum()) for r in records) == 751 and not any(r.ties.any() for r in records)
    for record in records:
        assert {m["role"] for m in record.conversations[0]} == {"user", "assistant"}
        k = len(record.conversations)
        assert sorted(record.wins.sum(axis=1)) == list(range(k))  # a full order


def test_kto_labels(read, shared_data):
    name = "llama-factory/kto_en_demo.json"
    labels = [r.attributes["label"][0] for r in read(name)[2]]
    assert labels == [float(row["label"]) for row in raw(shared_data, name)] and 0 < sum(labels) < 300


def test_pandalm_votes(read):
    records = read("pandalm/testset-v1.json")[2]
    for record in records:
        shares = [record.wins[0, 1], record.wins[1, 0], record.ties[0, 1]]
        assert sum(shares) == pytest.approx(1, abs=1e-6) and record.agreement == pytest.approx(max(shares), abs=1e-6)
    prompts = {record.conversations[0][0]["content"] for record in records}
    assert len(prompts) <= 170


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        (
            "topical_chat",
            {
                "understandability": (0, 1),
                "naturalness": (1, 3),
                "coherence": (1, 3),
                "engagingness": (1, 3),
                "groundedness": (0, 1),
                "overall": (1, 5),
            },
        ),
        ("sfres", dict.fromkeys(("informativeness", "naturalness", "overall"), (1, 6))),
        ("sfhot", dict.fromkeys(("informativeness", "naturalness", "overall"), (1, 6))),
    ],
)
def test_unieval_axes_and_their_scales(read, shared_data, name, scales):
    path = f"unieval/{name}.json"
    records = read(path)[2]
    for axis, (low, high) in scales.items():
        values = [record.attributes[axis][0] for record in records]
        assert low <= min(values) and max(values) <= high and len(set(values)) > 3
        assert values == [row["scores"][axis] for row in raw(shared_data, path)]
    assert all(set(record.attributes) == set(scales) for record in records)


@pytest.mark.parametrize("name", ["mt_bench_eval", "vicuna_eval"])
def test_prometheus_ratings_and_feedback(read, shared_data, name):
    path = f"prometheus/{name}.json.gz"
    rows = raw(shared_data, path)
    for record, row in zip(read(path)[2], rows):
        assert record.attributes["score"][0] == pytest.approx(np.mean(row["gpt4_score"]))
        assert 1 <= record.attributes["score"][0] <= 5
        asked, answered = (m["content"] for m in record.conversations[0])
        assert asked in row["instruction"] and answered in row["instruction"]
        assert "###" not in asked + answered
    _, count, written, whole, parts = read(path, "prometheus_judge")
    # Where two judges wrote the same words and rating, one of them is left out.
    assert count == 320 and sum(len(r.conversations) for r in written) + parts["identical_responses"] == 960
    assert not whole and set(parts) <= {"identical_responses"}
    for record, row in zip(written, rows):
        assert record.conversations[0][-1]["content"].endswith(f"[RESULT] {row['gpt4_score'][0]}")


def test_nemo_attributes(read, shared_data):
    name = "nemo-aligner/test-rm.jsonl"
    for record, row in zip(read(name)[2], raw(shared_data, name)):
        values = [v[0] for v in record.attributes.values()]
        np.testing.assert_equal(values, [math.nan if x == -100 else x for x in row["label"]])
        assert [math.isnan(v) for v in values] == [True] * 4 + [False] * 5
        content = record.conversations[0][-1]["content"]
        assert content and "extra_id" not in "".join(m["content"] for m in record.conversations[0])
        assert row["text"].endswith(f"<extra_id_1>Assistant\n{content}\n<extra_id_2>")
