"""The HTTP application: the shapes of vLLM's pooling servers, and raw rewards in them.

    POST /classify   {"input": TEXT, [TEXT, ...], [ID, ...] or [[ID, ...], ...]} or {"messages": [...]}: all outputs
    POST /pooling    the same, as "data"
    POST /score      {"text_1": PROMPT, "text_2": RESPONSE or [RESPONSE, ...]}: the reward of each response
    GET /health, /metrics (Prometheus), /v1/models

`input` is a whole rendering of the chat template, tokenized without adding special tokens; `messages` and `text_1` go
through the model's own template. Source of the shapes: vLLM's documentation of pooling models.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import prometheus_client
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rmjax.data.records import BadRow, check_conversation
from rmjax.serving.batching import Batcher, QueueFull

MOST_BYTES = 16 * 2**20  # of a request
WARM = 4_096  # tokens: rows up to here are compiled before the server is ready
CODES = {400: "BadRequestError", 413: "BadRequestError", 404: "NotFoundError", 405: "BadRequestError"}

log = logging.getLogger("rmjax.serve")


class Refused(Exception):
    """A request that is answered with an error.

    Attributes:
        code: of HTTP.
        detail: what was found, what was expected.
    """

    def __init__(self, code: int, detail: str):
        super().__init__(detail)
        self.code, self.detail = code, detail


class Service:
    """A model behind a batcher, with its counters.

    Attributes:
        name: of the model, as clients see it.
        ready: whether it is compiled for common shapes.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        *,
        max_length: int,
        queue: int,
        batch_tokens: int,
        max_wait: float,
        normalize: tuple[float, float] | None = None,
    ):
        """Starts the batcher.

        Args:
            model: a RewardModel of sequence classification.
            name: of it.
            max_length: most tokens of a sequence; 0 is no limit.
            queue: sequences that may wait.
            batch_tokens: of a batch.
            max_wait: seconds that a request waits for others.
            normalize: mean and standard deviation, for rewards.
        """
        self.model, self.name, self.max_length, self.ready = model, name, max_length, False
        self._normalize = normalize
        self._encoding = threading.Lock()  # a tokenizer is one thread's at a time
        self.registry = prometheus_client.CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus_client.Counter("rmjax_requests", "Requests.", ["route", "status"], **make)
        self.seconds = prometheus_client.Histogram("rmjax_request_seconds", "Seconds of a request.", ["route"], **make)
        self._sizes = prometheus_client.Histogram(
            "rmjax_batch_requests", "Requests of a batch.", buckets=[2**i for i in range(11)], **make
        )
        self._tokens = prometheus_client.Counter("rmjax_tokens", "Tokens of all batches.", **make)
        self._busy = prometheus_client.Counter("rmjax_model_seconds", "Seconds in which the model computed.", **make)
        self.batcher = Batcher(model.outputs, most=queue, batch_tokens=batch_tokens, max_wait=max_wait, told=self._told)
        waiting = prometheus_client.Gauge("rmjax_waiting", "Sequences in the queue.", **make)
        waiting.set_function(lambda: self.batcher.waiting)

    def _told(self, requests: int, tokens: int, seconds: float) -> None:
        self._sizes.observe(requests)
        self._tokens.inc(tokens)
        self._busy.inc(seconds)

    def warm_up(self) -> None:
        """Compiles rows of every length up to WARM tokens, or the longest sequence."""
        length, most = 200, min(self.max_length or WARM, WARM)
        while length <= most:
            self.model.outputs([[0] * length])
            length *= 2
        self.ready = True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of renderings."""
        with self._encoding:
            return self.model.chat.encode(list(texts))

    def render(self, conversation: Any) -> str:
        """The rendering of a whole conversation.

        Raises:
            Refused: it is none, or the template refuses it.
        """
        try:
            return self.model.chat.render(check_conversation(conversation))
        except BadRow as bad:
            raise Refused(400, bad.detail) from None

    async def outputs(self, request: Request, sequences: list[Sequence[int]], prompts: list[Any]) -> np.ndarray:
        """Outputs [n, A] of sequences.

        Raises:
            Refused: one is empty, too long or has unknown ids; the queue is full; or the client has gone.
        """
        for index, sequence in enumerate(sequences):
            if not len(sequence):
                raise Refused(400, f"input {index} has no tokens")
            if self.max_length and len(sequence) > self.max_length:
                raise Refused(400, f"input {index} has {len(sequence)} tokens, at most {self.max_length} are allowed")
            if max(sequence) >= self.model.config.vocab or min(sequence) < 0:
                raise Refused(
                    400, f"input {index} has a token id that is not of the vocabulary of {self.model.config.vocab}"
                )
        try:
            answer = self.batcher.submit(sequences, prompts)
        except QueueFull as full:
            raise Refused(503, f"{full}; try again later") from None
        waiting = asyncio.wrap_future(answer)
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=1.0)
                if not waiting.done() and await request.is_disconnected():
                    answer.cancel()
                    raise Refused(499, "the client has gone")
        except asyncio.CancelledError:
            answer.cancel()
            raise
        return await waiting

    def told(self, outputs: np.ndarray) -> np.ndarray:
        """What /classify and /pooling answer: rewards as they are, normalized if asked; of a judge probabilities."""
        if self._normalize is not None:
            outputs = (outputs - self._normalize[0]) / self._normalize[1]
        objective = self.model.objective
        if objective is not None and objective.problem_type == "single_label_classification":
            return np.stack(list(self.model.decode(outputs).values()), -1)
        return outputs

    def rewards(self, outputs: np.ndarray) -> np.ndarray:
        """[n]: what /score answers.

        Raises:
            Refused: the model has no single reward.
        """
        values = self.model.decode(outputs)
        if "score" not in values:
            raise Refused(400, f"the model gives {', '.join(values)}, not one reward; ask /classify")
        mean, std = self._normalize or (0.0, 1.0)
        return (values["score"] - mean) / std


# ----------------------------------------------------------------------------------------------------
# Requests
# ----------------------------------------------------------------------------------------------------


async def read(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        Refused: too large, or no JSON object.
    """
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise Refused(413, f"the request is larger than {MOST_BYTES // 2**20} MiB")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the request is a {type(body).__name__}, expected an object")
    return body


