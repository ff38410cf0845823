"""The progress line of long work.

Not tqdm's, of which only the rewriting in place would be left: it writes carriage returns into log files, cuts a long
line in the middle of a number, and counts compiling in its rates.
"""

import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

SECONDS = 10.0  # between two lines in a log file


class Progress:
    """The progress line: how much is done, the time left, and other values.

        step 1200/4000  46:40 left  loss 0.5123  41.2 pairs/s
        pairs.jsonl: 12,000/80,000  0:17 left  4,100 rows/s

    Rewritten in place on a terminal, where what does not fit is left out from the end; elsewhere a new line every
    `interval` seconds, and the last.
    """

    WINDOW = 100  # steps that the rate is measured over

    def __init__(
        self,
        total: int | Callable[[], int | None],
        label: str = "step",
        *,
        unit: str = "pairs",
        interval: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Shows nothing yet. `interval` is in seconds, SECONDS by default.

        `total` may be a function that counts it, None if it cannot. As counting can take a while, it is called only
        after `interval`, and nothing is shown before.
        """
        self._total = None if callable(total) else total
        self._ask = total if callable(total) else None
        self._label, self._unit, self._clock = label, unit, clock
        self._interval = SECONDS if interval is None else interval
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._begun, self._printed, self._line, self._count = clock(), -math.inf, "", 0
        # (time, done, count so far) after each step. The first entry is the end of the first step, so that no rate has
        # compiling in it.
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=self.WINDOW + 1)

    def step(self, done: int, values: Mapping[str, float] | None = None, count: int | None = None) -> None:
        """Shows `done` of the total, `values`, and the rate of `count`, units since the last step (or of `done`)."""
        self._count = done if count is None else self._count + count
        self._marks.append((self._clock(), done, self._count))
        if self._ask:
            if self._clock() - self._begun < self._interval:
                return
            self._total, self._ask = self._ask(), None
        (first, first_done, before), (last, last_done, after) = self._marks[0], self._marks[-1]
        parts = [f"{name} {value:.4g}" for name, value in (values or {}).items()]
        left = None
        if last > first and last_done > first_done:
            rate = (after - before) / (last - first)
            parts.append(f"{rate:,.{0 if rate >= 100 else 1}f} {self._unit}/s")
            left = self._total and (self._total - done) * (last - first) / (last_done - first_done)
        self.show(done, parts, left)

    def show(self, done: int, parts: Sequence[str] = (), seconds_left: float | None = None) -> None:
        """Shows how much is done, the time left (at the end the time it took), and `parts`."""
        now, total = self._clock(), self._total
        comma = "," if max(done, total or 0) >= 10_000 else ""
        words = [f"{self._label} {done:{comma}}" + (f"/{total:{comma}}" if total else ""), *parts]
        if done == total:
            words.insert(1, f"{clock_time(now - self._begun)} elapsed")
        elif seconds_left is not None:
            words.insert(1, f"{clock_time(seconds_left)} left")
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line would stay on screen
            while len("  ".join(words)) > width and len(words) > 1:
                words.pop()
            self._line = "  ".join(words)[:width]
            self._stream.write(f"\r{self._line}\x1b[K")
            self._stream.flush()
            return
        self._line = "  ".join(words)
        if now - self._printed >= self._interval or done == total:
            self._print(self._line)
            self._printed, self._line = now, ""

    def note(self, text: str) -> None:
        """Prints a line of its own and leaves the progress line below it."""
        self._print(f"\r{text}\x1b[K" if self._in_place else text)
        if self._in_place:
            self._stream.write(self._line)
            self._stream.flush()

    def close(self) -> None:
        """Ends the progress line; prints the last one if it was not shown."""
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
