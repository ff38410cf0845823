"""The score command: files in, files out, nothing lost, and nothing left behind when it fails."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl.testing import flagsaver

from rmjax.inference import contract
from rmjax.jobs import job
from rmjax.runtime import command_line
from rmjax.score import __main__ as score
from rmjax.score.making import Options

ROOT = Path(__file__).parents[2]


def row(i, **columns):
    """A row of two turns, unlike any other."""
    turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i * i}"}]
    return {"id": i, "messages": turns, **columns}


ROWS = [row(i, note=None if i < 4 else f"é{i}") for i in range(10)]


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "in.jsonl", ROWS)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(loaded, rows):
    return [{**r, "score": s} for r, s in zip(rows, loaded.score([r["messages"] for r in rows]), strict=True)]


def run_command(*arguments, cwd=ROOT):
    """The command in its own process: exit status, stdout, stderr."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "rmjax.score", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def same_rows(found, wanted):
    assert [{**r, "score": None} for r in found] == [{**r, "score": None} for r in wanted]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in wanted], atol=1e-5)


# What comes out


def test_the_command_scores_a_file(model_dir, loaded, source):
    output = source.with_name("out.jsonl")
    code, out, err = run_command(
        f"--model={model_dir}", f"--input={source.name}", "--output=out.jsonl", cwd=source.parent
    )
    assert code == 0, err
    assert "10 scores in out.jsonl" in out
    same_rows(read_jsonl(output), expected(loaded, ROWS))
    assert sorted(os.listdir(source.parent)) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("kinds", ["jsonl parquet", "parquet parquet", "parquet jsonl", "jsonl jsonl"])
def test_rows_and_their_order_are_kept(kinds, chunk, model_dir, loaded, fast, tmp_path, monkeypatch):
    """With chunks of 3 the first has only nulls in `note`, which the fifth row fills."""
    monkeypatch.setattr(job, "CHUNK", chunk)
    there, here = kinds.split()
    source, output = tmp_path / f"in.{there}", tmp_path / "new" / f"out.{here}"
    if there == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), source)
    else:
        write_jsonl(source, ROWS)
    read, counts = score.run(str(model_dir), str(source), output)
    assert (read, counts["rows"]) == (len(ROWS), len(ROWS))
    found = pq.read_table(output).to_pylist() if here == "parquet" else read_jsonl(output)
    same_rows(found, expected(loaded, ROWS))
    assert os.listdir(output.parent) == [output.name]


