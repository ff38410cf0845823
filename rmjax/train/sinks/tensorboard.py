"""TensorBoard: event files in WORKDIR/tensorboard."""

import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmjax.runtime import files
from rmjax.train.sinks import Opening

if TYPE_CHECKING:  # tensorboardX imports torch where that is installed, for seconds: only when it is used
    from tensorboardX.proto.event_pb2 import Event

DIRECTORY = "tensorboard"
EVENT_FILES = "events.out.tfevents.*"
OUR_EVENTS = ".rmjax"  # ends the names of those that are written here


def check(project: str) -> None:
    """Nothing can be missing: the package is one that rmjax needs."""


def open_sink(opening: Opening) -> "TensorBoard":
    """One more event file, without what the others have after the step that the run goes on from."""
    directory = opening.workdir / DIRECTORY
    cut_events(directory, opening.keep)
    return TensorBoard(directory, purge_step=opening.keep + 1)


class TensorBoard:
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
        self._last = 0  # step
        if purge_step is not None:
            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per value."""
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._last = int(step)
        self._add(self._last, summary=Summary(value=scalars))

    def sync(self) -> None:
        """Sends the event files to the disk."""
        for path in self._directory.glob(f"{EVENT_FILES}{OUR_EVENTS}"):
            files.sync(path)

    def keep(self, file: Path) -> None:
        """Adds a text that says where the file is, in the tab Text; there is no place for a file."""
        from tensorboardX.summary import text

        self._add(self._last, summary=text(file.stem, f"[{file.name}]({file.absolute().as_uri()})"))

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
