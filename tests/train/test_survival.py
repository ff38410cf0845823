"""What a run survives: signals at any moment, a full disk, broken checkpoints, NaN, other runs and a wrong clock."""

import functools
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import Started, checkpoints, column, metrics, same_run, small

from rmjax import config as config_lib
from rmjax import objectives
from rmjax.batches import prepare
from rmjax.inference import parameters, runs
from rmjax.runtime import exits, signals
from rmjax.train import resume, training


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """Token cache and compiled programs, shared by all runs of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache_dir):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    Started(workdir, cache_dir).finish()
    return workdir


# Signals


def signal_before(module, name, number=signal.SIGTERM, call=1, then=0.0):
    """In the run's process: sends it a signal at the `call`th call of a function, and goes on `then` seconds later."""
    import importlib

    *path, attribute = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(owner, attribute), []

    def spoilt(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            time.sleep(then)
        return original(*args, **kwargs)

    setattr(owner, attribute, spoilt)


LONG = 100.0  # nobody waits so long: the process must have ended by then


@pytest.mark.slow
def test_sigterm_anywhere_loses_nothing(whole, tmp_path, cache_dir):
    """One run, told to stop in every phase; each start goes on where the last one stopped."""
    workdir = tmp_path / "run"
    before = functools.partial
    moments = [  # where the signal comes, and the step that is saved then
        (before(signal_before, "rmjax.batches.prepare", "read_groups", then=LONG), None),
        (before(signal_before, "rmjax.train.training", "compile_program", then=LONG), None),
        (before(signal_before, "rmjax.train.evaluations", "Pass.metrics", then=0.2), None),
        (before(signal_before, "rmjax.train.watch", "Watch.step", call=2, then=0.2), 2),
        (before(signal_before, "rmjax.train.evaluations", "Pass.metrics", then=0.2), 5),
        (before(signal_before, "rmjax.train.evaluations", "Pass.metrics", then=0.2), 5),  # of step 5 again
        (before(signal_before, "rmjax.checkpoint", "Checkpointer.save", then=0.2), 6),
        (before(signal_before, "rmjax.train.evaluations", "Pass.metrics", call=5, then=0.2), 20),
        (before(signal_before, "rmjax.export.write", "write_export", then=LONG), 20),
    ]
    at = None
    for number, (spoil, saved) in enumerate(moments):
        code, text = Started(workdir, cache_dir, spoil).end()
        assert code == exits.AGAIN and "stopped by SIGTERM" in text, (number, text[-2000:])
        assert (f"continuing from step {at}" in text) is (at is not None and number > 1), (number, text)
        assert checkpoints(workdir)[-1:] == ([] if saved is None else [saved]), (number, text)
        assert not (workdir / "export").exists()
        at = saved
    text = Started(workdir, cache_dir).finish()
    assert "the run is done" in text
    same_run(whole, workdir)


EARLY = {"checkpoint__patience": 1, "optim__learning_rate": 0.05}


@pytest.mark.slow
def test_sigkill_anywhere_loses_at_most_the_steps_since_the_last_save(tmp_path, cache_dir):
    """Of a run that stops early. benchmarks/faults.py kills 50 times; inside a save: see test_checkpoint.py as well."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert "stopped early" in Started(whole, cache_dir, **EARLY).finish()
    lines = lambda: len(metrics(workdir))
    saving = lambda: any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
    rng = np.random.default_rng(0)
    moments = [saving, *(lambda n=n: lines() >= n for n in sorted(rng.integers(2, len(metrics(whole)), 3)))]
    for ready in moments:
        started = Started(workdir, cache_dir, **EARLY)
        killed = started.send_when(signal.SIGKILL, ready)
        code, text = started.end()
        assert (code == -signal.SIGKILL) is killed and code in (0, -signal.SIGKILL), text
        last, reached = checkpoints(workdir)[-1:], max([line["step"] for line in metrics(workdir)], default=0)
        # Every third step is saved, in the background: the newest save may not have been finished.
        assert reached - (last[0] if last else 0) <= 2 * 3
    text = Started(workdir, cache_dir, **EARLY).finish()
    assert not last or f"continuing from step {last[0]}" in text
    same_run(whole, workdir)


def twice(number):
    """In the run's process: the signal once in a step, and again while that is saved."""
    signal_before("rmjax.train.watch", "Watch.step", number=number, call=8, then=0.2)
    signal_before("rmjax.runtime.sealing", "_write_manifest", number=number, call=4, then=1.0)


@pytest.mark.slow
def test_a_second_sigterm_lets_the_save_go_on_and_a_second_ctrl_c_does_not(tmp_path, cache_dir):
    code, text = Started(tmp_path / "term", cache_dir, functools.partial(twice, signal.SIGTERM)).end()
    assert code == exits.AGAIN and "stopped by SIGTERM: step 8 is saved" in text
    assert checkpoints(tmp_path / "term")[-1] == 8
    code, text = Started(tmp_path / "int", cache_dir, functools.partial(twice, signal.SIGINT)).end()
    assert code == exits.INTERRUPTED and "stopped by SIGINT: the same command goes on" in text
    assert checkpoints(tmp_path / "int")[-1] == 6  # the last whole one stays


def test_stop_signals_are_given_back(monkeypatch):
    before = [signal.getsignal(number) for number in signals.CODES]
    with signals.Stop().listening() as stop, stop.defer_signals():
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop.agreed() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.agreed() and stop.signal == signal.SIGTERM
        stop.signal = 0  # or the process would end now
    assert [signal.getsignal(number) for number in signals.CODES] == before


# Two runs


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
    workdir = tmp_path / "a" / "b"
    with signals.alone(workdir):
        said = rf"another run is in .*b \(host \S+, process {os.getpid()}\); wait for it"
        with pytest.raises(ValueError, match=said), signals.alone(workdir):
            pass
        assert (workdir / "lock").exists()
    assert not (tmp_path / "a").exists()  # nothing was put there
    workdir.mkdir(parents=True)
    with signals.alone(workdir):
        (workdir / "file").touch()
    assert os.listdir(workdir) == ["file"]


def test_the_lock_of_a_killed_run_holds_nobody(tmp_path):
    child = os.fork()
    if not child:
        with signals.alone(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert f"process {child}" in (tmp_path / "lock").read_text()
    with signals.alone(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()


def test_a_lock_file_that_is_deleted_meanwhile_is_no_lock(tmp_path, monkeypatch):
    flock, calls = signals.fcntl.flock, []

    def late(file, how):
        calls.append(1)
        if len(calls) == 1:  # the last holder ends between open and flock
            (tmp_path / "lock").unlink()
        flock(file, how)

    monkeypatch.setattr(signals.fcntl, "flock", late)
    with signals.alone(tmp_path), pytest.raises(ValueError, match="another run is in"), signals.alone(tmp_path):
        pass
    assert len(calls) == 3


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(signals.fcntl, "flock", none)
    with signals.alone(tmp_path):
        assert "cannot be locked" in caplog.text


@pytest.mark.slow
def test_the_command_refuses_a_workdir_in_use(whole, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    with signals.alone(workdir):
        code, text = Started(workdir, cache_dir).end()
    assert code == exits.BAD_INPUT and f"process {os.getpid()}" in text and "plan:" not in text
    same_run(whole, workdir)


# Checkpoints


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, *(pytest.param(damage, marks=pytest.mark.release) for damage in (cut_short, Path.unlink))],
)
def test_a_broken_latest_checkpoint_falls_back_and_says_so(whole, tmp_path, cache_dir, damage):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "export")
    latest, before = checkpoints(workdir)[-1], checkpoints(workdir)[-2]
    arrays = [path for path in (workdir / "checkpoints" / str(latest)).rglob("d/*") if path.is_file()]
    damage(max(arrays, key=lambda path: path.stat().st_size))
    text = Started(workdir, cache_dir).finish()
    assert f"step {latest} is broken, going back to the one before" in text and f"continuing from step {before}" in text
    same_run(whole, workdir)


def small_files(bytes_):
    """In the run's process: the system refuses to write larger files, as a full disk does."""
    import resource

    from rmjax import checkpoint

    save = checkpoint.Checkpointer.save

    def limited(self, step, *rest):
        if step == 9:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
        save(self, step, *rest)

    checkpoint.Checkpointer.save = limited


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_what_is_saved(whole, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    code, text = Started(workdir, cache_dir, functools.partial(small_files, 2**16)).end()
    assert code == exits.FAILED and "saving the checkpoint of step 9 in" in text and "check the free space" in text
    assert checkpoints(workdir)[-1] == 6
    text = Started(workdir, cache_dir).finish()
    assert "continuing from step 6" in text
    same_run(whole, workdir)


# Steps that are not finite

BAD_ROW = 77


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory, cache_dir):
    """Pairs of which one asks for an infinite reward difference, and the steps in which it stands."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    vocabulary = ["river", "green", "late", "old", "deep", "often", "tree", "stone"]
    words = np.random.default_rng(0).choice(vocabulary, (160, 3, 6))
    rows = [dict(zip(("prompt", "chosen", "rejected"), map(" ".join, texts)), margin=0.0) for texts in words]
    rows[BAD_ROW]["margin"] = 1e30
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"data__train": str(path), "objective__margin_scale": 1e30}
    config = small(cache_dir, **values)
    groups, _ = prepare.read_groups(
        config, prepare.open_chat(config, path.parent), objectives.make(config.objective).task
    )
    plan = prepare.plan_training(config, groups)
    bad = [s for s in range(plan.steps) if f"rows.jsonl:{BAD_ROW}" in map(groups.id, np.concatenate(plan.rows(s)))]
    assert len(bad) == 2
    return values, bad, plan.steps


def saved_before(step: int) -> int:
    """The newest checkpoint of the small run at a step."""
    return max(done for done in range(step + 1) if done % 3 == 0 or done % 5 == 0)


@pytest.mark.slow
def test_a_rollback_leaves_out_the_rows_since_the_last_checkpoint_and_a_resume_repeats_it(
    poisoned, tmp_path, cache_dir
):
    values, bad, steps = poisoned
    values = {**values, "on_nonfinite": "rollback", "log__every": "1 steps"}
    text = Started(tmp_path / "run", cache_dir, **values).finish()
    for step in bad:
        assert f"the rows of steps {saved_before(step)} to {step} are left out" in text
    assert f"rows.jsonl:{BAD_ROW}" in text
    left_out = {s for step in bad for s in range(saved_before(step), step + 1)}
    assert column(tmp_path / "run", "train/skipped_steps")[-1] == len(left_out)
    losses = [line["step"] - 1 for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert losses == [s for s in range(steps) if s not in left_out]
    stop = functools.partial(signal_before, "rmjax.train.watch", "Watch.step", call=bad[0] + 3, then=0.2)
    code, _ = Started(tmp_path / "stopped", cache_dir, stop, **values).end()
    assert code == exits.AGAIN and "left out" in Started(tmp_path / "stopped", cache_dir, **values).finish()
    same_run(tmp_path / "run", tmp_path / "stopped")


@pytest.mark.slow
def test_a_run_that_stopped_at_a_bad_step_goes_on_when_told_to_skip_it(poisoned, tmp_path, cache_dir):
    values, bad, _ = poisoned
    code, text = Started(tmp_path / "run", cache_dir, **values).end()
    assert code == exits.FAILED and f"step {bad[0]}: the loss or a gradient is NaN" in text
    assert f"rows.jsonl:{BAD_ROW}" in text and checkpoints(tmp_path / "run")[-1] == bad[0]
    text = Started(tmp_path / "run", cache_dir, on_nonfinite="skip", **values).finish()
    assert "changed since the last start: config.on_nonfinite: 'stop' before, 'skip' now" in text
    assert column(tmp_path / "run", "train/skipped_steps")[-1] == 2
    Started(tmp_path / "other", cache_dir, on_nonfinite="skip", **values).finish()
    same_run(tmp_path / "run", tmp_path / "other")


@pytest.mark.slow
def test_rollbacks_that_do_not_help_end_the_run(tmp_path, cache_dir):
    values = {"optim__learning_rate": 1e30, "optim__clip_norm": 0.0, "on_nonfinite": "rollback"}
    code, text = Started(tmp_path / "run", cache_dir, **values).end()
    assert code == exits.FAILED and "leaving out rows does not help" in text
    last = checkpoints(tmp_path / "run")[-1]  # steps of infinite parameters can still be finite, and saved
    assert text.count(f"the rows of steps {last} to ") == training.MOST_ROLLBACKS + 1


def test_steps_left_out_are_remembered():
    host = resume.Host({})
    host.leave_out(6, 8, 20)
    assert (host.next_step(6), host.next_step(12), host.skipped, host.unevaluated) == (9, 12, 3, False)
    again = resume.Host.from_json(json.loads(json.dumps(host.to_json())))
    again.leave_out(18, 19, 20)
    assert (again.next_step(18), again.next_step(6), again.skipped, again.unevaluated) == (20, 6, 5, True)


# What changes between two starts


def rename_workdir(name):
    """In the run's process: another --workdir."""
    import sys

    from rmjax import main

    cli = main.cli
    main.cli = lambda: (sys.argv.__setitem__(2, f"--workdir={name}"), cli())


@pytest.mark.slow
def test_more_epochs_and_another_learning_rate_go_on_from_the_same_steps(whole, tmp_path, cache_dir):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    text = Started(workdir, cache_dir, duration="3 epochs", optim__learning_rate=1e-4).finish()
    before = small(cache_dir).optim.learning_rate
    assert "changed since the last start: config.duration: '2 epochs' before, '3 epochs' now" in text
    assert f"changed since the last start: config.optim.learning_rate: {before} before, 0.0001 now" in text
    assert "continuing from step 20" in text and checkpoints(workdir)[-1] == 30
    old, new = metrics(whole), metrics(workdir)
    assert new[: len(old)] == old and max(line["step"] for line in new) == 30
    code, text = Started(workdir, cache_dir, duration="1 epochs").end()
    assert code == exits.BAD_INPUT and "step 30 is beyond the 10 steps that the run has now" in text


CHANGES = {
    "config.seed": ("seed", 1, resume.REFUSED),
    "config.plan.row_tokens": ("plan__row_tokens", 512, resume.REFUSED),
    "config.optim.name": ("optim__name", "muon", resume.REFUSED),
    "config.checkpoint.metric": ("checkpoint__metric", "validation/loss", resume.REFUSED),
    "config.checkpoint.dir": ("checkpoint__dir", "/elsewhere", resume.REFUSED),
    "config.objective.center": ("objective__center", 0.1, resume.REFUSED),
    "config.duration": ("duration", "9 epochs", resume.LOGGED),
    "config.optim.learning_rate": ("optim__learning_rate", 1.0, resume.LOGGED),
    "config.optim.warmup": ("optim__warmup", "50%", resume.LOGGED),
    "config.optim.weight_decay": ("optim__weight_decay", 1.0, resume.LOGGED),
    "config.eval.every": ("eval__every", "2 steps", resume.LOGGED),
    "config.checkpoint.every": ("checkpoint__every", "9 steps", resume.LOGGED),
    "config.mesh.tensor": ("mesh__tensor", 2, resume.FREE),
    "config.model.remat": ("model__remat", "full", resume.FREE),
    "config.log.to": ("log__to", "tensorboard", resume.FREE),
    "config.checkpoint.keep_latest": ("checkpoint__keep_latest", 9, resume.FREE),
}


@pytest.mark.parametrize("name", CHANGES)
def test_which_keys_may_change(name, tmp_path, cache_dir):
    key, value, expected = CHANGES[name]
    resume.save_config(small(cache_dir), tmp_path)
    changed = small(cache_dir, **{key: value})
    assert resume.check_workdir(changed, tmp_path) == []  # nothing is saved yet
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "manifest.json").write_text("{}")
    if expected == resume.REFUSED:
        with pytest.raises(ValueError, match=rf"another config(.|\n)*  {name}: "):
            resume.check_workdir(changed, tmp_path)
    else:
        said = resume.check_workdir(changed, tmp_path)
        assert [line.partition(":")[0] for line in said] == [name] * (expected == resume.LOGGED)


