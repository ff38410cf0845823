"""How the processes of a run keep watch over each other: each holds a connection to a hub, a thread of process 0.

JAX's own service ends processes that wait for a lost one with a C++ stack that names nobody, the start included. Here
the hub calls the roll before that service starts. A connection that closes or falls silent is a lost process, which
the hub names to all others; so is one whose main thread stands still while others wait for it (see `Hub`). What they
agree on goes by JAX's service (processes.py). Messages are lines of JSON over TCP, on the port that JAX's service
listens to afterwards.

    hub to process   {"nonce": n}  {"go": hosts}  {"beat": 1}  {"end": [...]}
    process to hub   {"hello": number, "of": count, "host": h, "version": v, "proof": p}
                     {"beat": position, "step": n}  {"failed": why, "code": n}  {"bye": 1}

Anybody may connect. Who has not given a proof, a keyed hash of the nonce and the hello by which the secret is known
without being sent, is a stranger: whatever it sends or leaves out costs it its connection, and nothing else happens.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import logging

from rmjax.runtime import exits

BEAT = 2.0  # seconds between signs of life
SILENCE = 30.0  # seconds without one after which a process is lost: its host or the network to it is gone
LATE = 2.0  # seconds in which a run that has ended still answers
PATIENCE = 3  # times as long as until the warning, a process may stand still before it is given up
LONGEST = 2**17  # bytes of a message; more is not from one of us
STRANGERS = 100  # connections without a greeting that are kept, beside one of each process
CLOSED = "its connection closed, so it was killed or crashed (out of memory?)"
SILENT = f"nothing was heard of it for {SILENCE:.0f} s, so its host, the network or the process itself stands still"
HUNG_UP = "it closed the connection before all processes were there, or what listens there is no run of rmjax"
OTHER_SECRET = "has another RMJAX_SECRET than process 0; give all the same, or none"
HELLO: dict[str, type] = {"hello": int, "of": int, "host": str, "version": str, "proof": str}
LATER: tuple[dict[str, type], ...] = ({"beat": int, "step": int}, {"failed": str, "code": int}, {"bye": int})


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


def fits(message: Any, *forms: Mapping[str, type]) -> bool:
    """Whether a message has exactly the keys of one of the forms, with values of exactly its types."""
    return isinstance(message, dict) and any(
        message.keys() == form.keys() and all(type(message[key]) is kind for key, kind in form.items())
        for form in forms
    )


def proof(secret: str, nonce: str, hello: Mapping[str, Any]) -> bytes:
    """Shows that who says hello, in these words and now, knows the secret."""
    words = json.dumps([nonce, *(hello[key] for key in HELLO if key != "proof")])
    return hmac.new(secret.encode(), words.encode(), hashlib.sha256).hexdigest().encode()


async def receive(reader: asyncio.StreamReader) -> Any:
    """The next message; None where the other side is gone, or sends what is no message."""
    try:
        return json.loads(await reader.readline())
    except (OSError, ValueError, RecursionError):  # the empty line at the end is no JSON either
        return None


class Hub(threading.Thread):
    """Calls the roll and notices who is lost. Ends when every process has left.

    A process whose main thread stands still is found by its position, which the training loop counts up wherever it
    asks whether to stop, before each batch of a step or an evaluation. All compute each batch together, so nobody gets
    more than a batch or two ahead: the others wait, at a higher position. Who has the highest is never to blame, which
    leaves out what all do alike however long it takes: compiling, evaluating, exporting, a device that hangs for all.
    """

    def __init__(
        self, listener: socket.socket, count: int, seconds: float, place: str, secret: str = "", standing: float = 0
    ):
        """Waits `seconds` for `count` processes; `place` is the address that they are told, `secret` as for `proof`.

        One that others wait for is told of after `standing` seconds and given up after PATIENCE times as many; 0 never.
        """
        super().__init__(name="hub", daemon=True)
        self._listener, self._count, self._seconds, self._place = listener, count, seconds, place
        self._secret, self._standing = secret, standing
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._refused: dict[str, None] = {}  # addresses of those with another secret
        self._there: dict[int, asyncio.StreamWriter] = {}  # by number; those who left are taken out
        self._hosts: dict[int, str] = {}
        self._versions: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._at: dict[int, tuple[int, int]] = {}  # the position, and the step that people know it by
        self._behind: dict[int, tuple[int, float, bool]] = {}  # the position, since when, whether that was told
        self._why: End | None = None

    def run(self) -> None:
        """Serves until all have left."""
        asyncio.run(self._whole())

    async def _whole(self) -> None:
        with self._listener:
            try:
                await self._serve()
            except Exception as error:
                self._broken(error)
                await asyncio.sleep(LATE)  # until all have read it

    async def _serve(self) -> None:
        self._all_left = asyncio.Event()
        server = await asyncio.start_server(self._meet, sock=self._listener, limit=LONGEST, backlog=1024)
        self._close = server.close
        deadline, beat, before = time.monotonic() + self._seconds, 0.0, time.monotonic()
        while self._there or not (self._complete or (self._why and time.monotonic() > deadline)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_left.wait(), BEAT / 4)
            now = time.monotonic()
            if now - before > SILENCE / 2:  # it was this thread that stood still
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            if now >= beat:
                beat = now + BEAT
                self._tell(beat=1)
            for number in [n for n in self._there if now - self._heard[n] > SILENCE]:
                self._lost(number, SILENT)
            self._look_who_stands(now)
            if not self._complete and not self._why and now > deadline:
                self._end(End(-1, "", self._missing(), exits.AGAIN))
            if self._why:  # those who come within the next seconds hear it too
                deadline = min(deadline, now + LATE)

    @property
    def _complete(self) -> bool:
        return len(self._hosts) == self._count

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its greeting to its end."""
        self._strangers[writer] = None
        if len(self._strangers) > self._count + STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        number = -1
        try:
            number = await self._greet(reader, writer)
            while number in self._there and fits(message := await receive(reader), *LATER):
                self._handle(number, message)
        except Exception as error:
            self._broken(error)
        finally:
            if number in self._there:
                self._lost(number, CLOSED)
            self._strangers.pop(writer, None)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        """The number of the process that has connected; -1 of a stranger, or one that does not belong."""
        _send(writer, nonce=(nonce := secrets.token_hex(16)))
        try:
            hello = await asyncio.wait_for(receive(reader), SILENCE)
        except TimeoutError:
            return -1
        if not fits(hello, HELLO):
            return -1
        number, count, host, version = (hello[key] for key in ("hello", "of", "host", "version"))
        if not hmac.compare_digest(proof(self._secret, nonce, hello), hello["proof"].encode(errors="replace")):
            _send(writer, end=End(-1, "", f"process {number} on {host} {OTHER_SECRET}", exits.BAD_INPUT))
            if len(self._refused) < 5:
                self._refused[str((writer.get_extra_info("peername") or "?")[0])] = None
            return -1
        problem = ""
        if count != self._count or not 0 <= number < self._count:
            problem = f"calls itself process {number} of {count}, expected one of {self._count}"
        elif number in self._hosts:
            problem = f"calls itself process {number}, as one on {self._hosts[number]} does; give each its own number"
        elif self._versions and (other := next(iter(self._versions.values()))) != version:
            problem = f"has {version}, others have {other}; install the same everywhere"
        if problem or self._why:
            self._end(End(-1, "", f"a process on {host} {problem}", exits.BAD_INPUT))
            _send(writer, end=self._why)
            return -1
        self._strangers.pop(writer, None)
        self._there[number], self._hosts[number], self._versions[number] = writer, host, version
        self._heard[number] = time.monotonic()
        if self._complete:  # nobody else is let in
            self._close()
            for stranger in self._strangers:
                stranger.transport.abort()
            self._tell(go=[self._hosts[n] for n in range(self._count)])
        return number

    def _handle(self, number: int, message: dict[str, Any]) -> None:
        self._heard[number] = time.monotonic()
        if "beat" in message:
            self._at[number] = message["beat"], message["step"]
        elif "failed" in message:
            self._end(End(number, self._hosts[number], message["failed"], message["code"]))
        else:
            self._gone(number)

    def _look_who_stands(self, now: float) -> None:
        """Tells of processes that others wait for, and later gives them up."""
        furthest = max((position for position, _ in self._at.values()), default=0)
        for number, (position, step) in list(self._at.items()) if self._standing else ():
            known, since, told = self._behind.get(number, (-1, now, False))
            if position == furthest or position != known:
                since, told = now, False
            where = f"its main thread stands still at step {step}, and the others have waited for it for"
            if now - since > PATIENCE * self._standing:
                self._lost(number, f"{where} {(now - since) / 60:.3g} minutes (a file system that hangs?)")
            elif now - since > self._standing and not told:
                told, left = True, (PATIENCE - 1) * self._standing / 60
                text = f"process {number} on {self._hosts[number]}: {where} {(now - since) / 60:.3g} minutes"
                logging.warning("%s; in another %.3g all end, to be started again", text, left)
            self._behind[number] = position, since, told

    def _tell(self, **message: Any) -> None:
        for writer in self._there.values():
            _send(writer, **message)

    def _gone(self, number: int) -> None:
        del self._there[number]
        self._at.pop(number, None)
        if not self._there and self._complete:
            self._all_left.set()

    def _lost(self, number: int, why: str) -> None:
        self._end(End(number, self._hosts[number], why, exits.AGAIN, lost=True))
        self._gone(number)

    def _broken(self, error: Exception) -> None:
        why = f"the thread by which the processes keep in touch met {type(error).__name__}: {error}"
        self._end(End(0, self._hosts.get(0, ""), why, exits.FAILED))

    def _end(self, end: End) -> None:
        """Tells all why it ends; only the first reason counts, the others follow from it."""
        if self._why is None:
            self._why = end
            self._tell(end=end)

    def _missing(self) -> str:
        missing = sorted(set(range(self._count)) - set(self._hosts))
        numbers = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        came = ", ".join(f"{n} on {host}" for n, host in sorted(self._hosts.items())[:20])
        others = f" One from {', '.join(self._refused)} {OTHER_SECRET}." if self._refused else ""
        return (
            f"{len(missing)} of {self._count} processes did not come to {self._place} within {self._seconds:g} s: "
            f"{numbers}. There are: {came}.{others} Look at the output of those that are missing; check that they were "
            "started, that their hosts reach this address, and that all were told the same number of processes"
        )


