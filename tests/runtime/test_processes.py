"""Several processes: they meet, train alike, agree, and each says which one was lost."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import quick
import yaml

from rmjax import checkpoint
from rmjax.runtime import agreement, exits, processes

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TIMEOUT = 300


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# Alone


TOLD = {"JAX_COORDINATOR_ADDRESS": "host-a:1234", "JAX_NUM_PROCESSES": 4, "JAX_PROCESS_ID": 2}


@pytest.mark.parametrize("name", ["RMJAX_JOIN_SECONDS", "RMJAX_STALL_MINUTES"])
@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", ""])
def test_what_is_no_number_is_refused(environment, name, value):
    environment(**TOLD, **{name: value})
    what = name.rpartition("_")[2].lower()
    with pytest.raises(ValueError, match=f"{name}={value}: expected a number of {what}, 0 or more"):
        processes.start()


@pytest.mark.parametrize(
    ("why", "code"),
    [
        (
            "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:gloo"
            "/0,1,2048,2049/2 and duration: 29.99999989s",
            exits.AGAIN,
        ),
        (
            "FAILED_PRECONDITION: Gloo all-reduce failed: [tcp/unbound_buffer.cc:81] Timed out waiting 30000ms",
            exits.AGAIN,
        ),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: rmjax/checkpoint written/3", exits.AGAIN),
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer", exits.FAILED),
        ("the download timed out", exits.FAILED),
        ("step 3: the loss or a gradient is NaN or infinite", exits.FAILED),
    ],
)
def test_a_time_out_between_processes_is_told_from_other_errors(why, code):
    said, found = processes.explained(why, exits.FAILED)
    assert found == code and said.startswith(why) and ("The same command" in said) == (code == exits.AGAIN)
    assert processes.explained(why, exits.BAD_INPUT) == (why, exits.BAD_INPUT)


def test_a_single_process_needs_nobody(environment):
    environment()
    processes.start()
    processes.fail("nothing", 1)
    assert (processes.number(), processes.is_first(), agreement.agree("x", 3)) == (0, True, 3)
    assert agreement.stop_agreed(True, 1) and not agreement.stop_agreed(False, 1)
    with agreement.first_then_others("data"):
        agreement.require_same("x", [1], "data")
    processes.finish()


# Launch scripts


@pytest.mark.parametrize("script", sorted(LAUNCH.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    if script.name != "local.sh":
        assert subprocess.run([script], capture_output=True, timeout=60).returncode == exits.BAD_INPUT


@pytest.mark.parametrize("name", ["gpu.yaml", "tpu.yaml"])
def test_job_sets_are_consistent(name):
    (jobs,) = yaml.safe_load_all((LAUNCH / "gke" / name).read_text())
    assert jobs["kind"] == "JobSet" and jobs["spec"]["failurePolicy"]["maxRestarts"] > 0
    (workers,) = jobs["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
    rules = {rule["action"]: rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["values"] == [exits.FAILED, exits.BAD_INPUT] and rules["Count"]["values"] == [exits.AGAIN]
    assert {rule["containerName"] for rule in rules.values()} == {container["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    config = next(arg for arg in container["args"] if arg.startswith("--config="))
    assert (ROOT / config.removeprefix("--config=")).is_file()
    if name == "gpu.yaml":
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        host = f"{jobs['metadata']['name']}-{workers['name']}-0-0.{jobs['metadata']['name']}"
        assert env["JAX_COORDINATOR_ADDRESS"].startswith(f"{host}:")
        assert env["JAX_NUM_PROCESSES"] == str(job["parallelism"])


FAKE = """#!{python}
import os, pathlib, signal, sys, time
with (pathlib.Path(sys.argv[-1]) / "secrets").open("a") as file:
    file.write(os.environ["RMJAX_SECRET"] + "\\n")
