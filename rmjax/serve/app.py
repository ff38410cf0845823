"""The HTTP application: the shapes of vLLM's and SGLang's servers and of trainers, and raw rewards in them.

    POST /classify   {"input": TEXT, [TEXT, ...], [ID, ...] or [[ID, ...], ...]} or {"messages": [...]}: all outputs
    POST /pooling    the same, as "data"
    POST /score      {"text_1": PROMPT, "text_2": RESPONSE or [RESPONSE, ...]}: the reward of each response
    POST /rerank     {"query": PROMPT, "documents": [RESPONSE, ...]}: the responses, the best first
    POST /v1/embeddings  {"input": ...}: the one reward as an "embedding", as verl asks SGLang
    POST /get_reward or /   {"query": [...], "prompts": [...]} (OpenRLHF) or {"prompt": ..., "response": ...} (slime)
    GET /health, /metrics (Prometheus), /v1/models

Answers of an ensemble, and of a model with several heads, whose mean is the reward, have `spread` beside each reward,
but for slime, to which a number is answered.

`input` is a whole rendering of the chat template, its BOS included, tokenized without adding special tokens (vLLM adds
them unless told not to). One that does not begin or end as renderings do is refused, or completed ("complete": true).
`messages` and prompts with their responses go through the model's own template. /classify also takes SGLang's
{"text": TEXT or [TEXT, ...]} (or "input_ids") and answers as SGLang does: [{"embedding": [REWARD], "meta_info": ...}].

Sources of the shapes: vLLM's documentation of pooling models, and its request and response classes in
vllm/entrypoints/pooling; SGLang's native API, "Classify"; openrlhf/utils/agent.py and openrlhf/cli/serve_rm.py;
verl/experimental/reward_loop/reward_loop.py; slime/rollout/rm_hub/__init__.py. vLLM reads the two texts of /score as a
query and a document for a cross-encoder; a reward model reads a prompt and a response.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import prometheus_client
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rmjax.serve.bodies import Bodies
from rmjax.serve.connections import Gate
from rmjax.serve.inputs import STOPPING, Asked, Body, Refused, responses
from rmjax.serve.service import Answers, Service

T = TypeVar("T")

CLOSE_SECONDS = 2.0  # for the threads to end once everybody is answered
# vLLM's names of errors.
KINDS = {401: "AuthenticationError", 404: "NotFoundError", 500: "InternalServerError", 503: "ServiceUnavailableError"}
COMPILING = "the model is being compiled; /health says 200 when it is ready"

log = logging.getLogger("rmjax.serve")


@dataclasses.dataclass(frozen=True)
class Desk:
    """What every route needs: the model, the requests that are inside, and the bodies in memory."""

    service: Service
    gate: Gate
    bodies: Bodies

    async def read(
        self, request: Request, read: Callable[[Body], T], repeats: Callable[[Body], int] = lambda _: 1
    ) -> T:
        """What a request asks for; see `Service.prepared`."""
        data = await self.bodies.receive(request)
        try:
            return await self.service.prepared(data, read, request.is_disconnected, repeats)
        finally:
            self.bodies.release(data)

    async def answers(self, request: Request, asked: Asked, activation: bool | None = None, *, one: bool) -> Answers:
        """The answers to these sequences, of one value each if `one` reward is wanted."""
        return await self.service.answers(asked, request.is_disconnected, activation, one=one)


def _plain(service: Service, body: Body) -> tuple[Asked, bool | None]:
    """What `input` or `messages` asks for, and `use_activation`.

    verl sends false, by the old name `activation` before 2026, with the rendering without its BOS, and takes the last
    number of the answer.
    """
    activation, old = service.activation(body), body.get("activation") is not None
    if old and len(service.labels) > 1 and not activation:
        names = ", ".join(service.labels)
        raise Refused(
            400,
            f"the model gives {names}, and a trainer that sends `activation` takes the last; say `use_activation`, "
            "or start the server with --reward=NAME",
        )
    return service.reader.inputs(
        body, complete=True if old or body.get("use_activation") is False else None
    ), activation


def _answer(service: Service, kind: str, data: list[Any], asked: Asked) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": data,
        "usage": {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens, "completion_tokens": 0},
    }


async def classify(desk: Desk, request: Request) -> Any:
    service = desk.service

    def read(body: Body) -> tuple[Asked, bool | None, Callable[..., Any]]:
        if ("text" in body or "input_ids" in body) and not ("input" in body or "messages" in body):
            name = "text" if "text" in body else "input_ids"
            several = isinstance(body[name], list) and bool(body[name]) and isinstance(body[name][0], str | list)
            service.activation(body)
            return service.reader.renderings(name, body), False, functools.partial(_as_sglang, several)
        return *_plain(service, body), functools.partial(_as_vllm, service)

    asked, activation, answer = await desk.read(request, read)
    return answer(asked, await desk.answers(request, asked, activation, one=False))


def _as_vllm(service: Service, asked: Asked, answers: Answers) -> Any:
    labels = service.labels
    data = [
        {"index": i, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(row), **beside}
        for i, (row, beside) in enumerate(zip(*answers))
    ]
    return _answer(service, "classify", data, asked)


def _as_sglang(several: bool, asked: Asked, answers: Answers) -> Any:
    """One object for a single text, a list for a list."""
    objects = [
        {"embedding": row.tolist(), "meta_info": {"id": uuid.uuid4().hex, "prompt_tokens": length, **beside}}
        for row, beside, length in zip(*answers, asked.lengths)
    ]
    return objects if several else objects[0]


async def pooling(desk: Desk, request: Request) -> Any:
    asked, activation = await desk.read(request, functools.partial(_plain, desk.service))
    answers = await desk.answers(request, asked, activation, one=False)
    data = [
        {"index": i, "object": "pooling", "data": row.tolist(), **beside}
        for i, (row, beside) in enumerate(zip(*answers))
    ]
    return _answer(desk.service, "pool", data, asked)


async def _rewards(
    desk: Desk, request: Request, read: Callable[[Body], T], repeats: Callable[[Body], int] = lambda _: 1
) -> tuple[T, list[float], list[dict[str, Any]]]:
    """What was asked, an Asked or a tuple that begins with one; the one reward of each sequence, and what is beside."""
    given: Any = await desk.read(request, lambda body: (desk.service.activation(body), read(body))[1], repeats)
    asked = given[0] if isinstance(given, tuple) else given
    answers = await desk.answers(request, asked, one=True)
    return given, answers.values[:, 0].tolist(), answers.beside


async def score(desk: Desk, request: Request) -> Any:
    asked, rewards, beside = await _rewards(desk, request, desk.service.reader.pairs, responses)
    data = [{"index": i, "object": "score", "score": reward, **beside[i]} for i, reward in enumerate(rewards)]
    return _answer(desk.service, "score", data, asked)


async def rerank(desk: Desk, request: Request) -> Any:
    (asked, documents, top), rewards, beside = await _rewards(desk, request, desk.service.reader.ranked, responses)
    best = sorted(range(len(rewards)), key=lambda i: -rewards[i])[:top]
    results = [
        {"index": i, "document": {"text": documents[i]}, "relevance_score": rewards[i], **beside[i]} for i in best
    ]
    answer = _answer(desk.service, "rerank", [], asked)
    return {**{name: answer[name] for name in ("id", "model", "usage")}, "results": results}


async def embeddings(desk: Desk, request: Request) -> Any:
    complete = functools.partial(desk.service.reader.inputs, complete=True)
    asked, rewards, beside = await _rewards(desk, request, complete)
    data = [{"index": i, "object": "embedding", "embedding": [reward], **beside[i]} for i, reward in enumerate(rewards)]
    return _answer(desk.service, "embd", data, asked)


async def rollouts(desk: Desk, request: Request) -> Any:
    """OpenRLHF takes `rewards` and `scores`; slime the whole answer, which is a number."""

    def read(body: Body) -> tuple[Asked, bool]:
        return desk.service.reader.rollouts(body), "response" in body

    (_, of_slime), rewards, beside = await _rewards(desk, request, read)
    lists = {name: [one[name] for one in beside] for name in next(iter(beside), {})}
    return rewards[0] if of_slime else {"rewards": rewards, "scores": rewards, "extra_logs": {}, **lists}


def _error(code: int, detail: str, *, close: bool = False) -> JSONResponse:
    body = {"error": {"message": detail, "type": KINDS.get(code, "BadRequestError"), "param": None, "code": code}}
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(code, {})
    return JSONResponse(body, code, headers=headers | ({"Connection": "close"} if close else {}))


def _route(desk: Desk, path: str, answer: Callable[[Desk, Request], Awaitable[Any]]) -> Route:
    service = desk.service

    async def inside(request: Request) -> Any:
        if _excess(request):
            raise Refused(503, "there are too many connections; try again later")
        if not service.ready:
            raise Refused(503, COMPILING)
        return await answer(desk, request)

    async def endpoint(request: Request) -> Response:
        begun, response = time.monotonic(), _error(499, "the client has gone")  # stays if the server gives it up
        try:
            response = JSONResponse(await desk.gate.through(inside(request)))
        except Refused as refused:
            if refused.code == 503:
                await desk.bodies.discard(request)
            close = refused.code == 408 or desk.gate.closed or _excess(request)
            response = _error(refused.code, refused.detail, close=close)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("a request to %s failed", path)
            response = _error(500, "an error of the server; its log says more")
        finally:
            service.requests.labels(path, response.status_code).inc()
            service.seconds.labels(path).observe(time.monotonic() - begun)
        return response

    return Route(path, endpoint, methods=["POST"])


POSTS = {
    **{"/classify": classify, "/pooling": pooling, "/score": score, "/v1/score": score, "/v1/embeddings": embeddings},
    **{"/rerank": rerank, "/v1/rerank": rerank, "/v2/rerank": rerank, "/get_reward": rollouts, "/": rollouts},
}


def _with_key(app: ASGIApp, key: str) -> ASGIApp:
    """Answers 401 to requests without the key, before anything of theirs is read."""
    wanted = f"Bearer {key}".encode()

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        given = Request(scope).headers.get("authorization", "").encode()
        if hmac.compare_digest(given, wanted):
            await app(scope, receive, send)
        else:
            refusal = _error(
                401, "the server's API key is missing or wrong; send Authorization: Bearer KEY", close=True
            )
            await refusal(scope, receive, send)

    return guarded


def _excess(request: Request) -> bool:
    return bool(request.scope.get("state", {}).get("excess"))


def build(
    service: Service,
    *,
    gate: Gate | None = None,
    seconds: float = 60.0,
    key: str = "",
    on_failure: Callable[[], None] = lambda: None,
) -> Starlette:
    """The application. `gate` counts the requests inside; their bodies must arrive within `seconds`.

    With a `key`, only requests that have it ("Authorization: Bearer KEY") are answered; /health always is.

    `on_failure` is called, in the event loop, if the model cannot be compiled; `service.failure` says why.
    """
    desk = Desk(service, gate or Gate(), Bodies(seconds))

    async def health(_: Request) -> Response:
        if desk.gate.closed:
            return _error(503, STOPPING, close=True)
        return Response(status_code=200) if service.ready else _error(503, COMPILING)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(prometheus_client.generate_latest(service.registry))

    async def models(_: Request) -> Response:
        one = {"id": service.name, "object": "model", "owned_by": "rmjax", "max_model_len": service.max_length or None}
        return JSONResponse({"object": "list", "data": [one]})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start(on_failure)
        yield
        await asyncio.to_thread(service.close, CLOSE_SECONDS)

    async def unknown(request: Request, error: Exception) -> Response:
        code = getattr(error, "status_code", 404)
        return _error(code, f"{request.method} {request.url.path}: there is POST {', '.join(POSTS)}")

    gets = [Route("/metrics", metrics), Route("/v1/models", models)]
    routes = [*gets, *(_route(desk, path, answer) for path, answer in POSTS.items())]
    for route in routes if key else ():
        route.app = _with_key(route.app, key)
    routes.append(Route("/health", health))
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: unknown, 405: unknown})
