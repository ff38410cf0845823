"""Judgements that are right are kept as conversations, and what becomes of each is counted."""

import json

import pytest

from rmjax.data import __main__ as data
from rmjax.data.keeping import keep_right

ASKED = {"role": "user", "content": "Which is better?"}
ROWS = [
    {
        "messages": [ASKED],
        "label": "A",
        "responses": ["a <better>A</better>", "<better>B</better>", "I do not know", "<better>A</better>", "again"],
        "verdicts": ["A", "B", None, "A", "A"],
        "finish": ["stop", "stop", "stop", "length", "stop"],
    },
    {"messages": [ASKED], "label": "tie", "responses": ["x", "y"], "verdicts": ["A", None], "finish": ["stop"] * 2},
    {"messages": [ASKED], "label": "B", "responses": [], "verdicts": [], "finish": []},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path):
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("most, kept", [(0, ["a <better>A</better>", "again"]), (1, ["a <better>A</better>"])])
def test_right_judgements_that_ended_are_kept(most, kept, tmp_path, capsys):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "new" / "right.jsonl"
    data.main(["keep_right", str(source), f"--output={output}", f"--most={most}"])
    assert answers(output) == [[ASKED, {"role": "assistant", "content": text}] for text in kept]
    told = capsys.readouterr().out
    assert "7 judgements of 3 questions" in told and f"kept {len(kept)} " in told
    assert "wrong 2 " in told and "unreadable 2 " in told and "cut off 1 " in told
    assert ("right, beyond --most 1 " in told) == (most == 1)
    assert "2 questions have no judgement that is right" in told


def test_a_rating_is_right_where_it_is_the_label(tmp_path):
    row = {"messages": [ASKED], "label": 3, "responses": ["x", "y"], "verdicts": [3.0, 4.0], "finish": ["stop"] * 2}
    counts = keep_right(str(write(tmp_path / "in.jsonl", [row])), tmp_path / "right.jsonl")
    assert (counts["kept"], counts["wrong"], counts["without"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASKED], "responses": ["x"], "finish": ["stop"]}, r"in.jsonl:0 has no verdicts"),
        ({**ROWS[2], "label": None}, "has no label"),
        ({**ROWS[0], "finish": ["stop"]}, "has 5, 5, 1 responses, verdicts and values of finish"),
    ],
)
def test_rows_of_another_kind_are_refused_and_leave_nothing(row, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        keep_right(str(write(tmp_path / "in.jsonl", [row])), tmp_path / "right.jsonl")
    assert not (tmp_path / "right.jsonl").exists()


def test_the_output_is_no_input(tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(ValueError, match="is read as input"):
        keep_right(str(source), source)
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        keep_right(str(source), tmp_path / "right.parquet")