number, folder = int(os.environ["JAX_PROCESS_ID"]), pathlib.Path(sys.argv[-1])
assert sys.argv[1:3] == ["-m", "rmjax.main"] and sys.argv[3] == "--config=c.py"
with (folder / f"starts-{{number}}").open("a") as file:
    file.write(os.environ["JAX_NUM_PROCESSES"] + os.environ["JAX_COORDINATOR_ADDRESS"][:9] + "\\n")
attempt = len((folder / f"starts-{{number}}").read_text().splitlines())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
{body}
"""


def local(tmp_path, body, **values):
    """launch/local.sh with a stand-in for Python, in a folder."""
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, body=textwrap.dedent(body)))
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake), **values}
    return subprocess.Popen(
        [LAUNCH / "local.sh", "2", "c.py", tmp_path], env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def starts(tmp_path):
    return [(tmp_path / f"starts-{n}").read_text().splitlines() for n in range(2)]


def test_local_starts_again_on_75_only(tmp_path):
    process = local(tmp_path, "sys.exit([75, 75, 0][attempt - 1] if number or attempt != 2 else 137)")
    _, output = process.communicate(timeout=60)
    assert process.returncode == 0 and starts(tmp_path) == [["2localhost"] * 3] * 2
    assert output.count("starting again") == 2
    secrets = (tmp_path / "secrets").read_text().splitlines()  # one for each start, the same for both
    assert sorted(map(secrets.count, set(secrets))) == [2, 2, 2] and all(len(bytes.fromhex(s)) == 16 for s in secrets)


@pytest.mark.parametrize(("codes", "expected"), [((1, 75), 1), ((0, 2), 2), ((75, 137), 75), ((139, 0), 139)])
def test_local_ends_with_the_code_that_says_most(tmp_path, codes, expected):
    process = local(tmp_path, f"sys.exit({codes}[number])", RESTARTS="0")
    process.communicate(timeout=60)
    assert process.returncode == expected


def test_local_ends_those_that_do_not_end_themselves(tmp_path):
    process = local(tmp_path, "sys.exit(1) if number else time.sleep(100)", PATIENCE="1")
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - begun < 30


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_passes_signals_on_and_does_not_start_again(tmp_path, number, code):
    process = local(tmp_path, "time.sleep(60)")
    wait_for(lambda: all((tmp_path / f"starts-{n}").exists() for n in range(2)))
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code and [len(lines) for lines in starts(tmp_path)] == [1, 1]


def test_local_explains_its_use():
    result = subprocess.run([LAUNCH / "local.sh", "two", "c.py"], capture_output=True, text=True)
    assert result.returncode == exits.BAD_INPUT and "usage: launch/local.sh N CONFIG" in result.stderr


def wait_for(ready, timeout=TIMEOUT):
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# Real processes


def environ(devices=2, **values):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    flags = f"{quick.FLAGS} --xla_force_host_platform_device_count={devices}"
    return {**env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **values}


class Started:
    """A process, and what it writes to standard error, line by line with the time."""

    def __init__(self, command, env):
        self.process = subprocess.Popen(
            [*map(str, command)], env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line))

    def text(self):
        return "".join(line for _, line in self.lines)

    def end(self, timeout=TIMEOUT):
        code = self.process.wait(timeout)
        self.reader.join(10)
        return code


def together(script, *arguments, count=2, numbers=None, **values):
    """Starts processes that run `script`, each told its number."""
    address = f"localhost:{free_port()}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), **values}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return [Started(command, environ(**told, JAX_PROCESS_ID=str(n))) for n in numbers or range(count)]


STEPS = """
    import os, sys, time
    from rmjax.runtime import processes
    processes.start()
    import jax, jax.numpy as jnp, numpy as np
    from rmjax import sharding
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    total = jax.jit(jnp.sum, out_shardings=sharding.named(mesh))
    where, number = sys.argv[1:3], processes.number()
    for step in range(10**9 if where else 3):
        x = sharding.place(np.full(8, step, np.float32), sharding.named(mesh, sharding.BATCH))
        assert float(total(x)) == 8 * step
        if step == 3:
            print("at work", file=sys.stderr, flush=True)
        if where == ["raise", str(number)] and step == 5:
            raise TypeError("a bug of ours")
        time.sleep(0.01)
    processes.finish()
    print("a clean end", file=sys.stderr)
