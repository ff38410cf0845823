"""A uvicorn server that answers what it has accepted before it stops, and drops connections that send no request."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE = 5.0  # seconds, at most, in which requests that came during the stop are answered


def unanswered(connection: Any) -> bool:
    """Whether a connection waits for an answer, or may be about to send its first request."""
    return connection.cycle is None or not connection.cycle.response_complete


class Server(uvicorn.Server):
    """uvicorn cancels requests when its time is up, which their clients see as 500; here they are answered first.

    What is queued is computed, or answered with 503, by `drain`, and new requests are answered with 503 meanwhile: to
    close the port first would reset connections that the system has accepted. Only then does uvicorn stop.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]):
        """`drain` is called in a thread when the server stops, and returns when no request waits for the model."""
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops: the queue, then uvicorn's own stop."""
        await run_in_threadpool(self._drain)
        quiet, until = 0, time.monotonic() + GRACE
        while quiet < 10 and time.monotonic() < until:  # those that were just accepted get their 503 as well
            await asyncio.sleep(GRACE / 100)
            quiet = 0 if any(map(unanswered, self.server_state.connections)) else quiet + 1
        await super().shutdown(sockets)


def protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol that closes a connection which has sent no whole head of a request within `seconds`.

    uvicorn itself watches only connections that have been answered once.
    """

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._waits_for_head():
                self._watch()
            elif self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            super().connection_lost(exc)

        def _waits_for_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _watch(self) -> None:
            if self._deadline is None:  # bytes that trickle in do not move it
                self._deadline = self.loop.call_later(seconds, self._close_idle)

        def _close_idle(self) -> None:
            self._deadline = None
            if self._waits_for_head() and not self.transport.is_closing():
                self.transport.close()

    return Protocol
