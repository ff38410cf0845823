"""Several processes that train together: who they are, how they start, agree, and end when one of them is lost.

Without a cluster there is one process and every function here returns at once. With one, each process is told or
finds out how many there are (`_place`), all meet at process 0 (`hub.py`), and from then on a failure of one ends all:
each says which it was. Where somebody else has started JAX's runtime (`jax.distributed.initialize`: Ray, a notebook),
it says who and how many they are, and whoever started it notices who is lost. What processes tell each other goes by
that runtime's key-value store.

    environment                                                    set by
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID     launch/local.sh, launch/gke, you
    SLURM_...                                                      srun with several tasks
    OMPI_...                                                       mpirun
    none: the host's own metadata                                  TPU VMs, TPUs on GKE
    RMJAX_SECRET       any text, the same for all                  the launch scripts, you
    RMJAX_JOIN_SECONDS     how long all may take to come           you; 300 by default
    RMJAX_STALL_MINUTES    after which a process that others       you; 10 by default, 0 is never. After three
                           wait for is told of                     times as many all end, with exit code 75

Without a secret, whoever reaches the port while the processes gather and knows hub.py can pass for one of them, or end
the run. JAX's own service on that port asks for none, ever: keep the port inside the cluster.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import importlib.metadata
import itertools
import json
import logging as python_logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed  # its key-value store has no public name

from rmjax.runtime import exits, hub

JOIN_SECONDS, STALL_MINUTES, SECRET = "RMJAX_JOIN_SECONDS", "RMJAX_STALL_MINUTES", "RMJAX_SECRET"
GRACE = 2.0  # seconds in which a lost process is looked for before the error that it caused elsewhere is believed
RUNTIME_SECONDS = 60  # JAX's own limit for a silent process; longer than ours, which says more
LEAVE_SECONDS = 5.0
OVER = "over"
FOR_EVER = 2**31 - 1  # milliseconds: who is lost meanwhile, the hub or whoever started the runtime notices
TIMED_OUT = re.compile(r"gloo.*(timed out|DEADLINE_EXCEEDED)|^DEADLINE_EXCEEDED", re.IGNORECASE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among the others.

    Attributes:
        address: host:port of process 0.
        count: number of processes.
        number: of this one.
        devices: numbers of the host's GPUs that are this process's; None is all.
    """

    address: str
    count: int
    number: int
    devices: list[int] | None


_link: hub.Link | None = None
_hub: hub.Hub | None = None
_failing = False
_told = threading.Event()  # that it was this process's failure which ended the run


def start() -> None:
    """Joins the other processes, if there are any; call it before anything touches a device.

    Ends the process, with a message, when the others do not come: exit code 75.

    Raises:
        ValueError: an environment that tells half of what is needed, or what is no number.
    """
    global _link, _hub
    if jax.distributed.is_initialized() or (place := _place()) is None:
        return
    seconds, standing = _number_of(JOIN_SECONDS, 300), 60 * _number_of(STALL_MINUTES, 10)
    secret = os.environ.get(SECRET, "")
    me = socket.gethostname()
    who = f"process {place.number} of {place.count} on {me}"
    try:
        if place.number == 0:
            _hub = hub.Hub(hub.listen(place.address), place.count, seconds, place.address, secret, standing)
            _hub.start()
        here = place.address if place.number else f"localhost:{place.address.rpartition(':')[2]}"
        connection = hub.connect(here, seconds + GRACE)
    except OSError as error:
        problem = "could not open its port" if place.number == 0 and _hub is None else f"waited {seconds:g} s in vain"
        _quit(
            f"{who} {problem}: {place.address} ({error}). Check that process 0 runs there, that the address is right "
            f"on every host, and that the port is free and open between them; {JOIN_SECONDS} is how long to wait",
            exits.AGAIN,
        )
    _link = hub.Link(connection, place.number, _on_end, secret)
    _link.hello(place.count, me, f"rmjax {importlib.metadata.version('rmjax')}, jax {jax.__version__}")
    _link.joined.wait()  # or `_on_end` ends this process
    _start_jax(place, here)
    _speak_softly(place.number)
    atexit.register(_at_exit)  # runs before JAX's own, which would wait for the others


