"""Scoring jobs: a kill loses no row and doubles none, several processes, memory, and jobs in each other's place."""

import contextlib
import fcntl
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

from rmjax.data import records, sources
from rmjax.data.sources import files
from rmjax.jobs import job, parts
from rmjax.runtime import files as durable
from rmjax.score import __main__ as score
from rmjax.score import making
from rmjax.score.making import Options

ROOT = Path(__file__).parents[2]
CALM = contextlib.nullcontext()
ROWS = [{"prompt": "q", "id": n, "response": f"answer {n}"} for n in range(18)]


@pytest.fixture
def model(monkeypatch, tmp_path_factory):
    """The command finds this one, in an empty directory."""
    made = Model()
    made.directory = tmp_path_factory.mktemp("empty")
    monkeypatch.setattr("rmjax.inference.reward_model.load_checked", lambda *_args, **_kwargs: made)
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
    "the output has its name": ({"at": "remove", "when": "before", "call": 1}, 18),
    "some parts are removed": ({"at": "unlink", "when": "after", "call": 16}, 12),
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
    files = (f"--output={output.name}", "--summary=told.json")
    command = ("--model=model", "--input=in.jsonl", *files, "--dtype=float32")
    assert fork(tmp_path, *command, spoil={**spoil, "signal": signal.SIGKILL})["code"] == -signal.SIGKILL
    assert not output.exists() or output.read_bytes() == whole
    asked.write_text("")
    done = fork(tmp_path, *command)
    assert done["code"] == 0 and "18 scores in" in done["out"], done
    assert (f"{kept} of 18 rows are done already" in done["out"]) == (0 < kept < 18)
    assert asked.read_text().splitlines() == [row["response"] for row in ROWS[kept:]]
    assert output.read_bytes() == whole
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["rows"], told["written"], told["outcomes"]) == (18, 18, {})
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "model", output.name, "told.json", f"whole.{ending}"]


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


FOREIGN = {"00000001.json": '{"rows": 1}', "00000001.jsonl": "mine\n", "job.tmp": "mine", "mine.txt": "mine"}


