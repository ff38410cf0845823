"""Bad input through the public commands: exit code 2, one paragraph that names the culprit, and no file left behind."""

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bad_inputs
import bad_models
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
CASES = [*bad_inputs.CASES, *bad_models.CASES]


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """All that is in a directory, with size and time of change of its files."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
    known = lambda stat: (stat.st_size, stat.st_mtime_ns)
    return {name: known(path.lstat()) if path.is_file() else (0, 0) for name, path in found.items()}


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Runs jobs in a fork server; gives their results by id."""
    cache = tmp_path_factory.mktemp("cache")
    env = dict(os.environ, XDG_CACHE_HOME=str(cache), JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, Path(__file__).with_name("fork_server.py")]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def answer(jobs):
            server.stdin.write(json.dumps(jobs) + "\n")
            server.stdin.flush()
            return {result["id"]: result for result in json.loads(server.stdout.readline())}

        yield answer
        server.stdin.close()
    assert not list(cache.rglob("*.partial*"))


@pytest.fixture(scope="module")
def assets(tmp_path_factory, serve):
    """What broken inputs are made from: the configs, a finished run, and the model that it exported."""
    tmp = tmp_path_factory.mktemp("assets")
    found = {"configs": ROOT / "configs", "run": tmp / "run", "model": tmp / "run" / "export"}
    argv = [filled(arg, found) for arg in (*bad_models.RUN[1:], "--workdir=run")]
    (made,) = serve([{"id": 0, "module": "rmjax.main", "argv": argv, "cwd": str(tmp)}]).values()
    assert made["code"] == 0, made["err"]
    return found


def filled(argument, assets):
    for name, path in assets.items():
        argument = argument.replace(f"{{{name}}}", str(path))
    return argument


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, assets, serve):
    """What became of every case: the result, the files before and the files after."""
    tmp = tmp_path_factory.mktemp("bad-input")
    jobs, places, before = [], {}, {}
    for i, case in enumerate(CASES):
        places[i] = tmp / f"{i}"
        places[i].mkdir()
        for name, contents in case.files.items():
            (places[i] / name).write_bytes(contents)
        if case.make is not None:
            case.make(places[i], assets)
        before[i] = snapshot(places[i])
        argv = [filled(arg, assets) for arg in case.command[1:]]
        jobs.append({"id": i, "module": case.command[0], "argv": argv, "cwd": str(places[i])})
    results = serve(jobs)
    return {i: (results[i], before[i], snapshot(places[i])) for i in places}


def paragraph(text: str) -> str:
    """The error, without what was said before it (notes, progress)."""
    return text[text.rfind("\nerror: ") + 1 :] if "\nerror: " in text else text


@pytest.mark.parametrize("i", range(len(CASES)), ids=[case.name[:100] for case in CASES])
def test_bad_input_is_named_in_a_paragraph_and_leaves_nothing(i, outcomes):
    result, before, after = outcomes[i]
    said = result["err"]
    assert "Traceback" not in said and "Traceback" not in result["out"], said[-3000:]
    assert result["code"] == 2, said[-3000:]
    error = paragraph(said)
    assert error.startswith("error: ") and "\n\n" not in error.strip(), error
    assert CASES[i].says in error
    assert len(error) < 4000
    assert after == before


def test_the_corpus_is_large_and_its_messages_differ(outcomes):
    """Two messages are the same if they differ in paths, numbers or quoted values only."""
    plain = lambda text: re.sub(r"\S*/\S*|\d+|'[^']*'", "_", paragraph(text))
    distinct = collections.Counter(plain(result["err"]) for result, _, _ in outcomes.values())
    assert len(CASES) >= 200 and len(distinct) >= 60
