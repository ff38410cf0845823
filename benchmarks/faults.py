"""Kills one run again and again, and compares what it ends with to a run that nobody touched.

    python benchmarks/faults.py --workdir=runs/faults

Trains a tiny model for some hundred steps, with `python -m rmjax.main`, once undisturbed and once under each signal:

    SIGKILL  50 times, as a crash or a lost machine
    SIGTERM  20 times, as a preemption; the run saves, exits with 75 and is started again

Three of four signals come when the metrics reach a random line, up to a second later; the others at a random moment
of the start. After each the newest sealed checkpoint is compared with the last step that the metrics have: these are
the steps lost. At the end metrics.jsonl and every file of the export must be equal, byte for byte. Then the slow tests
of tests/train/test_survival.py and tests/test_checkpoint.py inject all other faults. Prints Markdown rows for
benchmarks/RESULTS.md; exits with 1 if anything differs.
"""

import argparse
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 10
RUN = {
    "data.train": "synthetic://pairs?n=1600&seed=0",
    "data.validation": "synthetic://pairs?n=60&seed=1",
    "duration": "400 steps",
    "model.scratch.hidden_size": 32,
    "model.scratch.intermediate_size": 48,
    "plan.groups_per_step": 16,
    "plan.row_tokens": 256,
    "eval.every": "50 steps",
    "eval.train_groups": 20,
    "checkpoint.every": f"{SAVE_EVERY} steps",
    "log.every": "1 steps",
    "log.tensorboard": False,
}
TESTS = ("tests/train/test_survival.py", "tests/test_checkpoint.py")


class Blow(NamedTuple):
    """A signal that met the run.

    Attributes:
        code: the exit code of the process.
        phase: "start", "training", or "saving" where a checkpoint was under way.
        lost: steps in the metrics after the newest whole checkpoint.
        seconds: from the signal to the end of the process.
    """

    code: int
    phase: str
    lost: int
    seconds: float


def start(workdir: Path, cache: Path) -> subprocess.Popen:
    """The command; its output is in a numbered file beside the workdir."""
    keys = [f"--config.{key}={value}" for key, value in {**RUN, "data.cache_dir": cache}.items()]
    command = [sys.executable, "-m", "rmjax.main", "--config=configs/bt_tiny.py", f"--workdir={workdir}", *keys]
    with open(f"{workdir}.{len(outputs(workdir))}.txt", "w") as output:
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)


def outputs(workdir: Path) -> list[Path]:
    """What the starts of a run printed, in their order."""
    found = workdir.parent.glob(f"{workdir.name}.*.txt")
    return sorted(found, key=lambda path: int(path.name.split(".")[-2]))


def steps_logged(workdir: Path) -> int:
    """The last step in the metrics."""
    path = workdir / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def step_saved(workdir: Path) -> int:
    """The newest checkpoint with a manifest; 0 without any."""
    found = [int(path.parent.name) for path in (workdir / "checkpoints").glob("[0-9]*/manifest.json")]
    return max(found, default=0)


def strike(process: subprocess.Popen, workdir: Path, number: int, ready: Callable[[], bool]) -> Blow | None:
    """Sends the signal when `ready()`; None if the run ended before."""
    while process.poll() is None and not ready():
        time.sleep(0.005)
    if process.poll() is not None:
        return None
    looping, sent = "\nstep: " in outputs(workdir)[-1].read_text(), time.monotonic()
    process.send_signal(number)
    code = process.wait()
    seconds = time.monotonic() - sent
    folders = list((workdir / "checkpoints").glob("[0-9]*"))
    saving = any(not (folder / "manifest.json").exists() for folder in folders)
    phase = "saving" if saving else "training" if looping else "start"
    return Blow(code, phase, max(0, steps_logged(workdir) - step_saved(workdir)), seconds)


