"""How the processes of a run keep watch over each other: each holds a connection to a hub, a thread of process 0.

JAX's own service ends processes that wait for a lost one with a C++ stack that names nobody. Here the hub calls the
roll before that service starts. A process whose connection closes or falls silent is lost; so is one whose main thread
stands still while others wait for it. The hub tells all others which it was. Messages are lines of JSON over TCP, on
the port that JAX's service listens to afterwards:

    hub to process   {"nonce": n}  {"go": hosts}  {"beat": 1}  {"end": [...]}
    process to hub   {"number": n, "count": n, "host": h, "version": v, "proof": p}
                     {"position": p, "step": n} for each beat  {"failed": why, "code": n}  {"bye": 1}

Anybody may connect. Who does not prove that it knows the secret, by a keyed hash of the nonce and its greeting, is a
stranger: whatever it sends or leaves out costs it its connection, and nothing else happens.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import itertools
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
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


class End(NamedTuple):
    """Why a run ends early, for people, and the exit code of all; `number` is the process to blame, -1 is none."""

    number: int
    why: str
    code: int


@dataclasses.dataclass(frozen=True)
class Hello:
    """A process's greeting; all must be of one version."""

    number: int
    count: int
    host: str
    version: str

    def __str__(self) -> str:
        return f"process {self.number} on {self.host}"

    def proof(self, secret: str, nonce: str) -> bytes:
        """Proves that the sender knows the secret, now."""
        words = json.dumps([nonce, *vars(self).values()])
        return hmac.new(secret.encode(), words.encode(), hashlib.sha256).hexdigest().encode()


def loss(number: int, host: str, why: str) -> End:
    text = f"process {number} on {host} was lost: {why}. The same command goes on from the last checkpoint"
    return End(number, text, exits.AGAIN)


@dataclasses.dataclass
class _Member:
    """A process that has joined, and how far its main thread has come: see `Hub`."""

    hello: Hello
    writer: asyncio.StreamWriter
    position: int = 0
    step: int = 0
    since: float = 0.0  # when it came there, or others went further
    warned: bool = False


async def _receive(reader: asyncio.StreamReader) -> Any:
    """The next message, or {"lost": why} where there is none."""
    try:
        return json.loads(await asyncio.wait_for(reader.readline(), SILENCE))
    except TimeoutError:
        return {"lost": SILENT}
    except (OSError, ValueError, RecursionError):  # the empty line at the end is no JSON either
        return {"lost": CLOSED}


