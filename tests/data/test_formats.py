"""Sources and formats: rows in, records out; what is unclear is refused and what is wrong is counted."""

import contextlib
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_rows import NAMED, ROWS, SYSTEM, UNANSWERED, UNLABELLED, assistant, user

from rmjax.data import formats, sources
from rmjax.data.records import BadRow

CONVERSATIONS = {
    "pair_text": ([user("q"), assistant("yes")], [user("q"), assistant("no")]),
    "pair_transcript": (
        [user("a"), assistant("b"), user("q"), assistant("yes")],
        [user("a"), assistant("other"), user("q"), assistant("no")],
    ),
    "pair_plain": ([user(""), assistant("yes")], [user(""), assistant("no")]),
    "pair_messages": ([user("q"), assistant("yes")], [user("q"), assistant("no")]),
    "pair_conversations": ([SYSTEM, user("q"), assistant("yes")], [SYSTEM, user("q"), assistant("no")]),
}


def read(row, name="auto", rows=None, **kwargs):
    return formats.detect(rows or [row], name).read(row, source="here", where="f:0", **kwargs)[0]


def reason(row, **kwargs):
    with pytest.raises(BadRow) as error:
        read(row, **kwargs)
    return error.value.reason


@pytest.mark.parametrize("name", formats.FORMATS)
def test_each_format_is_recognised_by_its_columns(name):
    if name in NAMED:
        with contextlib.suppress(ValueError):  # no other format fits
            assert formats.detect([NAMED[name]]).name != name
        assert formats.detect([NAMED[name]], name).name == name
    else:
        assert formats.detect([ROWS[name]]).name == name
        if name != "pair_plain":  # whose prompt the note could be
            assert formats.detect([{**ROWS[name], "note": "a column of no meaning"}]).name == name


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_pair_format_is_read(name):
    record = read(ROWS[name])
    assert tuple(map(list, record.conversations)) == CONVERSATIONS[name]
    np.testing.assert_array_equal(record.wins, [[0, 1], [0, 0]])
    assert (record.source, record.row, record.weight) == ("here", "f:0", 1.0)


def test_first_rows_must_agree():
    rows = [ROWS["pair_plain"], ROWS["pair_transcript"]]
    with pytest.raises(ValueError, match=r"do not agree.*pair_transcript.*pair_plain"):
        formats.detect(rows)
    assert formats.detect(rows, "pair_plain").name == "pair_plain"


def test_unknown_columns_name_what_was_seen_and_the_closest():
    with pytest.raises(ValueError, match=r"prompt \(str\), choosen \(str\).*Closest is pair_text.*mean 'choosen'"):
        formats.detect([{"prompt": "x", "choosen": "y", "rejected": "z"}])
    with pytest.raises(ValueError, match=r"Closest is stepwise, which needs 'labels' as a list, not as str '\+-'"):
        formats.detect([{"prompt": "x", "completions": ["y", "z"], "labels": "+-"}])
    with pytest.raises(ValueError, match=r"Closest is ranked, but its rows differ.*`scores` \(higher is better\)"):
        formats.detect([{"prompt": "x", "responses": ["y", "z"]}])
    with pytest.raises(ValueError, match="did you mean 'pair_text'"):
        formats.detect([ROWS["pair_text"]], "pairtext")
    with pytest.raises(ValueError, match="needs a column 'prompt'"):
        formats.detect([ROWS["pair_plain"]], "pair_text")
    with pytest.raises(ValueError, match=r"scored_text needs a column of numbers that are scores.*response \(str\)"):
        formats.detect([{"prompt": "q", "response": "a"}])


@pytest.mark.parametrize("column", ["promt", "passage", "note"])
def test_a_prompt_under_an_unknown_name_is_not_dropped_without_a_word(column):
    row = {column: "q", **ROWS["pair_plain"]}
    with pytest.raises(ValueError, match=r"Closest is pair_text, which needs 'prompt'.*name the format pair_plain"):
        formats.detect([row])
    assert formats.detect([row], columns=f"prompt={column}").name == "pair_text"


