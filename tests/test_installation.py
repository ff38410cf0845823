"""What is installed: one command with all the others, a whole wheel, images and cloud files that are in form."""

import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from own_environment import python_with

from rmjax import __main__ as console
from rmjax import suggestions
from rmjax.runtime import exits

ROOT = Path(__file__).parents[1]
READ = (".py", ".md", ".ipynb", ".yaml", ".sh", ".toml")
BARE = re.compile(r"pip install [^\n`]*(?<![\w/.-])rmjax(?:\[[\w,]*\])?(?![\w/.\[-]| @)")


def test_the_command_runs_the_others(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda name, run_name: ran.append((name, run_name, list(sys.argv))))
    monkeypatch.setattr(sys, "argv", ["rmjax"])
    for name in console.MODULES:
        console.main([name, "--debug", "x"])
    assert [argv for *_, argv in ran] == [[f"rmjax {name}", "--debug", "x"] for name in console.MODULES]
    for name, run_name, _ in ran:
        assert run_name == "__main__" and importlib.util.find_spec(name)
    console.main([])
    assert capsys.readouterr().out == console.__doc__.strip() + "\n"
    assert set(re.findall(r"^    (\w+)  ", console.__doc__, re.M)) == set(console.MODULES)
    console.main(["--version"])
    assert capsys.readouterr().out == f"rmjax {importlib.metadata.version('rmjax')}\n"
    with pytest.raises(SystemExit) as ended:
        console.main(["scroe"])
    assert ended.value.code == 2 and "did you mean 'score'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "data"])  # one by absl, one by argparse
def test_it_shows_their_help(name):
    command = [sys.executable, "-m", "rmjax", name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and f"python -m {console.MODULES[name]}" in done.stdout, done.stderr


def test_nothing_installs_rmjax_by_its_bare_name():
    """The name is nobody's on the package index, so anybody could take it."""
    assert BARE.search("pip install 'rmjax[serve]'") and BARE.search("%pip install -q rmjax")
    assert not BARE.search("pip install -e '.[serve]'") and not BARE.search("pip install 'rmjax @ git+https://x'")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in READ and path.exists() and path != Path(__file__):
            assert not BARE.search(path.read_text()), name


def test_what_an_extra_needs_is_named():
    assert suggestions.install("sql").startswith("pip install 'sqlalchemy")
    assert suggestions.install("nothing") == "install the extra [nothing] of rmjax's checkout"


def test_the_image_is_in_form():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
    known = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert {line.split()[0] for line in lines} <= known
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.M)
    assert set(re.findall(r"--target (\w+)|or --target (\w+), (\w+)", text)[0]) <= {*stages, ""}
    assert {"cuda", "tpu", "cpu"} <= set(stages)
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for source in sources.split():
            assert (ROOT / source).exists() and f"!{source}\n" in ignored, source
    extras = set(importlib.metadata.metadata("rmjax").get_all("Provides-Extra"))
    assert {"cuda", "tpu", "serve"} <= extras


def test_the_cloud_file_names_what_exists():
    task = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text())
    assert (ROOT / task["envs"]["CONFIG"]).exists()
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [exits.AGAIN]
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Python of an environment of its own with what builds, checks and reads."""
    return python_with(tmp_path_factory.mktemp("environment"), "build", "twine", "skypilot")


@pytest.mark.release
def test_wheel_and_sdist_are_whole(python, tmp_path):
    subprocess.run([python, "-m", "build", "-o", tmp_path, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    subprocess.run([python, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry = next(name for name in held if name.endswith("entry_points.txt"))
        assert b"rmjax = rmjax.__main__:main" in archive.read(entry)
    for pattern in ("rmjax/**/*.py", "rmjax/**/*.jinja", "rmjax/batches/lengths/*.json"):
        files = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
        assert files and files <= held, files - held


@pytest.mark.release
def test_skypilot_reads_the_cloud_file(python):
    script = "import json, sky; print(json.dumps(sky.Task.from_yaml('launch/sky.yaml').num_nodes))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == 1
