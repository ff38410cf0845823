"""Where the numbers of a run go: metrics.jsonl, timings.jsonl, the sinks of config.log.to (sinks/) and the terminal.

Metrics go everywhere but to timings.jsonl, timings everywhere but to metrics.jsonl: that file of a resumed run equals
that of an uninterrupted one byte for byte.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from rmjax.runtime import files, processes
from rmjax.train import sinks
from rmjax.train.sinks import Sink
from rmjax.train.sinks.tensorboard import DIRECTORY, TensorBoard, cut_events


class Writer(Protocol):
    """Takes named numbers of a step. Steps never decrease; a step may be written more than once."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values`; whatever a killed process had written before is on disk when this returns."""

    def sync(self) -> None:
        """Sends what was written to the disk: a power cut leaves it."""

    def close(self) -> None:
        """Releases files and threads."""


class JsonlWriter:
    """One line per write: {"step": 10, "train/loss": 0.693...}; every digit, and null where not finite."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open for the whole run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line and flushes it."""
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": int(step)} | {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Sends the lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self.sync()
        self._file.close()


def cut_jsonl(path: str | os.PathLike, step: int) -> None:
    """Drops the lines after `step`, and what a kill or a power cut left at the end. A missing file is fine."""
    path = Path(path)
    if not path.exists():
        return
    whole, rest = files.whole_lines(path.read_bytes(), lambda line: isinstance(line["step"], int))
    if rest.strip(b"\0\n"):
        logging.warning("%s ended in %d bytes that are no whole line; they are cut off", path, len(rest))
    kept = [line for line in whole.splitlines(keepends=True) if json.loads(line)["step"] <= step]
    files.write_whole(path, b"".join(kept))


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps and values of a file of JsonlWriter; NaN where a value was not finite."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            values = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
            yield int(values.pop("step")), values


class Writers:
    """All writers of a run: metrics to each of `metrics`, timings to each of `timings`, both to each of `both`."""

    def __init__(self, metrics: Sequence[Writer], timings: Sequence[Writer], both: Sequence[Sink]):
        self._metrics, self._timings, self._sinks = [*metrics, *both], [*timings, *both], both

    @classmethod
    def open(cls, workdir: str | os.PathLike, config: Any, start: int) -> "Writers":
        """Opens the writers that `config.log` asks for, without what was written after step `start`.

        Only the first process writes: those of the others do nothing.

        Args:
            workdir: gets metrics.jsonl, timings.jsonl and tensorboard/.
            start: the step restored; 0 is a run from the beginning, which also writes step 0 anew.
        """
        if not processes.is_first():
            return cls([], [], [])
        workdir, keep = Path(workdir), start if start > 0 else -1
        paths = [workdir / "metrics.jsonl", workdir / "timings.jsonl"]
        workdir.mkdir(parents=True, exist_ok=True)
        for path in paths:
            cut_jsonl(path, keep)
        cut_events(workdir / DIRECTORY, keep)  # also where this start writes no more of them
        metrics, timings = map(JsonlWriter, paths)
        earlier = sorted((line for path in paths for line in read_jsonl(path)), key=lambda line: line[0])
        return cls([metrics], [timings], sinks.open_sinks(config, workdir, keep, earlier))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics: the same numbers in every run of this config."""
        for writer in self._metrics:
            writer.write(step, values)

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """Writes timings and throughput, which differ between runs."""
        for writer in self._timings:
            writer.write(step, values)

    def made(self) -> list[Path]:
        """Files with new names that these writers have made."""
        return [path for sink in self._sinks if isinstance(sink, TensorBoard) for path in sink.made]

    def keep(self, file: Path) -> None:
        """Keeps a file of the run in each sink."""
        for sink in self._sinks:
            sink.keep(file)

    def sync(self) -> None:
        """Sends everything to the disk; before a checkpoint is saved, since a run goes on from its lines too."""
        for writer in dict.fromkeys((*self._metrics, *self._timings)):
            writer.sync()

    def close(self) -> None:
        """Closes them all."""
        for writer in dict.fromkeys((*self._metrics, *self._timings)):
            writer.close()