@pytest.mark.parametrize(
    "printed", [repr, lambda turns: "[" + "\n ".join(map(repr, turns)) + "]", lambda turns: repr(turns[-1])]
)
def test_messages_as_python_prints_them_are_no_texts(printed):
    """By themselves, in one of numpy's arrays, and a single one."""
    as_text = {
        c: printed([*cell, {"role": "assistant", "content": r"it's \d"}]) for c, cell in ROWS["pair_messages"].items()
    }
    for row in ({"prompt": "q", **as_text}, as_text):
        with pytest.raises(ValueError, match=r"'chosen' and 'rejected' hold conversations as text \(the first is str"):
            formats.detect([row])
    assert formats.detect([{"prompt": "q", **as_text}], "pair_text").name == "pair_text"
    with pytest.raises(ValueError, match="'context' hold conversations as text"):
        formats.detect([{**ROWS["pair_text"], "context": as_text["chosen"]}])
    with pytest.raises(ValueError, match=r"'chosen' is wrong throughout.*holds a list or object as text"):
        formats.detect([as_text], "pair_messages")
    assert formats.detect([{**ROWS["pair_text"], "chosen": "{'a': 1}"}]).name == "pair_text"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a"},
        {"id": "1", "prompt": "q", "chosen": ["a"], "rejected": "b"},
        {"source": "s", "question": "q", "response_A": "a", "response_B": "b"},
        {"pair_uid": "1", "chosen": "a", "reject": "b"},
        {"prompt": "q", "completions": ["a"]},
        {},
    ],
)
def test_the_closest_format_is_no_benchmark_of_other_columns(row):
    with pytest.raises(ValueError, match="Closest is") as error:
        formats.detect([row])
    assert not any(f"Closest is {name}," in str(error.value) for name in NAMED if name not in UNLABELLED | UNANSWERED)


def test_the_closest_format_may_be_a_benchmark_that_has_to_be_named():
    with pytest.raises(ValueError, match="Closest is rmb_best_of_n, which has to be named"):
        formats.detect([NAMED["rmb_best_of_n"]])


def test_null_is_not_a_missing_column():
    good = ROWS["pair_text"]
    with pytest.raises(ValueError, match="column 'prompt' is null throughout; pair_text needs it"):
        formats.detect([{**good, "prompt": None}], "pair_text")
    with pytest.raises(BadRow, match="prompt is NoneType None, expected text"):
        read({**good, "prompt": None}, rows=[good])
    with pytest.raises(BadRow, match=r"it has no column 'prompt'.*it has 'chosen', 'rejected'"):
        read(ROWS["pair_plain"], rows=[good])


@pytest.mark.parametrize("name", ["pair_text", "pair_transcript", "pair_messages", "scored_text", "boolean_text"])
def test_a_null_response_is_an_empty_one(name):
    for column in {"chosen", "rejected", "response", "completion"} & set(ROWS[name]):
        assert reason({**ROWS[name], column: None}, rows=[ROWS[name]]) == "empty_response"
    turns = [user("q"), {"role": "assistant", "content": None}]
    assert reason({**ROWS["boolean"], "messages": turns}) == "empty_response"


def test_a_null_response_of_several_is_left_out_alone():
    defects = []
    row = {"prompt": "q", "responses": ["a", None, "c"], "ranks": [1, 2, 3]}
    record = read(row, defects=defects)
    assert [c[-1]["content"] for c in record.conversations] == ["a", "c"]
    assert [bad.reason for bad in defects] == ["empty_response"]
    assert [c[-1]["content"] for c in read(row, keep=True).conversations] == ["a", "", "c"]


def test_json_written_as_text_is_said():
    as_text = lambda name: {c: cell if isinstance(cell, bool) else json.dumps(cell) for c, cell in ROWS[name].items()}
    with pytest.raises(
        ValueError, match=r"'messages' hold JSON or Python as text \(the first is str .*this is boolean"
    ):
        formats.detect([as_text("boolean")])
    with pytest.raises(
        ValueError, match=r"'messages' is wrong throughout: a list of messages.*holds a list or object as text"
    ):
        formats.detect([as_text("boolean")], "boolean")
    rows = [{"prompt": "q", **as_text("pair_messages")}]  # texts, so it would fit pair_text
    with pytest.raises(ValueError, match=r"'chosen' and 'rejected' hold conversations as text"):
        formats.detect(rows)
    assert formats.detect(rows, "pair_text").name == "pair_text"
    assert formats.detect([{**ROWS["pair_text"], "chosen": "[1, 2]"}]).name == "pair_text"


def test_every_format_says_what_it_is():
    assert all(form.means for form in formats.FORMATS.values())


