"""The progress line of long work."""

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO


class Progress:
    """The progress line: step, time left, and whatever else there is to say of a step.

    Rewritten in place on a terminal, where what does not fit is left out from the end; elsewhere a new line every
    `interval` seconds, and the last.
    """

    WINDOW = 100  # steps that the rate is measured over

    def __init__(
        self,
        total: int,
        *,
        unit: str = "pairs",
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Up to step `total`; `unit` is what `step` counts per second."""
        self._total, self._unit, self._interval, self._clock = total, unit, interval, clock
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._begun, self._printed, self._line = clock(), -math.inf, ""
        self._groups = 0
        # (time, step, groups so far) after each step. The first entry is the end of the first step, so that
        # no rate has compiling in it.
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=self.WINDOW + 1)

    def step(self, step: int, values: Mapping[str, float], groups: int) -> None:
        """Shows that `step` is done, which took in `groups` groups; the rate and the time left are measured here."""
        self._groups += groups
        self._marks.append((self._clock(), step, self._groups))
        (first, first_step, before), (last, last_step, after) = self._marks[0], self._marks[-1]
        parts = [f"{name} {value:.4g}" for name, value in values.items()]
        left = None
        if last > first:
            parts.append(f"{(after - before) / (last - first):.1f} {self._unit}/s")
            left = (self._total - step) * (last - first) / (last_step - first_step)
        self.show(step, parts, left)

    def show(self, step: int, parts: Sequence[str], seconds_left: float | None = None) -> None:
        """Shows that `step` is done, the time left (after the last step the time it took), and `parts`."""
        now = self._clock()
        times = [f"{clock_time(now - self._begun)} elapsed"] if step == self._total else []
        if step < self._total and seconds_left is not None:
            times = [f"{clock_time(seconds_left)} left"]
        words = [f"step {step}/{self._total}", *times, *parts]
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line would stay on screen
            while len("  ".join(words)) > width and len(words) > 1:
                words.pop()
            self._line = "  ".join(words)[:width]
            self._stream.write(f"\r{self._line}\x1b[K")
            self._stream.flush()
            return
        self._line = "  ".join(words)
        if now - self._printed >= self._interval or step == self._total:
            self._print(self._line)
            self._printed, self._line = now, ""

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


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds: 3725.4 is '1:02:05', 65 is '1:05'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
