"""How the processes of a run keep in touch: each holds a connection to a hub, a thread of process 0.

JAX's own service ends processes that wait for a lost one with a C++ stack that names nobody, the start included. Here
the hub calls the roll before that service starts; a connection that closes or falls silent is a lost process, which
the hub names to all others. Messages are lines of JSON over TCP, on the port that JAX's service listens to afterwards.

    process to hub   {"hello": number, ...}  {"beat": 1}  {"at": key, "value": x}  {"failed": why, "code": n}
                     {"stop": 1}  {"step": n}  {"bye": 1}
    hub to process   {"go": hosts}  {"beat": 1}  {"all": key, "values": [...]}  {"end": {...}}
                     {"freeze": 1}  {"stop_at": n}
"""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rmjax import exits

BEAT = 2.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one after which a process is lost: its host or the network to it is gone
LATE = 2.0  # seconds in which a roll call that failed still answers
LONGEST = 2**20  # bytes of a message; more is not from one of us
CLOSED = "its connection closed, so it was killed or crashed (out of memory?)"
SILENT = f"nothing was heard of it for {SILENCE:.0f} s, so its host, the network or the process itself stands still"


class End(NamedTuple):
    """Why a run ends early.

    Attributes:
        number: the process that it is about; -1 where the roll call failed.
        host: its host.
        why: its error, or how it was lost.
        code: exit code for all.
        lost: whether it is gone without having said why.
    """

    number: int
    host: str
    why: str
    code: int
    lost: bool = False


