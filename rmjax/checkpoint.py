"""Checkpoints of a run: saved by Orbax in the background, sealed with digests, verified before they are used.

Orbax restores a flipped byte without a word, and can name a step that lacks files as the latest one. So a step counts
as finished only with its manifest, and as whole only when every file has the digest noted there (step_directory.py).

Orbax's CheckpointManager is not used, only its policies: it changes files after its last callback and deletes
older steps right then, which leaves no moment for a manifest between the last byte of a step and the deletion
of those that it replaces.
"""

import atexit
import contextlib
import dataclasses
import datetime
import json
import logging as python_logging
import math
import os
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from rmjax.runtime import agreement, processes, sealing
from rmjax.runtime.step_directory import CheckpointError, StepDirectory
from rmjax.sharding import path_name

IN_FLIGHT = 32 * 2**20  # bytes of arrays that a process reads or writes at a time, beside the arrays themselves; or one
CHUNK = 16 * 2**20  # bytes of the pieces that arrays are stored in; whoever needs a part of a piece reads all of it


@dataclasses.dataclass(frozen=True)
class _Info:
    """A step, for Orbax's preservation policies."""

    step: int
    metrics: dict[str, Any] | None
    time: datetime.datetime = datetime.datetime.min  # no policy used here looks at it


def _rank(metrics: dict[str, Any]) -> tuple[float, int]:
    return metrics["score"], -metrics["step"]


