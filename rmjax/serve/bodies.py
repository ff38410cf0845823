"""Bodies of requests: received within a time and a memory, and parsed without keeping others from the interpreter."""

import asyncio
import contextlib
import json
import json.decoder
import json.scanner
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request

from rmjax.serve.inputs import Refused

MOST_BYTES = 16 * 2**20  # of a request
MOST_HELD = 16 * MOST_BYTES  # of all requests that are being received or wait to be tokenized
DISCARD_SECONDS = 2.0
AT_ONCE = 20_000  # values: json's C parser, which no thread can interrupt, takes some 10 ms for so many
MOST_NESTED = 20_000  # lists and objects, and keys of objects, of a body with more values than that


class Bodies:
    """The bodies that are in memory: `held` bytes, at most `most`. Each must arrive within `seconds`."""

    def __init__(self, seconds: float, most: int = MOST_HELD):
        self.held, self._seconds, self._most = 0, seconds, most

    async def receive(self, request: Request) -> bytearray:
        """The bytes of a body; `release` gives the memory back. Refused: too large, too slow, or no memory now."""
        data = bytearray()
        try:
            if int(request.headers.get("content-length", "0")) > MOST_BYTES:  # h11 has seen that it is a number
                raise _too_large()
            async with asyncio.timeout(self._seconds):
                async for part in request.stream():
                    self._hold(data, part)
        except TimeoutError:
            self.release(data)
            raise Refused(408, f"the request's body did not arrive within {self._seconds:g} seconds") from None
        except BaseException:
            self.release(data)
            raise
        return data

    def release(self, data: bytearray) -> None:
        self.held -= len(data)

    async def discard(self, request: Request) -> None:
        """Reads for a while what is left of a body that is refused: closing over it would lose the answer, too."""
        with contextlib.suppress(TimeoutError, RuntimeError, ClientDisconnect):  # RuntimeError: it was read
            async with asyncio.timeout(min(self._seconds, DISCARD_SECONDS)):
                async for _ in request.stream():
                    pass

    def _hold(self, data: bytearray, part: bytes) -> None:
        if len(data) + len(part) > MOST_BYTES:
            raise _too_large()
        if self.held + len(part) > self._most:
            raise Refused(503, f"requests of {self.held:,} bytes are being read, at most {self._most:,} may; try later")
        data += part
        self.held += len(part)


def parse(data: bytearray) -> Mapping[str, Any]:
    """The JSON object of a body; raises Refused where it is none."""
    try:
        many = sum(map(data.count, (b",", b"[", b"{"))) > AT_ONCE
        body = _Yielding().decode(data.decode(json.detect_encoding(data))) if many else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON: {str(error)[:300]}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the request is a {type(body).__name__}, expected an object")
    return body


class _Yielding(json.JSONDecoder):
    """json's parser in Python: slower for many values, but other threads run in between."""

    def __init__(self) -> None:
        super().__init__()
        self._nested = 0
        parser: Any = self
        parser.parse_array, parser.parse_object = self._array, self._object
        parser.scan_once = json.scanner.py_make_scanner(parser)  # type: ignore[attr-defined]

    def _array(self, text_and_end: Any, scan: Any) -> Any:
        self._count()
        return json.decoder.JSONArray(text_and_end, scan)  # type: ignore[attr-defined]

    def _object(self, text_and_end: Any, strict: bool, scan: Callable[[str, int], Any], *hooks: Any) -> Any:
        self._count()

        def counted(text: str, index: int) -> Any:
            self._count()
            return scan(text, index)

        return json.decoder.JSONObject(text_and_end, strict, counted, *hooks)  # type: ignore[attr-defined]

    def _count(self) -> None:
        self._nested += 1
        if self._nested > MOST_NESTED:
            detail = f"the request has more than {MOST_NESTED:,} lists, objects and keys; send fewer at a time"
            raise Refused(400, detail)


def _too_large() -> Refused:
    return Refused(413, f"the request is larger than {MOST_BYTES:,} bytes; send fewer texts at a time")
