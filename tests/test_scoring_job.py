"""Scoring jobs: a kill loses no row and doubles none, several processes, memory, and jobs in each other's place."""

import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring_fork import ASKED, Model

from rmjax import score
from rmjax.data import files, sources
from rmjax.scoring import job
from rmjax.scoring.making import Options

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": "q", "id": n, "response": f"answer {n}"} for n in range(18)]


@pytest.fixture
def model(monkeypatch, tmp_path_factory):
    """The command finds this one, in an empty directory."""
    made = Model()
    made.directory = tmp_path_factory.mktemp("empty")
    monkeypatch.setattr("rmjax.reward_model.load_checked", lambda *_args, **_kwargs: made)
    monkeypatch.setattr(job, "CHUNK", 4)
    return made


@pytest.fixture(scope="module")
def fork():
    """Runs the command in its own process, and kills it where it is told to; see scoring_fork.py."""
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    command = [sys.executable, str(ROOT / "tests" / "scoring_fork.py")]
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(cwd, *argv, spoil=None):
        server.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), "spoil": spoil}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model, source, output, **options):
    return score.run(str(model.directory), str(source), output, dtype="float32", options=Options(**options))


def dying(model, parts, error=MemoryError):
    """The model fails once this many parts are done."""
    real, left = model.values, [parts]

    def values(conversations):
        left[0] -= 1
        if left[0] < 0:
            model.values = real
            raise error("killed")
        return real(conversations)

    model.values = values


# A kill anywhere

KILLS = {  # of a job of five parts: where, and whether the next start scores again what was scored
    "before the model": ({"at": "load_checked", "when": "before", "call": 1}, 0),
    "while a part is scored": ({"at": "values", "when": "before", "call": 3}, 8),
    "scored, not written": ({"at": "values", "when": "after", "call": 3}, 8),
    "written, without its name": ({"at": "write_rows", "when": "after", "call": 3}, 8),
    "nothing is joined": ({"at": "join_parts", "when": "before", "call": 1}, 18),
    "joined, without its name": ({"at": "join_parts", "when": "after", "call": 1}, 18),
    "the output has its name": ({"at": "remove", "when": "before", "call": 2}, 18),
    "some parts are removed": ({"at": "unlink", "when": "after", "call": 4}, 0),
}


