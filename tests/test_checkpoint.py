"""Checkpoints: what is saved comes back byte for byte, and whatever is broken is noticed."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmjax import checkpoint
from rmjax.checkpoint import Checkpointer, CheckpointError
from rmjax.runtime import sealing
from rmjax.runtime.ownership import MARKER
from rmjax.runtime.step_directory import AMENDED


def make_state(seed=0, size=8):
    """A train state with everything that optax nests: named tuples, empty states, masked nodes, counts."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.standard_normal((size, 4)), jnp.bfloat16)
    params = {"decoder": {"kernel": kernel}, "score": {"kernel": jnp.asarray(rng.standard_normal((size, 1)))}}
    decayed = {"decoder": {"kernel": True}, "score": {"kernel": False}}
    labels = {"decoder": {"kernel": "train"}, "score": {"kernel": "freeze"}}
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.scale_by_adam(mu_dtype=jnp.float32), decayed),
        optax.add_decayed_weights(0.1, mask=decayed),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
    )
    tx = optax.partition({"train": chain, "freeze": optax.set_to_zero()}, labels)
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return {"params": params, "opt_state": opt_state, "step": jnp.asarray(seed, jnp.int32)}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def contents(state):
    """Structure, and dtype, shape and bytes of every leaf."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return jax.tree.structure(state), [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]


def opened(directory, keep_latest=2, keep_best=0, metric="", mode="max"):
    return Checkpointer(directory, keep_latest=keep_latest, keep_best=keep_best, metric=metric, mode=mode)


def names(directory):
    """What is in a directory of checkpoints, but for its marker."""
    return sorted(set(os.listdir(directory)) - {MARKER})


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    """A directory with steps 10 and 20, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpointer = opened(directory, metric="accuracy")
    for seed in (10, 20):
        checkpointer.save(seed, make_state(seed), {"seed": seed}, {"accuracy": seed / 100})
    checkpointer.close()
    return directory


def test_state_and_host_come_back_byte_for_byte(tmp_path):
    state, host = make_state(3), {"best": 0.1 + 0.2, "rows": [1, 2], "name": "é", "none": None}
    checkpointer = opened(tmp_path / "a" / "b")
    checkpointer.save(7, state, host, None)
    checkpointer.close()
    step, restored, restored_host = opened(tmp_path / "a" / "b").restore(abstract(state))
    assert step == 7 and restored_host == host
    assert contents(restored) == contents(state)


def test_a_relative_directory_and_strings_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = opened("checkpoints")
    checkpointer.save(1, make_state(), {}, None)
    checkpointer.close()
    assert opened(str(tmp_path / "checkpoints")).steps() == [1]


def test_arrays_may_be_donated_right_after_save(tmp_path):
    state = {"w": jnp.arange(2**21, dtype=jnp.float32)}
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpointer, shape = opened(tmp_path), abstract(state)
    checkpointer.save(0, state, {}, None)
    for _ in range(20):
        state = add(state)
    jax.block_until_ready(state)
    checkpointer.wait()
    _, restored, _ = checkpointer.restore(shape)
    np.testing.assert_array_equal(restored["w"], np.arange(2**21, dtype=np.float32))


def test_save_returns_while_files_are_written_and_the_old_step_stays_until_the_new_one_is_sealed(tmp_path, monkeypatch):
    checkpointer, write, proceed = (
        opened(tmp_path, keep_latest=1),
        sealing.seal_directory,
        threading.Event(),
    )
    checkpointer.save(1, make_state(1), {}, None)
    checkpointer.wait()
    monkeypatch.setattr(sealing, "seal_directory", lambda path: proceed.wait(60) and write(path))
    checkpointer.save(2, make_state(2), {}, None)
    assert checkpointer.steps() == [1]
    proceed.set()
    checkpointer.wait()
    assert checkpointer.steps() == [2]
    checkpointer.close()


NAN = float("nan")


