"""Compiled programs are kept in the user's cache folder, and nothing there can stop or change a run."""

import json
import os
import subprocess
import sys
import time

import pytest

from rmjax.runtime import compile_cache

# Compiles a program that takes a while, in a process of its own; says where it was kept, what it computed and how.
PROGRAM = """
import os
if cores := int(os.environ.get("CORES", 0)):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
import hashlib, json, sys, jax, jax.numpy as jnp
from absl import logging
from rmjax.runtime import compile_cache as startup
logging.use_absl_handler()
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
folder = startup.keep_programs(*sys.argv[1:])
@jax.jit
def work(x):
    for i in range(40):
        x = jnp.sin(x @ x + i) * jnp.cumsum(x, axis=i % 2) / (1 + jnp.abs(x))
    return x
value = work(jax.random.normal(jax.random.key(0), (64, 64)))
sum = hashlib.sha256(jax.device_get(value).tobytes()).hexdigest()
hits, misses = events.count("cache_hits"), events.count("cache_misses")
print(json.dumps({"folder": folder and str(folder), "used": jax.config.jax_compilation_cache_dir, "hits": hits,
                  "misses": misses, "sum": sum}))
"""


@pytest.fixture
def start(tmp_path):
    def run(*arguments, **env):
        command = [sys.executable, "-c", PROGRAM, *arguments]
        base = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        env = {**base, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "home"), **env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stderr}

    return run


def test_second_start_reads_the_very_program(start, tmp_path):
    first, second = start(), start()
    folder = tmp_path / "home" / "rmjax" / "xla" / f"{len(os.sched_getaffinity(0))}-cores"
    assert first["folder"] == first["used"] == second["folder"] == str(folder)
    assert first["misses"] > 0 and first["hits"] == 0
    assert second["misses"] == 0 and second["hits"] == first["misses"]
    assert first["sum"] == second["sum"]
    assert first["said"] == second["said"] == ""
    assert folder.stat().st_mode & 0o077 == 0


def test_damaged_and_unfinished_programs_are_compiled_again(start, tmp_path):
    first = start(str(tmp_path / "mine"))
    assert first["folder"].startswith(str(tmp_path / "mine"))
    [program] = [p for p in (tmp_path / "mine").rglob("*-cache") if "jit_work" in p.name]
    program.write_bytes(program.read_bytes()[:1000])
    damaged = start(str(tmp_path / "mine"))
    assert damaged["sum"] == first["sum"] and "Error reading persistent compilation cache" in damaged["said"]
    program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()  # killed while it was written
    os.utime(program, (time.time() - 600,) * 2)
    again = start(str(tmp_path / "mine"))
    assert again["sum"] == first["sum"] and again["misses"] == 1 and again["said"] == ""


def test_a_folder_that_cannot_be_written(start, tmp_path):
    (tmp_path / "home").write_text("a file")
    result = start()
    assert result["folder"] is None and result["used"] is None
    assert "every run compiles anew" in result["said"] and "home" in result["said"]


def test_the_users_own_settings_stay(start, tmp_path):
    own = start(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert own["folder"] is None and own["used"] == str(tmp_path / "own")
    off = start(JAX_ENABLE_COMPILATION_CACHE="false")
    assert off["folder"] is None and off["misses"] == 0
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_another_number_of_cores_is_another_device(start):
    two, one = start(), start(CORES="1")
    assert one["folder"] != two["folder"] and one["hits"] == 0


# Whose folder it is


@pytest.fixture
def place(tmp_path):
    """A folder for programs, with a program of JAX's and a file of somebody's in it."""
    folder = tmp_path / "home" / "xla" / "2-cores"
    folder.mkdir(parents=True)
    (folder / PROGRAM_NAME).write_bytes(b"program")
    (folder / "my-cache").write_bytes(b"precious")
    for path in (tmp_path, tmp_path / "home", folder.parent, folder):
        path.chmod(0o755)
    return folder


PROGRAM_NAME = f"jit_work-{'0123456789abcdef' * 4}-cache"


def modes(folder):
    return [path.stat().st_mode & 0o777 for path in (folder.parent, folder)]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777])
@pytest.mark.parametrize("which", ["xla", "2-cores"])
def test_a_folder_that_others_could_write_to_is_closed_and_emptied_of_programs(place, which, mode):
    path = {place.name: place, place.parent.name: place.parent}[which]
    path.chmod(mode)
    compile_cache._make_private(place)
    assert path.stat().st_mode & 0o077 == 0 and [p.name for p in place.iterdir()] == ["my-cache"]


def test_a_folder_of_ones_own_stays_as_it_is(place):
    compile_cache._make_private(place)
    assert modes(place) == [0o755, 0o755] and (place / PROGRAM_NAME).exists()
    place.parent.parent.chmod(0o775)  # the usual mode where each user has a group
    place.parent.parent.parent.chmod(0o1777)  # as /tmp
    compile_cache._make_private(place)
    assert (place / PROGRAM_NAME).exists()


def test_a_folder_in_whose_place_others_can_put_theirs_is_not_used(place, tmp_path):
    (tmp_path / "home").chmod(0o777)
    with pytest.raises(PermissionError, match="home is no safe place for programs: everybody can write to it"):
        compile_cache._make_private(place)
    (tmp_path / "home").chmod(0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "link").symlink_to("../home")
    (tmp_path / "short").symlink_to(tmp_path / "open" / "link")
    with pytest.raises(PermissionError, match="open is no safe place"):  # it leads there by a link of a link
        compile_cache._make_private(tmp_path / "short" / "xla" / "2-cores")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="link"):
        compile_cache._make_private(tmp_path / "circle" / "xla" / "2-cores")


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away")
def test_a_folder_of_another_user_is_not_used(place, tmp_path):
    for path in (place, place.parent, tmp_path / "home"):
        os.chown(path, 12345, 12345)
        with pytest.raises(PermissionError, match="belongs to"):
            compile_cache._make_private(place)
        os.chown(path, 0, 0)
    place.parent.rename(tmp_path / "home" / "theirs")
    place.parent.symlink_to("theirs")
    with pytest.raises(PermissionError, match="is a link"):
        compile_cache._make_private(place)


def test_programs_of_an_open_folder_are_not_read(start, tmp_path):
    first = start()
    folder = tmp_path / "home" / "rmjax" / "xla" / f"{len(os.sched_getaffinity(0))}-cores"
    folder.chmod(0o777)
    again = start()
    assert again["hits"] == 0 and again["misses"] == first["misses"] and folder.stat().st_mode & 0o077 == 0
    (tmp_path / "home" / "rmjax").chmod(0o777)
    refused = start()
    assert refused["folder"] is None and refused["hits"] == 0 and refused["sum"] == first["sum"]
    assert refused["said"].count("every run compiles anew") == 1 and "no safe place for programs" in refused["said"]


def test_unfinished_files_of_others_stay(place):
    for path in place.iterdir():
        os.utime(path, (0, 0))
    compile_cache._drop_unfinished(place)
    assert [path.name for path in place.iterdir()] == ["my-cache"]