def test_every_config_key_has_its_row_in_the_table():
    keys = [key for key, _ in config_lib.flatten(config_lib.defaults())]
    for pattern, what in resume.CHANGES[:-1]:
        for part in pattern.split("|") if "(" not in pattern else [pattern]:
            assert any(resume.re.fullmatch(part, key) for key in keys), f"{part}: no such key is {what}"


def test_checkpoints_can_be_elsewhere(tmp_path, cache_dir):
    """Buckets are reached by the same paths; none is here to try."""
    from rmjax.checkpoint import Checkpointer

    config = small(cache_dir, checkpoint__dir="gs://bucket/run")
    assert str(runs.checkpoint_directory(config, tmp_path)) == "gs://bucket/run"
    checkpointer = Checkpointer(runs.checkpoint_directory(config, tmp_path), keep_latest=1)
    assert str(checkpointer._steps.step_path(3)) == "gs://bucket/run/3"
    assert str(runs.checkpoint_directory(small(cache_dir), tmp_path)) == str(tmp_path / "checkpoints")
    config = small(cache_dir, checkpoint__dir=str(tmp_path / "elsewhere"))
    resume.save_config(config, tmp_path)
    (tmp_path / "elsewhere" / "3").mkdir(parents=True)
    (tmp_path / "elsewhere" / "3" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.seed: 0 before, 1 now"):
        resume.check_workdir(small(cache_dir, checkpoint__dir=str(tmp_path / "elsewhere"), seed=1), tmp_path)


def test_a_bucket_that_no_package_reaches_is_refused(tmp_path, cache_dir, monkeypatch):
    def missing(_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(resume.epath.Path("gs://bucket")), "exists", missing)
    with pytest.raises(ValueError, match=r"config.checkpoint.dir='gs://bucket/run' needs a package: .*gcsfs"):
        resume.check_workdir(small(cache_dir, checkpoint__dir="gs://bucket/run"), tmp_path)


def test_a_workdir_that_is_a_bucket_is_refused_with_advice(tmp_path, cache_dir):
    code, text = Started(tmp_path / "run", cache_dir, functools.partial(rename_workdir, "gs://bucket/run")).end()
    assert code == exits.BAD_INPUT and "--config.checkpoint.dir=gs://bucket/run/checkpoints" in text


def test_what_a_run_is_made_of_is_told_apart(tmp_path, cache_dir, tokenizer):
    from rmjax.batches.chat import Chat

    config = small(cache_dir)
    task = objectives.make(config.objective).task
    values = {"hidden_size": 32}

    def made_from(chat, train="synthetic://pairs?n=50", validation="synthetic://pairs?n=20&seed=1", **other):
        groups = [prepare.build_groups(config, chat, task, source) for source in (train, validation)]
        return resume.identity(config, chat, {**values, **other}, *groups)

    first = made_from(Chat(tokenizer))
    host, plan = resume.Host(first, "x"), None
    other_template = Chat(tokenizer, template_kwargs={"a": 1})
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    for parts, named in (
        ({"chat": Chat(tokenizer), "train": "synthetic://pairs?n=51"}, "the training data and the tokenizer changed"),
        ({"chat": other_template, "validation": "synthetic://pairs?n=21"}, "the validation data, the chat template or"),
        ({"chat": Chat(tokenizer), "hidden_size": 64}, "the tokenizer and the model's config changed"),
    ):
        with pytest.raises(ValueError, match=f"{named}.* since the checkpoint of step 3 was made; choose another"):
            host.check(made_from(**parts), plan, 3)


def test_weights_are_told_apart_by_their_tensors_and_files(tmp_path):
    from safetensors.numpy import save_file

    seen = []
    for tensors in ({"a": np.zeros(4)}, {"a": np.zeros((2, 2))}, {"b": np.zeros(4)}, {"a": np.zeros(4, np.float32)}):
        save_file(tensors, tmp_path / "model.safetensors")
        seen.append(json.dumps(parameters.weights_of(tmp_path), sort_keys=True))
    assert len(set(seen)) == 4


def test_a_longer_plan_begins_with_the_steps_of_a_shorter_one(cache_dir, tmp_path):
    config = small(cache_dir, plan__window=32)
    groups, _ = prepare.read_groups(config, prepare.open_chat(config, tmp_path), objectives.make(config.objective).task)
    plans = []
    for duration in ("0.5 epochs", "1 epochs", "13 steps", "2.3 epochs", "5 epochs"):
        config.duration = duration
        plans.append(prepare.plan_training(config, groups))
    for short, long in itertools.pairwise(plans):
        assert short.steps < long.steps and short.digest(short.steps) == long.digest(short.steps)
        for step in range(short.steps):
            for a, b in zip(short.rows(step), long.rows(step), strict=True):
                np.testing.assert_array_equal(a, b)
    config.seed = 1
    assert prepare.plan_training(config, groups).digest(3) != plans[-1].digest(3)


# Data, caches and the clock


def cut_the_cache(pattern, step):
    """In the run's process: cuts off the token cache at that step."""
    from rmjax.train import watch

    started = watch.Watch.step

    def spoilt(self, number):
        if number == step:
            for path in Path(pattern).parent.glob(Path(pattern).name):
                os.truncate(path, path.stat().st_size // 2)
        return started(self, number)

    watch.Watch.step = spoilt


@pytest.mark.slow
def test_a_token_cache_that_is_cut_off_under_a_run_is_said_and_built_again(whole, tmp_path, cache_dir):
    values = {"data__cache_dir": str(tmp_path / "cache"), "log__every": "3 steps"}
    spoil = functools.partial(cut_the_cache, str(tmp_path / "cache" / "*.arrow"), 8)
    code, text = Started(tmp_path / "run", cache_dir, spoil, **values).end()
    assert code == exits.FAILED and "was cut off while a run read it; the same command builds it again" in text
    text = Started(tmp_path / "run", cache_dir, **values).finish()
    assert "is damaged and is built again" in text and "continuing from step" in text
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def spoil_the_data(path, cache_dir, step):
    """In the run's process: at that step the data is another, and the token cache is gone."""
    from rmjax.train import watch

    started = watch.Watch.step

    def spoilt(self, number):
        if number == step:
            Path(path).write_text("{}")
            shutil.rmtree(cache_dir)
        return started(self, number)

    watch.Watch.step = spoilt


@pytest.mark.slow
def test_data_that_changes_and_a_cache_that_is_deleted_under_a_run_do_not_matter_until_the_next_start(
    poisoned, tmp_path, cache_dir
):
    values, *_ = poisoned
    data = tmp_path / "rows.jsonl"
    shutil.copy(values["data__train"], data)
    values = {"data__train": str(data), "data__cache_dir": str(tmp_path / "cache")}
    spoil = functools.partial(spoil_the_data, str(data), str(tmp_path / "cache"), 8)
    Started(tmp_path / "run", cache_dir, spoil, **values).finish()
    rows = Path(poisoned[0]["data__train"]).read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:-1]))
    code, text = Started(tmp_path / "run", cache_dir, **values).end()
    assert code == exits.BAD_INPUT and "the training data changed since the checkpoint of step 22" in text
    data.unlink()
    code, text = Started(tmp_path / "run", cache_dir, **values).end()
    assert code == exits.BAD_INPUT and f"{data}: no such file" in text
    data.write_text("".join(rows))
    assert "the run is done" in Started(tmp_path / "run", cache_dir, **values).finish()