def sequences_of(service: Service, body: dict[str, Any]) -> tuple[list[Sequence[int]], list[Any]]:
    """Token sequences of "input" or "messages", and what their prompts are.

    Raises:
        Refused: neither is there as it must be.
    """
    if ("input" in body) == ("messages" in body):
        raise Refused(400, "expected one of `input` (rendered text, texts, or token ids) and `messages`")
    if body.get("add_special_tokens"):
        raise Refused(400, "add_special_tokens must be false: the chat template decides special tokens")
    if "messages" in body:
        return list(service.encode([service.render(body["messages"])])), [object()]
    given = body["input"]
    if isinstance(given, str):
        given = [given]
    whole = lambda x: isinstance(x, list) and all(type(i) is int for i in x)
    if isinstance(given, list) and given and all(isinstance(x, str) for x in given):
        for text in given:
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise Refused(400, "the input is no Unicode: half of a surrogate pair")
        return _with_prompts(service.encode(given))
    if whole(given) and given:
        return [given], [object()]
    if isinstance(given, list) and given and all(whole(x) and x for x in given):
        return _with_prompts(given)
    raise Refused(
        400, f"`input` is {type(given).__name__} {str(given)[:60]!r}, expected text, texts, ids or lists of ids"
    )


def _with_prompts(sequences: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[Any]]:
    """Neighbours whose first halves are equal get equal prompts, so that what they share is computed once."""
    prompts: list[Any] = []
    for before, now in zip([[], *sequences], sequences):
        half = min(len(before), len(now)) // 2
        prompts.append(prompts[-1] if half and before[:half] == now[:half] else object())
    return list(sequences), prompts


