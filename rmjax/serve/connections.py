"""Connections of uvicorn, with a time and a number, and an end that answers everybody.

uvicorn alone waits for ever for a request that does not come or an answer that is not taken, and cancels what is under
way when it has waited long enough for the end, which clients see as code 500.
"""

import asyncio
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rmjax.serve.gate import Gate

SPARE = 64  # connections beyond the most that are still told so
MOMENT = 0.1  # seconds: connections that the kernel has taken are taken from it, and a request on its way arrives
ACCEPT_SECONDS = 2.0
FLUSH_SECONDS = 5.0  # for clients to take their answers at the end
UVICORN_SECONDS = 2  # its own wait, once all are answered
LINGER_SECONDS = 1.0  # at the end, for requests of connections that are kept alive


def protocol(seconds: float, most: int) -> type[H11Protocol]:
    """The protocol of a connection, for uvicorn.Config(http=).

    A request's head must arrive, and an answer be taken, within `seconds`; the body is the application's to wait for.

    Args:
        seconds: for each of them.
        most: connections; requests of those beyond are told apart by "excess" in their scope's state.
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


def _waiting(sockets: list[socket.socket]) -> bool:
    """Whether the kernel has connections for a listening socket, which would be reset if it were closed."""
    return bool(select.select(sockets, [], [], 0)[0])


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """A server that answers whom it has accepted before it ends."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain: float):
        """Makes it.

        Args:
            config: of uvicorn.
            gate: of the application.
            drain: seconds that those inside are waited for.
        """
        super().__init__(config)
        self._gate, self._drain = gate, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new requests, waits for those inside, sends the rest away, then closes every connection."""
        self._gate.close()
        await asyncio.sleep(MOMENT)
        await self._until(lambda: not _waiting(sockets or []), ACCEPT_SECONDS)
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