def torment(workdir: Path, cache: Path, number: int, times: int, total: int, starting: float) -> list[Blow]:
    """Starts the run until it ends by itself, and strikes it before that; `starting` is how long a start takes."""
    rng = np.random.default_rng(number)
    blows: list[Blow] = []
    for moment in np.sort(rng.integers(1, total, times)):
        process, begun = start(workdir, cache), time.monotonic()
        if rng.random() < 0.25:
            after = rng.uniform(0, starting)
            ready = lambda begun=begun, after=after: time.monotonic() - begun > after
        else:
            delay, reached = rng.uniform(0, 1), []
            ready = lambda moment=moment, delay=delay, reached=reached: (
                steps_logged(workdir) >= moment
                and (reached or reached.append(time.monotonic()) or reached)
                and time.monotonic() - reached[0] > delay
            )
        if (blow := strike(process, workdir, number, ready)) is None:
            break
        blows.append(blow)
        print(f"{len(blows)}: step {steps_logged(workdir)}, {blow}", file=sys.stderr, flush=True)
    if code := start(workdir, cache).wait():
        sys.exit(f"error: the run did not end well ({code}); see {outputs(workdir)[-1]}")
    return blows


def differing(a: Path, b: Path) -> list[str]:
    """Files of metrics and export in which two runs differ."""
    names = ["metrics.jsonl", *(str(path.relative_to(a)) for path in (a / "export").rglob("*") if path.is_file())]
    return [name for name in names if not (b / name).exists() or not filecmp.cmp(a / name, b / name, shallow=False)]


def row(number: int, blows: list[Blow], differences: list[str]) -> str:
    """What became of a tormented run, as a row of a table."""
    phases = {phase: sum(blow.phase == phase for blow in blows) for phase in ("start", "training", "saving")}
    when = ", ".join(f"{count} in {phase}" for phase, count in phases.items())
    lost = [blow.lost for blow in blows]
    end = "equal, byte for byte" if not differences else f"DIFFERENT: {', '.join(differences)}"
    codes = ", ".join(map(str, sorted({blow.code for blow in blows})))
    outcome = (
        f"exit {codes}; at most {max(lost)} steps lost, {np.mean(lost):.1f} on average (saved every {SAVE_EVERY}); "
        f"gone within {max(blow.seconds for blow in blows):.1f} s"
    )
    return f"| {signal.Signals(number).name}: {when} | {len(blows)} | {outcome} | {end} |"


def test_rows(workdir: Path) -> tuple[list[str], bool]:
    """Runs the tests that inject the other faults; a row for each, and whether all passed."""
    report = workdir / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", *TESTS]
    code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
    rows = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        passed = not {child.tag for child in case} & {"failure", "error", "skipped"}
        words = case.attrib["name"].removeprefix("test_").replace("_", " ")
        rows.append(f"| {words} | 1 | {'passed' if passed else 'NOT PASSED'} | |")
    return rows, code == 0


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="for the runs; is emptied")
    parser.add_argument("--kills", type=int, default=50, help="of SIGKILL")
    parser.add_argument("--terms", type=int, default=20, help="of SIGTERM")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests of the other faults")
    given = parser.parse_args()
    workdir = given.workdir.expanduser().absolute()
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    whole, cache = workdir / "whole", workdir / "cache"
    if code := start(whole, cache).wait():  # also fills the caches
        sys.exit(f"error: the undisturbed run did not end well ({code}); see {outputs(whole)[-1]}")
    process, begun = start(workdir / "timed", cache), time.monotonic()
    strike(process, workdir / "timed", signal.SIGKILL, lambda: steps_logged(workdir / "timed") > 0)
    starting, total = time.monotonic() - begun, steps_logged(whole)
    rows, good = ["| fault | times | outcome | metrics and export |", "|---|---|---|---|"], True
    for number, times in ((signal.SIGKILL, given.kills), (signal.SIGTERM, given.terms)):
        struck = workdir / signal.Signals(number).name
        blows = torment(struck, cache, number, times, total, starting)
        differences = differing(whole, struck)
        rows.append(row(number, blows, differences))
        good &= not differences
    if not given.no_tests:
        more, passed = test_rows(workdir)
        rows, good = rows + more, good and passed
    print("\n".join(rows))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