class Checkpointer:
    """Saves, keeps and restores the steps of one run.

    Kept are the newest `keep_latest` steps and the best `keep_best` by `metric`; of equal ones the earliest
    is the best. A step saved without the metric, or where it is not finite, is never among the best.

    Every process of a run calls every method. Process 0 alone looks at what is there, decides and clears up, and tells
    the others; all write their parts of the arrays, and none is sealed before all have.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep_latest: int,
        keep_best: int = 0,
        metric: str = "",
        mode: str = "max",
        owner: Mapping[str, Any] | None = None,
    ):
        """Opens `directory`, here or in a bucket, which need not exist; nothing is written before the first save.

        `mode` is "max" or "min", whichever is better; `owner` is what the marker says of the run: at least its id, as
        "run". ValueError for values that keep nothing or rank by nothing.
        """
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(f"keep_latest={keep_latest}, keep_best={keep_best}: expected at least 1 and 0")
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r}: expected 'max' or 'min', whichever is better for {metric!r}")
        if keep_best and not metric:
            raise ValueError(f"keep_best={keep_best} without a metric: name the metric that ranks the steps")
        path = epath.Path(directory)
        self._directory = path if path.is_absolute() else path.absolute()  # Orbax takes no other
        self._orbax_directory = _plain_name(self._directory)
        self._steps = StepDirectory(self._directory, owner or {})
        self._metric, self._sign = metric, 1 if mode == "max" else -1
        best = policies.BestN(get_metric_fn=_rank, n=keep_best, keep_checkpoints_without_metrics=False)
        self._keep = policies.AnyPreservationPolicy([policies.LatestN(keep_latest), best])
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future] | None = None  # a step being written, and its end
        self._finished: queue.SimpleQueue[int] = queue.SimpleQueue()  # steps, for `newly_finished`
        self._ends_before_exit = False
        python_logging.getLogger("absl").addFilter(_without_orbax_chatter)

    def save(self, step: int, state: Any, host: dict, metrics: dict[str, float] | None) -> None:
        """Starts saving `state` (arrays) and `host` (JSON) as `step`, and returns once the arrays are copied.

        The arrays may be donated or deleted afterwards. A save still under way is waited for first. A finished step is
        left as it is, with a warning. CheckpointError where this save or the one before failed (a full disk); finished
        steps stay.
        """
        self.wait()
        if self._first_says("saved", lambda: step in self._steps.sealed_steps()):
            logging.warning("step %d is already saved in %s; it is left as it is", step, self._directory)
            return
        host_json = json.dumps({"host": host, "metrics": metrics or {}})
        leaves = jax.tree.leaves(state)
        with self._failures_named(step):
            self._first_says("begun", lambda: self._begin(step))
            if self._orbax is None:
                self._orbax = ocp.AsyncCheckpointer(_handler(save_concurrent=max(map(_shard_bytes, leaves), default=0)))
                if not self._ends_before_exit:
                    # A program that ends without `close`: Python lets no thread start another once it shuts
                    # down, where a save would hang or stay unfinished. `atexit` comes later than that. From
                    # Python 3.12 on none may start even now: a save that needs one fails, and says so.
                    threading._register_atexit(self.wait)  # type: ignore[attr-defined]
                    self._ends_before_exit = True
            pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), state)
            self._orbax.save(self._orbax_directory / str(step), args=ocp.args.PyTreeSave(state, save_args=pieces))
            self._saving = step, self._background.submit(self._finish, self._orbax, step, host_json)

    def amend(self, step: int, host: dict, metrics: dict[str, float] | None) -> None:
        """Replaces the host and the metrics of a finished step, at one moment; CheckpointError where it failed."""
        self.wait()
        if not processes.is_first():
            return
        with self._failures_named(step):
            self._steps.amend(step, json.dumps({"host": host, "metrics": metrics or {}}))
            self._delete_replaced()

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict] | None:
        """Restores the newest whole step and clears the way for training to go on from it.

        Damaged steps are passed over with a warning. Unfinished ones are deleted and broken ones renamed to
        'broken-STEP', so that their numbers can be saved again.

        Args:
            abstract_state: the state's tree of ShapeDtypeStructs, each with the sharding wanted now; the mesh may
                differ from the one saved on.

        Returns:
            (step, state, host), or None where no save was ever finished.

        Raises:
            CheckpointError: steps are there but none is whole (all are left as they are), or the newest has other
                arrays, shapes or dtypes; every difference is named.
        """
        self.close()
        step = self._first_says("newest", self._steps.newest_whole_step)
        restored = None if step is None else (step, *self._read(step, abstract_state, partial=False))
        # Only now: a start that cannot go on from here takes nothing over from one that can.
        self._first_says("taken", lambda: self._steps.go_on_from(step))
        return restored

    def restore_step(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        """Restores a part of one step, for example only {'params': ...} of the best. Changes nothing on disk.

        Returns:
            (state, host), the state in the structure of `abstract_state`.

        Raises:
            CheckpointError: the step is missing or not whole, or lacks an array of this shape and dtype.
        """
        self.wait()
        problem = self._first_says("whole", lambda: sealing.find_damage(self._steps.step_path(step), deep=True))
        if problem:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} cannot be used: {problem}; "
                f"finished steps are {self.steps()}"
            )
        return self._read(step, abstract_state, partial=True)

    def steps(self) -> list[int]:
        """The finished steps, ascending. Large files are only checked for their size."""
        return self._first_says("steps", self._steps.finished_steps)

    def metrics(self, step: int) -> dict[str, float]:
        return self._first_says("metrics", lambda: self._steps.read_host(step)["metrics"])

    def best_step(self) -> int | None:
        """The best of the steps that are still here; None where none has the metric."""
        return self._first_says("best", self._best)

    def wait(self) -> None:
        """Waits until the save under way is finished; CheckpointError where it failed."""
        if self._saving is not None:
            (step, done), self._saving = self._saving, None
            with self._failures_named(step):
                done.result()

    def newly_finished(self) -> Iterator[tuple[int, epath.Path]]:
        """The steps, and their directories, that were finished since the last call; none in processes but the first."""
        while not self._finished.empty():
            step = self._finished.get()
            yield step, self._steps.step_path(step)

    def close(self) -> None:
        """Waits like `wait` and releases Orbax's threads; a later save starts them again."""
        self.wait()
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _first_says(self, what: str, find: Callable[[], Any]) -> Any:
        """The result of process 0; an error of its own ends the others, see processes.py."""
        return agreement.agree(f"checkpoint {what}", find() if processes.is_first() else None)

    def _best(self) -> int | None:
        ranked = [info.metrics for info in map(self._ranked, self._steps.finished_steps()) if info.metrics is not None]
        return max(ranked, key=_rank)["step"] if ranked else None

    def _begin(self, step: int) -> None:
        if not self._steps.taken:
            self._steps.take()
        if self._orbax is None:
            self._steps.clear_up()
        self._steps.begin(step)

    def _finish(self, orbax: ocp.AsyncCheckpointer, step: int, host_json: str) -> None:
        """In the background: waits for the files of a step, seals it, then deletes the steps it replaces."""
        orbax.wait_until_finished()
        if not processes.is_first():  # what this host wrote; process 0 syncs what it can see
            sealing.sync_directory(self._steps.step_path(step) / f"ocdbt.process_{processes.number()}")
        agreement.barrier("checkpoint written")
        if processes.is_first():
            self._steps.finish(step, host_json)
            self._finished.put(step)
            self._delete_replaced()
        agreement.barrier("checkpoint sealed")

    def _delete_replaced(self) -> None:
        begun = self._steps.begun_steps()
        infos = [self._ranked(step) for step in self._steps.finished_steps() if step in begun]
        kept = self._keep.should_preserve(infos, context=policies.PreservationContext())
        self._steps.delete(info.step for info, keep in zip(infos, kept) if not keep)

    def _ranked(self, step: int) -> _Info:
        """A finished step for the policies; `metrics` is None where it cannot be among the best."""
        score = self._steps.read_host(step)["metrics"].get(self._metric, math.nan)
        return _Info(step, {"score": self._sign * score, "step": step} if math.isfinite(score) else None)

    def _read(self, step: int, abstract: Any, partial: bool) -> tuple[Any, dict]:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        with ocp.Checkpointer(_handler()) as reader:
            metadata = reader.metadata(self._orbax_directory / str(step)).item_metadata.tree
        saved, wanted = _shapes(metadata), _shapes(abstract)
        names = sorted(wanted if partial else wanted | saved)
        problems = [
            f"\n  {name}: saved is {saved.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}"
            for name in names
            if saved.get(name) != wanted.get(name)
        ]
        if len(problems) > 8:
            problems[8:] = [f"\n  and {len(problems) - 8} more"]
        if problems:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} was saved by another configuration; "
                f"continue with that one, or use another directory:{''.join(problems)}"
            )
        with ocp.Checkpointer(_handler(restore_concurrent=_most_read(abstract, metadata))) as reader:
            state = reader.restore(self._orbax_directory / str(step), args=args)
        return state, self._first_says("host", lambda: self._steps.read_host(step)["host"])

    @contextlib.contextmanager
    def _failures_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            orbax, self._orbax = self._orbax, None
            with contextlib.suppress(Exception):  # it reports the same failure again
                if orbax is not None:
                    orbax.close()
            # Gives the space back; if it cannot, the next start does. One that does not have the directory must not.
            with contextlib.suppress(OSError, CheckpointError, ValueError):
                if processes.is_first() and self._steps.taken:
                    self._steps.clear_up()
            last = self._steps.finished_steps()[-1:]
            raise CheckpointError(
                f"saving the checkpoint of step {step} in {self._directory} failed: {error} "
                f"({f'step {last[0]} is the last one there' if last else 'there is none before it'}; "
                f"check the free space and permissions, then start again with the same command)"
            ) from error


