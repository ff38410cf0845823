"""Scoring jobs: a kill loses no row and doubles none, several processes, memory, and what is made of scored rows."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmjax import contract, score
from rmjax.data.reading import records
from rmjax.scoring import job
from rmjax.scoring.making import Options

ROOT = Path(__file__).parents[1]


class Model:
    """Scores a response by its number: "answer 7" is 7. Slow if asked, and counts what it was asked."""

    def __init__(self, seconds=0.0):
        self.seconds, self.asked = seconds, []

    def values(self, conversations):
        time.sleep(self.seconds)
        texts = [c[-1]["content"] for c in conversations]
        self.asked += texts
        return {"score": np.array([float(text.split()[-1]) for text in texts])}


@pytest.fixture
def model(monkeypatch, tmp_path_factory):
    """The command finds this one, in an empty directory."""
    made = Model()
    made.directory = tmp_path_factory.mktemp("empty")
    monkeypatch.setattr("rmjax.reward_model.load_checked", lambda *_args, **_kwargs: made)
    monkeypatch.setattr(job, "CHUNK", 4)
    return made


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model, source, output, normalize=False, **options):
    return score.run(str(model.directory), str(source), output, options=Options(**options), normalize=normalize)


def answers(*numbers):
    return [f"answer {n}" for n in numbers]


# Nothing is lost


def test_a_job_goes_on_where_it_was_and_scores_nothing_twice(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "response": f"answer {n}"} for n in range(18)])
    whole = tmp_path / "whole.jsonl"
    run(model, source, whole)
    model.asked.clear()
    real, output = model.values, tmp_path / "out.jsonl"

    def dies(conversations):
        if len(model.asked) >= 8:
            raise MemoryError("killed")
        return real(conversations)

    model.values = dies
    with pytest.raises(MemoryError):
        run(model, source, output)
    assert not output.exists() and len(list((tmp_path / "out.jsonl.parts").glob("*.jsonl"))) == 2
    model.values = real
    with pytest.raises(ValueError, match="options changed since"):
        run(
            model,
            source,
            output,
            best_of_n=False,
            tie_threshold=0.0,
            min_margin=-math.inf,
            max_margin=math.inf,
            std=2.0,
        )
    count, told = run(model, source, output)
    assert (count, told) == (18, {"rows": 18})
    assert model.asked == answers(*range(18))  # each once
    assert output.read_bytes() == whole.read_bytes() and not (tmp_path / "out.jsonl.parts").exists()


def test_another_input_in_the_same_place_is_refused(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "response": f"answer {n}"} for n in range(9)])
    model.values = lambda conversations: (_ for _ in ()).throw(MemoryError("killed"))
    with pytest.raises(MemoryError):
        run(model, source, tmp_path / "out.jsonl")
    write(source, [{"prompt": "q", "response": "answer 1"}])
    with pytest.raises(ValueError, match=r"input changed since: put that back .* or name another --output"):
        run(model, source, tmp_path / "out.jsonl")


SLOW = """
import sys
sys.path.insert(0, {tests!r})
import test_scoring_job as t
from rmjax import reward_model, score
from rmjax.scoring import job
job.CHUNK = 4
model = t.Model(0.02)
reward_model.load_checked = lambda *a, **k: model
sys.argv = ["score", *{argv!r}]
score.cli()
"""


def slowly(tmp_path, *argv, **told):
    text = SLOW.format(tests=str(ROOT / "tests"), argv=list(argv))
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT), **told)
    return subprocess.Popen([sys.executable, "-c", text], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_killed_job_ends_as_one_that_was_left_alone(ending, tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "q", "id": n, "response": f"answer {n}"} for n in range(400)])
    (tmp_path / "model").mkdir()
    command = ("--model=model", "--input=in.jsonl", f"--output=out.{ending}")
    parts = tmp_path / f"out.{ending}.parts"
    kills = 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = slowly(tmp_path, *command)
        before = len(list(parts.glob(f"0*.{ending}")))
        while process.poll() is None and len(list(parts.glob(f"0*.{ending}"))) < before + 5:
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait()
        kills += code in (-signal.SIGKILL, 130)
    assert kills == 3 and not (tmp_path / f"out.{ending}").exists()
    process = slowly(tmp_path, *command)
    assert process.wait() == 0, process.stderr.read()
    found = read(tmp_path / f"out.{ending}")
    assert [row["id"] for row in found] == list(range(400)) and [row["score"] for row in found] == list(range(400))
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "model", f"out.{ending}"]


@pytest.mark.slow
def test_two_processes_share_the_rows_and_write_them_in_order(tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "q", "response": f"answer {n}"} for n in range(50)])
    (tmp_path / "model").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    command = ("--model=model", "--input=in.jsonl", "--output=out.jsonl")
    both = [slowly(tmp_path, *command, **told, JAX_PROCESS_ID=str(number)) for number in range(2)]
    for process in both:
        assert process.wait(120) == 0, process.stderr.read()
    assert [row["score"] for row in read(tmp_path / "out.jsonl")] == list(range(50))
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "model", "out.jsonl"]


def test_memory_does_not_grow_with_the_rows(model, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CHUNK", 64)
    peaks = []
    for count in (1_000, 4_000):
        rows = [{"prompt": "q" * 200, "response": f"answer {n}"} for n in range(count)]
        source = write(tmp_path / f"{count}.jsonl", rows)
        model.asked = []
        model.values = lambda conversations: {"score": np.zeros(len(conversations))}
        tracemalloc.start()
        run(model, source, tmp_path / f"out-{count}.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0], peaks


# What is made of scored rows

PROMPTS = [
    {"prompt": "a", "responses": answers(1, 5, 3), "note": "x"},
    {"prompt": "b", "responses": answers(2, 2), "note": "y"},
    {"prompt": "c", "responses": answers(4), "note": "z"},
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_responses_of_a_prompt_get_a_list(ending, model, tmp_path):
    output = tmp_path / f"out.{ending}"
    assert run(model, write(tmp_path / "in.jsonl", PROMPTS), output) == (3, {"rows": 3})
    assert [row["scores"] for row in read(output)] == [[1, 5, 3], [2, 2], [4]]
    assert [row["note"] for row in read(output)] == ["x", "y", "z"] and read(output)[0]["responses"] == answers(1, 5, 3)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_best_of_n(ending, model, tmp_path):
    output = tmp_path / f"out.{ending}"
    run(model, write(tmp_path / "in.jsonl", PROMPTS), output, best_of_n=True)
    assert read(output) == [
        {"prompt": "a", "note": "x", "response": "answer 5", "score": 5.0},
        {"prompt": "b", "note": "y", "response": "answer 2", "score": 2.0},
        {"prompt": "c", "note": "z", "response": "answer 4", "score": 4.0},
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_pairs_of_responses_and_what_is_dropped(ending, model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / f"out.{ending}"
    count, told = run(model, source, output, pairs="best_worst")
    assert (count, told) == (3, {"rows": 1, "dropped: tie": 1, "single response": 1})
    pair = {"chosen": "answer 5", "rejected": "answer 1", "chosen_score": 5.0, "rejected_score": 1.0, "margin": 4.0}
    assert read(output) == [{"prompt": "a", "note": "x", **pair}]
    _, told = run(model, source, output, pairs="all", tie_threshold=1.9, max_margin=2.0)
    assert told == {"rows": 2, "dropped: tie": 1, "dropped: margin": 1, "single response": 1}
    assert [(row["chosen"], row["rejected"]) for row in read(output)] == [tuple(answers(5, 3)), tuple(answers(3, 1))]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_pairs_after_turns_are_in_a_format_that_training_reads(ending, model, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "responses": row["responses"]} for row in PROMPTS]
    output = tmp_path / f"out.{ending}"
    run(model, write(tmp_path / "in.jsonl", rows), output, pairs="all")
    found = list(records(str(output)))
    assert [c[-1]["content"] for c in found[0].conversations] == answers(5, 3) and len(found) == 3
    assert found[0].conversations[0][0]["content"] == "a" and found[0].margin[0, 1] == 2


LABELLED = [
    {"prompt": "a", "chosen": "answer 5", "rejected": "answer 1"},
    {"prompt": "b", "chosen": "answer 1", "rejected": "answer 3"},
    {"prompt": "c", "chosen": "answer 2", "rejected": "answer 2"},
    {"prompt": "d", "chosen": "answer 9", "rejected": "answer 8"},
]


def test_pairs_are_scored_filtered_and_relabelled(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", LABELLED), tmp_path / "out.jsonl"
    assert run(model, source, output) == (4, {"rows": 4})
    assert [(row["chosen_score"], row["rejected_score"]) for row in read(output)] == [(5, 1), (1, 3), (2, 2), (9, 8)]
    assert run(model, source, output, min_margin=0.5) == (4, {"rows": 2, "dropped: margin": 2})
    assert [row["prompt"] for row in read(output)] == ["a", "d"]
    _, told = run(model, source, output, relabel=True, tie_threshold=1.0)
    assert told == {"rows": 2, "relabelled": 1, "dropped: tie": 2}
    turned = {"chosen": "answer 3", "rejected": "answer 1", "chosen_score": 3.0, "rejected_score": 1.0, "margin": 2.0}
    assert read(output)[1] == {"prompt": "b", **turned}


def test_whole_conversations_as_pairs(model, tmp_path):
    turn = lambda role, text: {"role": role, "content": text}
    rows = [
        {"chosen": [turn("user", "q"), turn("assistant", "answer 3")], "rejected": [turn("user", "q")]},
        {"prompt": "q", "chosen": [turn("assistant", "answer 3")], "rejected": [turn("assistant", "answer 1")]},
    ]
    rows[0]["rejected"].append(turn("assistant", "answer 4"))
    output = tmp_path / "out.jsonl"
    run(model, write(tmp_path / "in.jsonl", rows), output, relabel=True)
    found = read(output)
    assert found[0]["chosen"][-1]["content"] == "answer 4" and found[1]["margin"] == 2


def test_normalized_scores(model, tmp_path, monkeypatch):
    source, output = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="rewards cannot be normalized: the model has no score contract"):
        run(model, source, output, normalize=True)
    monkeypatch.setattr(contract, "normalization", lambda terms: (1.0, 2.0))
    run(model, source, output, normalize=True)
    assert [row["scores"] for row in read(output)] == [[0, 2, 1], [0.5, 0.5], [1.5]]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (LABELLED, {"best_of_n": True}, "--best_of_n is for `responses`; these rows are of the shape 'pair'"),
        (LABELLED, {"pairs": "all"}, "--pairs=all is for `responses`"),
        (PROMPTS, {"relabel": True}, "--relabel is for `chosen` and `rejected`"),
        (PROMPTS, {"tie_threshold": 1.0}, "--tie_threshold is for pairs"),
        (PROMPTS, {"min_margin": 1.0}, "--min_margin and --max_margin is for pairs"),
        (PROMPTS, {"best_of_n": True, "pairs": "all"}, "give one of them"),
        (LABELLED, {"relabel": True, "tie_threshold": -1.0}, "must not be negative"),
        (LABELLED, {"min_margin": 2.0, "max_margin": 1.0}, "is above"),
    ],
)
def test_flags_that_do_not_go_with_the_rows_are_refused_before_the_model(rows, options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("rmjax.reward_model.load_checked", lambda *_a, **_k: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=words):
        score.run(
            "nowhere", str(write(tmp_path / "in.jsonl", rows)), tmp_path / "out.jsonl", options=Options(**options)
        )
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_parquet_columns_are_those_of_what_is_made(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.parquet"
    run(model, source, output, pairs="all")
    assert pq.read_schema(output).field("margin").type == pa.float64()
    assert pq.read_schema(output).names == [
        *("prompt", "note", "chosen", "rejected", "chosen_score", "rejected_score", "margin")
    ]
