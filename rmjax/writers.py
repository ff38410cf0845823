"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases and the terminal.

Metrics go everywhere. Timings go to TensorBoard and the terminal only, so that metrics.jsonl of a resumed run
equals that of an uninterrupted one byte for byte.
"""

import json
import math
import os
import shutil
import struct
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:  # tensorboardX imports torch where that is installed, for seconds: only when it is used
    from tensorboardX.proto.event_pb2 import Event

EVENT_FILES = "events.out.tfevents.*"


class Writer(Protocol):
    """Takes named numbers of a step. Steps never decrease; a step may be written more than once."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values`; whatever a killed process had written before is on disk when this returns."""

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

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def cut_jsonl(path: str | os.PathLike, step: int) -> None:
    """Drops the lines after `step` and a half-written last one, atomically. A missing file is fine."""
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    _replace(path, b"".join(kept))


class TensorBoardWriter:
    """One more event file in `directory`, on disk after every write (SummaryWriter has a queue before it)."""

    def __init__(self, directory: str | os.PathLike, purge_step: int | None = None):
        """`purge_step` tells a TensorBoard that is open to forget what it has read from this step on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # Names have a resolution of a second, and one that exists would be overwritten: hence the count.
        count = len(list(directory.glob(EVENT_FILES)))
        self._file = EventsWriter(str(directory / "events"), filename_suffix=f".{count}")
        if purge_step is not None:
            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per value."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._add(int(step), summary=Summary(value=scalars))

    def close(self) -> None:
        """Closes the event file."""
        self._file.close()

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
        self._file.flush()


def cut_events(directory: str | os.PathLike, step: int) -> None:
    """Rewrites TensorBoard's event files without the points after `step` or a half-written end.

    TensorBoard would hide such points by itself, but other readers of event files would not.
    """
    for path in Path(directory).glob(EVENT_FILES):
        records = read_events(path.read_bytes())
        _replace(path, b"".join(raw for raw, event in records if event.step <= step or event.file_version))


def read_events(data: bytes) -> Iterator[tuple[bytes, "Event"]]:
    """The whole records of an event file, raw and parsed.

    A record is a little-endian uint64 length, its uint32 checksum, the serialized Event, its uint32 checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return
        yield data[start:end], Event.FromString(data[start + 12 : end - 4])
        start = end


class WandbWriter:
    """A run on Weights & Biases; a resumed one goes on in the same run, known by `directory`/wandb_id."""

    def __init__(self, directory: str | os.PathLike, project: str, config: Mapping[str, Any]):
        """Starts or resumes the run.

        Raises:
            ImportError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"log.wandb={project!r} needs wandb: pip install 'rmjax[wandb]', or leave log.wandb empty"
            ) from error
        name = Path(directory) / "wandb_id"
        if not name.exists():
            _replace(name, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project=project, id=name.read_text(), resume="allow", dir=str(directory), config=dict(config)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs `values`. The service ignores steps it has already; a resumed run repeats the same numbers."""
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Uploads the rest and ends the run."""
        self._run.finish()


class Writers:
    """All writers of a run: metrics to each of `metrics`, timings to each of `timings`."""

    def __init__(self, metrics: Sequence[Writer], timings: Sequence[Writer]):
        self._metrics, self._timings = metrics, timings

    @classmethod
    def open(cls, workdir: str | os.PathLike, config: Any, start: int) -> "Writers":
        """Opens the writers that `config.log` asks for, without what was written after step `start`.

        Args:
            workdir: gets metrics.jsonl and tensorboard/.
            config: the run's ConfigDict.
            start: the step restored; 0 is a run from the beginning, which also writes step 0 anew.
        """
        workdir, keep = Path(workdir), start if start > 0 else -1
        path, events = workdir / "metrics.jsonl", workdir / "tensorboard"
        workdir.mkdir(parents=True, exist_ok=True)
        cut_jsonl(path, keep)
        cut_events(events, keep)
        metrics: list[Writer] = [JsonlWriter(path)]
        timings: list[Writer] = []
        if config.log.tensorboard:
            timings = [TensorBoardWriter(events, purge_step=keep + 1)]
        if config.log.wandb:
            metrics.append(WandbWriter(workdir, config.log.wandb, config.to_dict()))
        return cls([*metrics, *timings], timings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics: the same numbers in every run of this config."""
        for writer in self._metrics:
            writer.write(step, values)

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """Writes timings and throughput, which differ between runs."""
        for writer in self._timings:
            writer.write(step, values)

    def close(self) -> None:
        """Closes them all."""
        for writer in self._metrics:
            writer.close()


class Progress:
    """The progress line: step, values, groups per second, elapsed time and time left.

    Rewritten in place on a terminal; elsewhere a new line every `interval` seconds, and the last.
    """

    WINDOW = 100  # steps that the rate is measured over

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        unit: str = "pairs",
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """A run of steps `start` + 1 to `total`; `unit` is what is counted per second."""
        self._total, self._unit, self._interval, self._clock = total, unit, interval, clock
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._begun, self._printed, self._line = clock(), -math.inf, ""
        self._groups = 0
        # (time, step, groups so far) after each step. The first entry is the end of the first step, so that
        # no rate has compiling in it.
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=self.WINDOW + 1)

    def step(self, step: int, values: Mapping[str, float], groups: int) -> None:
        """Shows that `step` is done, which trained on `groups` groups."""
        now = self._clock()
        self._groups += groups
        self._marks.append((now, step, self._groups))
        self._line = self._words(step, values, now)
        if self._in_place:
            self._line = self._line[: shutil.get_terminal_size().columns - 1]  # a wrapped one stays on screen
            self._stream.write(f"\r{self._line}\x1b[K")
            self._stream.flush()
        elif now - self._printed >= self._interval or step == self._total:
            self._print(self._line)
            self._printed, self._line = now, ""

    def rates(self) -> dict[str, float]:
        """Steps and groups per second over the last steps; empty until the second step is done."""
        if len(self._marks) < 2 or self._marks[-1][0] <= self._marks[0][0]:
            return {}
        (first, first_step, first_groups), (last, last_step, last_groups) = self._marks[0], self._marks[-1]
        seconds = last - first
        return {
            "timing/steps_per_second": (last_step - first_step) / seconds,
            f"timing/{self._unit}_per_second": (last_groups - first_groups) / seconds,
        }

    def note(self, text: str) -> None:
        """Prints a line of its own and leaves the progress line below it."""
        if self._in_place:
            self._print(f"\r{text}\x1b[K")
            self._stream.write(self._line)
            self._stream.flush()
        else:
            self._print(text)

    def close(self) -> None:
        """Ends the progress line; prints the last one if it has not been shown."""
        if self._line:
            self._print("" if self._in_place else self._line)
            self._line = ""

    def _print(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def _words(self, step: int, values: Mapping[str, float], now: float) -> str:
        parts = [f"step {step}/{self._total}", *(f"{name} {value:.4g}" for name, value in values.items())]
        rates = self.rates()
        if rates:
            per_step, per_group = rates.values()
            parts.append(f"{per_group:.1f} {self._unit}/s")
        parts.append(f"{clock_time(now - self._begun)} elapsed")
        if rates and step < self._total:
            parts.append(f"{clock_time((self._total - step) / per_step)} left")
        return "  ".join(parts)


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds: 3725.4 is '1:02:05', 65 is '1:05'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"partial.{path.name}")
    partial.write_bytes(data)
    partial.replace(path)
