"""Watching a run: times, rates, waits, warnings and profiles, by a clock of the test's own and in a real run."""

import gzip
import io
import itertools
import json
import runpy
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_terminal import Clock, Terminal, screen
from test_train import metrics, small
from test_writers import points

from rmjax import config as config_lib
from rmjax import objectives
from rmjax.batches import prepare
from rmjax.batches.loader import StepSource
from rmjax.hardware import flops
from rmjax.models import config as model_config
from rmjax.models import heads
from rmjax.runtime.progress import Progress
from rmjax.train import training
from rmjax.train.watch import (
    LARGE_REWARD,
    Profile,
    Watch,
    conversation_lengths,
    device_memory,
    reward_drift,
    work_of_steps,
)

ROOT = Path(__file__).parents[2]


class Sums:
    """What a step leaves on the devices; there once `there` is set."""

    def __init__(self):
        self.there = threading.Event()

    def block_until_ready(self):
        assert self.there.wait(30)
        return self


class Bench:
    """A watch and its clock, and steps of 10 pairs, 1,000 tokens and 6e9 useful FLOPs."""

    def __init__(self, steps=1000, stream=None, **options):
        self.clock, self.stream = Clock(), stream or io.StringIO()
        each = {"pairs": 10.0, "tokens": 1000.0, "unshared_tokens": 1500.0, "useful_flops": 6e9}
        work = {name: np.full(steps, x) for name, x in each.items()}
        progress = Progress(steps, stream=self.stream, clock=self.clock, interval=0)
        self.watch = Watch(work, progress, clock=self.clock, **options)

    def start(self, number):
        sums = Sums()
        with self.watch.step(number):
            pass
        self.watch.follow(number, sums)
        return sums

    def finish(self, number, sums, seconds):
        """The devices end a step after `seconds`; the watch has seen it when this returns."""
        self.clock.now += seconds
        sums.there.set()
        self.watch._ends[number].result(timeout=30)

    def step(self, number, seconds=1.0, **values):
        """A step from start to end."""
        self.finish(number, self.start(number), seconds)
        self.watch.done(number, values)

    def pause(self, seconds):
        """An evaluation, or a save."""
        self.clock.now += seconds
        self.watch.resume()

    def lines(self, kind="warning"):
        return [line for line in self.stream.getvalue().splitlines() if line.startswith(kind)]

    def scalars(self):
        return {name.removeprefix("timing/"): value for name, value in self.watch.scalars().items()}


# Rates


def test_rates_count_neither_the_first_step_nor_evaluations_and_saves():
    bench = Bench(peak=48e9)
    bench.step(1, 60.0)
    assert bench.scalars() == {}
    for number in range(2, 22):
        bench.step(number, 0.5)
        if number % 5 == 0:
            bench.pause(100)
    assert bench.scalars() == {
        "step_seconds": 0.5,
        "steps_per_second": 2.0,
        "pairs_per_second": 20.0,
        "tokens_per_second": 2000.0,
        "unshared_tokens_per_second": 3000.0,
        "useful_mfu": 0.25,
        "waiting_for_data": 0.0,
    }


def test_rates_follow_the_last_steps_and_a_resumed_run_counts_from_there():
    bench = Bench(2000)
    for number in range(901, 1401):
        bench.step(number, 1.0 if number <= 1200 else 0.25)
    assert bench.scalars()["steps_per_second"] == 4.0 and bench.scalars()["step_seconds"] == 0.25
    assert bench.lines("step")[-1] == "step 1400/2000  2:30 left  40.0 pairs/s"


def test_time_left_has_evaluations_in_it():
    bench = Bench(100)
    for number in range(1, 51):
        bench.step(number, 1.0)
        if number % 10 == 0:
            bench.pause(5)
    bench.step(51, 1.0)
    assert bench.lines("step")[-1].split("  ")[1] == "1:13 left"  # 49 steps of 1 s, and 25 of 51 s as much again


