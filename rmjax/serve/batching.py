"""Dynamic batching: requests wait in a bounded queue; one thread that owns the model takes as many as fit a batch."""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

Run = Callable[[list[Sequence[int]], list[Any]], np.ndarray]  # sequences and their prompts to outputs [n, A]
T = TypeVar("T")
Answer = concurrent.futures.Future[np.ndarray]


class QueueFull(Exception):
    """There is no room for a request; it may be sent again later."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The sequences of one request."""

    sequences: list[Sequence[int]]  # token ids
    prompts: list[Any]  # for each sequence, a value that is equal for neighbours worth putting into one tree
    answer: Answer  # float32 [n, A]
    tokens: int  # of all sequences
    since: float  # when it came, by time.monotonic


class Batcher:
    """A queue before a model: `waiting` sequences of at most `most`.

    A batch is whole requests, in their order: as many as are waiting, up to `batch_tokens`; a larger request is
    computed alone, in pieces. A request waits at most `max_wait` seconds for others, including the time in which the
    model is busy.
    """

    def __init__(
        self,
        run: Run,
        *,
        most: int,
        batch_tokens: int,
        max_wait: float,
        on_batch: Callable[[int, int, float], None] = lambda requests, tokens, seconds: None,
    ):
        """An error of `run` goes to all requests of its batch; `on_batch` hears of each batch before its answers."""
        self.most, self.waiting = most, 0
        self._run, self._batch_tokens, self._max_wait, self._on_batch = run, batch_tokens, max_wait, on_batch
        self._jobs: collections.deque[Job] = collections.deque()
        self._tokens = 0  # of all jobs in the queue
        self._changed, self._closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self.thread.start()

    def submit(self, sequences: list[Sequence[int]], prompts: list[Any]) -> Answer:
        """Queues the sequences of a request, or raises QueueFull; cancelling the future takes them out again."""
        job = Job(sequences, prompts, Answer(), sum(map(len, sequences)), time.monotonic())
        with self._changed:
            if self._closed:
                raise QueueFull("the server is stopping")
            if self.waiting + len(sequences) > self.most:
                raise QueueFull(f"{self.waiting} sequences are waiting, and at most {self.most} may")
            self._jobs.append(job)
            self._count(job, 1)
            self._changed.notify()
        job.answer.add_done_callback(lambda answer: self._forget(job) if answer.cancelled() else None)
        return job.answer

    def close(self, seconds: float) -> bool:
        """Takes no more, and waits for what is queued; after `seconds` cancels the rest and returns False."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.thread.join(seconds)
        with self._changed:
            left = list(self._jobs)
        for job in left:
            job.answer.cancel()
        return not self.thread.is_alive()

    def _count(self, job: Job, sign: int) -> None:
        self.waiting += sign * len(job.sequences)
        self._tokens += sign * job.tokens

    def _forget(self, job: Job) -> None:
        """Takes a cancelled request out of the queue, so that it takes nobody's place."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._count(job, -1)

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            live = [job for job in batch if job.answer.set_running_or_notify_cancel()]
            if live:
                self._compute(live)

    def _compute(self, jobs: list[Job]) -> None:
        begun = time.monotonic()
        entries = [entry for job in jobs for entry in zip(job.sequences, job.prompts)]
        pieces = cut_pieces(entries, lambda entry: len(entry[0]), self._batch_tokens)
        try:
            outputs = np.concatenate([self._run([s for s, _ in piece], [p for _, p in piece]) for piece in pieces])
        except Exception as error:
            for job in jobs:
                job.answer.set_exception(error)
            return
        self._on_batch(len(jobs), sum(job.tokens for job in jobs), time.monotonic() - begun)
        cuts = np.cumsum([len(job.sequences) for job in jobs])[:-1]
        for job, own_outputs in zip(jobs, np.split(outputs, cuts)):
            job.answer.set_result(own_outputs)

    def _next(self) -> list[Job] | None:
        """The next batch; None when all is done and no more will come. It may be empty: all were cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return None
            until = self._jobs[0].since + self._max_wait
            while not self._closed and self._tokens < self._batch_tokens and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            batch: list[Job] = []
            tokens = 0
            while self._jobs and (not batch or tokens + self._jobs[0].tokens <= self._batch_tokens):
                batch.append(self._jobs.popleft())
                self._count(batch[-1], -1)
                tokens += batch[-1].tokens
            return batch


def cut_pieces(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Neighbours together, whose sizes add up to at most `most`, unless one alone has more."""
    piece: list[T] = []
    total = 0
    for item in items:
        if piece and total + size(item) > most:
            yield piece
            piece, total = [], 0
        piece.append(item)
        total += size(item)
    if piece:
        yield piece