def _number_of(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise ValueError(f"{name}={text}: expected a number of {name.rpartition('_')[2].lower()}, 0 or more")


def _start_jax(place: Place, address: str) -> None:
    config: Any = jax.config
    config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; see stop_agreed
    if "http_proxy" in os.environ:
        os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
    jax.distributed.initialize(
        hub.relay(address, RUNTIME_SECONDS),
        place.count,
        place.number,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=os.environ.get(
            "JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{place.address.rpartition(':')[2]}"
        ),
        initialization_timeout=RUNTIME_SECONDS,
        heartbeat_timeout_seconds=RUNTIME_SECONDS,
        shutdown_timeout_seconds=RUNTIME_SECONDS,
    )


def _place() -> Place | None:
    """This process's place; None where it is the only one."""
    told = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if told[1] in os.environ or told[2] in os.environ:
        if missing := [name for name in told if not os.environ.get(name)]:
            raise ValueError(f"of {', '.join(told)} the environment lacks {', '.join(missing)}; set all, or none")
        address, count, number = (os.environ[name] for name in told)
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise ValueError(f"{told[1]}={count}, {told[2]}={number}: expected a number of processes, and one below it")
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
            raise ValueError(f"{told[0]}={address}: expected HOST:PORT of process 0")
        found = Place(address, int(count), int(number), None)
    elif method := _cluster():
        found = _detected(method)
    else:
        return None
    return found if found.count > 1 else None


def _cluster() -> str | None:
    """JAX's name of the cluster that this process was started by, if any; asks no network."""
    several = lambda name: int(os.environ.get(name, "1")) > 1
    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in os.environ:  # a step; not the batch script itself
        return "slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "ompi"
    from jax._src import cloud_tpu_init  # no public name tells whether there are TPU chips here

    if cloud_tpu_init.running_in_cloud_tpu_vm and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        return "gketpu" if {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & set(os.environ) else "gcetpu"
    return None


def _detected(method: str) -> Place:
    """The place by JAX's own detection, which `initialize` would use: it has no public name of its own."""
    from jax._src.clusters import ClusterEnv

    seconds = int(_number_of(JOIN_SECONDS, 300))
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(given, None, None, None, method, seconds)
    address, count, number, devices = found
    if address is None or count is None or number is None:
        raise ValueError(
            f"this looks like a process of several ({method}), but JAX does not find the others; set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    if method == "slurm" and os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1":
        devices = None  # a task alone on its node has all of the node's GPUs, not only the first
    return Place(address, count, number, None if devices is None else list(devices))


def _speak_softly(number: int) -> None:
    """Process 0 speaks for all; of the others only warnings and errors are shown, with their number."""
    if number:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for good)
        handler = logging.get_absl_handler()
        handler.setFormatter(python_logging.Formatter(f"[process {number}] %(levelname)s: %(message)s"))


def _on_end(end: hub.End) -> None:
    """In the link's thread: ends this process with the reason; at once, since its main thread may wait for ever."""
    if _failing and end.number == number():
        _told.set()  # `fail` says it
        return
    if end.number < 0:
        text = end.why
    elif end.lost:
        text = (
            f"process {end.number} on {end.host} was lost: {end.why}. The same command goes on from the last checkpoint"
        )
        if end.number == number():  # it is here, but its main thread stands still: where?
            faulthandler.dump_traceback(sys.__stderr__ or 2)
    else:
        text = f"process {end.number} on {end.host} failed: {end.why}"
    _quit(text, end.code)


def _quit(text: str, code: int) -> NoReturn:
    prefix = f"[process {number()}] " if number() else "\n"
    with contextlib.suppress(OSError):
        os.write(2, f"{prefix}error: {text}\n".encode())
    if _hub is not None and _link is not None:
        _link.leave()
        _hub.join(LEAVE_SECONDS)  # or the others would only see that this process is gone
    os._exit(code)


def fail(why: str, code: int) -> None:
    """Ends all processes with this error; does nothing in a single one.

    Of several that fail, the first to say so counts, and a lost one before all: errors elsewhere follow from it.

    Args:
        why: for people.
        code: exit code of all; that processes waited too long for each other is exits.AGAIN, whatever it says.
    """
    global _failing
    why, code = explained(why, code)
    if _link is None:
        return
    time.sleep(GRACE)
    _failing = True
    _link.fail(why, code)
    _told.wait(GRACE)  # if another was first, `_on_end` says that
    _quit(why, code)


def explained(why: str, code: int) -> tuple[str, int]:
    """The error and its exit code, with what to do where processes have waited too long for each other."""
    if code != exits.FAILED or not TIMED_OUT.search(why):
        return why, code
    return (
        f"{why}\nProcesses wait this long for each other, and one was later: its host is slower or busy, or it "
        "compiled for longer. The same command goes on from the last checkpoint; if it comes again, give all as many "
        "free cores",
        exits.AGAIN,
    )


def finish() -> None:
    """The end of a run that went well: waits for all processes and lets them go."""
    global _link, _hub
    barrier("finish")
    if _meeting is not None:
        _meeting.close()
    if _link is None:
        return
    _link.leave()
    jax.distributed.shutdown()
    if _hub is not None:
        _hub.join(LEAVE_SECONDS)
    _link = _hub = None


def _at_exit() -> None:
    """A process that ends without `finish` or `fail`: a bug, or sys.exit somewhere."""
    if _link is not None:
        error = getattr(sys, "last_value", None)
        fail(f"{type(error).__name__}: {error}" if error else "it ended before the others", exits.FAILED)


def number() -> int:
    """This process's number, from 0."""
    return _link.number if _link else distributed.global_state.process_id if count() > 1 else 0


def count() -> int:
    """How many processes there are."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return number() == 0


class Meeting:
    """What processes tell each other through JAX's key-value store, which process 0 keeps."""

    def __init__(self, client: Any, number: int, count: int):
        """`client` is JAX's, connected."""
        self.client, self._number, self._count = client, number, count
        self._uses: dict[str, int] = {}
        self._stops: list[Stopping] = []

    def gather(self, name: str, value: Any) -> list[Any]:
        """See `gather`."""
        use = self._uses[name] = self._uses.get(name, 0) + 1
        key, mine = f"rmjax/{name}/{use}", lambda use: f"rmjax/{name}/{use}/{self._number}"
        self.client.key_value_set(mine(use), json.dumps(value))
        self.client.wait_at_barrier(key, FOR_EVER)
        found = dict(self.client.key_value_dir_get(key))
        if use > 1:  # all have come here, so they have read what was said the last time
            self.client.key_value_delete(mine(use - 1))
        return [json.loads(found[f"{key}/{n}"]) for n in range(self._count)]

    def stop_agreed(self, requested: bool, position: int) -> bool:
        """See `stop_agreed`."""
        if position == 1:  # of another run than the last
            self._stops.append(Stopping(self, f"stop {len(self._stops)}"))
        return self._stops[-1].agreed(requested, position)

    def close(self) -> None:
        """Ends what waits for a stop."""
        for stop in self._stops:
            stop.close()


class Stopping(threading.Thread):
    """Waits until any process of a run is asked to stop; all settle on the first position that none has come to."""

    def __init__(self, meeting: Meeting, key: str):
        """`key` is of the run."""
        super().__init__(name=key, daemon=True)
        self._meeting, self._key, self._changed = meeting, key, threading.Condition()
        self._frozen = self._asked = False
        self._position, self._stop_at = 0, math.inf
        self.start()
        atexit.register(self.close)  # before JAX's own: a thread that wakes later than Python aborts the process

    def close(self) -> None:
        """Ends the thread, as the run is over."""
        if self.is_alive():
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                self._meeting.client.key_value_set(f"rmjax/{self._key}", OVER)
            self.join(LEAVE_SECONDS)

    def agreed(self, requested: bool, position: int) -> bool:
        """See `stop_agreed`. While all tell each other their positions, none may come to another."""
        with self._changed:
            self._changed.wait_for(lambda: not self._frozen)
            self._position = position
        if requested and not self._asked:
            self._asked = True
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                self._meeting.client.key_value_set(f"rmjax/{self._key}", "")
        return position >= self._stop_at

    def run(self) -> None:
        """Waits, in its own thread, until somebody is asked, the run is over, or the runtime shuts down."""
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


def _met() -> Meeting:
    """The meeting of these processes, of which there are several."""
    global _meeting
    if _meeting is None or _meeting.client is not distributed.global_state.client:
        _meeting = Meeting(distributed.global_state.client, number(), count())
    return _meeting


def gather(name: str, value: Any) -> list[Any]:
    """What every process has for `value`, in their order; waits for all.

    Args:
        name: of the occasion; all processes must come to the same ones, those of one name in the same order and from
            one thread.
        value: plain JSON, and small.
    """
    return [value] if count() == 1 else _met().gather(name, value)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    gather(name, None)


def agree(name: str, value: Any) -> Any:
    """Process 0's value on all; waits for it."""
    return gather(name, value if is_first() else None)[0]


def require_same(name: str, value: Any, what: str) -> None:
    """Makes sure that all processes have the same.

    Raises:
        ValueError: one has another value; `what` says of what.
    """
    values = gather(name, value)
    if others := [n for n, x in enumerate(values) if x != values[0]]:
        hosts = gather(f"{name}: hosts", socket.gethostname())
        raise ValueError(
            f"process {others[0]} on {hosts[others[0]]} has other {what} than process 0 on {hosts[0]}; "
            "start all with the same command, on the same files"
        )


@contextlib.contextmanager
def first_then_others(name: str) -> Iterator[None]:
    """Process 0 goes through the block before the others, who find on a shared file system what it made."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)


def connect(mesh: jax.sharding.Mesh) -> None:
    """Connects the processes of a mesh of CPUs for whatever they will compute together; all call it alike.

    Gloo, by which CPUs reduce, connects a group of devices when a program first needs it, and gives up where one comes
    30 s later than the others. In the first program of a run that is who compiles while the others read theirs from
    the cache, and JAX's cache on CPUs serves process 0 only. Once connected, they wait for as long as it takes.
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


def stop_agreed(requested: bool, position: int, step: int = 0) -> bool:
    """Whether to stop at this position, where any process was asked to: the same answer on all for the same one.

    Costs nothing while nobody asks. The position is a later one than that of the request: the first that no process
    has come to yet. Where a process stays behind, the others are told of it, see `hub.Hub`.

    Args:
        requested: whether this process was asked to stop.
        position: how often this was called in this run, from 1; every process calls it as often.
        step: of training, for people.
    """
    if count() == 1:
        return requested
    if _link:
        _link.at = position, step
    return _met().stop_agreed(requested, position)