def test_only_time_in_which_the_devices_have_nothing_to_do_is_waiting_for_data():
    """Step 3's batch takes 5 s to come; for the first two of them the devices still compute step 2."""
    bench, running = Bench(), []

    def source():
        yield 1
        yield 2
        bench.finish(2, running[0], 2.0)
        bench.clock.now += 3.0
        yield 3

    batches = bench.watch.batches(source(), 0)
    next(batches)
    bench.step(1)
    next(batches)
    running.append(bench.start(2))
    next(batches)
    assert next(batches, None) is None
    bench.watch.done(2, {})
    assert bench.scalars()["waiting_for_data"] == 0.0 and "waiting" not in bench.lines("step")[-1]
    bench.step(3, 1.0)
    assert bench.scalars()["waiting_for_data"] == 0.5  # 3 s of step 2's 2 and step 3's 4
    assert bench.lines("step")[-1].endswith("waiting for data 50%")


def test_a_step_is_as_long_as_the_devices_take_for_it_whenever_the_loop_asks():
    bench = Bench()
    bench.step(1)
    sums = bench.start(2)
    bench.finish(2, sums, 1.0)
    bench.clock.now += 7.0  # the loop does something else while step 3 is computed
    third = bench.start(3)
    bench.watch.done(2, {})
    assert bench.scalars()["step_seconds"] == 1.0
    bench.finish(3, third, 0.5)
    bench.watch.done(3, {})
    assert bench.scalars()["steps_per_second"] == pytest.approx(2 / 8.5)


def test_memory_is_that_of_the_fullest_device_that_tells():
    def device(platform="gpu", **stats):
        return SimpleNamespace(platform=platform, memory_stats=lambda: stats or None)

    gib = 2**30
    full = [device(bytes_in_use=2 * gib, peak_bytes_in_use=70 * gib), device(bytes_in_use=3 * gib, peak_bytes_in_use=4)]
    assert device_memory(full) == {"gib": 3.0, "peak_gib": 70.0}
    assert device_memory([device("cpu", bytes_in_use=gib)]) == device_memory([device()]) == device_memory([]) == {}
    assert device_memory([device(bytes_in_use=gib)]) == {"gib": 1.0}
    bench = Bench(devices=full)
    bench.step(1)
    assert bench.scalars() == {"memory_gib": 3.0, "memory_peak_gib": 70.0}


def test_the_progress_line_of_a_terminal_of_100_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    memory = SimpleNamespace(platform="gpu", memory_stats=lambda: {"peak_bytes_in_use": 71.3 * 2**30})
    options = {"devices": [memory], "peak": 13.9e9, "shown": ("loss", "accuracy")}
    bench = Bench(4000, Terminal(), **options)
    values = {"loss": 0.51234, "accuracy": 0.75, "margin": 1.0, "grad_norm": 1.234, "learning_rate": 9.81e-6}
    for number in range(1198, 1201):
        bench.step(number, 1.0, **values)
    said = "step 1200/4000  46:40 left  loss 0.5123  accuracy 0.75  10.0 pairs/s  MFU 43%  71.3 GiB  grad 1.23"
    assert screen(bench.stream.getvalue()) == [said]  # the learning rate has no place there
    monkeypatch.setenv("COLUMNS", "120")
    bench.step(1201, 1.0, **values)
    assert screen(bench.stream.getvalue())[0].endswith("grad 1.23  lr 9.81e-06")


# Warnings


def test_a_slow_step_is_told_with_its_time_its_tokens_and_its_wait_for_data():
    bench = Bench()

    def source():
        for number in range(1, 9):
            bench.clock.now += 7.0 if number == 8 else 0.0
            yield number

    batches = bench.watch.batches(source(), 0)
    for number in range(1, 9):
        next(batches)
        bench.step(number, 1.25 if number == 8 else 0.5)
    assert bench.lines() == [
        "warning: step 8 took 8.25 s (usually 0.5 s), 7 s of it waiting for data; it had 1,000 tokens"
    ]


def test_slow_steps_are_told_once_a_minute():
    bench = Bench()
    for number in range(1, 200):
        bench.step(number, 10.0 if number in (50, 51, 52, 150, 151) else 0.5)
    assert [line.split()[2] for line in bench.lines()] == ["50", "150"]
    assert bench.lines()[1].endswith("; so did 2 more since the last warning")


