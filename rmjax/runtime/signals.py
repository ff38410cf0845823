"""How a run ends early without loss, by SIGTERM (a preemption, a time limit) or Ctrl-C; and that it is alone.

A run's files survive SIGKILL at any moment. So where there is nothing to save, while data is read and tokenized, the
step is compiled, weights are read or written, a signal ends the process at once; only the training loop is asked to
save first.
"""

import contextlib
import fcntl
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from absl import logging

from rmjax.runtime import agreement, exits, files, processes

CODES: dict[int, int] = {signal.SIGTERM: exits.AGAIN, signal.SIGINT: exits.INTERRUPTED}


class Stopped(Exception):
    """The training loop has stopped on request, and step `saved` is saved; 0 is none."""

    def __init__(self, saved: int):
        done = f"step {saved} is saved; the same command goes on from there"
        super().__init__(done if saved else "nothing is trained yet; the same command starts again")


class Stop:
    """Whether the run was asked to stop: `signal` is the first signal that came, 0 before."""

    def __init__(self, kept: str = "from the last checkpoint, if there is any"):
        """`kept` says how the same command goes on where a signal ends the process at once."""
        self.signal = 0
        self._kept = kept
        self._loop_looks = False
        self._questions = self._step = 0
        self._agreed = False

    def agreed(self, step: int | None = None) -> bool:
        """Whether to stop now, before `step`; every process of a run asks equally often and gets equal answers."""
        self._questions += 1
        self._step = self._step if step is None else step
        self._agreed = self._agreed or agreement.stop_agreed(bool(self.signal), self._questions, self._step)
        return self._agreed

    @contextlib.contextmanager
    def defer_signals(self) -> Iterator[None]:
        """While the training loop runs, a signal waits until the loop asks whether to stop."""
        self._loop_looks = True
        try:
            yield
        finally:
            self._loop_looks = False
        if self.signal:  # it came after the loop had asked for the last time
            self._end(self.signal)

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Takes over SIGTERM and Ctrl-C, in the main thread; ends the process by exits.py when the loop has stopped.

        A thread listens, since the main one hears of a signal only after its present computation, such as compiling.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        old_handlers = {number: signal.signal(number, lambda *_: None) for number in CODES}
        listener = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        listener.start()
        try:
            yield self
        except Stopped as stopped:
            if processes.is_first():
                print(f"\n{self._by()}{stopped}", file=sys.stderr, flush=True)
            processes.finish()
            sys.exit(CODES.get(self.signal, exits.AGAIN))
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_writer)
            os.close(writer)
            listener.join()
            os.close(reader)

    def _listen(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in CODES:
                self._take(number[0])

    def _take(self, number: int) -> None:
        """A second Ctrl-C wants out. A second SIGTERM changes nothing: the save it would cut off is under way."""
        impatient = number == self.signal == signal.SIGINT
        self.signal = self.signal or number
        if impatient or not self._loop_looks:
            self._end(number)

    def _end(self, number: int) -> None:
        """Ends the process as it is: a normal exit would wait for compilations and write what a next start does."""
        os.write(2, f"\n{self._by()}the same command goes on {self._kept}\n".encode())
        os._exit(CODES[number])

    def _by(self) -> str:
        return f"stopped by {signal.Signals(self.signal).name}: " if self.signal else "stopped by another process: "


@contextlib.contextmanager
def alone(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """Keeps other runs out of a workdir, by a lock on WORKDIR/lock that the kernel releases however the process ends.

    Makes the workdir; deletes it again if it stays empty. ValueError where another run is there: names its host and
    process, and `flag`.
    """
    if not processes.is_first():
        yield
        return
    new = files.missing_directories(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    file = _locked(workdir / "lock", flag)
    try:
        yield
    finally:
        if file is not None:
            (workdir / "lock").unlink(missing_ok=True)
            file.close()
        with contextlib.suppress(OSError):  # something is in it now
            for path in new:
                path.rmdir()


def _locked(path: Path, flag: str) -> TextIO | None:
    """The locked file; None where the file system knows no locks."""
    while True:
        try:  # never through a link: what it leads to is not a lock
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            file = os.fdopen(handle, "a+", encoding="utf-8")
        except OSError as error:
            if not os.path.lexists(path):
                raise
            raise ValueError(f"{path} is no lock of rmjax ({error.strerror}); move it away") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "not known"
            file.close()
            raise ValueError(
                f"another run is in {path.parent} ({holder}); wait for it or stop it, or choose another {flag}"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s); make sure that no second run is started there", path, error)
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:  # else its last holder has just deleted it
                _refuse_other_file(path, file, flag)
                file.truncate(0)
                file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
                file.flush()
                return file
        file.close()


def _refuse_other_file(path: Path, file: TextIO, flag: str) -> None:
    """Raises ValueError where a file is no lock, which is empty or names a holder, but somebody's file."""
    file.seek(0)
    try:
        ours = re.fullmatch(r"(host .*, process \d+\n)?", file.read(1000)) is not None
    except UnicodeDecodeError:
        ours = False
    if not ours:
        file.close()
        raise ValueError(f"{path} is no lock of rmjax; move it away, or choose another {flag}")
