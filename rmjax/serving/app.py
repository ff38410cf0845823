"""The HTTP application: the shapes of vLLM's pooling servers, and raw rewards in them.

    POST /classify   {"input": TEXT, [TEXT, ...], [ID, ...] or [[ID, ...], ...]} or {"messages": [...]}: all outputs
    POST /pooling    the same, as "data"
    POST /score      {"text_1": PROMPT, "text_2": RESPONSE or [RESPONSE, ...]}: the reward of each response
    GET /health, /metrics (Prometheus), /v1/models

`input` is a whole rendering of the chat template, its BOS included, tokenized without adding special tokens (vLLM adds
them unless told not to); `messages` and `text_1` go through the model's own template. /classify also takes SGLang's
{"text": TEXT or [TEXT, ...]} (or "input_ids") and answers as SGLang does: [{"embedding": [REWARD], "meta_info": ...}].

Sources of the shapes: vLLM's documentation of pooling models, and its request and response classes in
vllm/entrypoints/pooling; SGLang's native API, "Classify". vLLM reads the two texts of /score as a query and a document
for a cross-encoder; a reward model reads a prompt and a response.
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import prometheus_client
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rmjax.serving.inputs import Asked, Refused
from rmjax.serving.service import STOPPED, Service

MOST_BYTES = 16 * 2**20  # of a request
SMALL = 2**16  # bytes of a request that is parsed at once
KINDS = {404: "NotFoundError", 500: "InternalServerError", 503: "ServiceUnavailableError"}  # vLLM's names of errors
COMPILING = "the model is being compiled; /health says 200 when it is ready"

log = logging.getLogger("rmjax.serve")


async def read(service: Service, request: Request) -> Mapping[str, Any]:
    """The JSON object of a request.

    Raises:
        Refused: too large, too slow, or no JSON object.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(service.request_seconds):
            async for part in request.stream():
                data += part
                if len(data) > MOST_BYTES:
                    raise Refused(413, f"the request is larger than {MOST_BYTES:,} bytes; send fewer texts at a time")
    except TimeoutError:
        seconds = service.request_seconds
        raise Refused(408, f"the request was not there within {seconds:g} seconds; send it faster") from None
    try:  # large bodies in a thread: others are answered meanwhile
        body = json.loads(data) if len(data) <= SMALL else await run_in_threadpool(json.loads, data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the request is a {type(body).__name__}, expected an object")
    return body


async def _outputs(service: Service, request: Request, body: Mapping[str, Any]) -> tuple[Asked, np.ndarray]:
    """What `input` or `messages` asks for, and what is told of it, [n, A]."""
    asked = await run_in_threadpool(service.reader.inputs, body)
    activation = body.get("use_activation")
    if not isinstance(activation, bool | None):
        raise Refused(400, f"`use_activation` is {str(activation)[:60]!r}, expected true or false")
    return asked, service.told(await service.outputs(asked, request.is_disconnected), activation)


def _answer(service: Service, kind: str, data: list[Any], asked: Asked) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": data,
        "usage": {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens, "completion_tokens": 0},
    }


async def classify(service: Service, request: Request) -> Any:
    """POST /classify."""
    body = await read(service, request)
    if ("text" in body or "input_ids" in body) and not ("input" in body or "messages" in body):
        return await _as_sglang(service, request, body)
    asked, outputs = await _outputs(service, request, body)
    labels = service.model.labels
    data = [
        {"index": i, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(row)}
        for i, row in enumerate(outputs)
    ]
    return _answer(service, "classify", data, asked)


async def _as_sglang(service: Service, request: Request, body: Mapping[str, Any]) -> Any:
    """SGLang's answer to `text` or `input_ids`: one object for one of them, a list for a list; outputs as they are."""
    name = "text" if "text" in body else "input_ids"
    asked = await run_in_threadpool(service.reader.whole, name, body[name])
    outputs = service.told(await service.outputs(asked, request.is_disconnected), False)
    made = [
        {"embedding": row.tolist(), "meta_info": {"id": uuid.uuid4().hex, "prompt_tokens": len(sequence)}}
        for row, sequence in zip(outputs, asked.sequences)
    ]
    return made if isinstance(body[name], list) and isinstance(body[name][0], str | list) else made[0]


