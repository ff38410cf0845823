"""Watching a run: how long its steps take, how much is done in that time and what it waits for; and profiles.

What is measured here differs from run to run, so it goes to TensorBoard, W&B and the terminal, not to metrics.jsonl.
All times are of a monotonic clock. Steps are numbered from 1, as on the progress line.

A step lasts from the end of the one before to its own, as the devices end them: a thread waits for that, since the
loop may be waiting for data just then. Evaluations, saves and the first step count in nothing but the time left.
"""

import contextlib
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax.batches.groups import Groups
from rmjax.batches.prepare import Split
from rmjax.hardware import flops
from rmjax.inference import parameters
from rmjax.inference.parameters import AbstractModel
from rmjax.runtime import processes
from rmjax.runtime.progress import Progress

WINDOW = 100  # steps that medians, rates and shares are taken over
SLOW, LEAST = 3.0, 1.0  # a slow step takes this many times the usual time, and at least this many seconds
ENOUGH = 5  # steps that tell what is usual
PAUSE = 60.0  # seconds between two warnings of slow steps
WAITING = 0.05  # share of the time spent waiting for data from which on the progress line has it

# Rewards of Bradley-Terry are log-odds, so nothing needs ones this large. From here on neighbouring bfloat16 numbers
# are 1 apart: a server in bfloat16 no longer tells apart two responses of which one is preferred in 73 % of the cases.
LARGE_REWARD = 128.0


