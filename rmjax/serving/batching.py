"""Dynamic batching: requests wait in a bounded queue; one thread that owns the model takes as many as fit a batch."""

import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Run = Callable[[list[Sequence[int]], list[Any]], np.ndarray]  # sequences and their prompts to outputs [n, A]


class QueueFull(Exception):
    """There is no room for a request; it may be sent again later."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The sequences of one request.

    Attributes:
        sequences: token ids of each.
        prompts: for each, a value that is equal for neighbours worth putting into one tree.
        answer: gets the outputs, float32 [n, A].
    """

    sequences: list[Sequence[int]]
    prompts: list[Any]
    answer: "concurrent.futures.Future[np.ndarray]"

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.sequences))


class Batcher:
    """A queue before a model.

    A batch is whole requests, in their order: as many as are waiting, up to `batch_tokens`; a larger request is a batch
    of its own. The first one waits at most `max_wait` seconds for others, and not at all while the model is busy.

    Attributes:
        waiting: sequences in the queue.
    """

    def __init__(
        self,
        run: Run,
        *,
        most: int,
        batch_tokens: int,
        max_wait: float,
        told: Callable[[int, int, float], None] = lambda requests, tokens, seconds: None,
    ):
        """Starts the thread.

        Args:
            run: computes a batch; an error of its is every request's of the batch.
            most: sequences that may wait.
            batch_tokens: of a batch.
            max_wait: seconds.
            told: is told of each batch its requests, tokens and seconds.
        """
        self.waiting = 0
        self._run, self._most, self._tokens, self._wait, self._told = run, most, batch_tokens, max_wait, told
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence[int]], prompts: list[Any]) -> "concurrent.futures.Future[np.ndarray]":
        """Queues the sequences of a request; cancel the future to give it up.

        Raises:
            QueueFull: no room, or the server stops.
        """
        job = Job(sequences, prompts, concurrent.futures.Future())
        with self._changed:
            if self._closed:
                raise QueueFull("the server is stopping")
            if self.waiting and self.waiting + len(sequences) > self._most:  # one alone may be larger than the queue
                raise QueueFull(f"{self.waiting} sequences are waiting, and at most {self._most} may")
            self._jobs.append(job)
            self.waiting += len(sequences)
            self._changed.notify()
        return job.answer

    def close(self, seconds: float) -> bool:
        """Takes no more, and waits for what is queued; False if that took longer."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            live = [job for job in batch if job.answer.set_running_or_notify_cancel()]
            if not live:
                continue
            begun = time.monotonic()
            try:
                outputs = self._run(
                    [s for job in live for s in job.sequences], [p for job in live for p in job.prompts]
                )
            except Exception as error:
                for job in live:
                    job.answer.set_exception(error)
                continue
            cuts = np.cumsum([len(job.sequences) for job in live])[:-1]
            for job, those in zip(live, np.split(outputs, cuts)):
                job.answer.set_result(those)
            self._told(len(live), sum(job.tokens for job in live), time.monotonic() - begun)

    def _next(self) -> list[Job] | None:
        """The next batch; None when all is done and no more will come."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            until = time.monotonic() + self._wait
            while not self._closed and sum(job.tokens for job in self._jobs) < self._tokens:
                if (left := until - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            if not self._jobs:
                return None
            batch, tokens = [self._jobs.popleft()], 0
            tokens = batch[0].tokens
            while self._jobs and tokens + self._jobs[0].tokens <= self._tokens:
                batch.append(self._jobs.popleft())
                tokens += batch[-1].tokens
            self.waiting -= sum(len(job.sequences) for job in batch)
            return batch