async def pooling(service: Service, request: Request) -> Any:
    """POST /pooling."""
    asked, outputs = await _outputs(service, request, await read(service, request))
    data = [{"index": i, "object": "pooling", "data": row.tolist()} for i, row in enumerate(outputs)]
    return _answer(service, "pool", data, asked)


async def score(service: Service, request: Request) -> Any:
    """POST /score."""
    body = await read(service, request)
    asked = await run_in_threadpool(service.reader.pairs, body)
    if body.get("use_activation"):
        raise Refused(400, "`use_activation` is true, it must be false or left out: a reward is no probability")
    rewards = service.rewards(await service.outputs(asked, request.is_disconnected))
    data = [{"index": i, "object": "score", "score": float(x)} for i, x in enumerate(rewards)]
    return _answer(service, "score", data, asked)


def _error(code: int, detail: str) -> JSONResponse:
    body = {"error": {"message": detail, "type": KINDS.get(code, "BadRequestError"), "param": None, "code": code}}
    return JSONResponse(body, code, headers={"Retry-After": "1"} if code == 503 else None)


def _route(service: Service, path: str, answer: Callable[[Service, Request], Awaitable[Any]]) -> Route:
    """The route, counted, whose refusals and errors become answers."""

    async def respond(request: Request) -> Response:
        try:
            if not service.ready:
                raise Refused(503, COMPILING)
            return JSONResponse(await answer(service, request))
        except Refused as refused:
            return _error(refused.code, refused.detail)
        except ClientDisconnect:
            return _error(499, "the client has gone")
        except Exception:
            log.exception("a request to %s failed", path)
            return _error(500, "an error of the server; its log says more")

    async def endpoint(request: Request) -> Response:
        begun, code = time.monotonic(), 499  # stays if the server gives the request up
        try:
            response = await respond(request)
            code = response.status_code
            return response
        finally:
            service.requests.labels(path, code).inc()
            service.seconds.labels(path).observe(time.monotonic() - begun)

    return Route(path, endpoint, methods=["POST"])


def build(service: Service, *, drain: float = 30.0, failed: Callable[[], None] = lambda: None) -> Starlette:
    """The application.

    Args:
        service: the model.
        drain: seconds that queued requests are waited for when the server stops and has not been drained before.
        failed: is called, in the event loop, if the model cannot be compiled; `service.failure` says why.
    """

    async def health(_: Request) -> Response:
        if service.stopping:
            return _error(503, STOPPED)
        return Response(status_code=200) if service.ready else _error(503, COMPILING)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(prometheus_client.generate_latest(service.registry))

    async def models(_: Request) -> Response:
        one = {"id": service.name, "object": "model", "owned_by": "rmjax", "max_model_len": service.max_length or None}
        return JSONResponse({"object": "list", "data": [one]})

    async def warm_up() -> None:
        await asyncio.get_running_loop().run_in_executor(None, service.warm_up)
        if service.failure:
            failed()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(warm_up())
        yield
        await run_in_threadpool(service.close, drain)
        await warming

    async def unknown(request: Request, error: Exception) -> Response:
        code = getattr(error, "status_code", 404)
        return _error(code, f"{request.method} {request.url.path}: there is POST /classify, /pooling and /score")

    gets = [Route("/health", health), Route("/metrics", metrics), Route("/v1/models", models)]
    posts = {"/classify": classify, "/pooling": pooling, "/score": score, "/v1/score": score}
    routes = [*gets, *(_route(service, path, answer) for path, answer in posts.items())]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: unknown, 405: unknown})
