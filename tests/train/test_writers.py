"""Writers: what a resumed run leaves behind equals what an uninterrupted one does."""

import json
import math
import os
import struct
import subprocess
import sys
import types

import pytest
from ml_collections import ConfigDict
from tensorboardX.crc32c import crc32c

from rmjax.runtime import processes
from rmjax.train.sinks import wandb as wandb_sink
from rmjax.train.sinks.tensorboard import TensorBoard, cut_events, read_events
from rmjax.train.sinks.wandb import Wandb
from rmjax.train.writers import JsonlWriter, Writers, cut_jsonl


def config(to="tensorboard"):
    return ConfigDict({"log": {"to": to, "project": "rewards"}, "seed": 1})


def value_at(step):
    return {"train/loss": 1 / (step + 3), "validation/accuracy": step / 7}


def points(directory):
    """What a reader without purge semantics sees: {(tag, step): [values in file order]}."""
    found = {}
    for path in sorted(directory.glob("events*")):
        for _, event in read_events(path.read_bytes()):
            for value in event.summary.value:
                found.setdefault((value.tag, event.step), []).append(value.simple_value)
    return found


def test_jsonl_keeps_every_digit_and_is_on_disk_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(3, {"a": 0.1 + 0.2, "b": 1e-300, "c": float("nan"), "d": float("-inf"), "e": True})
    line = (tmp_path / "m.jsonl").read_text()
    assert line == '{"step": 3, "a": 0.30000000000000004, "b": 1e-300, "c": null, "d": null, "e": 1.0}\n'
    assert json.loads(line)["a"] == 0.1 + 0.2
    writer.close()


@pytest.mark.parametrize(("step", "kept"), [(20, [0, 10, 20, 20]), (19, [0, 10]), (-1, []), (99, [0, 10, 20, 20, 30])])
@pytest.mark.parametrize("half", [b"", b'{"step": 3', b'{"step": 3}', b'{"step": 30, "name": "\xc3'])
def test_cut_jsonl(tmp_path, step, kept, half):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"step": n, "x": 0.1}).encode() + b"\n" for n in (0, 10, 20, 20, 30)]
    path.write_bytes(b"".join(lines) + half)
    cut_jsonl(path, step)
    assert path.read_bytes() == b"".join(line for line in lines if json.loads(line)["step"] in kept)
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_cut_without_files(tmp_path):
    cut_jsonl(tmp_path / "none.jsonl", 3)
    cut_events(tmp_path / "none", 3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stops", [[(0, 25)], [(0, 25), (20, 34), (30, 31)], [(0, 7), (0, 12)]])
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path, stops):
    """Each stop is (step started from, step killed after); a checkpoint is there every 10 steps."""

    def train(workdir, start, end):
        writers = Writers.open(workdir, config(), start)
        for step in range(start + 1 if start else 0, end + 1):
            writers.write(step, value_at(step))
            writers.timing(step, {"timing/pairs_per_second": start + step})
        return writers  # not closed: killed

    train(tmp_path / "whole", 0, 40).close()
    for start, end in stops:
        train(tmp_path / "resumed", start, end)
        with open(tmp_path / "resumed" / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 4')
        newest = max((tmp_path / "resumed" / "tensorboard").iterdir(), key=lambda path: path.name)
        newest.write_bytes(newest.read_bytes() + struct.pack("<QI", 80, 0) + b"half")
    train(tmp_path / "resumed", stops[-1][1] // 10 * 10, 40).close()

    whole, resumed = (tmp_path / name for name in ("whole", "resumed"))
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert "timing" not in (whole / "metrics.jsonl").read_text()
    whole_points, resumed_points = points(whole / "tensorboard"), points(resumed / "tensorboard")
    assert whole_points.keys() == resumed_points.keys()
    assert len(whole_points) == 41 * 3
    assert {len(values) for values in resumed_points.values()} == {1}  # no stale point is left
    for key in whole_points.keys() - {("timing/pairs_per_second", step) for step in range(41)}:
        assert whole_points[key] == resumed_points[key]


def test_rewritten_event_files_have_valid_checksums(tmp_path):
    """The record format as TensorFlow documents it, its masked CRC-32C computed by tensorboardX."""
    writer = TensorBoard(tmp_path)
    for step in range(5):
        writer.write(step, value_at(step))
    writer.close()
    cut_events(tmp_path, 2)

    def masked(data):
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    (path,) = tmp_path.iterdir()
    data, start, records = path.read_bytes(), 0, 0
    while start < len(data):
        length, crc = struct.unpack_from("<QI", data, start)
        body = data[start + 12 : start + 12 + length]
        assert crc == masked(data[start : start + 8])
        assert struct.unpack_from("<I", data, start + 12 + length) == (masked(body),)
        start, records = start + 16 + length, records + 1
    assert records == 1 + 3  # the version, steps 0 to 2


def test_an_open_tensorboard_is_told_to_purge(tmp_path):
    """TensorBoard drops what it has read from the step of a START event on."""
    TensorBoard(tmp_path).close()
    TensorBoard(tmp_path, purge_step=21).close()
    first, second = sorted(tmp_path.iterdir())
    events = [event for _, event in read_events(second.read_bytes())]
    assert [event.file_version for event in events] == ["brain.Event:2", ""]
    assert events[1].step == 21 and events[1].session_log.status == events[1].session_log.START
    assert len(list(read_events(first.read_bytes()))) == 1


def test_tensorboard_can_be_off(tmp_path):
    writers = Writers.open(tmp_path, config(""), 0)
    writers.write(1, {"a": 1.0})
    writers.timing(1, {"b": 1.0})
    writers.close()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "timings.jsonl"]
    assert json.loads((tmp_path / "timings.jsonl").read_text()) == {"step": 1, "b": 1.0}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    writers = Writers.open(tmp_path / "new", config("tensorboard,wandb"), 0)
    writers.write(1, {"a": 1.0})
    writers.timing(1, {"b": 1.0})
    writers.close()
    assert not (tmp_path / "new").exists()


class FakeWandb(types.ModuleType):
    """Records calls as the package's own `init`, `Run.log` and `Run.finish` take them."""

    Error = type("Error", (Exception,), {})

    def __init__(self, mode="online", base_url="data:,"):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0
        self.step = 0  # the first that the service does not have
        self.settings = types.SimpleNamespace(mode=mode, base_url=base_url)
        self.logins, self.known = [], True

    def setup(self):
        return self

    def login(self, verify):
        self.logins.append(verify)
        if self.known is None:
            raise self.Error("No API key configured.")
        return self.known

    def init(self, **options):
        self.inits.append(options)
        if self.known == "lost" and options["mode"] != "offline":
            raise self.Error("timed out")
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 10):
        wandb.step = start
        writers = Writers.open(tmp_path, config("tensorboard,wandb"), start)
        writers.write(start + 1, {"a": 1})
        writers.timing(start + 1, {"timing/steps_per_second": 1.0})
        writers.close()
    first, second = wandb.inits
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 32
    assert first["project"] == "rewards" and first["config"]["seed"] == 1
    logged = [(start + 1, values) for start in (0, 10) for values in ({"a": 1.0}, {"timing/steps_per_second": 1.0})]
    assert wandb.logged == logged and wandb.finished == 2
    Wandb(tmp_path / "..", "rewards", {})
    assert wandb.inits[2]["id"] != first["id"]