def pairs_of(service: Service, body: dict[str, Any]) -> tuple[list[Sequence[int]], list[Any]]:
    """Token sequences of "text_1", a prompt, with each of "text_2", responses; or as many prompts as responses.

    Raises:
        Refused: they are not there as they must be.
    """
    sides = []
    for name in ("text_1", "text_2"):
        side = body.get(name)
        side = [side] if isinstance(side, str) else side
        if not isinstance(side, list) or not side or not all(isinstance(text, str) for text in side):
            raise Refused(400, f"`{name}` is {type(side).__name__}, expected a text or a list of texts")
        sides.append(side)
    prompts, responses = sides
    if len(prompts) not in (1, len(responses)):
        raise Refused(400, f"{len(prompts)} texts in text_1 for {len(responses)} in text_2; expected one, or as many")
    prompts = prompts * len(responses) if len(prompts) == 1 else prompts
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in zip(prompts, responses)
    ]
    return list(service.encode([service.render(turn) for turn in turns])), prompts


def _answer(service: Service, kind: str, data: list[Any], sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    tokens = sum(map(len, sequences))
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": service.name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


async def classify(service: Service, request: Request) -> dict[str, Any]:
    """POST /classify."""
    sequences, prompts = await run_in_threadpool(sequences_of, service, await read(request))
    outputs = service.told(await service.outputs(request, sequences, prompts))
    labels = service.model.labels
    data = [
        {"index": i, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(row)}
        for i, row in enumerate(outputs)
    ]
    return _answer(service, "classify", data, sequences)


async def pooling(service: Service, request: Request) -> dict[str, Any]:
    """POST /pooling."""
    sequences, prompts = await run_in_threadpool(sequences_of, service, await read(request))
    outputs = service.told(await service.outputs(request, sequences, prompts))
    data = [{"index": i, "object": "pooling", "data": row.tolist()} for i, row in enumerate(outputs)]
    return _answer(service, "pool", data, sequences)


async def score(service: Service, request: Request) -> dict[str, Any]:
    """POST /score."""
    sequences, prompts = await run_in_threadpool(pairs_of, service, await read(request))
    rewards = service.rewards(await service.outputs(request, sequences, prompts))
    data = [{"index": i, "object": "score", "score": float(x)} for i, x in enumerate(rewards)]
    return _answer(service, "score", data, sequences)


def _error(code: int, detail: str) -> JSONResponse:
    kind = CODES.get(code, "InternalServerError" if code == 500 else "ServiceUnavailableError")
    body = {"error": {"message": detail, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, code, headers={"Retry-After": "1"} if code == 503 else None)


def build(service: Service, *, drain: float = 30.0) -> Starlette:
    """The application.

    Args:
        service: the model.
        drain: seconds that queued requests are waited for when the server stops.
    """

    def route(path: str, answer: Callable[[Service, Request], Any]) -> Route:
        async def endpoint(request: Request) -> Response:
            begun, code = time.monotonic(), 200
            try:
                if not service.ready:
                    raise Refused(503, "the model is being compiled; see /health")
                return JSONResponse(await answer(service, request))
            except Refused as refused:
                code = refused.code
                return _error(code, refused.detail)
            except Exception:
                code = 500
                log.exception("a request to %s failed", path)
                return _error(code, "an error of the server; its log says more")
            finally:
                service.requests.labels(path, code).inc()
                service.seconds.labels(path).observe(time.monotonic() - begun)

        return Route(path, endpoint, methods=["POST"])

    async def health(_: Request) -> Response:
        return Response(status_code=200) if service.ready else _error(503, "the model is being compiled")

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(prometheus_client.generate_latest(service.registry))

    async def models(_: Request) -> Response:
        one = {"id": service.name, "object": "model", "owned_by": "rmjax", "max_model_len": service.max_length or None}
        return JSONResponse({"object": "list", "data": [one]})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        warming = asyncio.get_running_loop().run_in_executor(None, service.warm_up)
        yield
        await run_in_threadpool(service.batcher.close, drain)
        await asyncio.wait([asyncio.ensure_future(warming)], timeout=drain)

    async def unknown(request: Request, error: Exception) -> Response:
        code = getattr(error, "status_code", 404)
        return _error(code, f"{request.method} {request.url.path}: there is POST /classify, /pooling and /score")

    gets = [Route("/health", health), Route("/metrics", metrics), Route("/v1/models", models)]
    posts = [route("/classify", classify), route("/pooling", pooling), route("/score", score)]
    return Starlette(routes=[*posts, *gets], lifespan=lifespan, exception_handlers={404: unknown, 405: unknown})
