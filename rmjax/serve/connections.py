"""Connections of uvicorn, with a time and a number, and an end that answers everybody.

uvicorn alone waits for ever for a request that does not come or an answer that is not taken, and cancels what is under
way when it has waited long enough for the end, which clients see as code 500.
"""

import asyncio
import select
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rmjax.serve.inputs import STOPPING, UNFINISHED, Refused

SPARE = 64  # connections beyond the most that are still told so
MOMENT = 0.1  # seconds: connections that the kernel has taken are taken from it, and a request on its way arrives
ACCEPT_SECONDS = 2.0
FLUSH_SECONDS = 5.0  # for clients to take their answers at the end
UVICORN_SECONDS = 2  # its own wait, once all are answered
LINGER_SECONDS = 1.0  # at the end, for requests of connections that are kept alive


def protocol(seconds: float, most: int) -> type[H11Protocol]:
    """The protocol of a connection, for uvicorn.Config(http=).

    A request's head must arrive, and an answer be taken, within `seconds`; the application waits for the body. Requests
    of connections beyond `most` have "excess" in their scope's state.
    """

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._head: asyncio.TimerHandle | None = None
            self._taken: asyncio.TimerHandle | None = None
            super().connection_made(transport)
            self.app_state = {**self.app_state, "excess": len(self.connections) > most}
            if len(self.connections) > most + SPARE:
                transport.abort()
            else:
                self._expect_request()

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._head)
            _cancel(self._taken)
            super().connection_lost(exc)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before and not self.cycle.response_complete:
                _cancel(self._head)

        def on_response_complete(self) -> None:
            self._expect_request()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taken = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            _cancel(self._taken)
            super().resume_writing()

        def _expect_request(self) -> None:
            _cancel(self._head)
            self._head = self.loop.call_later(seconds, self._give_up)

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()  # between two requests it closes
            self._head = self.loop.call_later(MOMENT, self.transport.abort)  # if what is written is not taken, either

    return Connection


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Gate:
    """The requests that are being answered: `inside` is their number; new ones are refused once it is `closed`."""

    def __init__(self) -> None:
        self.inside, self.closed, self._cleared = 0, False, False
        self._leave: set[asyncio.Future[None]] = set()

    def close(self) -> None:
        self.closed = True

    def clear(self) -> None:
        """Sends those inside away, with a refusal."""
        self.closed = self._cleared = True
        for leave in self._leave:
            if not leave.done():
                leave.set_result(None)

    async def through(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of a request's work; Refused where the server stops, and did not let it in or sent it away."""
        if self.closed:
            work.close()
            raise Refused(503, UNFINISHED if self._cleared else STOPPING)
        task, leave = asyncio.ensure_future(work), asyncio.get_running_loop().create_future()
        self._leave.add(leave)
        self.inside += 1
        try:
            await asyncio.wait([task, leave], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Refused(503, UNFINISHED)
        finally:
            task.cancel()
            self._leave.discard(leave)
            self.inside -= 1


class Server(uvicorn.Server):
    """Answers all accepted requests before it ends; waits `drain` seconds for those inside the gate."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain: float):
        super().__init__(config)
        self._gate, self._drain = gate, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new requests, waits for those inside, sends the rest away, then closes every connection."""
        self._gate.close()
        await asyncio.sleep(MOMENT)
        # Closing the sockets would reset connections that still wait in the kernel.
        await self._until(lambda: not select.select(sockets or [], [], [], 0)[0], ACCEPT_SECONDS)
        for server in self.servers:
            server.close()
        await self._until(lambda: not self._gate.inside, self._drain)
        self._gate.clear()
        await self._until(lambda: not self.server_state.connections, LINGER_SECONDS)
        await self._until(lambda: not self.server_state.tasks, FLUSH_SECONDS)
        for connection in list(self.server_state.connections):
            any_protocol: Any = connection
            if any_protocol.cycle is not None and not any_protocol.cycle.response_complete:
                any_protocol.transport.abort()  # uvicorn would cancel the task, and log that as an error
        await super().shutdown(sockets)

    async def _until(self, done: Callable[[], bool], seconds: float) -> None:
        """Waits, unless a second Ctrl-C comes."""
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