@pytest.mark.parametrize("stops", [0, 12, 21])
def test_what_a_kill_kept_from_wandb_is_logged_again(tmp_path, monkeypatch, stops):
    """The service has the steps before `stops`; the checkpoint is of step 20."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writers = Writers.open(tmp_path, config("wandb"), 0)
    for step in range(25):
        writers.write(step, {"a": math.nan if step == 14 else step})
        writers.timing(step, {"timing/x": 2 * step})
    before, wandb.logged, wandb.step = wandb.logged, [], stops  # killed
    Writers.open(tmp_path, config("wandb"), 20).close()
    assert str(wandb.logged) == str([(step, values) for step, values in before if stops <= step <= 20])


@pytest.mark.parametrize("known, url", [(True, "http://127.0.0.1:9"), ("lost", "data:,")])
def test_where_wandb_cannot_be_reached_the_run_goes_on_offline(tmp_path, monkeypatch, caplog, known, url):
    wandb = FakeWandb(base_url=url)
    wandb.known = known
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb_sink.check("rewards")
    assert wandb.logins == [known == "lost"]  # whether a key is right cannot be asked
    writer = Wandb(tmp_path, "rewards", {})
    assert wandb.inits[-1]["mode"] == "offline" and "the run goes on offline; afterwards: wandb sync" in caplog.text
    writer.write(1, {"a": 1.0})
    assert wandb.logged == [(1, {"a": 1.0})]


@pytest.mark.parametrize("known, said", [(None, "No API key configured"), (False, "nobody is logged in")])
def test_nobody_logged_in_to_wandb_is_bad_input(monkeypatch, known, said):
    wandb = FakeWandb()
    wandb.known = known
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match=rf"config\.log\.to has wandb: {said}.*; log in with `wandb login`"):
        wandb_sink.check("rewards")
    wandb.settings.mode = "offline"
    wandb_sink.check("rewards")
    assert len(wandb.logins) == 1


def test_without_wandb_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"log\.to has wandb, .*pip install 'wandb"):
        Writers.open(tmp_path, config("tensorboard,wandb"), 0)


def test_importing_needs_no_optional_package():
    script = "import sys, rmjax.train.writers; print({'wandb', 'torch', 'tensorflow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
