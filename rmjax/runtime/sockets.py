"""TCP connections between the processes of a run, and a relay for JAX's."""

import contextlib
import socket
import threading
import time


def listen_on(address: str) -> socket.socket:
    """Listens on the port of this address, on every network."""
    port = int(address.rpartition(":")[2])
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # no IPv6 here; or the port is taken, as the next line says too
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def connect_to(address: str, seconds: float) -> socket.socket:
    """Connects, trying for `seconds`; an OSError says what was wrong the last time."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def relay_to(address: str, seconds: float) -> str:
    """An address on this host that leads to `address`, but does not close when that does.

    JAX's client aborts the process when its connection to process 0 closes, at the very moment in which the link
    notices that too, and could say so. (A callback in its place makes it abort as well, by std::bad_cast.)
    """
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, closes: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        if closes:
            source.close()
            target.close()

    def serve() -> None:
        while True:
            near, far = server.accept()[0], connect_to(address, seconds)
            far.settimeout(None)
            for source, target, closes in ((near, far, True), (far, near, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=pump, args=(source, target, closes), daemon=True).start()

    threading.Thread(target=serve, name="relay", daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"
