"""The sample command: what it reads, writes, counts and goes on with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny_models
import transformers

from rmjax.inference.generation import GenerativeModel
from rmjax.inference.reward_model import BadConversation
from rmjax.jobs import job
from rmjax.sample import __main__ as sample

ROOT = Path(__file__).parents[2]
TALK = [{"role": "user", "content": "What is a tree?"}]
ROWS = [
    {"prompt": "What is a tree?", "id": 3},
    {"prompt": TALK, "system": "Be brief."},
    {"prompt": "a b c d e f g h", "history": [["one", "two"]]},
    {"prompt": "Which?"},
    {"prompt": "Go on."},
]
SHORT = {"responses": 2, "max_tokens": 6, "slots": 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer_dir):
    """A language model of random weights with a chat template."""
    path = tmp_path_factory.mktemp("writes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tiny_models.make_hf_model(
        "qwen2", path, head=False, vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(model_dir):
    return GenerativeModel.load(model_dir)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return list(map(json.loads, path.read_text().splitlines()))


def test_rows_get_responses_in_their_order(model_dir, model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    read_rows, counts = sample.run(str(model_dir), str(source), output, log_probs=True, **SHORT)
    made = read(output)
    assert (read_rows, counts["rows"], counts["responses"]) == (5, 5, 10)
    assert [{name: row[name] for name in given} for row, given in zip(made, ROWS)] == ROWS
    turns = [
        TALK,
        [{"role": "system", "content": "Be brief."}, *TALK],
        [*({"role": r, "content": c} for r, c in (("user", "one"), ("assistant", "two"), ("user", ROWS[2]["prompt"])))],
        *([{"role": "user", "content": row["prompt"]}] for row in ROWS[3:]),
    ]
    wanted = model.generate(turns, responses=2, max_tokens=6, groups=3)
    for row, responses in zip(made, wanted):
        assert row["responses"] == [response.text for response in responses]
        assert row["finish"] == [response.finish for response in responses]
        assert row["response_tokens"] == [len(response.tokens) for response in responses]
        assert [len(x) for x in row["log_probs"]] == row["response_tokens"]
    assert counts["tokens"] == sum(sum(row["response_tokens"]) for row in made)
    assert counts["cut off"] == sum(row["finish"].count("length") for row in made)


def test_parquet_has_the_same(model_dir, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in ROWS if isinstance(row["prompt"], str)]
    source = write(tmp_path / "in.jsonl", rows)
    sample.run(str(model_dir), str(source), tmp_path / "out.jsonl", **SHORT)
    sample.run(str(model_dir), str(source), tmp_path / "out.parquet", **SHORT)
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == read(tmp_path / "out.jsonl")


def test_a_killed_job_goes_on_to_the_same_bytes(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "ROUNDS", 1)  # two rows of a part
    source = write(tmp_path / "in.jsonl", ROWS)
    sample.run(str(model_dir), str(source), tmp_path / "whole.jsonl", log_probs=True, **SHORT)
    real, calls = job.Job.write, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("killed")
        real(*arguments)

    monkeypatch.setattr(job.Job, "write", killed)
    with pytest.raises(MemoryError):
        sample.run(str(model_dir), str(source), tmp_path / "out.jsonl", log_probs=True, **SHORT)
    monkeypatch.setattr(job.Job, "write", real)
    with pytest.raises(ValueError, match='drawing seed is "1", was "0"'):
        sample.run(str(model_dir), str(source), tmp_path / "out.jsonl", log_probs=True, seed=1, **SHORT)
    sample.run(str(model_dir), str(source), tmp_path / "out.jsonl", log_probs=True, **SHORT)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_prompts_that_leave_no_room_are_counted(model_dir, tmp_path):
    source = write(tmp_path / "in.jsonl", [ROWS[0], {"prompt": "a b " * 60}])
    counts = sample.run(str(model_dir), str(source), tmp_path / "out.jsonl", **SHORT)[1]
    assert counts["prompt too long"] == 1 and [len(row["responses"]) for row in read(tmp_path / "out.jsonl")] == [2, 0]


def test_the_prompt_of_rows_with_responses_is_taken(model_dir, model, tmp_path):
    rows = [
        {"prompt": "Which?", "chosen": "a", "rejected": "b"},
        {"messages": [*TALK, {"role": "assistant", "content": "A plant."}]},
        {"messages": TALK},
        {"prompt": "Which?", "response": "a"},
    ]
    for row, asked in zip(rows, ([{"role": "user", "content": "Which?"}], TALK, TALK, None)):
        source = write(tmp_path / "in.jsonl", [row])
        sample.run(str(model_dir), str(source), tmp_path / "out.jsonl", **SHORT)
        wanted = model.generate([asked or [{"role": "user", "content": "Which?"}]], responses=2, max_tokens=6)
        assert read(tmp_path / "out.jsonl")[0]["responses"] == [response.text for response in wanted[0]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "responses": ["a"]}, "has a column `responses` already"),
        ({"text": "q"}, "unknown data format"),
        ({"prompt": "q", "chosen": [*TALK, {"role": "assistant", "content": "x"}], "rejected": "y"}, "format"),
    ],
)
def test_a_row_that_cannot_be_sampled_for_is_refused(row, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        sample.run("nowhere", str(write(tmp_path / "in.jsonl", [row])), tmp_path / "out.jsonl", **SHORT)


def test_a_text_may_end_a_response(model):
    (first,) = model.generate([TALK], max_tokens=20)[0]
    end = first.text[4:7]
    (cut,) = model.generate([TALK], max_tokens=20, stop=[end])[0]
    assert cut.text == first.text.partition(end)[0] and cut.finish == "stop"
    assert cut.tokens.tolist() == first.tokens[: len(cut.tokens)].tolist()


def test_what_cannot_be_answered_is_named(model):
    with pytest.raises(BadConversation, match=r"conversation 1: its .* tokens and a response of up to 20"):
        model.generate([TALK, [{"role": "user", "content": "a b " * 60}]], max_tokens=20)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate([TALK], temperature=-1)


def test_a_token_that_the_model_lacks_is_refused(model_dir, tmp_path, tokenizer_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    tiny_models.make_hf_model("qwen2", tmp_path, head=False, vocab_size=len(tokenizer), num_hidden_layers=1)
    tokenizer.add_tokens("Zyx")
    tokenizer.save_pretrained(tmp_path)
    model = GenerativeModel.load(tmp_path)
    with pytest.raises(BadConversation, match=rf"conversation 1: token {len(tokenizer) - 1} has no row"):
        model.generate([TALK, [{"role": "user", "content": "Zyx"}]], max_tokens=2)


def test_new_parameters_write_what_another_model_writes(model_dir, tmp_path, tokenizer_dir):
    model = GenerativeModel.load(model_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 64}
    tiny_models.make_hf_model("qwen2", tmp_path, head=False, seed=1, **sizes)
    tokenizer.save_pretrained(tmp_path)
    other = GenerativeModel.load(tmp_path)
    before = model.generate([TALK], max_tokens=8)
    model.replace_params(other.params)
    (now,), (wanted,) = (one.generate([TALK], max_tokens=8)[0] for one in (model, other))
    assert now.tokens.tolist() == wanted.tokens.tolist() != before[0][0].tokens.tolist()


def test_a_reward_model_does_not_write(tmp_path, tokenizer_dir):
    tiny_models.make_hf_model("qwen2", tmp_path)
    with pytest.raises(ValueError, match="Qwen2ForSequenceClassification: it scores, and does not write"):
        GenerativeModel.load(tmp_path)


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(model_dir, tmp_path):
    """By launch/local.sh; in two parts."""
    write(tmp_path / "in.jsonl", [{"prompt": f"question {n}"} for n in range(20)])
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), PYTHON=sys.executable, RESTARTS="0")
    flags = [f"--model={model_dir}", "--input=in.jsonl", "--responses=1", "--max_tokens=4", "--slots=2", "--logprobs"]
    for count, name in (("1", "one"), ("2", "two")):
        command = [str(ROOT / "launch/local.sh"), count, "rmjax.sample", *flags, f"--output={name}.jsonl"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "20 prompts, 20 responses of" in done.stdout, done.stderr
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_what_nobody_reads_is_named_and_what_looks_like_context_refused(model_dir, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "note": "of last year"}])
    sample.run(str(model_dir), str(source), tmp_path / "out.jsonl", **SHORT)
    assert "not read: note (e.g. 'of last year')" in capsys.readouterr().out
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "passage_2": "a text that the question is about"}])
    with pytest.raises(ValueError, match=r"not read as prompt_only: passage_2 \(context"):
        sample.run("nowhere", str(source), tmp_path / "out.jsonl", **SHORT)
