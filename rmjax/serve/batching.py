"""Dynamic batching: requests wait in a bounded queue; one thread that owns the model takes as many as fit a batch."""

import bisect
import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from rmjax.batches.trees import common_prefix, sort_key, worth

Run = Callable[[list[Sequence[int]]], np.ndarray]  # sequences to outputs [n, A]
Answer = concurrent.futures.Future[np.ndarray]


class QueueFull(Exception):
    """There is no room for a request; it may be sent again later."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The sequences of one request."""

    sequences: list[Sequence[int]]  # token ids
    answer: Answer  # float32 [n, A]
    tokens: int  # of all sequences
    since: float  # when it came, by time.monotonic


class Batcher:
    """A queue before a model: `waiting` sequences of at most `most`.

    A batch is whole requests, in their order: as many as are waiting, up to `batch_tokens`, of which what sequences
    share at their beginning is counted once; a larger request is a batch alone. A request waits at most `max_wait`
    seconds for others, including the time in which the model is busy.
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

    def submit(self, sequences: list[Sequence[int]]) -> Answer:
        """Queues the sequences of a request, or raises QueueFull; cancelling the future takes them out again."""
        job = Job(sequences, Answer(), sum(map(len, sequences)), time.monotonic())
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
        try:
            outputs = self._run([sequence for job in jobs for sequence in job.sequences])
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
        laid = Laid()
        while job := self._pop():
            for sequence in job.sequences:  # without the lock, which those who submit wait for
                laid.add(sequence)
            if batch and laid.tokens > self._batch_tokens:
                with self._changed:
                    self._jobs.appendleft(job)
                    self._count(job, 1)
                break
            batch.append(job)
        return batch

    def _pop(self) -> Job | None:
        with self._changed:
            if not self._jobs:
                return None
            self._count(self._jobs[0], -1)
            return self._jobs.popleft()


class Laid:
    """Counts the `tokens` of sequences that are computed together, as trees (`shared_trees`); a little too many."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sorted: list[tuple[bytes, np.ndarray]] = []

    def add(self, sequence: Sequence[int]) -> None:
        array = np.asarray(sequence, np.int32)
        here = bisect.bisect_left(self._sorted, key := sort_key(array), key=lambda one: one[0])
        shared = 0
        for _, other in self._sorted[max(here - 1, 0) : here + 1]:
            common = common_prefix([array, other])
            if worth(common, min(len(array), len(other))):
                shared = max(shared, common)
        self._sorted.insert(here, (key, array))
        self.tokens += len(array) - max(shared - 1, 0)
