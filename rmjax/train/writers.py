"""Where the numbers of a run go: metrics.jsonl, timings.jsonl, TensorBoard, Weights & Biases and the terminal.

Metrics go everywhere but to timings.jsonl, timings everywhere but to metrics.jsonl: that file of a resumed run equals
that of an uninterrupted one byte for byte.
"""

import http.client
import json
import math
import os
import struct
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from absl import logging

from rmjax.runtime import files, processes
from rmjax.suggestions import install

if TYPE_CHECKING:  # tensorboardX imports torch where that is installed, for seconds: only when it is used
    from tensorboardX.proto.event_pb2 import Event

EVENT_FILES = "events.out.tfevents.*"
OUR_EVENTS = ".rmjax"  # ends the names of those that are written here
ONLINE = (None, "online", "shared")  # modes of W&B in which it sends what is logged
REACH_SECONDS = 10.0  # that W&B may take to answer at all
FINISH_SECONDS = 600  # that W&B may take to upload what is left at the end; what it does not, `wandb sync` does


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
        self._directory, before = directory, set(directory.iterdir())
        self._file = EventsWriter(str(directory / "events"), filename_suffix=f".{count}{OUR_EVENTS}")
        self.made = [path for path in directory.iterdir() if path not in before]
        if purge_step is not None:
            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per value."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._add(int(step), summary=Summary(value=scalars))

    def sync(self) -> None:
        """Sends the event files to the disk."""
        for path in self._directory.glob(f"{EVENT_FILES}{OUR_EVENTS}"):
            files.sync(path)

    def close(self) -> None:
        """Closes the event file."""
        self.sync()
        self._file.close()

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
        self._file.flush()


def cut_events(directory: str | os.PathLike, step: int) -> None:
    """Rewrites our event files without the points after `step` or a half-written end; those of other programs stay.

    TensorBoard would hide such points by itself, but other readers of event files would not.
    """
    for path in Path(directory).glob(f"{EVENT_FILES}{OUR_EVENTS}"):
        records = read_events(path.read_bytes())
        files.write_whole(path, b"".join(raw for raw, event in records if event.step <= step or event.file_version))


def read_events(data: bytes) -> Iterator[tuple[bytes, "Event"]]:
    """The whole records of an event file, raw and parsed.

    A record is a little-endian uint64 length, its uint32 checksum, the serialized Event, its uint32 checksum.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data) or not length:  # zeros are what a power cut can leave
            return
        try:
            yield data[start:end], Event.FromString(data[start + 12 : end - 4])
        except DecodeError:
            return
        start = end


def _wandb(project: str) -> Any:
    """The package; where it cannot upload what is left at the end, it gives up instead of waiting for days."""
    try:
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
        import wandb
    except ImportError as error:
        raise ImportError(f"log.wandb={project!r} needs wandb: {install('wandb')}, or leave log.wandb empty") from error
    return wandb


def _out_of_reach(wandb: Any) -> str:
    """Why W&B, which is to be used online, cannot be reached; "" if it can, or is not to be."""
    settings = wandb.setup().settings
    if settings.mode not in ONLINE:
        return ""
    try:
        with urllib.request.urlopen(settings.base_url, timeout=REACH_SECONDS):
            return ""
    except urllib.error.HTTPError as error:  # an answer all the same
        return str(error) if error.code >= 500 else ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error)


def check_wandb(project: str) -> None:
    """Checks the login of W&B, if it is to be used online; whether the key is right, only where W&B can be reached.

    Raises:
        ValueError: nobody is logged in, or W&B refuses the key.
    """
    wandb = _wandb(project)
    advice = "log in with `wandb login`, set WANDB_API_KEY, or log to files alone with WANDB_MODE=offline"
    if wandb.setup().settings.mode not in ONLINE:
        return
    try:
        known = wandb.login(verify=not _out_of_reach(wandb))
    except wandb.Error as error:
        raise ValueError(f"config.log.wandb={project!r}: {error}; {advice}") from error
    if not known and wandb.setup().settings.mode in ONLINE:
        raise ValueError(f"config.log.wandb={project!r}: nobody is logged in to W&B; {advice}")


class WandbWriter:
    """A run on Weights & Biases; a resumed one goes on in the same run, known by `directory`/wandb_id.

    Where W&B cannot be reached the run is kept in `directory`/wandb, for `wandb sync`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        project: str,
        config: Mapping[str, Any],
        earlier: Sequence[tuple[int, Mapping[str, float]]] = (),
    ):
        """Starts or resumes the run, and logs again what it lacks of `earlier`: steps, never decreasing, and values.

        A killed process takes with it what it had not sent yet, and a run that is kept in files has nothing of those
        before it.

        Raises:
            ImportError: wandb is not installed.
        """
        wandb = _wandb(project)
        name = Path(directory) / "wandb_id"
        if not name.exists():
            files.write_whole(name, uuid.uuid4().hex)
        options = {
            **{"project": project, "id": name.read_text(), "resume": "allow"},
            **{"dir": str(directory), "config": dict(config)},
        }
        why = _out_of_reach(wandb)
        try:
            self._run = wandb.init(**options, mode="offline" if why else None)
        except wandb.Error as error:
            why = str(error)
            self._run = wandb.init(**options, mode="offline")
        if why:
            logging.warning(
                "W&B cannot be reached (%s), so the run goes on offline; afterwards: wandb sync %s",
                why,
                Path(directory) / "wandb" / "latest-run",
            )
        first = self._run.step  # the first that W&B does not have
        for step, values in earlier:
            if step >= first:
                self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs `values`. The service ignores steps it has already; a resumed run repeats the same numbers."""
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def sync(self) -> None:
        """W&B keeps its own files."""

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

        Only the first process writes: those of the others do nothing.

        Args:
            workdir: gets metrics.jsonl, timings.jsonl and tensorboard/.
            start: the step restored; 0 is a run from the beginning, which also writes step 0 anew.
        """
        if not processes.is_first():
            return cls([], [])
        workdir, keep = Path(workdir), start if start > 0 else -1
        paths, events = [workdir / "metrics.jsonl", workdir / "timings.jsonl"], workdir / "tensorboard"
        workdir.mkdir(parents=True, exist_ok=True)
        for path in paths:
            cut_jsonl(path, keep)
        cut_events(events, keep)
        metrics, timings = map(JsonlWriter, paths)
        both: list[Writer] = []
        if config.log.tensorboard:
            both.append(TensorBoardWriter(events, purge_step=keep + 1))
        if config.log.wandb:
            earlier = sorted((line for path in paths for line in read_jsonl(path)), key=lambda line: line[0])
            both.append(WandbWriter(workdir, config.log.wandb, config.to_dict(), earlier))
        return cls([metrics, *both], [timings, *both])

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
        return [path for writer in self._timings if isinstance(writer, TensorBoardWriter) for path in writer.made]

    def sync(self) -> None:
        """Sends everything to the disk; before a checkpoint is saved, since a run goes on from its lines too."""
        for writer in dict.fromkeys((*self._metrics, *self._timings)):
            writer.sync()

    def close(self) -> None:
        """Closes them all."""
        for writer in dict.fromkeys((*self._metrics, *self._timings)):
            writer.close()
