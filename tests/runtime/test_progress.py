"""The progress line of long work, on terminals and in log files."""

import io

import pytest
from fake_terminal import Clock, Terminal, screen

from rmjax.runtime.progress import Progress, clock_time


def test_progress_rate_and_time_left_leave_compiling_out():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, stream=stream, clock=clock, interval=0)
    clock.now += 60  # compiles
    progress.step(1, {"loss": 0.69314}, count=8)
    for step in range(2, 12):
        clock.now += 0.5
        progress.step(step, {"loss": 0.5, "accuracy": 0.75}, count=8)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/1000  loss 0.6931"
    assert lines[-1] == "step 11/1000  8:14 left  loss 0.5  accuracy 0.75  16.0 pairs/s"


def test_progress_follows_a_rate_that_changes():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(10_000, stream=stream, clock=clock, unit="rows", interval=0)
    for step in range(1, 601):
        clock.now += 1.0 if step <= 300 else 0.25
        progress.step(step, count=4)
    assert stream.getvalue().splitlines()[-1] == "step 600/10,000  39:10 left  16.0 rows/s"


def test_progress_in_a_log_prints_at_intervals_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(50, stream=stream, clock=clock, interval=10.0)
    for step in range(1, 51):
        clock.now += 1.0
        progress.step(step, count=1)
        if step == 5:
            progress.note("step 5: saved")
    progress.close()
    starts = [line.split("/")[0] for line in stream.getvalue().splitlines()]
    assert starts == ["step 1", "step 5: saved", "step 11", "step 21", "step 31", "step 41", "step 50"]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_progress_that_stops_early_prints_its_last_line():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(50, stream=stream, clock=clock)
    for step in (1, 2, 3):
        progress.step(step, count=1)
    progress.close()
    progress.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/50", "3/50"]


def test_progress_on_a_terminal_rewrites_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    clock, stream = Clock(), Terminal()
    progress = Progress(3, stream=stream, clock=clock)
    progress.step(1, {"loss": 2.0, "a_name": 1.0, "another_that_is_long": 1.0, "b": 1.0}, count=1)
    assert screen(stream.getvalue())[-1] == "step 1/3  loss 2  a_name 1"  # what does not fit whole is left out
    progress.step(2, {"loss": 2.0}, count=1)
    progress.note("saved")
    clock.now += 75.0
    progress.step(3, {"loss": 1.5}, count=1)
    progress.close()
    assert screen(stream.getvalue()) == ["saved", "step 3/3  1:15 elapsed  loss 1.5", ""]


@pytest.mark.parametrize("columns", [1, 5, 9])
def test_progress_on_a_terminal_too_narrow_for_a_step(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    Progress(3, stream=stream, clock=Clock()).step(1, {"loss": 2.0}, count=1)
    assert screen(stream.getvalue()) == ["step 1/3"[: columns - 1]]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3725.4, "1:02:05"), (360000, "100:00:00")],
)
def test_clock_time(seconds, words):
    assert clock_time(seconds) == words


def test_progress_of_rows_that_are_counted_only_if_they_take_long():
    clock, stream, counted = Clock(), io.StringIO(), []
    total = lambda: counted.append(clock.now) or 80_000
    progress = Progress(total, "a.jsonl:", unit="rows", stream=stream, clock=clock, interval=10.0)
    for done in range(1000, 13_000, 1000):
        clock.now += 1.0
        progress.step(done)
    progress.close()
    assert counted == [110.0]
    assert stream.getvalue().splitlines() == [
        "a.jsonl: 10,000/80,000  1:10 left  1,000 rows/s",
        "a.jsonl: 12,000/80,000  1:08 left  1,000 rows/s",
    ]
    quick = Progress(lambda: pytest.fail("it was counted"), "a.jsonl:", stream=(stream := io.StringIO()))
    quick.step(1000)
    quick.close()
    assert stream.getvalue() == ""


def test_progress_without_a_total():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(lambda: None, "a.json:", unit="rows", stream=stream, clock=clock, interval=0)
    for done in (500, 1000):
        clock.now += 100.0
        progress.step(done)
    progress.close()
    assert stream.getvalue().splitlines() == ["a.json: 500", "a.json: 1000  5.0 rows/s"]


def test_progress_that_stands_still_has_no_rate():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(7, stream=stream, clock=clock, interval=0)
    for _ in range(2):
        clock.now += 1.0
        progress.step(0)
    assert stream.getvalue().splitlines() == ["step 0/7", "step 0/7"]