def test_a_wrong_column_is_an_error_and_a_wrong_cell_a_bad_row():
    good = ROWS["pair_text"]
    with pytest.raises(ValueError, match="'weight' is wrong throughout"):
        formats.detect([{**good, "weight": "heavy"}])
    with pytest.raises(ValueError, match="'rejected' is wrong throughout"):
        formats.detect([{**good, "rejected": True}], "pair_text")
    assert reason({**good, "rejected": True}, rows=[good]) == "wrong_type"
    assert reason({**good, "weight": -1}, rows=[good]) == "wrong_type"
    assert reason({**good, "chosen": " \n"}) == "empty_response"
    assert reason({**good, "chosen": "no"}) == "identical_responses"
    row = {"chosen": [user("q")], "rejected": [user("q"), assistant("no")]}
    assert reason(row) == "no_assistant_turn"
    assert reason({"chosen": [{"role": "boss", "content": "q"}], "rejected": [user("q")]}) == "wrong_type"


def test_keep_lets_defects_that_allow_training_through():
    same = {**ROWS["pair_text"], "chosen": "no"}
    assert len(read(same, keep=True).conversations) == 2
    assert read({**same, "chosen": ""}, keep=True).wins[0, 1] == 1
    assert reason({**same, "chosen": 3}, rows=[same], keep=True) == "wrong_type"


@pytest.mark.parametrize(
    ("cells", "margin"),
    [
        ({"margin": 2}, 2),
        ({"preference_strength": 3}, 3),
        ({"margin": 2, "preference_strength": 3}, 2),
        ({"chosen_score": 7.5, "rejected_score": 6}, 1.5),
        ({"margin": None, "chosen_score": 2, "rejected_score": float("nan")}, np.nan),
        ({"margin": 0}, 0),
        ({"chosen_score": 2, "rejected_score": 2}, 0),
    ],
)
def test_margins(cells, margin):
    record = read({**ROWS["pair_text"], **cells}, rows=[{**ROWS["pair_text"], **dict.fromkeys(cells, 1)}])
    np.testing.assert_array_equal(record.margin, [[0, margin], [0, 0]])


def test_labels_that_contradict_themselves():
    good = ROWS["pair_text"]
    assert reason({**good, "chosen_score": 1, "rejected_score": 2}) == "conflicting_label"
    assert reason({**good, "margin": -1}) == "conflicting_label"
    assert reason({**good, "preference": 0.8, "chosen_score": 1, "rejected_score": 2}) == "conflicting_label"
    assert reason({**good, "preference": 1.4}, rows=[{**good, "preference": 0.4}]) == "conflicting_label"


@pytest.mark.parametrize(
    ("seen", "value", "expected"),
    [
        ([0.0, 1.0], 0.25, 0.25),  # a probability
        ([1, 2], 2, 0.0),  # a place: the second is better
        ([1, 2], 1, 1.0),
        ([1.5, 1.25], 1.25, 0.75),
        ([1, 1], 1, 1.0),  # means the same in both scales
    ],
)
def test_scales_of_soft_preferences(seen, value, expected):
    rows = [{**ROWS["pair_text"], "preference": p} for p in seen]
    record = read({**ROWS["pair_text"], "preference": value}, rows=rows)
    np.testing.assert_allclose(record.wins, [[0, expected], [1 - expected, 0]])


def test_a_tie_written_as_zero_beside_one_and_two_is_refused():
    rows = [{**ROWS["pair_text"], "preference": p} for p in (0, 1, 2)]
    with pytest.raises(ValueError, match="preference runs from 0 to 2"):
        formats.detect(rows)
    record = read({**ROWS["pair_text"], "preference": 0.5})
    assert not record.wins.any() and record.ties.tolist() == [[0, 1], [1, 0]]


def test_other_columns_reach_the_record():
    tool = {"type": "function", "function": {"name": "f"}}
    extra = {"system": "be brief", "tools": json.dumps([tool]), "source": "elsewhere", "weight": 0.5}
    record = read({**ROWS["pair_text"], **extra})
    assert record.conversations[1][0] == {"role": "system", "content": "be brief"}
    assert (record.tools, record.source, record.weight) == ((tool,), "elsewhere", 0.5)
    own = read({**ROWS["pair_conversations"], **extra})
    assert own.conversations[0][0]["content"] == "be kind"  # a conversation's own system message stays