def test_a_step_that_fails_on_the_devices_leaves_the_error_to_the_loop(capfd):
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("lost")

    bench = Bench()
    bench.watch.follow(1, Failed())
    bench.watch.done(1, {})
    assert "lost" not in "".join(capfd.readouterr())


def test_another_process_warns_where_its_own_data_is_late(caplog):
    bench, late = Bench(first=False), {9: 2.0, 15: 7.0}

    def source():
        for number in range(1, 20):
            bench.clock.now += late.get(number, 0.0)
            yield number

    batches = bench.watch.batches(source(), 0)
    for number in range(1, 20):
        next(batches)
        bench.step(number, 9.0 if number == 9 else 0.5)
    (record,) = caplog.records
    assert record.getMessage().startswith("step 15 took 7.5 s (usually 0.5 s), 7 s of it waiting for data")


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ([99.0] + [0.5] * 20, "the first step compiles"),
        ([0.5] * 4 + [9.0] + [0.5] * 9, "nothing is usual yet"),
        ([0.01] * 20 + [0.9] + [0.01] * 9, "less than a second"),
        ([1.0] * 20 + [2.9] + [1.0] * 9, "less than three times the usual"),
        ([0.5] * 20 + [None, 9.0, 0.5], "the step after an evaluation"),
    ],
)
def test_no_warning(times, why):
    bench, number = Bench(), 0
    for seconds in times:
        if seconds is None:
            bench.pause(30.0)
        else:
            number += 1
            bench.step(number, seconds)
    assert bench.lines() == [], why


def test_a_clock_that_stands_still_divides_by_no_zero():
    bench = Bench()
    for number in range(1, 9):
        bench.step(number, 0.0)
    assert bench.scalars() == {} and bench.lines("step")[-1] == "step 8/1000  0:00 left"


def test_large_rewards_are_told_once():
    bench = Bench(large_reward=LARGE_REWARD)
    bench.step(1, reward_min=-100.0, reward_max=float("nan"))
    bench.step(2, reward_min=-100.0, reward_max=127.0)
    assert bench.lines() == []
    bench.step(3, reward_min=-300.4, reward_max=12.0)
    bench.step(4, reward_min=-500.0, reward_max=12.0)
    assert bench.lines() == [
        "warning: step 3 has a reward of -300; from 128 on bfloat16 rounds log-odds to whole numbers. "
        "config.objective.center or barrier keeps rewards small, as does a lower config.optim.learning_rate"
    ]
    assert jnp.bfloat16(LARGE_REWARD) + jnp.bfloat16(0.4) == LARGE_REWARD
    assert jnp.nextafter(jnp.bfloat16(LARGE_REWARD), jnp.bfloat16(1e3)) - jnp.bfloat16(LARGE_REWARD) == 1
    other = Bench()  # of an objective with a scale of its own
    other.step(1, reward_max=1000.0)
    assert other.lines() == []


def test_reward_drift_is_measured_from_the_evaluation_before_training():
    first = {"validation/reward_mean": 0.5, "train_slice/reward_mean": -1.0}
    now = {"validation/reward_mean": 2.0, "train_slice/reward_mean": -1.5, "validation/loss": 0.1}
    assert reward_drift(now, first) == {"validation/reward_drift": 1.5, "train_slice/reward_drift": -0.5}
    assert reward_drift(now, {}) == {}


# Profiles


@pytest.mark.parametrize("text", ["10", "10-15", "15,10", "0,3", "-1,3", "a,b", "1,2,3", "1.5,2"])
def test_steps_to_profile_that_are_none(text):
    config = config_lib.demo()
    config.data.train, config.profile.steps = "x.jsonl", text
    with pytest.raises(ValueError, match=rf"config.profile.steps='{text}' is no range of steps; write '10,15'"):
        config_lib.check(config)


def test_steps_to_profile():
    assert config_lib.profile_steps("") is None
    assert config_lib.profile_steps("10,15") == (10, 15) and config_lib.profile_steps(" 3 , 3 ") == (3, 3)