"""
HOST = socket.gethostname()


@pytest.mark.slow
def test_a_clean_end_is_clean_on_all():
    for started in together(STEPS):
        assert started.end() == 0, started.text()
        assert "a clean end" in started.text() and "rror" not in started.text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_an_error_in_one_ends_all_with_its_message(number):
    for n, started in enumerate(together(STEPS, "raise", str(number))):
        assert started.end(60) == exits.FAILED, started.text()
        said = "error: " if n == number else f"error: process {number} on {HOST} failed: "
        assert f"{said}TypeError: a bug of ours" in started.text()
        assert "Check failure stack trace" not in started.text()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_who_was_lost_is_named_within_a_minute(number, how, record_property):
    started = together(STEPS, "for ever", "")
    for one in started:
        wait_for(lambda one=one: "at work" in one.text())
    lost, other = started[number], started[1 - number]
    begun = time.monotonic()
    lost.process.send_signal(how)
    assert other.end() == exits.AGAIN, other.text()
    seconds = time.monotonic() - begun
    record_property("seconds", seconds)
    print(f"process {number}, {how.name}: the other ended after {seconds:.1f} s")
    assert seconds < 60
    why = "nothing was heard of it" if how == signal.SIGSTOP else "its connection closed"
    assert f"error: process {number} on {HOST} was lost: {why}" in other.text()
    assert "Check failure stack trace" not in other.text()
    lost.process.kill()
    lost.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"),
    [(0, r"1 of 2 processes did not come to localhost:\d+ within 3 s: 1. There are: 0 on"), (1, "waited 3 s in vain")],
)
def test_a_host_that_never_joins(number, said, tmp_path):
    address = f"localhost:{free_port()}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
    command = [sys.executable, "-m", "rmjax.main", "--config=configs/bt_tiny.py", f"--workdir={tmp_path / 'run'}"]
    started = Started(command, environ(**told, RMJAX_JOIN_SECONDS="3"))
    assert started.end() == exits.AGAIN
    assert re.search(said, started.text()) and "stack trace" not in started.text()
    assert "Traceback" not in started.text()
    assert not (tmp_path / "run").exists()


ROWS = """
    import sys
    from rmjax.runtime import processes
    processes.start()
    import jax, numpy as np
    from types import SimpleNamespace
    from jax.sharding import Mesh
    from rmjax import sharding
    from rmjax.batches import loader, packing
    from rmjax.batches.trees import build_tree

    trees = [build_tree([[i + 1] * 6]) for i in range(8)]
    asked = []

    def group(i):
        asked.append(i)
        return SimpleNamespace(tree=trees[i], labels={}, weight=1.0)

    groups = SimpleNamespace(group=group)
    plan = packing.make_plan(np.full(8, 6), np.full(8, 1), row_tokens=8, rows_per_step=8, seed=None)
    shape = loader.plan_shape(plan, 1, micro_rows=1, row_devices=4)
    assert (shape.micro, shape.rows) == (2, 4)
    devices = np.array(jax.devices())
    whole = np.array([[trees[i].tokens[0] for i in row] for row in plan.rows(0)]).reshape(2, 4)
    # Processes whose rows have gaps, as on a slice of TPUs; and two with the same rows, each a part of `tensor`.
    for order, sizes in (([0, 2, 1, 3], (2, 2, 1)), ([0, 1, 2, 3], (1, 4, 1)), ([0, 2, 1, 3], (1, 2, 2))):
        mesh = Mesh(devices[order].reshape(sizes), sharding.AXES)
        if sizes == (1, 2, 2):
            shape = loader.plan_shape(plan, 1, micro_rows=2, row_devices=2)
        rows = sharding.named(mesh, sharding.BATCH)
        local = loader.local_rows(rows, 4)
        asked.clear()
        batch = next(loader.batches(groups, plan, shape, rows))
        for shard in batch["tokens"].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data)[..., 0], whole[shard.index[:2]])
        mine = {i for m in range(2) for r in local for i in plan.rows(0)[m * 4 + r].tolist()}
        assert set(asked) == mine, (asked, mine)
        print(sizes, local, file=sys.stderr)
    processes.finish()