class Lines:
    """A socket that carries messages; `receive` is for one thread, `send` for any."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.heard = connection, time.monotonic()
        self._lock, self._rest = threading.Lock(), b""

    def send(self, **message: Any) -> None:
        """Sends; that the other side is gone is for `receive` to notice."""
        try:
            with self._lock:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that are there, waiting for some bytes; None where the other side is gone or no one of us."""
        try:
            data = self.socket.recv(2**16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        self.heard = time.monotonic()
        whole = all(isinstance(message, dict) for message in messages)
        return messages if data and whole and len(self._rest) <= LONGEST else None


class Hub(threading.Thread):
    """Calls the roll, passes messages on and notices who is lost. Ends when every process has left."""

    def __init__(self, listener: socket.socket, count: int, seconds: float, place: str):
        """Listens for `count` processes, `seconds` long; `place` is the address that they are told."""
        super().__init__(name="hub", daemon=True)
        self._listener, self._count, self._seconds, self._place = listener, count, seconds, place
        self._selector = selectors.DefaultSelector()
        self._there: dict[int, Lines] = {}  # by number; those who left are taken out
        self._hosts: dict[int, str] = {}
        self._versions: dict[int, str] = {}
        self._gathered: dict[str, dict[int, Any]] = {}
        self._steps: dict[int, int] = {}
        self._complete = self._freezing = False
        self._why: End | None = None

    def run(self) -> None:
        """Serves until all have left."""
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        deadline, beat = time.monotonic() + self._seconds, 0.0
        while self._there or not (self._complete or (self._why and time.monotonic() > deadline)):
            for key, _ in self._selector.select(BEAT / 4):
                if key.data is None:
                    if self._complete:  # closed since
                        continue
                    lines = Lines(self._listener.accept()[0])
                    self._selector.register(lines.socket, selectors.EVENT_READ, lines)
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now >= beat:
                beat = now + BEAT
                self._tell(beat=1)
            for number in [n for n, lines in self._there.items() if now - lines.heard > SILENCE]:
                self._lost(number, SILENT)
            if not self._complete and not self._why and now > deadline:
                self._end(End(-1, "", self._missing(), exits.AGAIN))
            if self._why:  # those who come within the next seconds hear it too
                deadline = min(deadline, now + LATE)
        self._close_listener()
        for key in list(self._selector.get_map().values()):
            key.data.socket.close()

    def _tell(self, **message: Any) -> None:
        for lines in self._there.values():
            lines.send(**message)

    def _read(self, lines: Lines) -> None:
        number = next((n for n, known in self._there.items() if known is lines), None)
        messages = lines.receive()
        for message in messages or ():
            if number is not None:
                self._handle(number, message)
            elif {"hello", "of", "host", "version"} <= set(message):
                number = self._greet(lines, message)
        if messages is None or (number is not None and number not in self._there):
            self._selector.unregister(lines.socket)
            lines.socket.close()
            if number in self._there:
                self._lost(number, CLOSED)

    def _greet(self, lines: Lines, hello: dict[str, Any]) -> int:
        number, count, host = int(hello["hello"]), int(hello["of"]), str(hello["host"])
        problem = ""
        if count != self._count or not 0 <= number < self._count:
            problem = f"calls itself process {number} of {count}, expected one of {self._count}"
        elif number in self._hosts:
            problem = f"calls itself process {number}, as one on {self._hosts[number]} does; give each its own number"
        elif self._versions and (other := next(iter(self._versions.values()))) != hello["version"]:
            problem = f"has {hello['version']}, others have {other}; install the same everywhere"
        if problem or self._why:
            self._end(End(-1, "", f"a process on {host} {problem}", exits.BAD_INPUT))
            lines.send(end=self._why)
            return -1
        self._there[number], self._hosts[number], self._versions[number] = lines, host, str(hello["version"])
        if len(self._there) == self._count:
            self._complete = True
            self._close_listener()
            self._tell(go=[self._hosts[n] for n in range(self._count)])
        return number

    def _handle(self, number: int, message: dict[str, Any]) -> None:
        if "at" in message:
            values = self._gathered.setdefault(message["at"], {})
            values[number] = message["value"]
            if len(values) == self._count:
                del self._gathered[message["at"]]
                self._tell(all=message["at"], values=[values[n] for n in range(self._count)])
        elif "failed" in message:
            self._end(End(number, self._hosts[number], message["failed"], message["code"]))
        elif "stop" in message and not self._freezing:
            self._freezing = True
            self._tell(freeze=1)
        elif "step" in message:
            self._steps[number] = message["step"]
            if len(self._steps) == self._count:
                self._tell(stop_at=max(self._steps.values()) + 1)
        elif "bye" in message:
            del self._there[number]

    def _lost(self, number: int, why: str) -> None:
        del self._there[number]
        self._end(End(number, self._hosts[number], why, exits.AGAIN, lost=True))

    def _end(self, end: End) -> None:
        """Tells all why it ends; only the first reason counts, the others follow from it."""
        if self._why is None:
            self._why = end
            self._tell(end=end)

    def _missing(self) -> str:
        missing = sorted(set(range(self._count)) - set(self._hosts))
        numbers = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        came = ", ".join(f"{n} on {host}" for n, host in sorted(self._hosts.items())[:20])
        return (
            f"{len(missing)} of {self._count} processes did not come to {self._place} within {self._seconds:g} s: "
            f"{numbers}. There are: {came}. Look at the output of those that are missing; check that they were "
            "started, that their hosts reach this address, and that all were told the same number of processes"
        )

    def _close_listener(self) -> None:
        if self._listener.fileno() >= 0:
            self._selector.unregister(self._listener)
            self._listener.close()


class Link(threading.Thread):
    """A process's end of its connection to the hub.

    Attributes:
        hosts: of all processes, by number, once `joined`.
        joined: set when all processes are there.
    """

    def __init__(self, connection: socket.socket, number: int, on_end: Callable[[End], None]):
        """`on_end` is called, from this thread, when the run ends early."""
        super().__init__(name="link", daemon=True)
        self.number, self.hosts, self.joined = number, [""], threading.Event()
        self._lines, self._on_end = Lines(connection), on_end
        self._changed = threading.Condition()
        self._uses: dict[str, int] = {}
        self._results: dict[str, list[Any]] = {}
        self._step, self._frozen, self._asked, self._left = -1, False, False, False
        self._stop_at: int | None = None

    def hello(self, count: int, host: str, version: str) -> None:
        """Says who this is and starts listening."""
        self.hosts[0] = "its host"
        self._lines.send(hello=self.number, of=count, host=host, version=version)
        self.start()

    def run(self) -> None:
        """Reads what comes and gives signs of life."""
        selector = selectors.DefaultSelector()
        selector.register(self._lines.socket, selectors.EVENT_READ)
        beat = 0.0
        while not self._left:
            why = ""
            if selector.select(BEAT / 4):  # what has come counts, however late this thread gets to run
                messages = self._lines.receive()
                why = CLOSED if messages is None else ""
                for message in messages or ():
                    self._handle(message)
            elif time.monotonic() - self._lines.heard > SILENCE:
                why = SILENT
            if why and not self._left:
                self._on_end(End(0, self.hosts[0], why, exits.AGAIN, lost=True))
                return
            if time.monotonic() >= beat:
                beat = time.monotonic() + BEAT
                self._lines.send(beat=1)

    def _handle(self, message: dict[str, Any]) -> None:
        if "end" in message:
            self._on_end(End(*message["end"]))
        with self._changed:
            if "go" in message:
                self.hosts = message["go"]
                self.joined.set()
            elif "all" in message:
                self._results[message["all"]] = message["values"]
            elif "freeze" in message:
                self._frozen = True
                self._lines.send(step=self._step)
            elif "stop_at" in message:
                self._frozen, self._stop_at = False, message["stop_at"]
            self._changed.notify_all()

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values of all processes, once all have called it with this name as many times."""
        with self._changed:
            self._uses[name] = self._uses.get(name, 0) + 1
            key = f"{name} {self._uses[name]}"
            self._lines.send(at=key, value=value)
            self._changed.wait_for(lambda: key in self._results)
            return self._results.pop(key)

    def stop_agreed(self, requested: bool, step: int) -> bool:
        """See processes.stop_agreed. While the hub asks all for their steps, none may begin another."""
        with self._changed:
            self._changed.wait_for(lambda: not self._frozen)
            self._step = step
            if requested and not self._asked:
                self._asked = True
                self._lines.send(stop=1)
            return self._stop_at is not None and step >= self._stop_at

    def fail(self, why: str, code: int) -> None:
        """Tells the others that this process fails."""
        self._lines.send(failed=why, code=code)

    def leave(self) -> None:
        """Says good-bye; whatever happens to the others no longer matters."""
        self._left = True
        self._lines.send(bye=1)


def listen(address: str) -> socket.socket:
    """Listens on the port of this address, on every network."""
    port = int(address.rpartition(":")[2])
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError as error:
            if error.errno != 97:  # no IPv6 here
                raise
    return socket.create_server(("", port), backlog=1024)


def connect(address: str, seconds: float) -> socket.socket:
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


def relay(address: str, seconds: float) -> str:
    """An address on this host that leads to `address`, but does not close when that does.

    JAX's client aborts the process when its connection to process 0 closes, at the very moment in which the link
    notices that too, and could say so.
    """
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, closes: bool) -> None:
        try:
            while data := source.recv(2**16):
                target.sendall(data)
        except OSError:
            pass
        if closes:
            source.close()
            target.close()

    def serve() -> None:
        while True:
            near = server.accept()[0]
            far = connect(address, seconds)
            far.settimeout(None)
            for source, target, closes in ((near, far, True), (far, near, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=pump, args=(source, target, closes), daemon=True).start()

    threading.Thread(target=serve, name="relay", daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"