class Watch:
    """What the training loop feeds; it prints the progress line and warnings. (Only the first process is heard.)"""

    def __init__(
        self,
        work: Mapping[str, np.ndarray],
        progress: Progress,
        *,
        shown: Sequence[str] = (),
        devices: Sequence[Any] = (),
        peak: float | None = None,
        large_reward: float = math.inf,
        profile: "Profile | None" = None,
        first: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """What the run's steps are made of, and where it runs.

        Args:
            peak: FLOP/s of all devices of the run; None where it is not known.
            first: whether this is the process that speaks for all; another one warns where it is its data that is late.
        """
        self.progress = progress
        self._work, self._shown, self._devices, self._peak = work, shown, devices, peak
        self._large_reward, self._profile, self._first, self._clock = large_reward, profile, first, clock
        self._waits: dict[int, tuple[float, float]] = {}  # when a step's batch was asked for, and when it came
        self._ends: dict[int, Future[float]] = {}
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)  # number, seconds, those without data
        self._last, self._fresh = clock(), True  # when the last step or pause ended; whether it was a pause
        self._counts = False  # whether the next step does; the first one compiles what is left, and fills caches
        self._paused, self._done = 0.0, 0
        self._warned, self._unsaid = -math.inf, 0

    @classmethod
    def open(
        cls,
        config: ConfigDict,
        workdir: Path,
        work: Mapping[str, np.ndarray],
        shown: Sequence[str],
        mesh: jax.sharding.Mesh,
    ) -> "Watch":
        """The watch of a run, as its config says."""
        steps = config_lib.profile_steps(config.profile.steps)
        peak = flops.peak(mesh.devices.flat[0].device_kind)
        first = processes.is_first()
        total = len(next(iter(work.values())))
        progress = Progress(total)
        return cls(
            work,
            progress,
            shown=shown,
            devices=mesh.local_devices,
            peak=peak and peak * mesh.size,
            large_reward=LARGE_REWARD if config.objective.name == "bradley_terry" else math.inf,
            profile=Profile(workdir / "profile", *steps, total, progress.note) if steps and first else None,
            first=first,
        )

    def batches(self, batches: Iterable[Any], start: int) -> Iterator[Any]:
        """The same batches, from that of step `start` + 1 on; notes how long each was waited for."""
        source, number = iter(batches), start
        while True:
            number, asked = number + 1, self._clock()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waits[number] = asked, self._clock()
            yield batch

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The start of a step: names it in a profile, which begins here if it is to."""
        if self._profile:
            self._profile.before(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def follow(self, number: int, sums: Any) -> None:
        """Notes when a step that was started ends, which is when its sums are there."""
        ends: Future[float] = Future()

        def wait() -> None:
            with contextlib.suppress(Exception):  # the loop meets it too
                jax.block_until_ready(sums)
            ends.set_result(self._clock())

        self._ends[number] = ends
        threading.Thread(target=wait, daemon=True).start()

    def done(self, number: int, values: Mapping[str, float]) -> None:
        """Takes in a step whose metrics are on the host; shows it, and warns of what is not as it should be."""
        end = self._ends.pop(number).result()
        asked, got = self._waits.pop(number, (self._last, self._last))
        seconds = end - self._last
        waited = min(max(got - max(asked, self._last), 0.0), seconds)
        if self._counts and not self._fresh:
            self._warn_if_slow(number, seconds, waited)
        if self._counts:
            self._steps.append((number, seconds, waited))
        self._last, self._fresh, self._counts, self._done = max(end, self._last), False, True, self._done + 1
        reward = max((values.get(f"reward_{which}", 0.0) for which in ("min", "max")), key=abs)
        if abs(reward) > self._large_reward:
            self._large_reward = math.inf  # once is enough
            self.progress.note(
                f"warning: step {number} has a reward of {reward:.0f}; from {LARGE_REWARD:.0f} on bfloat16 rounds "
                "log-odds to whole numbers. config.objective.center or barrier keeps rewards small, as does a lower "
                "config.optim.learning_rate"
            )
        self.progress.show(number, self._parts(values), self._seconds_left(number))
        if self._profile and number == self._profile.last:
            self._profile.close()
            self._last, self._counts = self._clock(), False  # the next one was under way meanwhile

    def resume(self) -> None:
        """What was done since the last step was no training: it counts in no rate."""
        now = self._clock()
        self._paused += now - self._last
        self._last, self._fresh = now, True

    def scalars(self) -> dict[str, float]:
        """Times, rates and memory over the last steps, see docs/watching.md; what is not known is left out."""
        values = {}
        numbers, seconds, waited = np.array(self._steps).reshape(-1, 3).T
        if total := seconds.sum():
            rates = {name: x[numbers.astype(int) - 1].sum() / total for name, x in self._work.items()}
            useful = rates.pop("useful_flops", None)
            values = {"step_seconds": np.median(seconds), "steps_per_second": len(seconds) / total}
            values |= {f"{name}_per_second": rate for name, rate in rates.items()}
            values |= {"useful_mfu": useful / self._peak} if self._peak and useful is not None else {}
            values["waiting_for_data"] = waited.sum() / total
        values |= {f"memory_{name}": held for name, held in device_memory(self._devices).items()}
        return {f"timing/{name}": float(value) for name, value in values.items()}

    def close(self) -> None:
        """Ends a profile that is under way, and the progress line."""
        if self._profile:
            self._profile.close()
        self.progress.close()

    def _parts(self, values: Mapping[str, float]) -> list[str]:
        """The progress line but for step and time, what matters most first."""
        now = {name.removeprefix("timing/"): value for name, value in self.scalars().items()}
        unit = next(iter(self._work))
        parts = [f"{name} {values[name]:.4g}" for name in self._shown if name in values]
        if f"{unit}_per_second" in now:
            parts.append(f"{now[f'{unit}_per_second']:.1f} {unit}/s")
        if "useful_mfu" in now:
            parts.append(f"MFU {now['useful_mfu']:.0%}")
        if now.get("waiting_for_data", 0.0) >= WAITING:
            parts.append(f"waiting for data {now['waiting_for_data']:.0%}")
        if "memory_peak_gib" in now:
            parts.append(f"{now['memory_peak_gib']:.1f} GiB")
        names = {"grad_norm": "grad", "learning_rate": "lr"}
        return parts + [f"{short} {values[name]:.3g}" for name, short in names.items() if name in values]

    def _seconds_left(self, number: int) -> float | None:
        """Until the last step, with evaluations and saves as long and as often as so far."""
        if not self._steps:
            return None
        seconds = [seconds for _, seconds, _ in self._steps]
        each = sum(seconds) / len(seconds) + self._paused / self._done
        return each * (len(next(iter(self._work.values()))) - number)

    def _warn_if_slow(self, number: int, seconds: float, waited: float) -> None:
        if len(self._steps) < ENOUGH:
            return
        usual = statistics.median(seconds for _, seconds, _ in self._steps)
        if seconds <= max(SLOW * usual, LEAST) or not (self._first or waited > seconds / 2):
            return
        if self._clock() - self._warned < PAUSE:
            self._unsaid += 1
            return
        others = f"; so did {self._unsaid} more since the last warning" if self._unsaid else ""
        self._warned, self._unsaid = self._clock(), 0
        name = "tokens" if "tokens" in self._work else next(iter(self._work))
        text = (
            f"step {number} took {seconds:.3g} s (usually {usual:.2g} s), {waited:.2g} s of it waiting for data; "
            f"it had {self._work[name][number - 1]:,.0f} {name}{others}"
        )
        if self._first:
            self.progress.note(f"warning: {text}")
        else:
            logging.warning("%s", text)


class Profile:
    """A trace of steps `first` to `last` of what this process and its devices do, for TensorBoard and Perfetto.

    One process is enough: all run the same program, and one that is late shows as a long wait in the others.
    """

    def __init__(self, directory: Path, first: int, last: int, total: int, note: Callable[[str], None]):
        self.last = last
        self._directory, self._first, self._note, self._running = directory, first, note, False
        if first > total:
            note(f"warning: config.profile.steps={first},{last}, but the run has {total} steps: there will be no trace")

    def before(self, number: int) -> None:
        """Called when a step is about to start."""
        if self._running or not self._first <= number <= self.last:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would drown the rest, and slow it down
        jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
        self._running = True

    def close(self) -> None:
        """Writes what was traced, if anything; a failure is no reason to stop a run."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:
            self._note(f"warning: the profile could not be written: {error}")
            return
        self._note(
            f"profile in {self._directory}: `tensorboard --logdir={self._directory}` (pip install xprof tensorboard), "
            "or open its perfetto_trace.json.gz at https://ui.perfetto.dev"
        )


