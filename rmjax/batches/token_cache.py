"""Groups of token trees on disk: built once by worker processes, then a memory map.

A cache file is Arrow IPC, named by the fingerprint of the data, the chat (tokenizer, template, arguments,
length policy) and the options of `build`. It appears whole (written elsewhere, then renamed), beside a JSON
file with its audit and digests (token_files.py); what is not as it was written is built again. A build that was
killed leaves what it wrote; the next one of the same goes on from there.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from absl import logging

from rmjax.batches import groups as groups_lib
from rmjax.batches import token_files
from rmjax.batches.augment import EVALUATION, augment
from rmjax.batches.chat import Chat, Labelled, conversation_key
from rmjax.batches.encoding import json_digest
from rmjax.batches.groups import COLUMNS, HISTORIES, Groups, Store, schema
from rmjax.batches.tasks import Example, Task
from rmjax.batches.token_files import Result
from rmjax.data import formats, sources
from rmjax.data.ledger import Audit
from rmjax.data.prompts import histories
from rmjax.data.reading import open_rows, read_row
from rmjax.data.records import KEEPABLE, BadRow, Record
from rmjax.runtime import compile_cache
from rmjax.runtime.progress import Progress

CACHE_VERSION = 6  # of what is stored; another one is another file
CHUNK = 256  # rows of a worker's job
SMALL = 2048  # fewer rows than this are tokenized before processes would have started


class WorkerDied(RuntimeError):
    """A process that tokenizes was killed; what was written before stays for the next build, as after any kill."""


def build(
    spec: str,
    chat: Chat,
    task: Task,
    *,
    format: str = "auto",
    columns: str = "",
    carried: Sequence[str] = (),
    on_bad_row: str = "skip",
    max_bad_fraction: float = 0.05,
    workers: int = -1,
    cache_dir: str | Path = "",
    augmentations: Sequence[str] = (),
    progress: TextIO | None = None,
) -> Groups:
    """Reads, renders and tokenizes the sources of `spec`, or maps what an earlier call wrote, if that is whole.

    Args:
        format: a name in formats.FORMATS, or "auto" for each source.
        columns: what columns are, see config.data.columns.
        carried: further columns of the rows that go into Record.columns where they are, beside those of the task.
        on_bad_row: "error" stops at the first; "skip" counts; "keep" counts and keeps those in
            records.KEEPABLE.
        max_bad_fraction: more unusable rows than this are an error; ties are a choice and not among them.
        workers: processes; 0 is none but this one, -1 is one per core. Small data never starts any. They
            import the main module, so a script that calls this needs its `if __name__ == "__main__"`.
        cache_dir: default is $XDG_CACHE_HOME/rmjax or ~/.cache/rmjax.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: data that cannot be read, an unclear format, a bad row (on_bad_row="error"), too many of
            them, no group at all, or data that changed while it was read.
    """
    if on_bad_row not in ("error", "skip", "keep"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is none of error, skip, keep")
    options = [format, type(task).__name__, repr(task), on_bad_row == "keep", *augmentations]
    options += [{"columns": columns}] * bool(columns)  # so that the data of earlier runs, which had none, is the same
    kept = groups_lib.carried(task)
    carried = tuple(dict.fromkeys((*kept, *carried)))
    options += [{"carried": carried, "kept": kept}] * bool(carried)
    witness = sources.Witness(spec)
    origin = witness.fingerprint
    fingerprint = json_digest([origin, chat.fingerprint(), options])[:32]
    versions = [CACHE_VERSION, transformers.__version__, tokenizers.__version__]
    path = _directory(cache_dir) / f"{json_digest([fingerprint, versions])[:32]}.arrow"
    cached = _cached(path, task)
    if cached is None:
        work = functools.partial(_tokenize, task=task, keep=on_bad_row == "keep", augmentations=tuple(augmentations))
        jobs, columns = _jobs(spec, format, columns, carried), schema(task)
        unused: list[_Job] = []
        with token_files.partials(path, CHUNK, WorkerDied) as (partial, left):
            done = _done(token_files.intact_results(left[0], columns) if left else iter(()), jobs, unused)
            results: Iterator[Result] = itertools.chain(done, _run(itertools.chain(unused, jobs), work, chat, workers))
            results = _shown(results, spec, progress) if progress else results
            results = _refuse_bad(results) if on_bad_row == "error" else results
            token_files.write_results(path, partial, results, columns, functools.partial(_confirm, spec, witness))
        cached = _load(path, task)
    store, audit = cached
    audit.check(on_bad_row, max_bad_fraction)
    return Groups(store, np.arange(len(store)), fingerprint, origin, audit)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Rows of one source, and how to read them."""

    layout: formats.Layout
    source: str
    rows: list[tuple[str, sources.Row]]


def _jobs(spec: str, format: str, columns: str, carried: Sequence[str] = ()) -> Iterator[_Job]:
    for item in sources.split_spec(spec):
        layout, rows = open_rows(item, format, columns, carried=carried)
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield _Job(layout, sources.source_name(item), chunk)