@pytest.mark.parametrize(
    ("metrics", "keep_latest", "keep_best", "mode", "kept", "best"),
    [
        ([0.5, 0.9, 0.7, 0.6], 1, 1, "max", [2, 4], 2),
        ([0.5, 0.9, 0.7, 0.4], 1, 1, "min", [4], 4),
        ([0.5, 0.2, 0.7, 0.9], 2, 1, "min", [2, 3, 4], 2),
        ([0.9, 0.8, 0.7, 0.6], 1, 2, "max", [1, 2, 4], 1),
        ([0.5, 0.9, 0.9, 0.9, 0.1], 1, 1, "max", [2, 5], 2),  # of equal ones the earliest, both ways
        ([0.5, 0.1, 0.1, 0.1, 0.9], 1, 1, "min", [2, 5], 2),
        ([0.5, NAN, None, 0.1], 1, 1, "max", [1, 4], 1),
        ([NAN, float("inf"), None, NAN], 1, 1, "max", [4], None),
        ([NAN, float("inf"), None, NAN], 1, 2, "max", [3, 4], None),  # BestN keeps whatever is no more than n
        ([0.9, 0.1, 0.5], 2, 0, "max", [2, 3], 3),
        ([None, None, None], 2, 1, "max", [2, 3], None),
    ],
)
@pytest.mark.parametrize("restarts", [False, True])
def test_the_newest_and_the_best_are_kept(tmp_path, metrics, keep_latest, keep_best, mode, kept, best, restarts):
    state = {"w": jnp.zeros(2)}
    checkpointer = opened(tmp_path, keep_latest, keep_best, "accuracy", mode)
    for step, value in enumerate(metrics, 1):
        if restarts:
            checkpointer.close()
            checkpointer = opened(tmp_path, keep_latest, keep_best, "accuracy", mode)
            checkpointer.restore(abstract(state))
        checkpointer.save(step, state, {}, None if value is None else {"accuracy": value, "loss": 1.0})
    checkpointer.close()
    assert checkpointer.steps() == kept
    assert checkpointer.best_step() == best
    assert names(tmp_path) == sorted(map(str, kept))


def test_no_metric_means_no_best(tmp_path):
    checkpointer = opened(tmp_path)
    checkpointer.save(1, {"w": jnp.zeros(2)}, {}, {"accuracy": 0.5})
    checkpointer.close()
    assert checkpointer.best_step() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_latest": 0}, "keep_latest=0"),
        ({"keep_latest": 1, "keep_best": -1}, "keep_best=-1"),
        ({"keep_latest": 1, "mode": "largest"}, "expected 'max' or 'min'"),
        ({"keep_latest": 1, "keep_best": 1}, "name the metric"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path, **options)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_to_any_file_falls_back_to_the_save_before(tmp_path, two_saves, damage, caplog):
    shape = abstract(make_state())
    names = [path.relative_to(two_saves / "20") for path in (two_saves / "20").rglob("*") if path.is_file()]
    assert len(names) > 6
    for index, name in enumerate(names):
        directory = shutil.copytree(two_saves, tmp_path / str(index))
        damage(directory / "20" / name)
        caplog.clear()
        checkpointer = opened(directory)
        step, state, host = checkpointer.restore(shape)
        assert (step, host) == (10, {"seed": 10}), name
        assert contents(state) == contents(make_state(10)), name
        if name.name == "manifest.json":  # without it the step was never finished; damaged, any file can look it
            assert damage is Path.unlink or "step 20 is broken, going back to the one before" in caplog.text
        else:
            assert f"step 20 is broken, going back to the one before: {name}" in caplog.text
            assert (directory / "broken-20").exists()
        assert checkpointer.steps() == [10]


def test_the_number_of_a_broken_step_can_be_saved_again(tmp_path, two_saves):
    directory, state = shutil.copytree(two_saves, tmp_path / "c"), make_state(21)
    for aside in (["broken-20"], ["broken-20", "broken-20-2"]):
        flip(directory / "20" / "_METADATA")
        checkpointer = opened(directory)
        assert checkpointer.restore(abstract(state))[0] == 10
        checkpointer.save(20, state, {"again": True}, None)
        checkpointer.close()
        assert names(directory) == ["10", "20", *aside]
    step, restored, host = opened(directory).restore(abstract(state))
    assert (step, host) == (20, {"again": True}) and contents(restored) == contents(state)


