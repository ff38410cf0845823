"""A terminal and a clock that tests look at and set."""

import io


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(written):
    """The lines that a terminal shows, by its rules for carriage return and erase to the end of the line."""
    lines = []
    for line in written.split("\n"):
        cells = ""
        for part in line.split("\r"):
            text, erase, rest = part.partition("\x1b[K")
            cells = (text if erase else text + cells[len(text) :]) + rest
        lines.append(cells)
    return lines