def _send(writer: asyncio.StreamWriter, **message: Any) -> None:
    """Sends, or keeps to send; that the other side is gone is for `receive` to notice."""
    writer.write(json.dumps(message).encode() + b"\n")


class Link(threading.Thread):
    """A process's end of its connection to the hub.

    Attributes:
        hosts: of all processes, by number, once `joined`.
        joined: set when all processes are there.
        at: how far the main thread has come, see `Hub`: the position, and the step that people know it by.
    """

    def __init__(self, connection: socket.socket, number: int, on_end: Callable[[End], None], secret: str = ""):
        """`on_end` is called, from this thread, when the run ends early."""
        super().__init__(name="link", daemon=True)
        self.number, self.hosts, self.joined, self.at = number, ["its host"], threading.Event(), (0, 0)
        connection.settimeout(SILENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._on_end, self._secret = connection, on_end, secret
        self._lock, self._left = threading.Lock(), threading.Event()
        self._hello: dict[str, Any] = {}

    def hello(self, count: int, host: str, version: str) -> None:
        """Starts listening, and says who this is when the hub asks."""
        self._hello = {"hello": self.number, "of": count, "host": host, "version": version}
        self.start()

    def run(self) -> None:
        """Reads what comes until this process or the hub has left."""
        try:
            for line in self._socket.makefile("rb"):
                self._handle(json.loads(line))
            why = CLOSED if self.joined.is_set() else HUNG_UP
        except TimeoutError:
            why = SILENT
        except OSError:
            why = CLOSED
        except Exception as error:
            why = f"it sent what no hub sends ({type(error).__name__}: {error})"
        if not self._left.is_set():
            self._on_end(End(0, self.hosts[0], why, exits.AGAIN, lost=True))

    def _beat(self) -> None:
        while not self._left.wait(BEAT):
            position, step = self.at
            self._send(beat=position, step=step)

    def _send(self, **message: Any) -> None:
        """Sends; that the other side is gone is for `run` to notice."""
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _handle(self, message: dict[str, Any]) -> None:
        if "end" in message:
            self._on_end(End(*message["end"]))
        elif "nonce" in message:
            self._send(**self._hello, proof=proof(self._secret, message["nonce"], self._hello).decode())
            threading.Thread(target=self._beat, name="beats", daemon=True).start()
        elif "go" in message:
            self.hosts = message["go"]
            self.joined.set()

    def fail(self, why: str, code: int) -> None:
        """Tells the others that this process fails."""
        self._send(failed=why[: LONGEST // 10], code=code)

    def leave(self) -> None:
        """Says good-bye; whatever happens to the others no longer matters."""
        self._left.set()
        self._send(bye=1)


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