@pytest.mark.parametrize("name", [*FOREIGN, "00000001.parquet", "job.json"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_directory_that_this_command_did_not_make_is_refused_and_stays(name, fails, model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    directory = tmp_path / "out.jsonl.parts"
    directory.mkdir()
    text = FOREIGN.get(name, '{"version": 2, "name": "job of another program"}')
    (directory / name).write_text(text)
    if fails:
        dying(model, 0, ValueError)
    with pytest.raises(ValueError, match=rf"{name}.*(no job\.json|not written by).*move it away.*another --output"):
        run(model, source, output)
    assert os.listdir(directory) == [name] and (directory / name).read_text() == text and not output.exists()


@pytest.mark.parametrize("error", [MemoryError, ValueError, None])
def test_files_that_come_into_the_directory_meanwhile_stay(error, model, tmp_path):
    """Whatever their names, and whether the job ends, is stopped, or is given up."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    directory, real = tmp_path / "out.jsonl.parts", model.values
    others = {"mine.txt", "00000009.json", "00000009.jsonl", "00000001.parquet", "job.tmp"}

    def values(conversations):
        for name in others:
            (directory / name).write_text('{"mine": 1}')
        model.values = real
        dying(model, 1 if error else 9, error or ValueError)
        return model.values(conversations)

    model.values = values
    with pytest.raises(error) if error else contextlib.nullcontext():
        run(model, source, output)
    for name in others:
        assert (directory / name).read_text() == '{"mine": 1}'
    if error is None:
        assert {*os.listdir(directory)} == others and len(read(output)) == 18


def test_a_file_in_the_place_of_a_part_is_refused(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    dying(model, 2)
    with pytest.raises(MemoryError):
        run(model, source, output)
    directory = tmp_path / "out.jsonl.parts"
    (directory / "00000003.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"00000003\.jsonl was not made by this job"):
        run(model, source, output)
    (directory / "00000003.jsonl").unlink()
    for name in ("jsonl", "json"):  # a part by its contents, of another number
        (directory / f"00000003.{name}").write_bytes((directory / f"00000000.{name}").read_bytes())
    with pytest.raises(ValueError, match=r"00000003\.json is of another job, or of another part"):
        run(model, source, output)
    (directory / "00000003.jsonl").unlink()
    (directory / "00000003.json").unlink()
    assert run(model, source, output) == (18, {"rows": 18})
    assert [row["score"] for row in read(output)] == list(range(18))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_output_is_replaced_by_a_whole_one_and_never_through_a_link(ending, model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / f"out.{ending}"
    target = tmp_path / f"target.{ending}"
    for there in (True, False):
        target.write_text("precious") if there else target.unlink()
        output.symlink_to(target)
        with pytest.raises(ValueError, match=f"out.{ending} is a link to .*target.{ending}; name that file itself"):
            run(model, source, output)
        assert output.is_symlink() and target.exists() == there and (not there or target.read_text() == "precious")
        output.unlink()
    os.mkfifo(output)
    with pytest.raises(ValueError, match="is no plain file"):
        run(model, source, output)
    output.unlink()
    output.write_text("old")
    (tmp_path / f"{output.name}.partial").write_text("mine")
    run(model, source, output)
    assert len(read(output)) == 18 and (tmp_path / f"{output.name}.partial").read_text() == "mine"
    os.symlink("nowhere", tmp_path / f".{output.name}.rmjax-partial")
    run(model, source, output)
    assert len(read(output)) == 18 and not (tmp_path / "nowhere").exists()


def test_an_output_that_becomes_a_link_meanwhile_costs_no_score(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    real = model.values

    def values(conversations):
        if not output.is_symlink():
            output.symlink_to(tmp_path / "target")
        return real(conversations)

    model.values = values
    with pytest.raises(ValueError, match="is a link to"):
        run(model, source, output)
    output.unlink()
    model.values, before = real, len(model.asked)
    assert run(model, source, output) == (18, {"rows": 18}) and len(model.asked) == before


def test_a_second_start_of_a_job_is_refused(model, tmp_path):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.parts").mkdir()
    with open(tmp_path / "out.jsonl.parts" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another run is in .*out\.jsonl\.parts.* another --output"):
            run(model, source, output)
    assert run(model, source, output) == (18, {"rows": 18})


REWRITTEN = {  # the input while it is scored: how, and what is told
    "other rows from the third part on": (lambda rows: [*rows[:8], *ROWS[:10]], "from in.jsonl:8 on it has other rows"),
    "the last row is another": (lambda rows: [*rows[:17], rows[0]], "from in.jsonl:16 on"),
    "fewer rows": (lambda rows: rows[:9], "from in.jsonl:8 on"),
    "fewer parts": (lambda rows: rows[:8], "it has not as many rows"),
    "more rows": (lambda rows: [*rows, rows[0]], "from in.jsonl:16 on"),
    "two rows in each other's place": (lambda rows: [*rows[:5], rows[6], rows[5], *rows[7:]], "from in.jsonl:4 on"),
    "no JSON": (lambda rows: rows[:5], "line 6: not JSON"),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_an_input_that_changed_while_it_was_scored_is_found(how, model, tmp_path, monkeypatch):
    """After all rows were looked at. When it is put back, the same command goes on; what was scored is kept."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    change, words = REWRITTEN[how]
    real, calls = sources.open_source, []

    def opened(spec):
        calls.append(spec)
        if len(calls) == 2:  # after the survey
            write(source, change(ROWS))
            if how == "no JSON":
                source.write_text(source.read_text() + '{"prompt": "q", "id"')
        return real(spec)

    monkeypatch.setattr(sources, "open_source", opened)
    with pytest.raises(RuntimeError, match=f"in.jsonl was changed meanwhile: .*{words}.*Put it back"):
        run(model, source, output)
    assert len(calls) == 2 and not output.exists()
    monkeypatch.setattr(sources, "open_source", real)
    with pytest.raises(ValueError, match="not JSON" if how == "no JSON" else "but input is another"):
        run(model, source, output)
    write(source, ROWS)
    assert run(model, source, output) == (18, {"rows": 18})
    assert [row["score"] for row in read(output)] == list(range(18)) and len(model.asked) == 18


def test_an_input_that_is_changed_and_put_back_between_two_looks_is_found(model, tmp_path, monkeypatch):
    """A digest of the file before and one after are equal then."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    real, calls = sources.open_source, []

    def opened(spec):
        calls.append(spec)
        if len(calls) == 1:  # the survey
            return real(spec)
        write(source, ROWS[::-1])
        rows = list(real(spec))
        write(source, ROWS)
        return iter(rows)

    monkeypatch.setattr(sources, "open_source", opened)
    with pytest.raises(RuntimeError, match=r"from in\.jsonl:0 on it has other rows"):
        run(model, source, output)
    assert not output.exists()


# A machine that goes down, by what it leaves of a file: each file of a job, one at a time

LEFT = {
    "emptied": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "all zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_power_cut_costs_no_row(ending, left, model, tmp_path, capsys):
    """The same command ends with the same file, or names what it cannot use."""
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / f"out.{ending}"
    run(model, source, output)
    whole = output.read_bytes()
    names = ["job.json", *(f"0000000{n}.{suffix}" for n in range(3) for suffix in ("json", ending))]
    for name in names:
        output.unlink(missing_ok=True)
        dying(model, 3)
        with pytest.raises(MemoryError):
            run(model, source, output)
        directory = output.with_name(f"{output.name}.parts")
        assert sorted(os.listdir(directory)) == sorted(names)
        kept = {name: (directory / name).read_bytes() for name in names}
        (directory / name).write_bytes(LEFT[left](kept[name]))
        capsys.readouterr()
        model.asked.clear()
        if name == "job.json":
            with pytest.raises(ValueError, match=r"job\.json is (empty|no JSON).*delete it, or name another --output"):
                run(model, source, output)
            assert {n: (directory / n).read_bytes() for n in names[1:]} == {n: kept[n] for n in names[1:]}
            (directory / name).write_bytes(kept[name])
        assert run(model, source, output) == (18, {"rows": 18})
        assert output.read_bytes() == whole and not directory.exists()
        said = capsys.readouterr().out
        assert (name in said and "made again" in said) == (name != "job.json"), said
        assert len(model.asked) == 6 + 4 * (name != "job.json")
    output.write_bytes(LEFT[left](whole))
    assert run(model, source, output) == (18, {"rows": 18}) and output.read_bytes() == whole


@pytest.mark.parametrize("left", [*LEFT, "swapped"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("suffix", ["json", "rows"])
def test_what_is_damaged_after_it_was_looked_at_is_found_when_parts_are_joined(
    suffix, ending, left, model, tmp_path, monkeypatch
):
    source, output = write(tmp_path / "in.jsonl", ROWS), tmp_path / f"out.{ending}"
    directory = output.with_name(f"{output.name}.parts")
    name = "00000001." + (ending if suffix == "rows" else "json")
    real = job.Job.join

    def join(self, *args):
        path = directory / name
        damage = LEFT.get(left, lambda _: path.with_stem("00000002").read_bytes())
        path.write_bytes(damage(path.read_bytes()))
        return real(self, *args)

    monkeypatch.setattr(job.Job, "join", join)
    another = (suffix, left) == ("json", "swapped")
    words = "is of another job, or of another part" if another else ".*start the same command again"
    with pytest.raises(ValueError if another else RuntimeError, match=rf"{directory.name}/{name} {words}"):
        run(model, source, output)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", directory.name]
    monkeypatch.setattr(job.Job, "join", real)
    if another:
        with pytest.raises(ValueError, match=f"{name} is of another job, or of another part"):
            run(model, source, output)
        (directory / name).unlink()
        (directory / name).with_suffix(f".{ending}").unlink()
    assert run(model, source, output) == (18, {"rows": 18})
    assert [row["score"] for row in read(output)] == list(range(18))


def test_rows_that_were_written_are_counted(model, tmp_path, monkeypatch):
    """A part of fewer rows than its note says, whose digest is right: a fault of ours."""
    source = write(tmp_path / "in.jsonl", ROWS)
    real = job.write_rows
    monkeypatch.setattr(job, "write_rows", lambda path, rows, schema: real(path, rows[:-1], schema))
    for ending in ("jsonl", "parquet"):
        with pytest.raises(RuntimeError, match="is not what was written there"):
            run(model, source, tmp_path / f"out.{ending}")
        assert not (tmp_path / f"out.{ending}").exists()


def test_everything_is_synced_before_it_has_its_name(model, tmp_path, monkeypatch):
    """And the parts are gone from the disk before what says whose they are."""
    events = []
    for name in ("replace", "unlink"):
        real = getattr(Path, name)
        told = lambda self, *a, _real=real, _name=name, **k: (events.append((_name, self.name)), _real(self, *a, **k))[
            1
        ]
        monkeypatch.setattr(Path, name, told)
    sync = durable.sync
    monkeypatch.setattr(durable, "sync", lambda p: (events.append(("sync", Path(p).name)), sync(p))[1])
    run(model, write(tmp_path / "in.jsonl", ROWS[:4]), tmp_path / "out.jsonl")
    named = [i for i, (what, _) in enumerate(events) if what == "replace"]
    assert [events[i - 1][0] for i in named] == ["sync"] * 4
    assert [events[i][1].removesuffix(durable.SCRATCH) for i in named] == [
        ".job.json", ".00000000.json", ".00000000.jsonl", ".out.jsonl"
    ]  # fmt: skip
    last = [event for event in events[named[-1] + 1 :] if event[1] != "lock"]
    parts_directory = "out.jsonl.parts"
    assert last == [
        ("sync", tmp_path.name), ("unlink", "00000000.jsonl"), ("unlink", "00000000.json"), ("sync", parts_directory),
        ("unlink", "job.json"),
    ]  # fmt: skip


# Rows that are too much


def test_rows_of_too_many_responses_or_levels_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_RESPONSES", 9)
    for count, fine in ((9, True), (10, False)):
        row = {"prompt": "q", "responses": [f"answer {n}" for n in range(count)]}
        source = write(tmp_path / "many.jsonl", [row])
        with (
            CALM
            if fine
            else pytest.raises(ValueError, match=r"many\.jsonl:0: it has 10 responses, a group has at most 9")
        ):
            run(model, source, tmp_path / "out.jsonl")
    monkeypatch.setattr(making, "MOST_PAIRED", 8)
    write(source, [{"prompt": "q", "responses": [f"answer {n}" for n in range(9)]}])
    with pytest.raises(ValueError, match=r"many\.jsonl:0 has 9 responses, of which --pairs=all makes 36 pairs"):
        run(model, source, tmp_path / "pairs.jsonl", pairs="all")
    run(model, source, tmp_path / "pairs.jsonl", pairs="best_worst")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_in_lists_are_scored_or_named(ending, model, tmp_path):
    """However deep: none gets past the look at all rows and fails when it is written."""
    for depth in (1, 20, 60, 400, *range(820, 1000, 7), 5000):
        source, output = tmp_path / f"{depth}.jsonl", tmp_path / f"{depth}.{ending}"
        output = output.with_stem(f"out-{depth}")
        deep = "[" * depth + "1" + "]" * depth
        source.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:-1] + f', "deep": {deep}}}\n')
        try:
            assert run(model, source, output) == (2, {"rows": 2})
        except ValueError as error:
            assert f"{depth}.jsonl" in str(error) or "Parquet cannot hold these rows" in str(error), error
            assert depth > 20 and not output.with_name(f"{output.name}.parts").exists()


def test_lists_in_lists_of_other_sources_are_scored_or_named(model, tmp_path):
    """Those that JSON's reader does not refuse first."""
    value, outcomes = 1, set()
    for depth in range(1, 1100):
        value = [value]
        if depth < 900 or (depth % 25 and not 970 < depth < 1000):
            continue
        sources.register("deep", [ROWS[0], {**ROWS[1], "deep": value}], version="1")
        try:
            outcomes.add(run(model, "python://deep", tmp_path / "out.jsonl")[0])
        except ValueError as error:
            assert "deep:1: a value has lists" in str(error)
            outcomes.add("named")
    assert outcomes == {2, "named"}


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
    monkeypatch.setattr(parts, "ROW_GROUP", (8, 2**30))
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
    monkeypatch.setattr(parts, "ROW_GROUP", (512, 2**30))
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
        from rmjax.inference.reward_model import BadConversation
        if any(os.environ["FAIL"] == c[-1]["content"] for c in conversations):
            raise BadConversation(1, "no such answer")
        import time
        time.sleep(0.5)
        return real(self, conversations)
    scoring_fork.Model.values = values
sys.argv = ["score", *sys.argv[3:]]
sys.modules["rmjax.score.__main__"].cli()
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
def test_a_process_that_has_nothing_left_to_do_waits_for_the_others(launch, model):
    start, directory = launch
    source = write(directory / "in.jsonl", ROWS)
    dying(model, 4)  # the fifth part is the first process's
    with pytest.raises(MemoryError):
        run(model, source, directory / "out.jsonl")
    both = start("--input=in.jsonl", "--output=out.jsonl")
    assert both.wait(120) == 0, both.stderr.read()
    assert [row["score"] for row in read(directory / "out.jsonl")] == list(range(18))
    assert (directory / "model" / ASKED).read_text().splitlines() == ["answer 16", "answer 17"]


@pytest.mark.slow
def test_a_bad_row_ends_both_processes_and_leaves_nothing(launch):
    start, directory = launch
    write(directory / "in.jsonl", ROWS)
    both = start("--input=in.jsonl", "--output=new/out.jsonl", FAIL="answer 5")  # of the second process
    assert both.wait(120) == 2
    assert "in.jsonl:5: no such answer" in both.stderr.read()
    assert sorted(os.listdir(directory)) == ["in.jsonl", "model"]