def named_steps(directory):
    """Numbers of the steps in the trace for Perfetto."""
    (path,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]


def test_a_run_that_stops_within_the_profile_leaves_a_whole_trace(tmp_path):
    said = []
    bench = Bench(profile=Profile(tmp_path, 2, 900, 1000, said.append))
    for number in range(1, 4):
        bench.step(number)
    assert not list(tmp_path.iterdir())
    bench.watch.close()
    bench.watch.close()
    assert named_steps(tmp_path) == [2, 3]
    assert said == [
        f"profile in {tmp_path}: `tensorboard --logdir={tmp_path}` (pip install xprof tensorboard), or open its "
        "perfetto_trace.json.gz at https://ui.perfetto.dev"
    ]


def test_a_run_resumed_after_the_profile_and_one_too_short_for_it_have_none(tmp_path):
    said = []
    bench = Bench(profile=Profile(tmp_path, 2, 3, 1000, said.append))
    for number in range(4, 8):
        bench.step(number)
    bench.watch.close()
    assert said == [] and not list(tmp_path.iterdir())
    Profile(tmp_path, 10, 15, 9, said.append)
    assert said == ["warning: config.profile.steps=10,15, but the run has 9 steps: there will be no trace"]


def test_a_profile_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    def full():
        raise OSError("No space left on device")

    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    bench = Bench(profile=Profile(tmp_path, 2, 3, 1000, said.append))
    for number in range(1, 5):
        bench.step(number)
    assert said == ["warning: the profile could not be written: No space left on device"]


def test_the_step_under_way_while_a_profile_is_written_counts_in_nothing(tmp_path, monkeypatch):
    bench = Bench(profile=Profile(tmp_path, 2, 7, 1000, lambda _: None))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    for number in range(1, 7):
        bench.step(number)
    seventh, eighth = bench.start(7), bench.start(8)
    bench.finish(7, seventh, 1.0)

    def write():
        bench.finish(8, eighth, 1.0)
        bench.clock.now += 30

    monkeypatch.setattr(jax.profiler, "stop_trace", write)
    bench.watch.done(7, {})
    bench.watch.done(8, {})
    bench.step(9)
    assert bench.scalars()["steps_per_second"] == 1.0 and bench.lines() == []
    assert bench.lines("step")[-1].split("  ")[1] == "16:31 left"


# What steps hold


@pytest.mark.parametrize(
    "name", ["bt_tiny", "bt_rankings_tiny", "pairwise_tiny", "pointwise_tiny", "prm_tiny", "sft_tiny"]
)
def test_work_of_steps_is_that_of_their_conversations(name, tmp_path, tmp_path_factory):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    config.data.train = config.data.train.partition("?")[0] + "?n=40&seed=0"
    config.data.validation = config.data.train.replace("seed=0", "seed=1")
    config.data.cache_dir, config.data.workers, config.plan.groups_per_step = str(tmp_path), 0, 8
    objective = objectives.make(config.objective)
    groups, _ = prepare.read_groups(config, prepare.open_chat(config, tmp_path), objective.task)
    groups = groups.select(np.arange(len(groups))[::-1])
    plan = prepare.plan_training(config, groups)
    model = model_config.from_hf({"vocab_size": 768, **config.model.scratch.to_dict()})
    _, shapes = heads.abstract(model, 1)

    def conversations(index):
        """Lengths, by walking the tree: what the tokens that no other token follows see."""
        tree = groups.group(index).tree
        followed = {int(i) for end in range(len(tree)) for i in tree.path(end)[:-1]}
        return [len(tree.path(end)) for end in range(len(tree)) if end not in followed]

    expected = [conversations(index) for index in range(len(groups))]
    lengths, begin = conversation_lengths(groups)
    assert [lengths[a:b].tolist() for a, b in itertools.pairwise(begin)] == expected
    assert [sum(each) for each in expected] == groups.unshared.tolist()
    said = SimpleNamespace(config=model, plain=SimpleNamespace(shapes=shapes), flops_each=flops.TRAINED)
    work = work_of_steps(prepare.Split(groups, plan, None), said)
    count, *_ = work
    assert count == ("groups" if name == "bt_rankings_tiny" or set(groups.responses) != {2} else "pairs")
    for step in range(plan.steps):
        here = np.concatenate(plan.rows(step))
        useful = sum(flops.useful(model, shapes, np.array([expected[i]])).sum() for i in here)
        sums = [len(here), groups.lengths[here].sum(), groups.unshared[here].sum(), useful]
        assert [x[step] for x in work.values()] == pytest.approx(sums, rel=1e-12)