@pytest.mark.parametrize(
    ("where", "ending"), [*((where, "jsonl") for where in KILLS), *((where, "parquet") for where in list(KILLS)[3:6:2])]
)
def test_a_killed_job_ends_as_one_that_was_left_alone(where, ending, fork, model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / f"out.{ending}"
    run(model, source, tmp_path / f"whole.{ending}")
    whole = (tmp_path / f"whole.{ending}").read_bytes()
    asked = tmp_path / "model" / ASKED
    asked.parent.mkdir()
    spoil, kept = KILLS[where]
    command = ("--model=model", "--input=in.jsonl", f"--output={output.name}", "--dtype=float32")
    assert fork(tmp_path, *command, spoil={**spoil, "signal": signal.SIGKILL})["code"] == -signal.SIGKILL
    assert not output.exists() or output.read_bytes() == whole
    asked.write_text("")
    done = fork(tmp_path, *command)
    assert done["code"] == 0 and "18 scores in" in done["out"], done
    assert (f"{kept} of 18 rows are scored already" in done["out"]) == (0 < kept < 18)
    assert asked.read_text().splitlines() == [row["response"] for row in ROWS[kept:]]
    assert output.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "model", output.name, f"whole.{ending}"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_leave_what_is_done(number, code, fork, tmp_path):
    write(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "model").mkdir()
    command = ("--model=model", "--input=in.jsonl", "--output=new/out.jsonl", "--dtype=float32")
    found = fork(tmp_path, *command, spoil={"at": "values", "when": "after", "call": 3, "signal": number})
    assert found["code"] == code and "the same command goes on" in found["err"], found
    assert len(list((tmp_path / "new/out.jsonl.parts").glob("0*.jsonl"))) == 2
    assert fork(tmp_path, *command)["code"] == 0
    assert [row["score"] for row in read(tmp_path / "new/out.jsonl")] == list(range(18))


def test_what_is_done_survives_errors_but_those_of_the_input(model, tmp_path):
    """A full disk, a file system that is away for a while: not the job's fault."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "new" / "out.jsonl"
    for error, there in [(ValueError, False), (RuntimeError, True), (OSError, True)]:
        dying(model, 2, error)
        with pytest.raises(error):
            run(model, source, output)
        assert output.parent.exists() == there
    dying(model, 0, ValueError)  # of a job that goes on, everything is kept
    with pytest.raises(ValueError, match="killed"):
        run(model, source, output)
    assert len(list((tmp_path / "new/out.jsonl.parts").glob("0*.jsonl"))) == 4


def test_bad_input_takes_nothing_of_others_with_it(model, tmp_path):
    source = write(tmp_path / "in.jsonl", ROWS)
    real = model.values

    def values(conversations):
        (tmp_path / "of_another_job.jsonl").write_text("")
        dying(model, 0, ValueError)
        return model.values(conversations)

    model.values = values
    with pytest.raises(ValueError, match="killed"):
        run(model, source, tmp_path / "out.jsonl")
    model.values = real
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "of_another_job.jsonl"]


# Jobs in each other's place


def test_another_job_in_the_same_place_is_refused_with_what_differs(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    weights = model.directory / "model.safetensors"
    size = 2 * job.SAMPLES * job.SAMPLE
    weights.write_bytes(bytes(size))
    dying(model, 2)
    with pytest.raises(MemoryError):
        run(model, source, output)

    def refused(words, **options):
        with pytest.raises(ValueError, match=words):
            run(model, source, output, **options)

    refused('but options std is "2.0", was "1.0". Put that back to go on, delete', std=2.0)
    weights.write_bytes(b"\1" * size)  # another training of the same model
    refused("but model model.safetensors is another")
    weights.write_bytes(bytes(size))
    write(source, ROWS[:-1])
    refused("but input is another")
    write(source, ROWS)
    assert run(model, source, output) == (18, {"rows": 18}) and not model.directory.joinpath(ASKED).exists()


def test_a_job_that_has_done_nothing_makes_room_for_another(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    dying(model, 0)
    with pytest.raises(MemoryError):
        run(model, source, output)
    assert run(model, source, output, std=2.0) == (18, {"rows": 18})
    assert [row["score"] for row in read(output)] == [n / 2 for n in range(18)]


def test_parts_without_a_seal_are_no_parts(model, tmp_path):
    """What a kill left of a job that was done, before one with another model."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    directory = tmp_path / "out.jsonl.parts"
    directory.mkdir()
    (directory / "00000001.jsonl").write_text('{"score": "stale"}\n')
    (directory / "00000001.json").write_text('{"rows": 1}')
    (directory / "mine.txt").write_text("somebody's")
    assert run(model, source, output) == (18, {"rows": 18})
    assert [row["score"] for row in read(output)] == list(range(18))
    assert os.listdir(directory) == ["mine.txt"]


def test_a_second_start_of_a_job_is_refused(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.parts").mkdir()
    with open(tmp_path / "out.jsonl.parts" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another run is in .*out\.jsonl\.parts.* another --output"):
            run(model, source, output)
    assert run(model, source, output) == (18, {"rows": 18})


def test_an_input_that_changed_while_it_was_scored_is_found(model, tmp_path, monkeypatch):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    real = sources.open_source
    monkeypatch.setattr(sources, "open_source", lambda spec: itertools.islice(real(spec), 9))  # not in the survey
    with pytest.raises(RuntimeError, match="has the scores of 9 rows, but there are 18"):
        run(model, source, output)
    assert not output.exists()


# Parts


def test_long_rows_and_many_responses_make_small_parts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CHARACTERS", 100)
    sizes = []
    model.values = lambda conversations: sizes.append(len(conversations)) or {"score": np.zeros(len(conversations))}
    rows = [{"prompt": "q" * 10, "responses": ["answer"] * k} for k in (1, 1, 20, 1, 1, 1, 1, 1)]
    assert run(model, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")[0] == 8
    assert sizes == [22, 4, 1]
    assert [len(row["scores"]) for row in read(tmp_path / "out.jsonl")] == [1, 1, 20, 1, 1, 1, 1, 1]


def test_row_groups_of_parquet_are_larger_than_parts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "ROW_GROUP", (8, 2**30))
    run(model, write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.parquet")
    found = pq.ParquetFile(tmp_path / "out.parquet").metadata
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [8, 8, 2]


def test_text_that_is_no_unicode_is_kept_in_json(model, tmp_path):
    rows = [{"prompt": "q", "response": "answer 1", "note": "half \ud800"}]
    source = write(tmp_path / "in.jsonl", rows)
    run(model, source, tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [{**rows[0], "score": 1.0}]
    with pytest.raises(ValueError, match="column `note` fits no Parquet column"):
        run(model, source, tmp_path / "out.parquet")


@contextlib.contextmanager
def arrow_memory():
    """Yields a function that says how much Arrow had at most."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        yield pool.max_memory
    finally:
        pa.set_memory_pool(before)


def write_many(path, count):
    rows = [{"prompt": "q" * 500, "response": f"answer {n}" * 30} for n in range(count)]
    if path.suffix == ".jsonl":
        return write(path, rows)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)
    return path


@pytest.mark.parametrize(("ending", "count"), [("jsonl", 1_200), ("parquet", 4_000)])
def test_memory_does_not_grow_with_the_rows(ending, count, model, tmp_path, monkeypatch):
    """Python's memory, or Arrow's, once there is more than a part, a row group and a block of the reader hold."""
    monkeypatch.setattr(job, "CHUNK", 256)
    monkeypatch.setattr(job, "ROW_GROUP", (512, 2**30))
    monkeypatch.setattr(files, "BLOCK", 2**16)
    model.values = lambda conversations: {"score": np.zeros(len(conversations))}
    run(model, write_many(tmp_path / f"few.{ending}", 10), tmp_path / f"out.{ending}")  # what is made once is made
    peaks = []
    for n in (count, 4 * count):
        source, output = write_many(tmp_path / f"{n}.{ending}", n), tmp_path / f"out-{n}.{ending}"
        if ending == "jsonl":
            tracemalloc.start()
            run(model, source, output)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        else:
            with arrow_memory() as most:
                run(model, source, output)
                peaks.append(most())
    assert peaks[1] <= 1.1 * peaks[0], peaks


# Several processes

STUB = """#!{python}
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import scoring_fork
import importlib
for name in scoring_fork.IMPORTS:
    importlib.import_module(name)
scoring_fork.use_numbers()
if "FAIL" in os.environ:
    real = scoring_fork.Model.values
    def values(self, conversations):
        from rmjax.reward_model import BadConversation
        if any(os.environ["FAIL"] == c[-1]["content"] for c in conversations):
            raise BadConversation(1, "no such answer")
        import time
        time.sleep(0.5)
        return real(self, conversations)
    scoring_fork.Model.values = values
sys.argv = ["score", *sys.argv[3:]]
sys.modules["rmjax.score"].cli()
"""


@pytest.fixture
def launch(tmp_path):
    """Starts launch/local.sh with two processes and the model of numbers."""
    python = tmp_path / "python"
    python.write_text(STUB.format(python=sys.executable, root=str(ROOT), tests=str(ROOT / "tests")))
    python.chmod(0o755)
    directory = tmp_path / "job"
    (directory / "model").mkdir(parents=True)

    def start(*argv, **env):
        command = [str(ROOT / "launch/local.sh"), "2", "rmjax.score", "--model=model", "--dtype=float32", *argv]
        env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHON=str(python), RESTARTS="0", **env)
        return subprocess.Popen(command, cwd=directory, env=env, stderr=subprocess.PIPE, text=True)

    return start, directory


@pytest.mark.slow
def test_two_processes_share_a_job_that_one_began(launch, model):
    """They are stopped by SIGTERM, and go on; what they make is what one process makes."""
    start, directory = launch
    source = write(directory / "in.jsonl", ROWS * 20)
    run(model, source, directory / "whole.jsonl")
    argv = ("--input=in.jsonl", "--output=out.jsonl")
    both = start(*argv, FAIL="never")  # slowly
    parts = directory / "out.jsonl.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("0*.jsonl"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    both.send_signal(signal.SIGTERM)
    code, said = both.wait(120), both.stderr.read()
    assert code == 75 and "stopped by SIGTERM: the same command goes on with what is scored" in said, said
    done = {int(path.stem) for path in parts.glob("0*.jsonl")}
    assert {n % 2 for n in done} == {0, 1} and not (directory / "out.jsonl").exists()
    (directory / "model" / ASKED).write_text("")
    both = start(*argv)
    assert both.wait(120) == 0, both.stderr.read()
    assert (directory / "out.jsonl").read_bytes() == (directory / "whole.jsonl").read_bytes()
    assert len((directory / "model" / ASKED).read_text().splitlines()) == 360 - 4 * len(done)
    assert sorted(os.listdir(directory)) == ["in.jsonl", "model", "out.jsonl", "whole.jsonl"]


@pytest.mark.slow
def test_a_bad_row_ends_both_processes_and_leaves_nothing(launch):
    start, directory = launch
    write(directory / "in.jsonl", ROWS)
    both = start("--input=in.jsonl", "--output=new/out.jsonl", FAIL="answer 5")  # of the second process
    assert both.wait(120) == 2
    assert "in.jsonl:5: no such answer" in both.stderr.read()
    assert sorted(os.listdir(directory)) == ["in.jsonl", "model"]