def test_a_flipped_byte_in_large_files_is_found_by_restore(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sealing, "SMALL", 0)
    checkpointer, state = opened(tmp_path), {"w": jnp.arange(100.0)}
    for step in (1, 2):
        checkpointer.save(step, state, {}, None)
    checkpointer.close()
    flip(max((tmp_path / "2").rglob("d/*"), key=lambda path: path.stat().st_size))
    assert checkpointer.steps() == [1, 2]
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        checkpointer.restore_step(2, abstract(state))
    assert checkpointer.restore(abstract(state))[0] == 1
    assert checkpointer.steps() == [1]


def test_when_all_are_broken_it_says_so_and_touches_nothing(tmp_path, two_saves):
    directory = shutil.copytree(two_saves, tmp_path / "c")
    flip(directory / "20" / "host.json")
    truncate(directory / "10" / "_METADATA")
    with pytest.raises(CheckpointError, match=r"(?s)every checkpoint.*step 20: host\.json.*step 10: _METADATA"):
        opened(directory).restore(abstract(make_state()))
    assert names(directory) == ["10", "20"]


def test_a_broken_older_step_does_not_block_saving_nor_count_as_the_best(tmp_path, two_saves):
    directory = shutil.copytree(two_saves, tmp_path / "c")
    flip(directory / "10" / "host.json")
    checkpointer = opened(directory, keep_latest=1, keep_best=1, metric="accuracy", mode="min")
    assert checkpointer.best_step() == 20
    assert checkpointer.restore(abstract(make_state()))[0] == 20
    checkpointer.save(30, make_state(30), {}, {"accuracy": 0.5})
    checkpointer.close()
    assert checkpointer.steps() == [20, 30] and checkpointer.best_step() == 20


def test_unfinished_steps_are_no_checkpoints_and_are_cleared(tmp_path, two_saves):
    directory = shutil.copytree(two_saves, tmp_path / "c")
    for step in (30, 40):
        shutil.copytree(directory / "20", directory / f"{step}.orbax-checkpoint-tmp")
    for step in ("10", "20"):
        (directory / step / "manifest.json").unlink()
    marker = json.loads((directory / MARKER).read_text())
    (directory / MARKER).write_text(json.dumps({**marker, "steps": [10, 20, 30]}))
    (directory / "notes").mkdir()
    checkpointer = opened(directory)
    assert checkpointer.steps() == [] and checkpointer.best_step() is None
    assert checkpointer.restore(abstract(make_state())) is None
    assert names(directory) == ["40.orbax-checkpoint-tmp", "notes"]  # 40 was never begun by this run


def test_what_others_have_there_is_neither_deleted_nor_replaced(tmp_path):
    """Folders and files with numbers for names, and an Orbax checkpoint of another trainer."""
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "thesis.txt").write_text("precious")
    (tmp_path / "7").write_text("precious")
    (tmp_path / "9" / "d").mkdir(parents=True)
    (tmp_path / "9" / "manifest.json").write_text("not ours")
    (tmp_path / "broken-1").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    checkpointer = opened(tmp_path, keep_latest=1)
    for step in (1, 2):
        checkpointer.save(step, make_state(step), {}, None)
    checkpointer.close()
    flip(tmp_path / "2" / "host.json")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        opened(tmp_path).restore(abstract(make_state()))
    checkpointer = opened(tmp_path, keep_latest=1)
    checkpointer.save(3, make_state(3), {}, None)
    checkpointer.wait()
    for step in (7, 9):
        with pytest.raises(CheckpointError, match=rf"{step} is there and is no checkpoint of this run; move it away"):
            checkpointer.save(step, make_state(), {}, None)
    assert checkpointer.steps() == [3]
    assert {path: path.read_bytes() for path in before} == before
    assert names(tmp_path) == ["2024", "3", "7", "9", "broken-1", "broken-2"]  # broken-1 is not ours either