# A run


def test_a_run_is_watched(tmp_path, capsys, monkeypatch):
    """Two steps are profiled; then the data of one step comes late, and the clock is set back."""
    real, inner, follow, seventh = time.time, StepSource.__getitem__, Watch.follow, threading.Event()

    def late(self, step):
        if self.plan.steps == 20 and step == 7:
            assert seventh.wait(120)
            time.sleep(2.5)
            monkeypatch.setattr(time, "time", lambda: real() - 86400)
        return inner(self, step)

    def started(self, number, sums):
        follow(self, number, sums)
        if number == 7:
            seventh.set()

    monkeypatch.setattr(StepSource, "__getitem__", late)
    monkeypatch.setattr(Watch, "follow", started)
    monkeypatch.setattr(flops, "peak", lambda _: 1e12)
    monkeypatch.setattr(training, "conclude", lambda *_: None)  # the export takes as long as all the rest
    cache, workdir = tmp_path / "cache", tmp_path / "run"
    options = {"eval__every": "10 steps", "plan__rows_per_step": 4, "duration": "20 steps"}
    options |= {"log__to": "tensorboard", "model__remat": "full", "model__scratch__num_hidden_layers": 1}
    training.run(small(cache, profile__steps="2,3", **options), workdir)
    output = capsys.readouterr().out

    (warning,) = [line for line in output.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: step 8 took ") and " s of it waiting for data; it had " in warning
    assert f"profile in {workdir / 'profile'}: " in output and named_steps(workdir / "profile")[:2] == [2, 3]
    scalars = points(workdir / "tensorboard")
    named = lambda name: {step: x for (tag, step), (x,) in scalars.items() if tag == f"timing/{name}"}
    waiting, rate = named("waiting_for_data"), named("steps_per_second")
    assert waiting.keys() == {3, 6, 9, 12, 15, 18, 20}
    waited = {step: waiting[step] * counted / rate[step] for step, counted in ((6, 4), (9, 7))}  # not 1, and not 4
    assert waited[9] - waited[6] > 2 and waiting[9] > waiting[6]
    for name in ("step_seconds", "pairs_per_second", "tokens_per_second", "unshared_tokens_per_second"):
        assert named(name).keys() == waiting.keys() and all(0 < x < 1e6 for x in named(name).values())
    for step, mfu in named("useful_mfu").items():  # 6 FLOPs a token and parameter at least, of which there are 5,776
        assert 1 < mfu * 1e12 / (6 * 5776 * named("unshared_tokens_per_second")[step]) < 2
    lines = metrics(workdir)
    assert not any(name.startswith("timing") for line in lines for name in line)
    for name in ("grad_norm", "learning_rate", "reward_mean", "reward_std", "reward_min", "reward_max"):
        assert all(f"train/{name}" in line for line in lines if "train/loss" in line)
    before, *later = [line for line in lines if "validation/loss" in line]
    assert before["validation/reward_drift"] == 0.0 and len(later) == 2
    for line in later:
        assert line["validation/reward_drift"] == line["validation/reward_mean"] - before["validation/reward_mean"] != 0


@pytest.mark.slow
def test_a_resumed_run_knows_the_rewards_from_before_training_and_its_profile_is_over(tmp_path):
    cache, workdir = tmp_path / "cache", tmp_path / "run"
    options = {"eval__every": "10 steps", "duration": "20 steps"}
    training.run(small(cache, **options), workdir)
    lines = metrics(workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    training.run(small(cache, profile__steps="1,10", **options), workdir)
    assert metrics(workdir) == lines and not (workdir / "profile").exists()
    assert "validation/reward_drift" in lines[-1]