"""


@pytest.mark.slow
def test_every_process_reads_only_its_rows():
    first, second = together(ROWS)
    assert (first.end(), second.end()) == (0, 0), first.text() + second.text()
    assert "(2, 2, 1) [0, 2]" in first.text() and "(2, 2, 1) [1, 3]" in second.text()
    assert "(1, 4, 1) [0, 1]" in first.text() and "(1, 4, 1) [2, 3]" in second.text()
    for started in (first, second):
        assert "(1, 2, 2) [0, 1, 2, 3]" in started.text()


SAVES = """
    import os, signal, sys
    from rmjax.runtime import agreement, processes
    processes.start()
    import jax, numpy as np
    from rmjax import sharding
    from rmjax.checkpoint import Checkpointer
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    place = lambda step: {"w": sharding.place(np.arange(8, dtype=np.int32) + step, sharding.named(mesh, "fsdp"))}
    checkpointer = Checkpointer(sys.argv[1], keep_latest=2, keep_best=1, metric="x")
    for step in (1, 2):
        checkpointer.save(step, place(step), {"step": step}, {"x": -step})
    checkpointer.wait()
    assert (checkpointer.steps(), checkpointer.best_step()) == ([1, 2], 1)
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), place(0))
    step, state, host = checkpointer.restore(shape)
    assert (step, host) == (2, {"step": 2})
    for shard in state["w"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), np.arange(2, 10)[shard.index])
    barrier = agreement.barrier

    def die(name):
        if name == "checkpoint written" and processes.number() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        barrier(name)

    agreement.barrier = die
    checkpointer.save(3, place(3), {}, None)
    checkpointer.wait()
"""


@pytest.mark.slow
def test_a_step_that_lost_a_process_while_it_was_saved_is_none(tmp_path):
    import jax

    from rmjax.checkpoint import Checkpointer

    first, second = together(SAVES, str(tmp_path))
    assert second.end() == -signal.SIGKILL, second.text()
    assert first.end(60) == exits.AGAIN and f"process 1 on {HOST} was lost" in first.text()
    assert (tmp_path / "3").exists() and not (tmp_path / "3" / "manifest.json").exists()
    shape = {"w": jax.ShapeDtypeStruct((8,), np.int32, sharding=jax.numpy.zeros(1).sharding)}
    step, state, _ = Checkpointer(tmp_path, keep_latest=2).restore(shape)
    assert step == 2 and not (tmp_path / "3").exists()
    np.testing.assert_array_equal(state["w"], np.arange(2, 10))


LATE = """
    import sys, time
    from rmjax.runtime import agreement, processes
    processes.start()
    import jax, jax.numpy as jnp, numpy as np
    from rmjax import sharding
    if sys.argv[1] == "unconnected":
        agreement.connect_mesh = lambda mesh: None
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": -1})
    x = sharding.place(np.ones((8, 8), np.float32), sharding.named(mesh, sharding.BATCH, "tensor"))
    if processes.number():
        time.sleep(35)  # it compiles, gloo's patience is 30 s
    try:
        assert float(jax.jit(lambda x: (x @ x).sum(), out_shardings=sharding.named(mesh))(x)) == 512
    except Exception as error:
        processes.fail(str(error), 1)
    processes.finish()