def test_the_later_of_two_starts_has_the_directory(tmp_path):
    """As in a bucket, where no lock reaches: the earlier one notices before it writes or deletes anything."""
    owner = {"run": "a", "workdir": "/w"}
    first = Checkpointer(tmp_path, keep_latest=1, owner=owner)
    first.save(1, make_state(1), {}, None)
    first.wait()
    second = Checkpointer(tmp_path, keep_latest=1, owner=owner)
    assert second.restore(abstract(make_state()))[0] == 1
    with pytest.raises(CheckpointError, match="another start has taken over"):
        first.save(2, make_state(2), {}, None)
    second.save(2, make_state(3), {}, None)
    second.close()
    assert names(tmp_path) == ["2"]
    marker = json.loads((tmp_path / MARKER).read_text())
    (tmp_path / MARKER).write_text(json.dumps({**marker, "steps": [2, 4]}))
    (tmp_path / "4").mkdir()  # which run a is writing
    with pytest.raises(CheckpointError, match="checkpoints of another run by now, whose workdir is /w"):
        Checkpointer(tmp_path, keep_latest=1, owner={"run": "b"}).save(3, make_state(), {}, None)
    assert names(tmp_path) == ["2", "4"]


@pytest.mark.parametrize("name", ["lr=[1e-5]", "a\\b", "what? *.* {x,y}", "50% #1 & more"])
def test_paths_of_any_name(tmp_path, name):
    """No character of a path means anything: a sweep names its runs as it likes."""
    checkpointer = opened(tmp_path / name, keep_latest=1)
    for step in (1, 2):
        checkpointer.save(step, make_state(step), {"step": step}, None)
    checkpointer.close()
    step, state, host = opened(tmp_path / name).restore(abstract(make_state()))
    assert (step, host) == (2, {"step": 2}) and names(tmp_path / name) == ["2"]
    assert contents(state) == contents(make_state(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_there(tmp_path):
    checkpointer = opened(tmp_path / "none")
    assert checkpointer.restore(abstract(make_state())) is None
    assert checkpointer.steps() == [] and checkpointer.best_step() is None
    assert not (tmp_path / "none").exists()


def test_a_finished_step_is_not_saved_over(tmp_path, caplog):
    checkpointer = opened(tmp_path)
    for seed in (1, 2):
        checkpointer.save(5, make_state(seed), {"seed": seed}, None)
    assert "step 5 is already saved" in caplog.text
    assert checkpointer.restore(abstract(make_state()))[2] == {"seed": 1}


def test_what_is_measured_later_amends_a_finished_step(tmp_path, monkeypatch):
    checkpointer, state, amended = opened(tmp_path, 1, 1, "accuracy"), make_state(), AMENDED
    checkpointer.save(1, state, {"evaluated": False}, None)
    checkpointer.wait()
    assert checkpointer.best_step() is None

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr(sealing, "seal_file", full)
        checkpointer.amend(1, {"evaluated": True}, {"accuracy": 0.9})
    assert (tmp_path / "1" / amended).exists()
    assert checkpointer.restore(abstract(state))[2] == {"evaluated": False}  # what is not sealed does not count
    checkpointer.amend(1, {"evaluated": True}, {"accuracy": 0.9})
    for step in (2, 3):
        checkpointer.save(step, state, {}, {"accuracy": 0.1})
    checkpointer.close()
    assert checkpointer.steps() == [1, 3] and checkpointer.best_step() == 1
    part, host = checkpointer.restore_step(1, abstract(state))
    assert host == {"evaluated": True} and contents(part) == contents(state)
    flip(tmp_path / "1" / amended)
    with pytest.raises(CheckpointError, match=f"{amended} has other contents"):
        checkpointer.restore_step(1, abstract(state))


def test_restore_step_gives_a_part(two_saves):
    checkpointer, state = opened(two_saves), make_state(10)
    shape = abstract(state)
    part, host = checkpointer.restore_step(10, {"params": shape["params"]})
    assert host == {"seed": 10} and contents(part) == contents({"params": state["params"]})
    part, _ = checkpointer.restore_step(10, {"params": {"score": shape["params"]["score"]}})
    assert contents(part) == contents({"params": {"score": state["params"]["score"]}})
    with pytest.raises(CheckpointError, match=r"params/head: saved is nothing, expected int32 \(\)"):
        checkpointer.restore_step(10, {"params": {"head": shape["step"]}})
    with pytest.raises(CheckpointError, match=r"step 15 .* finished steps are \[10, 20\]"):
        checkpointer.restore_step(15, shape)


def test_a_state_of_another_configuration_is_refused(two_saves):
    shape = abstract(make_state())
    with pytest.raises(CheckpointError, match=r"step 20 [^\n]*\n  extra: saved is nothing, expected int32 \(\)$"):
        opened(two_saves).restore({**shape, "extra": shape["step"]})
    with pytest.raises(CheckpointError, match=r"params/score/kernel: saved is float32 \(8, 1\), expected nothing"):
        opened(two_saves).restore({"opt_state": shape["opt_state"], "step": shape["step"]})
    with pytest.raises(CheckpointError, match=r"kernel: saved is float32 \(8, 1\), expected float32 \(9, 1\)"):
        opened(two_saves).restore(abstract(make_state(size=9)))
    with pytest.raises(CheckpointError, match=r"step: saved is int32 \(\), expected float32 \(\)"):
        opened(two_saves).restore(shape | {"step": jax.ShapeDtypeStruct((), jnp.float32)})


def test_orbax_is_quiet(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("absl").setLevel(logging.DEBUG)
    checkpointer = opened(tmp_path, keep_latest=1)
    for step in (1, 2):
        checkpointer.save(step, make_state(), {}, None)
    checkpointer.restore(abstract(make_state()))
    logging.getLogger("absl").setLevel(logging.NOTSET)
    assert [record for record in caplog.records if record.name == "absl"] == []


@pytest.mark.parametrize("then", ["same process", "restart"])
def test_a_write_that_fails_keeps_the_last_good_checkpoint(tmp_path, then):
    """The file size limit makes the operating system refuse writes, as a full disk does."""
    state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(2**19))}
    checkpointer, limits = opened(tmp_path, keep_latest=1), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer.save(1, state, {}, None)
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 in .*step 1 is the last one there; check the free"):
            checkpointer.save(2, state, {}, None)
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpointer.steps() == [1]
    assert names(tmp_path) == ["1"]  # what was half-written takes no space from the next attempt
    if then == "restart":
        checkpointer = opened(tmp_path, keep_latest=1)
        assert checkpointer.restore(abstract(state))[0] == 1
    checkpointer.save(2, state, {}, None)
    checkpointer.close()
    assert checkpointer.steps() == [2]


def test_a_manifest_that_cannot_be_written_is_a_failed_save(tmp_path, monkeypatch):
    checkpointer, shape = opened(tmp_path, keep_latest=1), abstract(make_state())
    checkpointer.save(1, make_state(1), {}, None)
    checkpointer.wait()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealing, "seal_directory", full)
    checkpointer.save(2, make_state(2), {}, None)
    with pytest.raises(CheckpointError, match=r"step 2 in .* failed: .*No space left on device.*step 1 is the last"):
        checkpointer.save(3, make_state(3), {}, None)
    assert checkpointer.restore(shape)[0] == 1