def _run(jobs: Iterator[_Job], work: Callable[[Chat, _Job], Result], chat: Chat, workers: int) -> Iterator[Result]:
    """Does the jobs, in processes unless there are few; yields results in the order of the jobs."""
    if workers < 0:
        cores = compile_cache.cores()
        workers = cores if cores > 1 else 0
    head = list(itertools.islice(jobs, SMALL // CHUNK))
    jobs = itertools.chain(head, jobs)
    if not workers or len(head) < SMALL // CHUNK:
        yield from (work(chat, job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (chat, work))
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(_work, job))
            if len(pending) > 4 * workers:  # bounds memory, and keeps every worker busy
                yield _result(pool, pending.popleft())
        while pending:
            yield _result(pool, pending.popleft())
    except concurrent.futures.process.BrokenProcessPool as error:
        raise WorkerDied(
            "a tokenizing process died (out of memory, or a script without `if __name__ == '__main__'`); the next "
            "start goes on with what is left; config.data.workers=0 works without processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(pool: Any, future: "concurrent.futures.Future[Result]") -> Result:
    """A job's result. The pool itself does not notice that a process is killed while it writes one: it waits for the
    rest, from a pipe that it holds open as well.
    """
    while not future.done():
        concurrent.futures.wait([future], timeout=1.0)
        processes = list((pool._processes or {}).values())
        if not future.done() and not all(process.is_alive() for process in processes):
            for process in processes:
                process.kill()
            pool._result_queue._writer.close()
            pool._call_queue._reader.close()
    return future.result()


_worker: Callable[[_Job], Result]  # in worker processes


def _start_worker(chat: Chat, work: Callable[[Chat, _Job], Result]) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
    _worker = functools.partial(work, chat)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone; a killed one cannot tell its workers, which would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: _Job) -> Result:
    return _worker(job)


def _tokenize(chat: Chat, job: _Job, *, task: Task, keep: bool, augmentations: Sequence[str] = ()) -> Result:
    """Rows to groups. With `keep`, a row with a defect that still allows training is counted and kept."""
    audit = Audit(rows=len(job.rows), unread=dict(job.layout.unread))
    lost: dict[tuple[str, str], BadRow] = {}  # by row and reason: a row counts once, however many groups it makes

    def lose(where: str, bad: BadRow) -> None:
        if (where, bad.reason) not in lost or bad.tokens > lost[where, bad.reason].tokens:
            lost[where, bad.reason] = bad

    to_tokenize: list[tuple[str, int, np.ndarray, Record, Example, int]] = []
    for where, row in job.rows:
        for whole in read_row(job.layout, row, job.source, where, keep, audit):
            asked = np.array(histories(whole), np.uint64).ravel()  # of what was read: a swapped copy stays on its side
            for record, use in augment(whole, augmentations, audit.augmented):
                try:
                    examples = task.examples(record)
                except BadRow as bad:
                    examples = [bad]
                usable = [example for example in examples if isinstance(example, Example)]
                to_tokenize += [(where, use, asked, record, example, len(usable)) for example in usable]
                for part in examples:
                    if isinstance(part, BadRow):
                        lose(where, part)
    groups, used = [], set()
    tokenized = chat.groups([example for *_, example, _ in to_tokenize])
    for (where, use, asked, record, example, shares), group in zip(to_tokenize, tokenized):
        if isinstance(group, BadRow):
            kept = keep and group.reason in KEEPABLE
            lose(where, group)
            group = chat.groups([example], keep=True)[0] if kept else group
        if isinstance(group, Labelled):
            for loss in group.left_out:
                lose(where, loss)
            groups.append({**_columns(record, example, group, shares), HISTORIES: asked, "uses": use})
            used.add(where)
            if use != EVALUATION:
                audit.sources[record.source] = audit.sources.get(record.source, 0) + 1
    for (where, _), defect in lost.items():
        audit.add(defect.reason, where, defect.detail, defect.tokens, kept=where in used)
    columns = schema(task)
    arrays = [_array([g[field.name] for g in groups], field.type) for field in columns]
    return Result(pa.RecordBatch.from_arrays(arrays, schema=columns), audit, _rows_digest(job))


def _array(cells: list[Any], of_type: pa.DataType) -> pa.Array:
    """A column; lists, which are numpy's, are put end to end rather than read number by number."""
    if not cells or not pa.types.is_list(of_type):
        return pa.array(cells, of_type)
    offsets = np.cumsum([0, *map(len, cells)], dtype=np.int32)
    values = np.concatenate(cells, dtype=of_type.value_type.to_pandas_dtype(), casting="same_kind")
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), of_type)