"""


@pytest.mark.slow
def test_who_compiles_for_longer_than_collectives_wait_is_waited_for():
    for started in together(LATE, "connected"):
        assert started.end() == 0, started.text()


@pytest.mark.slow
def test_a_time_out_of_a_collective_is_no_failure_of_the_run():
    for number, started in enumerate(together(LATE, "unconnected")):
        assert started.end() == exits.AGAIN, started.text()
        assert "timed out" in started.text() and "The same command goes on from the last checkpoint" in started.text()
        assert number == 0 or f"error: process 0 on {HOST} failed: " in started.text()


STANDS = """
    import sys, time
    from rmjax.runtime import processes
    processes.start()
    import jax, jax.numpy as jnp, numpy as np
    from rmjax import sharding
    from rmjax.runtime.signals import Stop
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    total, stop = jax.jit(jnp.sum, out_shardings=sharding.named(mesh)), Stop()

    def hung_file_system():
        time.sleep(1000)

    for step in range(1, 1000):
        if step == 5 and processes.number() == 1:
            hung_file_system()
        assert not stop.agreed(step)
        x = sharding.place(np.full(8, step, np.float32), sharding.named(mesh, sharding.BATCH))
        assert float(total(x)) == 8 * step
"""


@pytest.mark.slow
def test_who_stands_still_is_told_of_then_all_end():
    first, second = together(STANDS, RMJAX_STALL_MINUTES="0.05")
    assert (first.end(60), second.end(60)) == (exits.AGAIN, exits.AGAIN), first.text() + second.text()
    where = f"process 1 on {HOST}: its main thread stands still at step 4, and the others have waited for it for"
    assert where in first.text()
    assert f"error: process 1 on {HOST} was lost: its main thread stands still at step 4" in first.text()
    assert "in hung_file_system" in second.text()  # it says where


FOREIGN = """
    import os, sys, time
    import jax
    told = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, number = (os.environ.pop(name) for name in told)
    jax.distributed.initialize(address, int(count), int(number))
    from rmjax.runtime import agreement, processes
    if sys.argv[1] == "started":
        processes.start()
    assert (processes.number(), processes.count()) == (int(number), 2)
    assert agreement.gather("a", processes.number() * 3) == [0, 3] and agreement.agree("b", int(number) + 5) == 5
    agreement.barrier("c")
    agreement.require_same("d", 1, "data")
    try:
        agreement.require_same("e", number, "data")
        raise AssertionError
    except ValueError as error:
        assert "process 1 on" in str(error)
    for n in range(1, 1000):
        if agreement.stop_agreed(n == 5 and number == "1", n):
            break
        time.sleep(0.01)
    assert 5 < n < 1000 and len(set(agreement.gather("n", n))) == 1
    with agreement.first_then_others("f"):
        pass
    if sys.argv[2:]:
        from pathlib import Path
        from rmjax.train import training as train
        from rmjax.runtime.config_file import load
        config = load("configs/bt_tiny.py")
        config.update_from_flattened_dict(eval(sys.argv[3]))
        barrier, loop, names = agreement.barrier, train.loop, []
        agreement.barrier = lambda name: (names.append(name), barrier(name))

        def looped(*args):
            assert "compiled" in names  # nobody begins before all have compiled
            return loop(*args)

        train.loop = looped
        train.run(config, Path(sys.argv[2]))
    processes.finish()
    print("a clean end", file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("started", ["started", "not started"])
def test_a_runtime_that_somebody_else_has_started(started):
    for one in together(FOREIGN, started):
        assert one.end(60) == 0 and "a clean end" in one.text(), one.text()


# Training

RUN = {
    "duration": "10 steps",
    "optim.learning_rate": 1e-4,
    "data.train": "synthetic://pairs?n=160&seed=0",
    "data.validation": "synthetic://pairs?n=40&seed=1",
    "model.scratch.hidden_size": 32,
    "model.scratch.intermediate_size": 48,
    "plan.groups_per_step": 0,
    "plan.rows_per_step": 4,
    "plan.row_tokens": 256,
    "eval.every": "5 steps",
    "eval.train_groups": 0,
    "checkpoint.keep_latest": 3,
    "export.step": "last",
    "log.every": "1 steps",
    "log.to": "",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def flags(workdir, cache, **values):
    flat = {**RUN, "data.cache_dir": cache} | {name.replace("__", "."): value for name, value in values.items()}
    return [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in flat.items())]


def train(workdir, cache, count, devices, **values):
    """A run of `count` processes, by launch/local.sh where they are several; returns what was said."""
    command = [LAUNCH / "local.sh", count, "configs/bt_tiny.py"]
    if count == 1:
        command = [sys.executable, "-m", "rmjax.main", "--config=configs/bt_tiny.py"]
    env = environ(devices, PYTHON=sys.executable, RESTARTS="1")
    result = subprocess.run(
        [*map(str, command), *flags(workdir, cache, **values)],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 11))
    return np.array([line[name] for name in ("train/loss", "validation/loss") for line in lines if name in line])


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("one") / "run"
    train(workdir, cache, 1, 1)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, train(workdir, cache, 2, 2)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(one, two):
    workdir, said = two
    assert np.abs(losses(workdir) - losses(one)).max() <= 1e-5
    assert "mesh: data 1 x fsdp 4 x tensor 1 on 4 devices" in said
    for line in ("plan: 10 steps", "before training: ", "step 5: validation", "export:      "):
        assert said.count(line) == 1, line  # one process speaks
    assert (workdir / "audit.json").exists() and not (workdir / "lock").exists()


