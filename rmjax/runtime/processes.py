"""Several processes that train together: how they start, and end when one of them is lost.

Without a cluster (cluster.py) there is one process and every function here returns at once. With one, all meet at
process 0 (hub.py), and from then on a failure of one ends all: each says which it was. Where somebody else has started
JAX's runtime (`jax.distributed.initialize`: Ray, a notebook), it says who and how many they are, and whoever started it
notices who is lost. agreement.py exchanges values.

    RMJAX_SECRET           any text, the same for all              the launch scripts, you
    RMJAX_STALL_MINUTES    after which a process that others       you; 10 by default, 0 is never. After three
                           wait for is reported                    times as many all end, with exit code 75

Without a secret, whoever reaches the port while the processes gather and knows hub.py can pass for one of them, or end
the run. JAX's own service on that port asks for none, ever: keep the port inside the cluster.
"""

import atexit
import contextlib
import faulthandler
import importlib.metadata
import logging as python_logging
import os
import re
import socket
import sys
import time
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed  # its client and numbers have no public name

from rmjax.runtime import cluster, exits, hub, sockets

STALL_MINUTES, SECRET = "RMJAX_STALL_MINUTES", "RMJAX_SECRET"
GRACE = 2.0  # seconds in which a lost process is looked for before the error that it caused elsewhere is believed
RUNTIME_SECONDS = 60  # JAX's own limit for a silent process; longer than ours, which says more
LEAVE_SECONDS = 5.0
FOR_EVER = 2**31 - 1  # milliseconds: who is lost meanwhile, the hub or whoever started the runtime notices
TIMED_OUT = re.compile(r"gloo.*(timed out|DEADLINE_EXCEEDED)|^DEADLINE_EXCEEDED", re.IGNORECASE | re.DOTALL)

_link: hub.Link | None = None
_hub: hub.Hub | None = None
_failure = ""  # of this process


def start() -> None:
    """Joins the other processes, if there are any; call it before anything touches a device.

    Ends the process, with a message, when the others do not come: exit code 75. ValueError for a wrong environment.
    """
    global _link, _hub
    if jax.distributed.is_initialized() or (place := cluster.find_place()) is None:
        return
    seconds = cluster.environment_number(cluster.JOIN_SECONDS, 300)
    standing = 60 * cluster.environment_number(STALL_MINUTES, 10)
    secret, version = os.environ.get(SECRET, ""), f"rmjax {importlib.metadata.version('rmjax')}, jax {jax.__version__}"
    hello = hub.Hello(place.number, place.count, socket.gethostname(), version)
    address = place.address if place.number else f"localhost:{place.address.rpartition(':')[2]}"
    problem = "could not open its port"
    try:
        if place.number == 0:
            _hub = hub.Hub(sockets.listen_on(place.address), place.count, seconds, place.address, secret, standing)
            _hub.start()
        problem = f"waited {seconds:g} s in vain"
        connection = sockets.connect_to(address, seconds + GRACE)
    except OSError as error:
        _quit(
            f"process {place.number} of {place.count} on {hello.host} {problem}: {place.address} ({error}). Check that "
            "process 0 runs there, that the address is right on every host, and that the port is free and open between "
            f"them; {cluster.JOIN_SECONDS} is how long to wait",
            exits.AGAIN,
        )
    _link = hub.Link(connection, hello, _on_end, secret)
    _link.start()
    _link.joined.wait()  # or `_on_end` ends this process
    _start_jax(place, address)
    if place.number:  # process 0 speaks for all: of the others only warnings and errors are shown
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for good)
        formatter = python_logging.Formatter(f"[process {place.number}] %(levelname)s: %(message)s")
        logging.get_absl_handler().setFormatter(formatter)
    atexit.register(_at_exit)  # runs before JAX's own, which would wait for the others


def _start_jax(place: cluster.Place, address: str) -> None:
    config: Any = jax.config
    config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, see agreement.stop_agreed
    if "http_proxy" in os.environ:
        os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
    jax.distributed.initialize(
        sockets.relay_to(address, RUNTIME_SECONDS),
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


def number() -> int:
    return _link.hello.number if _link else distributed.global_state.process_id if count() > 1 else 0


def count() -> int:
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is process 0, which alone writes and speaks."""
    return number() == 0


def moved(position: int, step: int) -> None:
    """Tells the others how far the main thread has come: see `hub.Hub`."""
    if _link:
        _link.at = position, step


def _on_end(end: hub.End) -> None:
    """In the link's thread: ends this process with the reason; at once, since its main thread may wait for ever."""
    if end.number != number():
        _quit(end.why, end.code)
    if not _failure:  # this process is here, but its main thread stands still: where?
        faulthandler.dump_traceback(sys.__stderr__ or 2)
    _quit(_failure or end.why, end.code)


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
    That processes waited too long for each other is exits.AGAIN, whatever `code` says.
    """
    global _failure
    if _link is None:
        return
    why, code = explained(why, code)
    time.sleep(GRACE)
    _failure = why
    _link.fail(why, code)
    time.sleep(GRACE)  # the hub answers with who was first, and `_on_end` ends this process
    _quit(why, code)


def explained(why: str, code: int) -> tuple[str, int]:
    """The error and its exit code, with advice where processes have waited too long for each other."""
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
    client: Any = distributed.global_state.client
    if count() > 1:
        client.wait_at_barrier("rmjax/finish", FOR_EVER)
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
