"""Measurements in processes of their own, one after the other, within a time; and their files as one archive."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 20.0  # nothing begins with less left: the imports alone take some of it
LOG_BYTES = 20_000  # of the end of each log, in the archive
KEPT = ("json", "partial", "failed", "log", "txt")


class Session:
    """Runs measurements one after the other; shows what is done and how long the rest will take.

    Attributes:
        workdir: where the figures are.
        total: measurements that are planned.
        seconds: for all of them.
        failures: what failed, by the name of the measurement.
        late: what there was no time for.
    """

    def __init__(self, workdir: Path, total: int, seconds: float = math.inf):
        self.workdir, self.total, self.seconds = workdir, total, seconds
        self.failures, self.late = dict[str, str](), list[str]()
        self._count, self._measured, self._begun = 0, 0, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self._begun)

    def measure(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> dict[str, Any] | None:
        """The figures that a command writes to the file behind its last argument; None if it failed, or came late."""
        path = self.workdir / f"{_slug(name)}.json"
        self._count += 1
        if path.exists():
            return json.loads(path.read_text())
        if self.left < LEAST_SECONDS:
            if (failed := path.with_suffix(".failed")).exists():  # in an earlier session
                self.failures[name] = failed.read_text()
            else:
                self.late.append(name)
            return None
        print(f"[{self._count}/{self.total}] {name}{self._outlook()}", flush=True)
        partial, limit = path.with_suffix(".partial"), min(self.left, self.seconds / 3)
        with open(path.with_suffix(".log"), "w") as log:
            code = _run([*command, f"--json={partial}"], env, log, limit)
        self._measured += 1
        if code is None and self.left < LEAST_SECONDS:
            self.late.append(name)
            print("  stopped: the time is over", flush=True)
            return None
        if code is None or code:
            self.failures[name] = f"stopped after {limit:.0f} s" if code is None else _why(path, code)
            path.with_suffix(".failed").write_text(self.failures[name])
            print(f"  failed: {self.failures[name]}", flush=True)
            return None
        partial.replace(path)
        path.with_suffix(".failed").unlink(missing_ok=True)
        return json.loads(path.read_text())

    def _outlook(self) -> str:
        if not self._measured or self.left < LEAST_SECONDS:
            return ""
        each = (time.monotonic() - self._begun) / self._measured
        return f", about {min(each * (self.total - self._count + 1), self.left) / 60:.0f} minutes left"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".=" else "_" for c in name)


def _why(path: Path, code: int) -> str:
    errors = re.findall(r"^(?:error|\S*Error): .*", path.with_suffix(".log").read_text(), re.MULTILINE)
    return errors[-1][:300] if errors else f"exit code {code}, see {path.stem}.log"


def _run(command: Sequence[str], env: Mapping[str, str], log: Any, limit: float) -> int | None:
    """The exit code; None of a command that took longer. It and its children are gone when this ends, however it does:
    one that was left would hold the device's memory."""
    child = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return child.wait(None if limit == math.inf else limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def write_archive(workdir: Path, page: Path) -> Path:
    """Packs the page, all figures and the end of each log into one file, which appears whole."""
    target = workdir / "results.tar.gz"
    scratch = target.with_suffix(".writing")
    with tarfile.open(scratch, "w:gz") as archive:
        for path in sorted({page, *(path for kind in KEPT for path in workdir.glob(f"*.{kind}"))}):
            if path.is_file():
                data = path.read_bytes()[-LOG_BYTES if path.suffix == ".log" else 0 :]
                entry = tarfile.TarInfo(path.name)
                entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
                archive.addfile(entry, io.BytesIO(data))
    scratch.replace(target)
    return target