def _plain_name(directory: epath.Path) -> epath.Path:
    """A path to the directory that Orbax takes literally: a link in place of brackets, below which Orbax's globs find
    nothing, and of backslashes, which TensorStore takes for slashes.
    """
    if "://" in str(directory) or not re.search(r"[\\*?\[\]]", str(directory)):
        return directory
    scratch = tempfile.TemporaryDirectory(prefix="rmjax-")
    atexit.register(scratch.cleanup)
    link = epath.Path(scratch.name) / "checkpoints"
    os.symlink(directory, link)
    return link


def _handler(**most: int) -> ocp.PyTreeCheckpointHandler:
    """Orbax's way to store arrays; `most` are bytes that it must be allowed to have in flight."""
    # Nothing is compressed: parameters and moments shrink by less than a tenth, and writing takes three times as long.
    limits = {f"{name}_gb": (max(IN_FLIGHT, size) + 1024) / 1e9 for name, size in most.items()}
    return ocp.PyTreeCheckpointHandler(use_compression=False, **limits)


def _shard_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def _most_read(abstract: Any, metadata: Any) -> int:
    """Bytes of the stored pieces that hold one device's part of an array; of the array with most."""
    stored = {path_name(path): leaf.storage for path, leaf in jax.tree_util.tree_leaves_with_path(metadata)}

    def of(name: str, leaf: Any) -> int:
        part = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        chunk = stored[name].chunk_shape if stored[name] else None
        if chunk is None:
            return 2 * math.prod(leaf.shape) * leaf.dtype.itemsize
        pieces = [n // c if n % c == 0 else -(-n // c) + 1 for n, c in zip(part, chunk)]
        return math.prod(n * c for n, c in zip(pieces, chunk)) * leaf.dtype.itemsize

    return max((of(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(abstract)), default=0)


def _shapes(tree: Any) -> dict[str, str]:
    """The arrays of a tree by path, as text: {'params/score/kernel': 'float32 (8, 1)'}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): f"{jax.numpy.dtype(leaf.dtype)} {tuple(leaf.shape)}" for path, leaf in leaves}


def _without_orbax_chatter(record: python_logging.LogRecord) -> bool:
    """Drops what Orbax logs: progress, and failures that reach the caller as an exception as well."""
    return "/orbax/" not in record.pathname