def _line(**message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Hub(threading.Thread):
    """Calls the roll and notices who is lost. Ends when every process has left.

    A process whose main thread stands still is known by its position, which the training loop counts up before each
    batch of a step or an evaluation. All compute each batch together, so nobody gets more than a batch or two ahead:
    the others wait, at a higher position. The one with the highest is never to blame, which excludes what all do alike
    however long it takes: compiling, evaluating, exporting, a device that hangs for all.
    """

    def __init__(
        self, listener: socket.socket, count: int, seconds: float, address: str, secret: str = "", standing: float = 0
    ):
        """Waits `seconds` for `count` processes, which were told to come to `address`.

        One that others wait for is reported after `standing` seconds, or never (0), and later given up (PATIENCE).
        """
        super().__init__(name="hub", daemon=True)
        self._listener, self._count, self._seconds, self._address = listener, count, seconds, address
        self._secret, self._standing = secret, standing
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._refused: dict[str, None] = {}  # addresses of those with another secret
        self._members: dict[int, _Member] = {}
        self._there: dict[int, _Member] = {}  # those who have not left
        self._why: End | None = None

    def run(self) -> None:
        asyncio.run(self._whole())

    async def _whole(self) -> None:
        with self._listener:
            try:
                await self._serve()
            except Exception as error:
                self._broken(error)
                await asyncio.sleep(LATE)  # until all have read it

    async def _serve(self) -> None:
        self._deadline = time.monotonic() + self._seconds
        server = await asyncio.start_server(self._meet, sock=self._listener, limit=LONGEST, backlog=1024)
        self._close = server.close
        for tick in itertools.count():
            if tick % 8 == 0:
                self._tell(beat=1)
            await asyncio.sleep(BEAT / 8)
            self._look_who_stands(time.monotonic())
            late = time.monotonic() > self._deadline
            if late and not self._complete and not self._why:
                self._end(End(-1, self._missing(), exits.AGAIN))
            elif not self._there and (late or self._complete):
                return

    @property
    def _complete(self) -> bool:
        return len(self._members) == self._count

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._strangers[writer] = None
        if len(self._strangers) > self._count + STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        number = -1
        try:
            number = await self._greet(reader, writer)
            while number in self._there:
                self._handle(number, await _receive(reader))
        except Exception as error:
            self._broken(error)
        finally:
            self._there.pop(number, None)
            self._strangers.pop(writer, None)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        """The number of the process that has connected; -1 of a stranger, or one that does not belong."""
        writer.write(_line(nonce=(nonce := secrets.token_hex(16))))
        match await _receive(reader):
            case {
                "number": int(n),
                "count": int(count),
                "host": str(host),
                "version": str(version),
                "proof": str(sent),
            }:
                hello = Hello(n, count, host, version)
            case _:
                return -1
        if not hmac.compare_digest(hello.proof(self._secret, nonce), sent.encode(errors="replace")):
            writer.write(_line(end=End(-1, f"{hello} {OTHER_SECRET}", exits.BAD_INPUT)))
            self._refused[str((writer.get_extra_info("peername") or "?")[0])] = None
            return -1
        if problem := self._problem(hello):
            self._end(End(-1, f"a process on {host} {problem}", exits.BAD_INPUT))
        if self._why:
            writer.write(_line(end=self._why))
            return -1
        del self._strangers[writer]
        self._there[n] = self._members[n] = _Member(hello, writer, since=time.monotonic())
        if self._complete:  # nobody else is let in
            self._close()
            for stranger in self._strangers:
                stranger.transport.abort()
            self._tell(go=[self._members[n].hello.host for n in range(self._count)])
        return n

    def _problem(self, hello: Hello) -> str:
        member = self._members.get(hello.number, next(iter(self._members.values()), None))
        if hello.count != self._count or not 0 <= hello.number < self._count:
            return f"calls itself process {hello.number} of {hello.count}, expected one of {self._count}"
        if member and member.hello.number == hello.number:
            return f"calls itself process {hello.number}, as one on {member.hello.host} does; give each its own number"
        if member and member.hello.version != hello.version:
            return f"has {hello.version}, others have {member.hello.version}; install the same everywhere"
        return ""

    def _handle(self, number: int, message: Any) -> None:
        member = self._there[number]
        match message:
            case {"position": position, "step": step}:
                if position != member.position:
                    member.position, member.step, member.since, member.warned = position, step, time.monotonic(), False
            case {"failed": why, "code": code}:
                self._end(End(number, f"{member.hello} failed: {why}", code))
            case {"bye": 1}:
                del self._there[number]
            case {"lost": why}:
                self._lost(number, why)
            case _:
                self._lost(number, CLOSED)

    def _look_who_stands(self, now: float) -> None:
        """Warns of processes that others wait for, and later gives them up."""
        furthest = max((member.position for member in self._there.values()), default=0)
        for number, member in list(self._there.items()) if self._standing else ():
            if member.position == furthest:
                member.since, member.warned = now, False
            stood, limit = now - member.since, PATIENCE * self._standing
            where = f"its main thread stands still at step {member.step}, and the others have waited for it for"
            if stood > limit:
                self._lost(number, f"{where} {stood / 60:.3g} minutes (a file system that hangs?)")
            elif stood > self._standing and not member.warned:
                member.warned = True
                text = f"{member.hello}: {where} {stood / 60:.3g} minutes"
                logging.warning("%s; in another %.3g all end, to be started again", text, (limit - stood) / 60)

    def _tell(self, **message: Any) -> None:
        for member in self._there.values():
            member.writer.write(_line(**message))  # that the other side is gone is for `_receive` to notice

    def _lost(self, number: int, why: str) -> None:
        self._end(loss(number, self._there[number].hello.host, why))  # it is told as well, if it can hear
        del self._there[number]

    def _broken(self, error: Exception) -> None:
        why = f"the thread of process 0 by which all keep in touch met {type(error).__name__}: {error}"
        self._end(End(-1, why, exits.FAILED))

    def _end(self, end: End) -> None:
        """Tells all why it ends; only the first reason counts, the others follow from it."""
        if self._why is None:
            self._why, self._deadline = end, time.monotonic() + LATE  # those who come by then hear it too
            self._tell(end=end)

    def _missing(self) -> str:
        missing = sorted(set(range(self._count)) - set(self._members))
        numbers = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        came = ", ".join(f"{n} on {member.hello.host}" for n, member in sorted(self._members.items())[:20])
        others = f" One from {', '.join(list(self._refused)[:5])} {OTHER_SECRET}." if self._refused else ""
        return (
            f"{len(missing)} of {self._count} processes did not come to {self._address} within {self._seconds:g} s: "
            f"{numbers}. There are: {came}.{others} Look at the output of those that are missing; check that they were "
            "started, that their hosts reach this address, and that all were told the same number of processes"
        )


class Link(threading.Thread):
    """A process's end of its connection to the hub: `joined` is set when all processes are there.

    `at` is how far the main thread has come: the position (see `Hub`), and the step, for people.
    """

    def __init__(self, connection: socket.socket, hello: Hello, on_end: Callable[[End], None], secret: str = ""):
        """`on_end` is called, from this thread, when the run ends early."""
        super().__init__(name="link", daemon=True)
        connection.settimeout(SILENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.hello, self.hosts, self.joined, self.at = hello, ["its host"], threading.Event(), (0, 0)
        self._socket, self._on_end, self._secret = connection, on_end, secret
        self._lock, self._left = threading.Lock(), False

    def run(self) -> None:
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
        if not self._left:
            self._on_end(loss(0, self.hosts[0], why))

    def _handle(self, message: dict[str, Any]) -> None:
        if "nonce" in message:
            proof = self.hello.proof(self._secret, message["nonce"]).decode()
            self._send(**vars(self.hello), proof=proof)
        elif "beat" in message:
            position, step = self.at
            self._send(position=position, step=step)
        elif "go" in message:
            self.hosts = message["go"]
            self.joined.set()
        elif "end" in message:
            self._on_end(End(*message["end"]))

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError), self._lock:  # that the other side is gone is for `run` to notice
            self._socket.sendall(_line(**message))

    def fail(self, why: str, code: int) -> None:
        self._send(failed=why[: LONGEST // 16], code=code)  # a character takes up to 12 bytes

    def leave(self) -> None:
        """Says good-bye; whatever happens to the others no longer matters."""
        self._left = True
        self._send(bye=1)