def test_prompts_of_messages_apart_or_repeated():
    last = {"chosen": [assistant("yes")], "rejected": [assistant("no")]}
    whole = ROWS["pair_messages"]
    for row in (
        {"prompt": [user("q")], **last},
        {"prompt": "q", **last},
        {"prompt": "q", **whole},
        {"prompt": [user("q")], **whole},
    ):
        assert tuple(map(list, read(row).conversations)) == CONVERSATIONS["pair_messages"]
    system = {"role": "system", "content": "s"}
    assert list(read({"prompt": [system], **whole}).conversations[0]) == [system, user("q"), assistant("yes")]


def test_null_fields_of_messages_vanish():
    # Arrow gives every struct the fields of all others.
    message = {**assistant("yes"), "tool_calls": None}
    record = read({**ROWS["pair_messages"], "chosen": [user("q"), message]})
    assert record.conversations[0][1] == assistant("yes")


def test_transcripts_may_continue_a_prompt():
    row = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " yes", "rejected": " no"}
    assert formats.detect([row]).name == "pair_transcript"
    assert tuple(map(list, read(row).conversations)) == CONVERSATIONS["pair_text"]
    empty = {**ROWS["pair_transcript"], "chosen": "\n\nHuman: q\n\nAssistant:"}
    assert reason(empty) == "empty_response"


def write(path, rows):
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(text)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        writer = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with writer(path, table.schema) as sink:
            sink.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.arrow", "stream.arrow"])
def test_every_kind_of_file(tmp_path, name):
    rows = [{"chosen": f"yes {i}", "rejected": "né\u2028"} for i in range(2500)]
    path = write(tmp_path / name, rows)
    assert list(sources.open_source(str(path))) == [(f"{name}:{i}", row) for i, row in enumerate(rows)]
    assert sources.count_rows(str(path)) == 2500


def test_directories_globs_and_lists(tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(3):
        write(tmp_path / "d" / f"p{i}.jsonl", [{"n": i}])
    (tmp_path / "d" / "dataset_info.json").write_text("{}")
    ns = lambda spec: [row["n"] for _, row in sources.open_source(spec)]
    assert ns(f"{tmp_path}/d") == ns(f"{tmp_path}/d/*.jsonl") == [0, 1, 2]
    assert ns(f"{tmp_path}/d/p2.jsonl, {tmp_path}/d/p0.jsonl") == [2, 0]
    write(tmp_path / "d" / "q.parquet", [{"n": 3}])
    with pytest.raises(ValueError, match="several kinds"):
        ns(f"{tmp_path}/d")


def test_json_columns_and_misnamed_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"chosen": [[user("q"), assistant("a")]] * 2, "rejected": [[user("q")]] * 2}))
    rows = [row for _, row in sources.open_source(str(path))]
    assert [len(row["chosen"]) for row in rows] == [2, 2] and formats.detect(rows).name == "pair_messages"
    path.write_text(json.dumps({"chosen": [1, 2], "rejected": [1]}))
    with pytest.raises(ValueError, match="equally long columns"):
        list(sources.open_source(str(path)))
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert [row["n"] for _, row in sources.open_source(str(path))] == [1, 2]


def test_what_cannot_be_read_is_said_clearly(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl: no such file"):
        list(sources.open_source(str(path)))
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        list(sources.open_source(str(path)))
    path.write_text('{"n": 1}\n\n{"n": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON"):
        list(sources.open_source(str(path)))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is a list"):
        list(sources.open_source(str(path)))
    with pytest.raises(ValueError, match=r"unknown scheme ftp://.*hf://"):
        list(sources.open_source("ftp://bucket/a.jsonl"))
    with pytest.raises(ValueError, match="no data was named"):
        list(sources.open_source(" "))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        list(sources.open_source(f"{tmp_path}/a.parquet"))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match="unknown kind of file"):
        list(sources.open_source(f"{tmp_path}/a.csv"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.csv").write_text("a,b")
    with pytest.raises(FileNotFoundError, match=r"empty is a directory without any file that can be read: \.parquet"):
        list(sources.open_source(f"{tmp_path}/empty"))


def test_synthetic_sources_take_arguments():
    rows = [row for _, row in sources.open_source("synthetic://pairs?n=7&seed=3")]
    assert len(rows) == 7
    assert sources.fingerprint("synthetic://pairs?n=7") != sources.fingerprint("synthetic://pairs?n=8")


def test_fingerprint_follows_contents(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"n": 1}])
    before = sources.fingerprint(str(path))
    assert before == sources.fingerprint(str(path))
    write(path, [{"n": 2}])
    assert before != sources.fingerprint(str(path))