def test_parquet_holds_what_later_rows_bring(model_dir, loaded, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CHUNK", 2)
    rows = [
        row(0),
        row(1, value=1, more={"a": 1}),
        row(2, value=0.5),
        row(3, tags=[]),
        row(4, tags=["x"], more={"b": "y"}),
    ]
    rows[3]["messages"][0]["name"] = "ann"
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"
    score.run(str(model_dir), str(source), output)
    table = pq.read_table(output)
    assert table.column_names == ["id", "messages", "value", "more", "tags", "score"]
    assert table.schema.field("value").type == pa.float64() and table.schema.field("score").type == pa.float64()
    assert table["value"].to_pylist() == [None, 1, 0.5, None, None]
    assert table["tags"].to_pylist() == [None, None, None, [], ["x"]]
    assert table["more"].to_pylist() == [None, {"a": 1, "b": None}, None, None, {"a": None, "b": "y"}]
    assert table["messages"].to_pylist()[3][0] == {"role": "user", "content": "question 3", "name": "ann"}
    assert [m["content"] for m in table["messages"].to_pylist()[0]] == ["question 0", "answer 0"]
    np.testing.assert_allclose(table["score"], loaded.score([r["messages"] for r in rows]), atol=1e-5)


def test_prompt_and_response_columns(model_dir, loaded, fast, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rows = [{"prompt": "Why?", "response": "So."}, {"prompt": turns, "response": "So."}]
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    score.run(str(model_dir), str(source), output)
    answer = {"role": "assistant", "content": "So."}
    wanted = loaded.score([[turns[1], answer], [*turns, answer]])
    same_rows(read_jsonl(output), [{**r, "score": s} for r, s in zip(rows, wanted, strict=True)])


def test_the_responses_of_a_prompt_score_as_they_do_alone(model_dir, loaded, fast, tmp_path, monkeypatch):
    """To 1e-5; and each prompt is one tree."""
    asked = [{"prompt": f"Why {i}?", "responses": [f"So {j}." * (j + 1) for j in range(i + 1)]} for i in range(4)]
    trees, real = [], type(loaded.inference).trees
    spy = lambda self, given, *more: trees.extend(given) or real(self, given, *more)
    monkeypatch.setattr(type(loaded.inference), "trees", spy)
    score.run(str(model_dir), str(write_jsonl(tmp_path / "in.jsonl", asked)), tmp_path / "out.jsonl")
    assert len(trees) == len(asked)
    for found in read_jsonl(tmp_path / "out.jsonl"):
        turns = [{"role": "user", "content": found["prompt"]}]
        alone = [loaded.score([[*turns, {"role": "assistant", "content": text}]])[0] for text in found["responses"]]
        np.testing.assert_allclose(found["scores"], alone, atol=1e-5)


def test_the_summary_has_the_counts_of_the_whole_job(model_dir, loaded, fast, tmp_path, monkeypatch):
    """The tokens that are computed and those of all conversations; a start that goes on tells those of all starts."""
    monkeypatch.setattr(job, "CHUNK", 2)
    asked = [{"prompt": f"Why {i}?", "responses": ["So.", "No.", None, "So."]} for i in range(5)]
    source, output, told = write_jsonl(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl", tmp_path / "new/told.json"
    call = lambda: score.run(str(model_dir), str(source), output, options=Options(best_of_n=True), summary=told)
    call()
    whole = json.loads(told.read_text())
    tokenizer, turn = loaded.chat.tokenizer, lambda role, text: {"role": role, "content": text}
    pairs = [(one["prompt"], text) for one in asked for text in one["responses"] if text]
    turns = [[turn("user", prompt), turn("assistant", text)] for prompt, text in pairs]
    texts = [tokenizer.apply_chat_template(x, tokenize=False) for x in turns]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert whole == {
        "version": 1,
        **{"rows": 5, "written": 5, "outcomes": {"without a score: empty_response": 5}},
        **{"tokens_computed": whole["tokens_computed"], "tokens_unshared": sum(lengths), "seconds": whole["seconds"]},
    }
    assert 0 < whole["tokens_computed"] < sum(lengths) * 2 / 3  # one response of three is another's equal
    told.unlink()
    real, left = type(loaded).values, [3]

    def values(*args, **more):
        left[0] -= 1
        if not left[0]:
            raise MemoryError("killed")
        return real(*args, **more)

    monkeypatch.setattr(type(loaded), "values", values)
    with pytest.raises(MemoryError):
        call()
    assert not told.exists()
    call()
    again = json.loads(told.read_text())
    assert again | {"seconds": 0} == whole | {"seconds": 0} and again["seconds"] > 0


def test_values_that_json_lacks_become_text(model_dir, fast, tmp_path):
    day = datetime.date(2024, 7, 26)
    pq.write_table(pa.Table.from_pylist([row(0, day=day)]), tmp_path / "in.parquet")
    score.run(str(model_dir), str(tmp_path / "in.parquet"), tmp_path / "out.jsonl")
    assert read_jsonl(tmp_path / "out.jsonl")[0]["day"] == "2024-07-26"


def test_one_chunk_is_in_memory(model_dir, loaded, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CHUNK", 8)
    sizes = []
    scored = lambda conversations: sizes.append(len(conversations)) or {"score": np.zeros(len(conversations))}
    monkeypatch.setattr(loaded, "values", scored)
    source = write_jsonl(tmp_path / "in.jsonl", [row(i) for i in range(50)])
    read, counts = score.run(str(model_dir), str(source), tmp_path / "out.parquet")
    assert (read, counts["rows"]) == (50, 50)
    assert sizes == [8] * 6 + [2]
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == list(range(50))


# Refusals


BAD = {
    "no_columns": ({"text": "x"}, r"in\.jsonl:7: it has no column 'messages' \(a list of messages\); it has 'text'"),
    "null": ({"messages": None}, r"in\.jsonl:7: messages is NoneType None, expected a list of messages"),
    "no_answer": ({"messages": ROWS[0]["messages"][:1]}, r"in\.jsonl:7: .*ends with user"),
    "scored": (row(7, score=1.0), r"in\.jsonl:7 has a column `score` already"),
    "tools": (row(7, tools={"type": "function"}), "column 'tools' is wrong throughout: a list, or JSON of one was exp"),
    "role": ({"messages": [{"role": "king", "content": "x"}]}, r"in\.jsonl:7: a message's role is str 'king'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_before_the_model_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rmjax.inference.reward_model.load_checked", lambda *_a, **_k: pytest.fail("the model was loaded")
    )
    bad, message = BAD[name]
    source = write_jsonl(tmp_path / "in.jsonl", [*ROWS[:7], bad, *ROWS[8:]])
    with pytest.raises(ValueError, match=message):
        score.run("nowhere", str(source), tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_row_that_the_template_refuses_leaves_nothing(ending, model_dir, loaded, fast, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CHUNK", 4)
    template = "{% if 'question 6' in messages[0].content %}{{ raise_exception('no sixes') }}{% endif %}"
    monkeypatch.setattr(loaded.chat.tokenizer, "chat_template", template + loaded.chat.tokenizer.chat_template)
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"in\.jsonl:6: .*no sixes"):
        score.run(str(model_dir), str(source), tmp_path / f"out.{ending}")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_rows_that_parquet_cannot_hold_are_refused(tmp_path):
    for name, columns, message in [
        ("mixed", [{"x": 1}, {"x": "a"}], "column `x` fits no Parquet column"),
        ("empty", [{"x": {}}, {"x": {}}], "Parquet cannot hold these rows"),
    ]:
        source = write_jsonl(tmp_path / f"{name}.jsonl", [row(i, **more) for i, more in enumerate(columns)])
        with pytest.raises(ValueError, match=message):
            score.run("nowhere", str(source), tmp_path / "out.parquet")
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "mixed.jsonl"]


def test_places_that_cannot_be_written_are_refused(source):
    before = source.read_bytes()
    for name, error, message in [
        ("in.jsonl", ValueError, "is read as input"),
        ("../" + source.parent.name + "/in.jsonl", ValueError, "is read as input"),
        (".", ValueError, "must end in"),
        ("out.csv", ValueError, r"must end in \.jsonl or \.parquet"),
        ("in.jsonl/out.jsonl", ValueError, r"in\.jsonl is a file"),
    ]:
        with pytest.raises(error, match=message):
            score.run("nowhere", str(source), source.parent / name)
    for spec in (str(source.parent), str(source.parent / "*.jsonl"), f"{source}, {source}"):
        with pytest.raises(ValueError, match="is read as input"):
            score.run("nowhere", spec, source)
    output = source.parent / "out.jsonl"
    for name, message in [("out.jsonl", "is --output, too"), ("in.jsonl", "is read as input"), (".", "is a directory")]:
        with pytest.raises(ValueError, match=f"--summary.*{message}"):
            score.run("nowhere", str(source), output, summary=source.parent / name)
    (source.parent / "taken.jsonl").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        score.run("nowhere", str(source), source.parent / "taken.jsonl")
    assert source.read_bytes() == before and sorted(os.listdir(source.parent)) == ["in.jsonl", "taken.jsonl"]


def test_an_output_that_is_there_stays_if_scoring_fails(source):
    output = source.with_name("out.jsonl")
    output.write_text("old\n")
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        score.run("nowhere", str(source), output)
    assert output.read_text() == "old\n" and sorted(os.listdir(source.parent)) == ["in.jsonl", "out.jsonl"]


def test_missing_input_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        score.run("nowhere", str(tmp_path / "gone.jsonl"), tmp_path / "out.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="has no rows"):
        score.run("nowhere", str(tmp_path / "empty.jsonl"), tmp_path / "out.jsonl")


def test_a_contract_is_replayed_first(model_dir, loaded, source):
    objective = {"objective": {"name": "bradley_terry"}, "architecture": "SequenceClassification", "decoding": ""}
    given = {**objective, "own": {}, "labels": ["LABEL_0"], "metrics": {}, "data": ""}
    terms = contract.make(loaded.chat, **given, max_length=0, over_long="drop")
    golden = contract.golden_rows(loaded.chat, [])
    wanted = loaded.replay(golden)[0]
    output = source.with_name("out.jsonl")
    try:
        contract.write(model_dir, {**terms, "golden": [{**golden[0], "outputs": wanted.tolist()}]})
        read, counts = score.run(str(model_dir), str(source), output)
        assert (read, counts["rows"]) == (len(ROWS), len(ROWS))
        output.unlink()
        contract.write(model_dir, {**terms, "golden": [{**golden[0], "outputs": (wanted + 2e-4).tolist()}]})
        with pytest.raises(ValueError, match="golden row 0 scores"):
            score.run(str(model_dir), str(source), output)
    finally:
        (model_dir / contract.FILE).unlink()
    assert not output.exists()


def test_template_arguments_reach_the_template(model_dir, loaded, source, tmp_path, monkeypatch):
    given = []
    load = lambda *_args, **kwargs: given.append(kwargs) or loaded
    monkeypatch.setattr("rmjax.inference.reward_model.load_checked", load)
    score.run(str(model_dir), str(source), tmp_path / "out.jsonl", "float32", {"date_string": "26 Jul 2024"})
    assert given == [{"dtype": "float32", "template_kwargs": {"date_string": "26 Jul 2024"}}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=x", "--output=y"], "--model is required"),
        (["--model=x", "--output=y"], "--input is required"),
        (["--model=x", "--input=y"], "--output is required"),
        (["--model=x", "--input=y", "--output=z", "a"], "unexpected arguments"),
        (["--model=x", "--input=y", "--output=z", "--template_kwargs={"], "--template_kwargs={ is not JSON"),
        (["--model=x", "--input=y", "--output=z", "--template_kwargs=[]"], "is not a JSON object"),
        (["--model=x", "--input=gone.jsonl", "--output=z.jsonl"], "error: gone.jsonl: no such file"),
    ],
)
def test_the_command_line_is_checked(arguments, message, capsys):
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as error:
        score.main(command_line.parse_strictly(["score", *arguments]))
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_memory_that_is_not_enough_is_one_paragraph(monkeypatch, capsys):
    def run(*_, **__):
        raise MemoryError("Unable to allocate 9.00 TiB")

    monkeypatch.setattr(score, "run", run)
    monkeypatch.setattr("rmjax.runtime.compile_cache.keep_programs", lambda: None)
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as error:
        score.main(command_line.parse_strictly(["score", "--model=x", "--input=y", "--output=z.jsonl"]))
    said = capsys.readouterr().err
    assert error.value.code == 1 and said.startswith("error: the machine's memory is not enough (Unable to allocate")
    assert "the same command goes on" in said and "Traceback" not in said and said.count("\n") == 1


def test_an_error_is_one_line_and_a_status():
    code, out, err = run_command("--model=x", "--input=gone.jsonl", "--output=z.jsonl")
    assert (code, out) == (2, "") and err.startswith("error: gone.jsonl: no such file") and err.count("\n") == 1
    code, _, err = run_command("--model=x")
    assert code == 2 and "--input is required" in err


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(model_dir, fast, tmp_path):
    """With a real model, by launch/local.sh; in two parts."""
    source = write_jsonl(tmp_path / "in.jsonl", [row(i) for i in range(1_100)])
    score.run(str(model_dir), str(source), tmp_path / "one.parquet", summary=tmp_path / "one.json")
    command = [str(ROOT / "launch/local.sh"), "2", "rmjax.score", f"--model={model_dir}", "--input=in.jsonl"]
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), PYTHON=sys.executable, RESTARTS="0")
    command += ["--output=two.parquet", "--summary=two.json"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1100 scores in two.parquet" in done.stdout, done.stderr
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one.pop("seconds") > 0 and two.pop("seconds") > 0 and one == two
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "one.json", "one.parquet", "two.json", "two.parquet"]
