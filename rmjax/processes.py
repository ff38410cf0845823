"""Several processes that train together: who they are, how they start, agree, and end when one of them is lost.

Without a cluster there is one process and every function here returns at once. With one, each process is told or
finds out how many there are (`_place`), all meet at process 0 (`hub.py`), and from then on a failure of one ends all:
each says which it was.

    environment                                                    set by
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID     launch/local.sh, launch/gke, you
    SLURM_...                                                      srun with several tasks
    OMPI_...                                                       mpirun
    none: the host's own metadata                                  TPU VMs, TPUs on GKE
    RMJAX_JOIN_SECONDS                                             you: how long all may take to come, 300 by default
"""

import atexit
import contextlib
import dataclasses
import importlib.metadata
import logging as python_logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from absl import logging

from rmjax import exits, hub

JOIN_SECONDS = "RMJAX_JOIN_SECONDS"
GRACE = 2.0  # seconds in which a lost process is looked for before the error that it caused elsewhere is believed
RUNTIME_SECONDS = 60  # JAX's own limit for a silent process; longer than ours, which says more
LEAVE_SECONDS = 5.0


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
        ValueError: an environment that tells half of what is needed.
    """
    global _link, _hub
    place = _place()
    if place is None or _link is not None:
        return
    seconds = float(os.environ.get(JOIN_SECONDS, 300))
    me = socket.gethostname()
    who = f"process {place.number} of {place.count} on {me}"
    try:
        if place.number == 0:
            _hub = hub.Hub(hub.listen(place.address), place.count, seconds, place.address)
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
    _link = hub.Link(connection, place.number, _on_end)
    _link.hello(place.count, me, f"rmjax {importlib.metadata.version('rmjax')}, jax {jax.__version__}")
    _link.joined.wait()  # or `_on_end` ends this process
    _start_jax(place, here)
    _speak_softly(place.number)
    atexit.register(_at_exit)  # runs before JAX's own, which would wait for the others


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

    seconds = int(float(os.environ.get(JOIN_SECONDS, 300)))
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
        code: exit code of all.
    """
    global _failing
    if _link is None:
        return
    time.sleep(GRACE)
    _failing = True
    _link.fail(why, code)
    _told.wait(GRACE)  # if another was first, `_on_end` says that
    _quit(why, code)


def finish() -> None:
    """The end of a run that went well: waits for all processes and lets them go."""
    global _link, _hub
    if _link is None:
        return
    barrier("finish")
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
    return 0 if _link is None else _link.number


def is_first() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return number() == 0


def gather(name: str, value: Any) -> list[Any]:
    """What every process has for `value`, in their order; waits for all.

    Args:
        name: of the occasion; all processes must come to the same ones, those of one name in the same order.
        value: plain JSON, and small.
    """
    return [value] if _link is None else _link.gather(name, value)


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
        hosts = _link.hosts if _link else []
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


def stop_agreed(requested: bool, step: int) -> bool:
    """Whether to stop at this step, where any process was asked to: the same answer on all for the same step.

    Costs nothing while nobody asks. The step is a later one than that of the request: the first that no process has
    come to yet.

    Args:
        requested: whether this process was asked to stop.
        step: that it has come to; every process calls this with the same steps in the same order.
    """
    return requested if _link is None else _link.stop_agreed(requested, step)