def run(script, *arguments, devices=1):
    """Runs `script` in a fresh process with that many devices."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    root = Path(checkpoint.__file__).parents[1]
    return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=120)


KILLED = """
    import os, pathlib, signal, sys
    import jax, jax.numpy as jnp
    from rmjax import checkpoint
    from rmjax.runtime import files
    directory, step, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    state = {"w": jnp.full(2**21, step, jnp.int32)}
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpointer = checkpoint.Checkpointer(directory, keep_latest=1)
    checkpointer.restore(jax.eval_shape(lambda: state))
    if where == "digests":
        files.sha256 = die
    if where == "manifest":
        replace = pathlib.Path.replace
        pathlib.Path.replace = lambda x, target: die() if target.name == "manifest.json" else replace(x, target)
    if where == "deletion":
        type(checkpointer._steps.path).rmtree = die
    checkpointer.save(step, state, {}, None)
    if where == "files":  # they are written by threads, which may not have begun
        while not any(x.name.startswith(str(step)) for x in pathlib.Path(directory).iterdir()):
            pass
        die()
    checkpointer.close()
"""


@pytest.mark.parametrize("where", ["files", "digests", "manifest", "deletion"])
def test_sigkill_inside_a_save(tmp_path, where):
    """Inside the first save and a later one: the next start finds the last whole one and goes on from it."""
    shape = {"w": jax.ShapeDtypeStruct((2**21,), jnp.int32, sharding=jnp.zeros(1).sharding)}
    checkpointer = opened(tmp_path, keep_latest=1)
    if where != "deletion":  # the first save replaces none
        assert run(KILLED, tmp_path, 1, where).returncode == -signal.SIGKILL
        assert names(tmp_path) != []
        assert checkpointer.restore(shape) is None
    checkpointer.save(1, {"w": jnp.full(2**21, 1, jnp.int32)}, {}, None)
    checkpointer.close()
    assert run(KILLED, tmp_path, 2, where).returncode == -signal.SIGKILL
    step, state, _ = checkpointer.restore(shape)
    assert step == (2 if where == "deletion" else 1)
    np.testing.assert_array_equal(state["w"], np.full(2**21, step, np.int32))
    checkpointer.save(2, {"w": jnp.full(2**21, 2, jnp.int32)}, {}, None)
    checkpointer.close()
    assert names(tmp_path) == ["2"]


def test_restore_onto_other_meshes(tmp_path):
    """Saved on 1x8x1, restored on 2x2x2 and on one device: the same bytes in the shardings asked for."""
    result = run(
        """
        import sys
        import jax, jax.numpy as jnp, numpy as np, optax
        from rmjax.checkpoint import Checkpointer
        from rmjax.sharding import make_mesh, named, param_shardings

        def mesh(data, fsdp, tensor):
            devices = jax.devices()[: data * fsdp * tensor]
            return make_mesh(dict(data=data, fsdp=fsdp, tensor=tensor), devices)

        def shardings(mesh, state):
            params = param_shardings(mesh, state["params"])
            (adam, empty) = state["opt"]
            return {"params": params, "opt": (adam._replace(count=named(mesh), mu=params, nu=params), empty)}

        rng = np.random.default_rng(0)
        params = {"decoder": {"layers": {"q": {"kernel": rng.standard_normal((3, 16, 8), np.float32)}},
                              "embed": {"embedding": rng.standard_normal((32, 16), np.float32)}},
                  "score": {"kernel": rng.standard_normal((16, 1), np.float32)}}
        host = {"params": params, "opt": optax.adam(1.0).init(params)}
        state = jax.tree.map(jax.device_put, host, shardings(mesh(1, 8, 1), host))
        checkpointer = Checkpointer(sys.argv[1], keep_latest=1)
        checkpointer.save(1, state, {}, None)
        struct = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for sizes in ((2, 2, 2), (1, 1, 1), (1, 8, 1)):
            wanted = shardings(mesh(*sizes), host)
            shape = jax.tree.map(struct, host, wanted)
            _, restored, _ = checkpointer.restore(shape)
            assert jax.tree.structure(restored) == jax.tree.structure(host)
            for got, want, sharding in zip(*map(jax.tree.leaves, (restored, host, wanted))):
                assert got.sharding == sharding, (got.sharding, sharding)
                assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
        checkpointer.close()
        """,
        tmp_path,
        devices=8,
    )
    assert result.returncode == 0, result.stderr


def test_a_program_that_ends_without_close_finishes_its_save_or_says_that_it_cannot(tmp_path):
    result = run(
        """
        import sys, time
        import jax.numpy as jnp
        from rmjax import checkpoint
        from rmjax.runtime import sealing

        seal = sealing.seal_directory

        def slow(path):
            time.sleep(0.5)  # the main thread has ended by then
            seal(path)

        sealing.seal_directory = slow
        checkpoint.Checkpointer(sys.argv[1], keep_latest=1).save(1, {"w": jnp.ones(8)}, {}, None)
        """,
        tmp_path,
    )
    assert result.returncode == 0
    if sys.version_info < (3, 12):
        assert (result.stderr, opened(tmp_path).steps()) == ("", [1])
    else:  # no thread can start by then
        assert "saving the checkpoint of step 1" in result.stderr and opened(tmp_path).steps() == []


def test_the_manifest_lists_what_sha256sum_computes(two_saves):
    files = json.loads((two_saves / "20" / "manifest.json").read_text())["files"]
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in files.items())
    command = ["sha256sum", "--check", "--strict", "-"]
    if shutil.which(command[0]) is None:
        pytest.skip("no sha256sum here")
    subprocess.run(command, input=lines, text=True, cwd=two_saves / "20", check=True, capture_output=True)
    found = {str(p.relative_to(two_saves / "20")) for p in (two_saves / "20").rglob("*") if p.is_file()}
    assert found - {"manifest.json"} == set(files)
