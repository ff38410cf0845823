"""Records written as Parquet and read back: the same, for every format and for everything a record can say."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from format_rows import NAMED, ROWS, SYSTEM, assistant, user

from rmjax.data import formats, labelling, sources, store
from rmjax.data.records import BadRow, Record, Step, group, pair
from rmjax.runtime import files


def read_back(path):
    rows = list(sources.open_source(str(path)))
    layout = formats.detect([row for _, row in rows])
    assert layout.name == "records"
    return [record for where, row in rows for record in layout.read(row, source="elsewhere", where=where)]


def assert_same(first, second):
    assert dataclasses.asdict(first).keys() == dataclasses.asdict(second).keys()
    for field in dataclasses.fields(Record):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert type(one) is type(other), field.name
        np.testing.assert_equal(one, other, err_msg=field.name)  # NaN is equal to NaN
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype


def there_and_back(records, path):
    assert store.write(path, records) == len(records)
    again = read_back(path)
    assert len(again) == len(records)
    for first, second in zip(records, again):
        assert_same(first, second)


def test_every_format_makes_the_same_records_after_a_round_trip(tmp_path):
    made = []
    names = set(formats.FORMATS) - {"prompt_only"}  # which has no responses
    for name in sorted(names):
        row = {**ROWS, **NAMED}[name]
        extra = {"weight": 0.1, "tools": [{"name": "f"}]} if name != "unieval" else {}
        for r in (row, {**row, **extra}):
            made += formats.detect([r], name).read(r, source=name, where=f"{name}:0")
    assert {record.row.partition(":")[0] for record in made} == names
    there_and_back(made, tmp_path / "all.parquet")


def random_record(rng, i):
    """A record that says anything at all, of 1 to 4 responses."""
    k = int(rng.integers(1, 5))
    text = lambda: "".join(rng.choice(list("ab \néки\u2028🙂\0"), rng.integers(1, 9))) + "."
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None, 0.1]}}}]}
    result = {"role": "tool", "content": text(), "tool_call_id": "1"}
    history = [[SYSTEM], [user(text())], [user(text()), {**call, "content": None}, result], [user("q"), call, result]]
    last = lambda j: {**assistant(f"{j}{text()}"), **({"reasoning_content": text()} if rng.random() < 0.5 else {})}
    number = lambda: math.nan if rng.random() < 0.3 else float(rng.normal())
    matrix = lambda: np.where(rng.random((k, k)) < 0.5, 0, rng.normal(size=(k, k)))
    steps = [[Step(j + 1, math.nan if rng.random() < 0.3 else float(rng.random())) for j in range(2)] for _ in range(k)]
    return group(
        [[*history[rng.integers(4)], last(j)] for j in range(k)],
        wins=matrix(),
        ties=matrix(),
        margin=np.where(rng.random((k, k)) < 0.2, math.nan, matrix()),
        attributes={name: [number() for _ in range(k)] for name in ("helpful", "ehrlich ß")[: rng.integers(3)]},
        steps=steps if rng.random() < 0.5 else (),
        agreement=number(),
        weight=float(rng.random()),
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}] if rng.random() < 0.5 else None,
        source=f"source {i % 3}",
        row=f"f.jsonl:{i}",
    )


def test_anything_a_record_says_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    records = [random_record(rng, i) for i in range(300)]
    there_and_back(records, tmp_path / "sub" / "r.parquet")


def test_records_stream_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP", 4)
    rng = np.random.default_rng(1)
    records = [random_record(rng, i) for i in range(10)]
    taken = []

    def source():
        for record in records:
            taken.append(record)
            yield record

    there_and_back(records, tmp_path / "r.parquet")
    assert store.write(tmp_path / "s.parquet", source()) == 10 == len(taken)
    groups = pq.ParquetFile(tmp_path / "s.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [4, 4, 2]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "r.parquet"
    record = random_record(np.random.default_rng(2), 0)
    store.write(path, [record])
    before = path.read_bytes()

    def broken():
        yield record
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="broke"):
        store.write(path, broken())
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["r.parquet"]
    assert store.write(tmp_path / "none.parquet", []) == 0
    assert pq.read_schema(tmp_path / "none.parquet").names == store.SCHEMA.names


def test_missing_values_are_null_for_people(tmp_path):
    record = group([[user("q"), assistant("a")]], attributes={"x": [math.nan]}, steps=[[Step(1, math.nan)]], source="s")
    store.write(tmp_path / "r.parquet", [record])
    (row,) = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert row["attributes"] == [{"name": "x", "values": [None]}] and row["steps"] == [[{"stop": 1, "label": None}]]
    assert row["agreement"] is None and row["tools"] is None
    store.write(tmp_path / "r.parquet", [pair([assistant("a")], [assistant("b")])])
    assert pq.read_table(tmp_path / "r.parquet")["margin"].to_pylist() == [[[0, None], [0, 0]]]
    assert row["conversations"][0][1] == {"role": "assistant", "content": "a", "extra": None}


def test_records_written_by_hand():
    layout = formats.Layout("records")
    read = lambda row: layout.read(row, source="here", where="f:3")[0]
    turns = [user("q"), {**assistant("a"), "reasoning_content": "hm"}]
    record = read({"conversations": [turns]})
    assert list(record.conversations[0]) == turns and (record.source, record.row, record.weight) == ("here", "f:3", 1)

    def reason(row):
        with pytest.raises(BadRow) as error:
            read({"conversations": [turns, [user("q"), assistant("b")]], **row})
        return error.value.reason

    assert reason({"wins": [[0, 1]]}) == reason({"wins": [[0, "x"], [0, 0]]}) == "wrong_type"
    assert reason({"wins": [[0]]}) == reason({"attributes": [{"name": "x", "values": [1]}]}) == "conflicting_label"
    assert reason({"steps": [[{"stop": 1, "label": 2}], []]}) == reason({"steps": [[{"stop": 1}], []]}) == "wrong_type"
    assert reason({"conversations": [[{**user("q"), "extra": "{"}, assistant("a")]]}) == "wrong_type"
    assert reason({"conversations": [turns, turns]}) == "identical_responses"


def test_tools_are_json_text(tmp_path):
    tools = ({"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}},)
    record = group([[user("q"), assistant("a")]], tools=tools)
    assert "größe" in store.to_row(record)["tools"] and json.loads(store.to_row(record)["tools"]) == list(tools)
    half = group([[user("q"), {**assistant("a"), "reasoning_content": "\ud83d"}]], row="f:0", source="s")
    there_and_back([half], tmp_path / "r.parquet")


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Records, pages, tasks and audits: each file is synced under another name, renamed, and its directory synced."""
    done = []
    sync, replace = files.sync, Path.replace
    monkeypatch.setattr(files, "sync", lambda path: done.append(("sync", Path(path).name)) or sync(path))
    monkeypatch.setattr(Path, "replace", lambda a, b: done.append(("name", Path(b).name)) or replace(a, b))
    record = read_one()
    store.write(tmp_path / "a.parquet", [record])
    labelling.write_project(tmp_path / "tasks", [record])
    files.write_json(tmp_path / "audit.json", {"n": 1})
    for name in ("a.parquet", "tasks.json", "config.xml", "audit.json"):
        at = done.index(("name", name))
        assert done[at - 1] == ("sync", f".{name}.rmjax-partial") and done[at + 1][0] == "sync"
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"a.parquet", "tasks.json", "config.xml", "audit.json"}


def read_one():
    return formats.detect([ROWS["pair_text"]], "pair_text").read(ROWS["pair_text"], source="s", where="s:0")[0]


def test_a_report_takes_no_other_files_name(tmp_path):
    (tmp_path / "audit.tmp").write_text("precious")
    files.write_json(tmp_path / "audit.json", {"n": 1})
    assert (tmp_path / "audit.tmp").read_text() == "precious"