def set_back_the_clock():
    """In the run's process: a day earlier from the third step on."""
    from rmjax.train import watch

    started, now = watch.Watch.step, time.time

    def spoilt(self, number):
        if number == 3:
            time.time = lambda: now() - 24 * 3600.0
        return started(self, number)

    watch.Watch.step = spoilt


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(whole, tmp_path, cache_dir):
    Started(tmp_path / "run", cache_dir, set_back_the_clock).finish()
    same_run(whole, tmp_path / "run")


def kill_a_tokenizer(rows):
    """In the run's process: one of the processes that tokenize is killed."""
    import multiprocessing

    from rmjax.batches import token_cache

    merge, merged = token_cache.Audit.merge, []

    def spoilt(self, other):
        merged.append(other.rows)
        if sum(merged) > rows and len(merged) < 1000:
            merged.extend([0] * 1000)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return merge(self, other)

    token_cache.Audit.merge = spoilt


@pytest.mark.slow
def test_a_tokenizing_process_that_is_killed_costs_only_its_own_work(tmp_path, cache_dir):
    values = {"data__train": "synthetic://pairs?n=6000&seed=0", "data__workers": 2, "duration": "3 steps"}
    values |= {"data__cache_dir": str(tmp_path / "cache"), "checkpoint__dir": str(tmp_path / "elsewhere")}
    code, text = Started(tmp_path / "run", cache_dir, functools.partial(kill_a_tokenizer, 1000), **values).end()
    assert code == exits.FAILED and "a tokenizing process died" in text
    text = Started(tmp_path / "run", cache_dir, **values).finish()
    assert "6,000 rows read and tokenized" in text and "of them by an earlier run)" in text
    assert (tmp_path / "elsewhere" / "3" / "manifest.json").exists() and not (tmp_path / "run" / "checkpoints").exists()
