"""Who is let in, and when those inside are sent away: how a server stops without dropping a request."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from rmjax.serve.inputs import Refused

STOPPING = "the server is stopping; try again later"
UNFINISHED = "the server stopped before this request's turn; try again later"


class Gate:
    """The requests that are being answered.

    Attributes:
        inside: how many they are.
        closed: whether new ones are refused.
    """

    def __init__(self) -> None:
        """Opens it."""
        self.inside, self.closed, self._cleared = 0, False, False
        self._leave: set[asyncio.Future[None]] = set()

    def close(self) -> None:
        """Lets nobody in any more; those inside go on."""
        self.closed = True

    def clear(self) -> None:
        """Sends those inside away, with a refusal."""
        self.closed = self._cleared = True
        for one in self._leave:
            if not one.done():
                one.set_result(None)

    async def through(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of a request's work.

        Raises:
            Refused: the server stops, and did not let it in or sent it away.
        """
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