@pytest.mark.slow
def test_two_processes_export_what_one_does(one, two):
    from safetensors.numpy import load_file

    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (two[0], one))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-5, name
    golden = [json.loads((path / "export" / "reward_contract.json").read_text())["golden"] for path in (two[0], one)]
    for a, b in zip(*golden, strict=True):
        assert a["token_ids"] == b["token_ids"] and np.abs(np.array(a["outputs"]) - b["outputs"]).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "count", "devices"),
    [
        pytest.param("two", 1, 1, marks=pytest.mark.release),
        ("two", 1, 8),
        pytest.param("one", 2, 2, marks=pytest.mark.release),
    ],
)
def test_a_run_goes_on_with_other_processes(start, count, devices, one, two, cache, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two[0] if start == "two" else one, workdir)
    shutil.rmtree(workdir / "checkpoints" / "10")
    assert "continuing from step 5" in train(workdir, cache, count, devices)
    assert np.abs(losses(workdir) - losses(one)).max() <= 1e-5


@pytest.mark.slow
def test_a_runtime_that_somebody_else_has_started_trains(one, cache, tmp_path):
    workdir = tmp_path / "run"
    for process in together(FOREIGN, "not started", str(workdir), repr({**RUN, "data.cache_dir": str(cache)})):
        assert process.end() == 0, process.text()
    assert np.abs(losses(workdir) - losses(one)).max() <= 1e-5