def _columns(record: Record, example: Example, group: Labelled, shares: int) -> dict[str, Any]:
    """One line of the file; what the whole record says is shared out among its groups, `shares` of them."""
    tree = group.tree
    keys = [conversation_key(c, record.tools) for c in record.conversations]
    preferred = np.sign(record.wins - record.wins.T).astype(np.int8)
    lengths = np.zeros(len(example.conversations), np.int32)
    np.maximum.at(lengths, tree.end_slot, tree.positions[tree.end] + 1)
    leaf_ends = tree.visible_until == np.arange(1, len(tree) + 1)  # more than is scored where steps are
    whole = tree.positions[leaf_ends] + 1
    characters = np.array([len(c[-1].get("content") or "") for c in record.conversations], np.int32)
    alone = example.conversations is record.conversations  # each response in a sequence of its own
    sizes = lengths if alone else characters
    longer = 0.5 * (1 + np.sign(sizes[:, None] - sizes[None, :]))
    begins = np.ones(len(tree), bool)  # where a run of positions in one node does
    begins[1:] = (tree.visible_until[1:] != tree.visible_until[:-1]) | (tree.positions[1:] != tree.positions[:-1] + 1)
    starts = np.flatnonzero(begins)
    runs = np.stack([starts, tree.positions[starts], tree.visible_until[starts]], axis=1)
    return {
        "id": record.row + (f"#{example.name}" if example.name else ""),
        "source": record.source,
        "tokens": tree.tokens,
        "runs": runs.ravel().astype(np.int32),
        "scored": np.stack([tree.end, tree.end_slot], axis=1).ravel(),
        "characters": characters,
        **{f"label/{name}": x.ravel() for name, x in group.labels.items()},
        "lengths": len(tree),
        "responses": len(example.conversations),
        "ends": len(tree.end),
        "unshared": int(whole.sum()),
        "longest": int(whole.max()),
        "prompt_characters": sum(len(m.get("content") or "") for m in record.conversations[0][:-1]),
        "weights": record.weight,
        "comparisons": float((preferred > 0).sum()) / shares,
        "longer_wins": float(longer[preferred > 0].sum()) / shares,
        "margins": record.largest_margin,
        "agreements": record.agreement,
        "response_sets": _hash(json.dumps([example.name, *sorted(keys)])),
        "label_ids": _label_id(record, preferred, np.argsort(np.array(keys, object), kind="stable")),
        COLUMNS: json.dumps(record.columns),
    }


def _label_id(record: Record, preferred: np.ndarray, order: np.ndarray) -> int:
    """Equal for equal labels, whatever the order of the responses."""
    said: list[Any] = [preferred[np.ix_(order, order)].tobytes().hex()]
    said += [[name, [repr(values[i]) for i in order]] for name, values in sorted(record.attributes.items())]
    said += [repr(record.steps[i]) for i in order if record.steps]
    return _hash(json.dumps(said))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _refuse_bad(results: Iterator[Result]) -> Iterator[Result]:
    for result in results:
        result.audit.check("error", 0.0)
        yield result


def _shown(results: Iterator[Result], spec: str, stream: TextIO) -> Iterator[Result]:
    progress = Progress(lambda: sources.count_rows(spec), f"{spec}:", unit="rows", stream=stream)
    start, done, before = time.monotonic(), 0, 0
    for result in results:
        yield result
        done += result.audit.rows
        if result.before:  # an earlier build's, which is in no rate
            before, start = done, time.monotonic()
        else:
            progress.step(done)
    progress.close()
    earlier = f" ({before:,} of them by an earlier run)" if before else ""
    progress.note(f"{spec}: {done:,} rows read and tokenized in {time.monotonic() - start:,.1f} s{earlier}")


def _rows_digest(job: _Job) -> str:
    """Of the rows of a job and of how they are read; "" where a row holds what cannot be told apart."""
    try:
        text = json.dumps([repr(job.layout), job.source, job.rows], default=sources.plain)
    except (TypeError, ValueError, RecursionError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def _done(left: Iterator[Result], jobs: Iterator[_Job], unused: list[_Job]) -> Iterator[Result]:
    """The results that a killed build wrote whole; takes their jobs from `jobs`.

    It ends at the first whose rows are no longer those of the source: a source may have changed and changed back
    while that build read it. The job that was taken for it is put into `unused`.
    """
    for result, job in zip(left, jobs):
        if not result.rows or result.rows != _rows_digest(job):
            unused.append(job)
            return
        yield result


def _confirm(spec: str, witness: sources.Witness, audit: Audit) -> None:
    """Refuses a build that read other rows than the file is named by, or none."""
    witness.check()
    if not sum(audit.sources.values()):
        raise ValueError(f"{spec}: none of its {audit.rows} rows could be used; {audit.reasons_text()}")


def _load(path: Path, task: Task) -> tuple[Store, Audit]:
    audit = token_files.read_audit(path)
    return Store(path, task), audit


def _cached(path: Path, task: Task) -> tuple[Store, Audit] | None:
    """What an earlier build wrote; None if it wrote nothing, or if the file is not what it wrote any more."""
    try:
        return _load(path, task)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; Arrow's have no number
            raise
        logging.warning("%s is damaged and is built again (%s)", path, str(error).partition("\n")[0])
        return None


def _directory(cache_dir: str | Path) -> Path:
    directory = compile_cache.user_cache(cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    token_files.remove_abandoned(directory)
    return directory
