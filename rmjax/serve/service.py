"""A reward model behind a batcher, with its counters."""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import prometheus_client

from rmjax.batches.chat import Chat
from rmjax.inference import engine
from rmjax.inference.reward_model import RewardModel
from rmjax.objectives.base import SPREAD
from rmjax.serve import REFUSE
from rmjax.serve.batching import Batcher, QueueFull
from rmjax.serve.bodies import parse
from rmjax.serve.inputs import STOPPING, UNFINISHED, Asked, Body, Reader, Refused, shown

ASK_SECONDS = 0.5  # between two looks whether a client is still there
LARGE = 65_536  # bytes of requests that have threads of their own, so that small ones do not wait for them
SMALL_THREADS = 4
# vLLM's names of one thing, the newest first.
ACTIVATION = ("use_activation", "activation", "softmax")

T = TypeVar("T")

log = logging.getLogger("rmjax.serve")


class Answers(NamedTuple):
    """The answers to the sequences of a request."""

    values: np.ndarray  # float32 [n, A]
    beside: list[dict[str, Any]]  # of each, what stands beside its values: the spread of members or heads


class Service:
    """A model behind a batcher, with its counters.

    The batcher's thread is the only one that computes with `model` once it is `ready`: compiled for the common shapes.
    `failure` is the error that ended the warming up, if there was one.
    """

    def __init__(
        self,
        model: RewardModel,
        name: str,
        *,
        max_length: int,
        queue: int,
        batch_tokens: int,
        max_wait: float,
        normalize: tuple[float, float] | None = None,
        complete: bool = False,
        over_long: str | float = REFUSE,
        policy: Chat | None = None,
        reward: str = "",
    ):
        """Starts the batcher of a model for sequence classification, called `name` by clients.

        A sequence has at most `max_length` tokens (0 is no limit) and a batch `batch_tokens` (0 is what the model
        computes in one call); `queue` sequences may wait, for others `max_wait` seconds. `normalize` is the mean and
        the standard deviation of rewards. `reward` names the one value that all answers are; without it that is the
        score of a model that `has_spread`, and of others /classify and /pooling give all outputs. `complete`,
        `over_long` and `policy` are as in Reader.

        Raises:
            ValueError: the model has no value of that name, or several outputs and `over_long` is one number.
        """
        self.model, self.name, self.max_length = model, name, max_length
        self.ready = False
        self.failure: Exception | None = None
        self._normalize, self._stopping = normalize, False
        self._devices = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        self._reward, self._over_long = reward or ("score" if model.has_spread else ""), over_long
        if self._reward and self._reward not in (values := self._values(1)):
            raise ValueError(f"--reward={reward} is none of what this model gives: {', '.join(values)}")
        if not isinstance(over_long, str) and not self._reward and len(model.labels) > 1:
            names = ", ".join(self._values(1))
            raise ValueError(
                f"--over_long={over_long:g} is one number, this model gives {names}; choose one by --reward"
            )
        self.registry = prometheus_client.CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus_client.Counter("rmjax_requests", "Requests.", ["route", "status"], **make)
        self.seconds = prometheus_client.Histogram("rmjax_request_seconds", "Seconds of a request.", ["route"], **make)
        self._lengths = prometheus_client.Counter(
            "rmjax_over_long", "Sequences longer than allowed, by what was done with them.", ["done"], **make
        )
        self._completed = prometheus_client.Counter(
            "rmjax_completed", "Renderings to which a BOS or an end was added.", ["given"], **make
        )
        sizes: dict[str, Any] = {"vocabulary": model.config.vocab, "max_length": max_length, "most": queue}
        self.reader = Reader(
            model.chat, name, **sizes, complete=complete, over_long=over_long, policy=policy, count=self._count_sequence
        )
        self._sizes = prometheus_client.Histogram(
            "rmjax_batch_requests", "Requests of a batch.", buckets=[2**i for i in range(11)], **make
        )
        self._tokens = prometheus_client.Counter("rmjax_tokens", "Tokens of all batches.", **make)
        self._busy = prometheus_client.Counter("rmjax_model_seconds", "Seconds in which the model computed.", **make)
        batch_tokens = batch_tokens or self._devices * engine.call_tokens()
        limits: dict[str, Any] = {"most": queue, "batch_tokens": batch_tokens, "max_wait": max_wait}
        self.batcher = Batcher(model.outputs, **limits, on_batch=self._count_batch)
        threads = concurrent.futures.ThreadPoolExecutor
        self._small = threads(SMALL_THREADS, "requests")
        # The tokenizer has as many threads as there are cores; some stay free for small requests.
        self._large = threads(max(1, (os.cpu_count() or 1) // 2), "large requests")
        self._warming = threading.Thread(target=self.warm_up, name="warming up", daemon=True)
        waiting = prometheus_client.Gauge("rmjax_waiting", "Sequences in the queue.", **make)
        waiting.set_function(lambda: self.batcher.waiting)
        computed = prometheus_client.Gauge("rmjax_tokens_computed", "Tokens computed; less than all if shared.", **make)
        computed.set_function(lambda: self.model.inference.work.computed)

    def _count_batch(self, requests: int, tokens: int, seconds: float) -> None:
        self._sizes.observe(requests)
        self._tokens.inc(tokens)
        self._busy.inc(seconds)

    def _count_sequence(self, what: str, how: str) -> None:
        (self._lengths if what == "over_long" else self._completed).labels(how).inc()

    def warm_up(self) -> None:
        """Compiles the shapes of all batches whose sequences have at most LONGEST_ROW tokens, then is ready.

        Keeps an error in `failure`. Ends early when the server stops.
        """
        begun = time.monotonic()
        shapes = list(engine.call_shapes(engine.LEAST_ROW, engine.LONGEST_ROW))
        try:
            for rows, tokens in shapes:
                if self._stopping:
                    return
                # No two begin alike, or they would share a row.
                self.model.outputs([[i % self.model.config.vocab] * tokens for i in range(rows * self._devices)])
        except Exception as error:
            self.failure = error
        else:
            self.ready = True
            log.info("ready: %d shapes compiled in %.0f seconds", len(shapes), time.monotonic() - begun)
            if not self.max_length or self.max_length > engine.LONGEST_ROW:
                log.info("longer sequences than %d tokens are compiled when the first one comes", engine.LONGEST_ROW)

    def start(self, on_failure: Callable[[], None]) -> None:
        """Warms up beside the running event loop, which calls `on_failure` if that fails."""
        loop = asyncio.get_running_loop()

        def warm() -> None:
            self.warm_up()
            if self.failure:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(on_failure)

        self._warming = threading.Thread(target=warm, name="warming up", daemon=True)
        self._warming.start()

    def close(self, seconds: float) -> None:
        """Takes no more requests, and finishes queued ones within `seconds`; `busy` says whether some go on."""
        self._stopping = True
        end = time.monotonic() + seconds
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
        if not self.batcher.close(max(seconds, 0.1)):  # an idle thread needs a moment, too
            log.warning("the model is still computing %g seconds after the stop; that is given up", seconds)
        while self.busy and time.monotonic() < end:
            time.sleep(0.01)

    @property
    def busy(self) -> bool:
        """Whether a thread still works: the interpreter's end would wait for it, or abort in the model's."""
        pools = [thread for pool in (self._small, self._large) for thread in pool._threads]
        return any(thread.is_alive() for thread in (self.batcher.thread, self._warming, *pools))

    async def prepared(
        self,
        data: bytearray,
        read: Callable[[Body], T],
        gone: Callable[[], Awaitable[bool]],
        repeats: Callable[[Body], int] = lambda body: 1,
    ) -> T:
        """Parses and tokenizes a request's body in threads, by `read` of its JSON object.

        `gone` says whether the client has gone; `repeats` how often, at most, the text of a body is tokenized. Refused
        by `read`, for no JSON, when the client has gone, or the server stops.
        """

        def small() -> T | concurrent.futures.Future[T]:
            body = parse(data)
            return self._large.submit(read, body) if len(data) * repeats(body) > LARGE else read(body)

        large = len(data) > LARGE
        try:
            first = self._large.submit(lambda: read(parse(data))) if large else self._small.submit(small)
        except RuntimeError:  # it is shut down
            raise Refused(503, STOPPING) from None
        result: Any = await _unless_gone(first, gone)
        return await _unless_gone(result, gone) if isinstance(result, concurrent.futures.Future) else result

    async def answers(
        self, asked: Asked, gone: Callable[[], Awaitable[bool]], activation: bool | None = None, *, one: bool = False
    ) -> Answers:
        """What all outputs mean, or one value of each if `one` reward is wanted, or the server gives but one.

        Refused: the model has no single reward, the queue is full, the server stops, or the client has gone.
        """
        outputs = np.full((len(asked.sequences), max(1, len(self.model.labels))), np.nan, np.float32)
        if asked.scored:
            sequences = [ids for ids in asked.sequences if ids is not None]
            try:
                future = self.batcher.submit(sequences)
            except QueueFull as full:
                raise Refused(503, f"{full}; try again later") from None
            answer: np.ndarray = await _unless_gone(future, gone)
            outputs[asked.scored] = answer
        values = self.rewards(outputs)[:, None] if one or self._reward else self._activated(outputs, activation)
        values = np.array(values, np.float32)
        fixed = [i for i, ids in enumerate(asked.sequences) if ids is None]
        values[fixed] = np.nan if isinstance(self._over_long, str) else self._over_long
        return Answers(values, self._beside(outputs, fixed))

    def _beside(self, outputs: np.ndarray, fixed: Sequence[int]) -> list[dict[str, Any]]:
        if not self.model.has_spread:
            return [{} for _ in outputs]
        _, std = self._normalize or (0.0, 1.0)
        spreads = (self.model.decode(outputs)[SPREAD] / std).tolist()
        return [{SPREAD: None if i in fixed else spread} for i, spread in enumerate(spreads)]

    @property
    def labels(self) -> tuple[str, ...]:
        """What the values of an answer are called."""
        return (self._reward,) if self._reward else tuple(self.model.labels)

    @property
    def judges(self) -> bool:
        objective = self.model.objective
        return objective is not None and objective.problem_type == "single_label_classification"

    def activation(self, body: Body) -> bool | None:
        """What a body says of vLLM's `use_activation`, under any of its names. Refused where it cannot be done."""
        given = {name: body[name] for name in ACTIVATION if body.get(name) is not None}
        for name, value in given.items():
            if not isinstance(value, bool):
                raise Refused(400, f"`{name}` is {shown(value)}, expected true or false")
            if value and not self.judges:
                raise Refused(400, f"`{name}` is true, it must be false or left out: a reward is no probability")
        if len(set(given.values())) > 1:
            raise Refused(400, f"{' and '.join(f'`{name}`' for name in given)} contradict each other")
        return next(iter(given.values()), None)

    def _activated(self, outputs: np.ndarray, activation: bool | None) -> np.ndarray:
        """Rewards, perhaps normalized; of a judge the probabilities of its verdicts, unless `activation` is False."""
        if self._normalize is not None:
            outputs = (outputs - self._normalize[0]) / self._normalize[1]
        if self.judges and activation is not False:
            return np.stack(list(self.model.decode(outputs).values()), -1)
        return outputs

    def rewards(self, outputs: np.ndarray) -> np.ndarray:
        """float32 [n]: the one reward of each; Refused where the model has none, and the server was told none."""
        values = self.model.decode(outputs)
        name = self._reward or "score"
        if name not in values:
            given = ", ".join(values)
            raise Refused(
                400, f"the model gives {given}, not one reward; ask /classify, or start it with --reward=NAME"
            )
        mean, std = self._normalize or (0.0, 1.0)
        return (values[name] - (0.0 if name == SPREAD else mean)) / std

    def _values(self, count: int) -> Mapping[str, np.ndarray]:
        return self.model.decode(np.zeros((count, max(1, len(self.model.labels))), np.float32))


async def _unless_gone(answer: "concurrent.futures.Future[T]", gone: Callable[[], Awaitable[bool]]) -> T:
    """The result of a future; cancelled once the client has gone, so that a queued one never begins."""
    waiting = asyncio.wrap_future(answer)
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=ASK_SECONDS)
            if not waiting.done() and await gone():
                raise Refused(499, "the client has gone")
        if waiting.cancelled():
            raise Refused(503, UNFINISHED)
        return waiting.result()
    finally:
        answer.cancel()
        waiting.cancel()