def children(process):
    """The processes that a script has started, by their number."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            env = dict(x.partition("=")[::2] for x in Path(f"/proc/{pid}/environ").read_text().split("\0"))
            if "rmjax.main" in Path(f"/proc/{pid}/cmdline").read_text():
                found[int(env.get("JAX_PROCESS_ID", -1))] = int(pid)
    return found


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_starts_again_and_stops_on_sigterm(cache, tmp_path):
    workdir = tmp_path / "run"
    endless = flags(workdir, cache, duration="3000 steps", eval__every="1000 steps", checkpoint__every="20 steps")
    env = environ(2, PYTHON=sys.executable)
    started = Started([LAUNCH / "local.sh", 2, "configs/bt_tiny.py", *endless], env)
    newest = lambda: max([int(p.parent.name) for p in workdir.glob("checkpoints/[0-9]*/manifest.json")], default=0)
    wait_for(lambda: newest() >= 20)
    begun = time.monotonic()
    os.kill(children(started.process)[1], signal.SIGKILL)
    wait_for(lambda: "starting again (1 of" in started.text(), 90)
    said = dict(reversed([(line, at) for at, line in started.lines]))
    lost = next(at for line, at in said.items() if f"error: process 1 on {HOST} was lost" in line)
    again = next(at for line, at in said.items() if "starting again (1 of" in line)
    print(f"SIGKILL in training: named after {lost - begun:.2f} s, started again after {again - begun:.2f} s")
    assert again - begun < 60
    before = newest()
    wait_for(lambda: newest() > before)
    os.kill(children(started.process)[1], signal.SIGTERM)  # one of them is preempted, and both save
    wait_for(lambda: "starting again (2 of" in started.text(), 120)
    stopped_at = newest()
    assert stopped_at > before and "was lost" not in started.text().split("starting again (1 of")[1]
    wait_for(lambda: newest() > stopped_at)
    started.process.send_signal(signal.SIGTERM)
    assert started.end() == exits.AGAIN
    assert "starting again (3" not in started.text() and "Traceback" not in started.text()


# Memory


def make_model(directory, **values):
    """A Llama with random weights, float32; returns its bytes."""
    from safetensors.numpy import save_file

    from rmjax.models import heads, hf
    from rmjax.models.config import from_hf

    values = {"model_type": "llama", "vocab_size": 700, "rms_norm_eps": 1e-5, "max_position_embeddings": 1024} | values
    config = from_hf(values)
    rng = np.random.default_rng(0)
    _, shapes = heads.abstract(config, 1, "float32", "float32")
    tensors = {
        name: 0.02 * rng.standard_normal(row.shape(leaf), np.float32)
        for row, leaf in hf.expected_rows(shapes, config).items()
        for name in row.names(config.layers)
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.release  # minutes: it takes a model large enough to show in the memory of a process
def test_no_process_holds_the_whole_model(tmp_path):
    """Each phase's peak, less a constant, is below 0.7 of the model's bytes; half are shards on CPU devices.

    The constant is the peak of the same phase with a model of nothing, and what may be in flight, which such a model
    cannot fill.
    """
    from rmjax.data import synthetic

    synthetic.make_tokenizer(tmp_path / "tokenizer")
    size = make_model(
        tmp_path / "large", hidden_size=384, intermediate_size=1536, num_hidden_layers=48,
        num_attention_heads=6, num_key_value_heads=6,
    )  # fmt: skip
    make_model(
        tmp_path / "small", hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    script = f"import runpy; runpy.run_path({str(ROOT / 'tests' / 'memory_of_phases.py')!r}, run_name='__main__')"
    peaks = {}
    for name in ("small", "large"):
        arguments = (str(tmp_path / name), str(tmp_path / "tokenizer"), str(tmp_path / f"out-{name}"))
        # glibc keeps what was freed where it comes in pieces below a threshold that it raises up to 32 MiB; real
        # shards are larger, so here it is lower.
        started = together(script, *arguments, MALLOC_MMAP_THRESHOLD_="1000000")
        for one in started:
            assert one.end() == 0, one.text()
        peaks[name] = [json.loads(one.lines[-1][1]) for one in started]
    for small, large in zip(peaks["small"], peaks["large"]):
        assert {"load", "save", "restore", "export"} <= set(large)
        constants = {phase: small[phase] + checkpoint.IN_FLIGHT for phase in ("load", "save", "restore", "export")}
        shares = {phase: (large[phase] - constant) / size for phase, constant in constants.items()}
        constant = {phase: f"{n / 2**20:.0f} MiB" for phase, n in constants.items()}
        print(f"of {size / 2**20:.0f} MiB: " + ", ".join(f"{p} {x:.3f} (+ {constant[p]})" for p, x in shares.items()))
        assert max(shares.values()) < 0.7
        assert min(shares.values()) > 0.4  # its own half is seen, or nothing would be measured