def work_of_steps(split: Split, model: AbstractModel) -> dict[str, np.ndarray]:
    """What each step of a plan holds and costs, in the terms of `rmjax.benchmark`.

    Returns:
        float64 [steps] each: `pairs` (`groups`, where some have not two responses); `tokens` of their trees;
        `unshared_tokens`, of all conversations, each whole; `useful_flops`, see flops.py.
    """
    groups, plan = split.groups, split.plan
    params = parameters.model_params(model.plain.shapes)
    lengths, begin = conversation_lengths(groups)
    of_group = {
        "pairs" if (groups.responses == 2).all() else "groups": np.ones(len(groups)),
        "tokens": groups.lengths,
        "unshared_tokens": groups.unshared,
        "useful_flops": np.add.reduceat(
            flops.useful(model.config, params, lengths[:, None], model.flops_each), begin[:-1]
        ),
    }
    starts = plan.row_start[plan.step_start[:-1]]
    return {name: np.add.reduceat(x[plan.groups].astype(np.float64), starts) for name, x in of_group.items()}


def conversation_lengths(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each conversation of all groups end to end, int64, and int64 [n + 1] where each group's begin.

    A conversation ends where a node of the tree does that has no children.
    """
    runs, begin = groups.column("runs")  # (start, position, visible_until) of each
    start, position, until = runs.reshape(-1, 3).astype(np.int64).T
    begin = begin // 3
    stop = np.append(start[1:], 0)
    stop[begin[1:] - 1] = groups.lengths
    leaf = until == stop
    return (position + stop - start)[leaf], np.append(0, np.cumsum(leaf))[begin]


def device_memory(devices: Sequence[Any]) -> dict[str, float]:
    """GiB in use now and at most so far, of the device that has most; empty where devices do not tell, as CPUs."""
    stats = [device.memory_stats() or {} for device in devices if device.platform != "cpu"]
    names = {"gib": "bytes_in_use", "peak_gib": "peak_bytes_in_use"}
    return {
        short: max(s[name] for s in stats) / 2**30
        for short, name in names.items()
        if stats and all(name in s for s in stats)
    }


def reward_drift(values: Mapping[str, float], first: Mapping[str, float]) -> dict[str, float]:
    """How far mean rewards have moved since the evaluation before training; a preference loss leaves them free.

    Args:
        first: `reward_mean` by name, as in `values`, of the first one.

    Returns:
        "validation/reward_drift" for "validation/reward_mean", and so on.
    """
    return {
        name.replace("reward_mean", "reward_drift"): value - first[name]
        for name, value in values.items()
        if name in first
    }
