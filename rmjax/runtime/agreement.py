"""What the processes of a run tell each other, through the key-value store of JAX's runtime, which process 0 keeps.

A single process agrees with itself: every function here returns at once.
"""

import atexit
import contextlib
import itertools
import json
import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # its key-value store has no public name

from rmjax.runtime import processes
from rmjax.runtime.processes import FOR_EVER, LEAVE_SECONDS

OVER = "over"


class Meeting:
    """The processes that share a key-value store, by JAX's connected client. See the functions of these names below."""

    def __init__(self, client: Any, number: int, count: int):
        self.client, self._number, self._count = client, number, count
        self._uses: dict[str, int] = {}
        self._stopping: Stopping | None = None
        self._runs = itertools.count()

    def gather(self, name: str, value: Any) -> list[Any]:
        use = self._uses[name] = self._uses.get(name, 0) + 1
        key, mine = f"rmjax/{name}/{use}", lambda use: f"rmjax/{name}/{use}/{self._number}"
        self.client.key_value_set(mine(use), json.dumps(value))
        self.client.wait_at_barrier(key, FOR_EVER)
        values = dict(self.client.key_value_dir_get(key))
        if use > 1:  # all have come here, so they have read the values of the last time
            self.client.key_value_delete(mine(use - 1))
        return [json.loads(values[f"{key}/{n}"]) for n in range(self._count)]

    def stop_agreed(self, requested: bool, position: int) -> bool:
        if self._stopping is None or position == 1:  # of another run than the last
            self.close()
            self._stopping = Stopping(self, f"stop {next(self._runs)}")
        return self._stopping.agreed(requested, position)

    def close(self) -> None:
        if self._stopping:
            self._stopping.close()


class Stopping(threading.Thread):
    """Waits for a request to stop, then lets all settle on the first position that no process has reached."""

    def __init__(self, meeting: Meeting, key: str):
        super().__init__(name=key, daemon=True)
        self._meeting, self._key, self._changed = meeting, key, threading.Condition()
        self._frozen = self._asked = False
        self._position, self._stop_at = 0, math.inf
        self.start()
        atexit.register(self.close)  # before JAX's own: a thread that wakes later than Python aborts the process

    def close(self) -> None:
        if self.is_alive():
            self._say(OVER)
            self.join(LEAVE_SECONDS)

    def agreed(self, requested: bool, position: int) -> bool:
        """While all exchange their positions, none may move on."""
        with self._changed:
            self._changed.wait_for(lambda: not self._frozen)
            self._position = position
        if requested and not self._asked:
            self._asked = True
            self._say("stop")
        return position >= self._stop_at

    def _say(self, what: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
            self._meeting.client.key_value_set(f"rmjax/{self._key}", what)

    def run(self) -> None:
        """Waits, in its own thread, for a request, the end of the run, or the runtime's shutdown."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._meeting.client.blocking_key_value_get(f"rmjax/{self._key}", FOR_EVER) == OVER:
                return
            with self._changed:
                self._frozen = True
            self._stop_at = max(self._meeting.gather(f"{self._key}: positions", self._position)) + 1
            with self._changed:
                self._frozen = False
                self._changed.notify_all()


_meeting: Meeting | None = None


def _current_meeting() -> Meeting:
    global _meeting
    if _meeting is None or _meeting.client is not distributed.global_state.client:
        _meeting = Meeting(distributed.global_state.client, processes.number(), processes.count())
    return _meeting


def gather(name: str, value: Any) -> list[Any]:
    """The values of all processes (plain JSON, and small), in their order; waits for all.

    All processes must come to the same names, those of one name in the same order and from one thread.
    """
    return [value] if processes.count() == 1 else _current_meeting().gather(name, value)


def barrier(name: str) -> None:
    gather(name, None)


def agree(name: str, value: Any) -> Any:
    """Process 0's value on all; waits for it."""
    return gather(name, value if processes.is_first() else None)[0]


def require_same(name: str, value: Any, what: str) -> None:
    """Raises ValueError where one process has another value; `what` names it."""
    values = gather(name, value)
    if others := [n for n, x in enumerate(values) if x != values[0]]:
        hosts = gather(f"{name}: hosts", socket.gethostname())
        raise ValueError(
            f"process {others[0]} on {hosts[others[0]]} has other {what} than process 0 on {hosts[0]}; "
            "start all with the same command, on the same files"
        )


@contextlib.contextmanager
def first_then_others(name: str) -> Iterator[None]:
    """Process 0 runs the block before the others, who find its files on a shared file system."""
    if not processes.is_first():
        barrier(name)
    yield
    if processes.is_first():
        barrier(name)


def stop_agreed(requested: bool, position: int, step: int = 0) -> bool:
    """Whether to stop at this position because some process was asked to (`requested`): all get the same answer.

    Costs nothing while nobody asks. `position` is the number of this call in this run, from 1. The stop comes at the
    first position that no process has reached. Where a process stays behind, the others hear of it, see `hub.Hub`.
    """
    if processes.count() == 1:
        return requested
    processes.moved(position, step)
    return _current_meeting().stop_agreed(requested, position)


def connect_mesh(mesh: jax.sharding.Mesh) -> None:
    """Connects the processes of a mesh of CPUs for all joint computations; all call it alike.

    Gloo, by which CPUs reduce, connects a group of devices when a program first needs it, and gives up where one comes
    30 s later than the others. In the first program of a run one may compile while the others read from the cache:
    JAX's cache on CPUs serves process 0 only. Once connected, they wait for as long as it takes.
    """
    devices = mesh.devices.flat
    if devices[0].platform != "cpu" or len({device.process_index for device in devices}) == 1:
        return
    groups = [axes for n in range(len(mesh.axis_names)) for axes in itertools.combinations(mesh.axis_names, n + 1)]
    sums = lambda: [jax.lax.psum(jax.lax.axis_index(mesh.axis_names), axes) for axes in groups]
    spec = jax.sharding.PartitionSpec()
    compiled = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(), out_specs=spec, check_vma=False)).lower().compile()
    barrier("connect")
    jax.block_until_ready(compiled())
