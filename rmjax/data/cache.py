"""Groups of token trees on disk: built once by worker processes, then a memory map.

A cache file is Arrow IPC, named by the fingerprint of the data, the chat (tokenizer, template, arguments,
length policy) and the options of `build`. It appears whole (written elsewhere, then renamed), beside a JSON
file with its audit.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from absl import logging

from rmjax.data import formats, sources
from rmjax.data.audit import Audit
from rmjax.data.chat import Chat, Labelled, conversation_key, sequence_lengths
from rmjax.data.records import KEEPABLE, BadRow, Record
from rmjax.data.tasks import Example, Task
from rmjax.data.trees import Tree

CACHE_VERSION = 2  # of what is stored; another one is another file
CHUNK = 256  # rows of a worker's job
SMALL = 2048  # fewer rows than this are tokenized before processes would have started
PROGRESS_SECONDS = 5.0
ABANDONED_SECONDS = 24 * 3600.0  # a build writes all the time, so it no longer runs

INTS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
NUMBERS = {  # one number per group, see Groups
    **{name: pa.int32() for name in ("lengths", "responses", "ends", "unshared", "longest")},
    **{name: pa.float32() for name in ("weights", "comparisons", "longer_wins", "margins", "agreements")},
    **{name: pa.uint64() for name in ("prompt_ids", "response_sets", "label_ids")},
}
# Positions and visible_until are runs: (start, position, visible_until) of each. scored: (end, end_slot) of each.
LISTS = ("tokens", "runs", "scored")


def schema(task: Task) -> pa.Schema:
    """The columns of a cache file; the task's label fields are lists of float32 in C order."""
    lists = dict.fromkeys(LISTS, INTS) | {f"label/{name}": FLOATS for name in task.fields}
    return pa.schema({"id": pa.string(), "source": pa.string(), **lists, **NUMBERS})


@dataclasses.dataclass(frozen=True)
class Group:
    """One group: tree, float32 labels by the fields of its task (without G), weight, row id."""

    tree: Tree
    labels: dict[str, np.ndarray]
    weight: float
    id: str


class Groups:
    """Random access to groups in a cache file, or to a selection of them. n groups.

    Attributes:
        fingerprint: of the data, the chat and the options it was built with.
        fields: the label fields of the task and their axes.
        sources: names of the sources.
        source: int32 [n] which of them each group is from.
        audit: what became of the rows; shared by selections.
        lengths: int32 [n] tokens of each tree.
        responses: int32 [n] responses of each group, K.
        ends: int32 [n] scored tokens.
        unshared: int32 [n] tokens of the responses' conversations, each counted whole.
        longest: int32 [n] tokens of the longest conversation.
        weights: float32 [n].
        comparisons: float32 [n] pairs of responses of which one is preferred.
        longer_wins: float32 [n] those in which it is the longer one, in tokens; equally long counts one half.
        margins: float32 [n] the largest margin in the group; 0 without any.
        agreements: float32 [n] share of the annotators who gave the label; NaN where it is not known.
        prompt_ids: uint64 [n] hash of the prompt: all messages but the last of response 0.
        response_sets: uint64 [n] hash of the set of conversations, whatever their order.
        label_ids: uint64 [n] hash of who is preferred to whom; equal sets with other labels contradict each
            other.
    """

    lengths: np.ndarray
    responses: np.ndarray
    ends: np.ndarray
    unshared: np.ndarray
    longest: np.ndarray
    weights: np.ndarray
    comparisons: np.ndarray
    longer_wins: np.ndarray
    margins: np.ndarray
    agreements: np.ndarray
    prompt_ids: np.ndarray
    response_sets: np.ndarray
    label_ids: np.ndarray

    def __init__(self, store: "_Store", indices: np.ndarray, fingerprint: str, audit: Audit):
        self._store, self._indices = store, indices
        self.fingerprint, self.audit = fingerprint, audit
        self.fields, self.sources, self.source = store.fields, store.sources, store.source[indices]
        for name in NUMBERS:
            setattr(self, name, store.numbers[name][indices])

    def __len__(self) -> int:
        return len(self._indices)

    def group(self, index: int) -> Group:
        """One group; its arrays are read-only views of the file where they can be."""
        return self._store.group(int(self._indices[index]))

    def id(self, index: int) -> str:
        """The row a group came from, "file.jsonl:17"."""
        return self._store.id(int(self._indices[index]))

    def select(self, indices: Sequence[int] | np.ndarray) -> "Groups":
        """A view of these groups, in this order."""
        chosen = self._indices[np.asarray(indices, np.int64)]
        return Groups(self._store, chosen, self.fingerprint, self.audit)

    def sample(self, count: int, seed: int) -> "Groups":
        """A fixed random choice of at most `count` groups, in their order."""
        order = np.random.default_rng(seed).permutation(len(self))
        return self.select(np.sort(order[:count]))

    def fitting(self, row_tokens: int) -> "Groups":
        """The groups whose tree fits a row; the others are counted as `tree_too_long`.

        Raises:
            ValueError: none fits.
        """
        too_long = np.flatnonzero(self.lengths > row_tokens)
        if not len(too_long):
            return self
        audit = self.audit.copy()
        for i in too_long.tolist():
            tokens = int(self.lengths[i])
            audit.add("tree_too_long", self.id(i), f"{tokens} tokens, plan.row_tokens is {row_tokens}", tokens)
        kept = self.select(np.flatnonzero(self.lengths <= row_tokens))
        if not len(kept):
            raise ValueError(
                f"no tree fits a row of {row_tokens} tokens (config.plan.row_tokens); the shortest has "
                f"{self.lengths.min()}, the longest {self.lengths.max()}"
            )
        return Groups(self._store, kept._indices, self.fingerprint, audit)


def split(groups: Groups, fraction: float, seed: int) -> tuple[Groups, Groups]:
    """Splits off about `fraction` of the groups for validation; all groups of a prompt are on one side.

    Returns:
        (training, validation), each in the order of the data.

    Raises:
        ValueError: one side would be empty.
    """
    prompts, inverse, counts = np.unique(groups.prompt_ids, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(prompts))
    before = np.concatenate([[0], np.cumsum(counts[order])[:-1]])  # groups of the prompts drawn before each
    in_validation = np.zeros(len(prompts), bool)
    in_validation[order[before < fraction * len(groups)]] = True
    chosen = in_validation[inverse]
    if not 0 < chosen.sum() < len(groups):
        raise ValueError(
            f"data.validation_fraction={fraction} of {len(groups)} groups with {len(prompts)} different prompts "
            "leaves training or validation without any; give data.validation, or another fraction"
        )
    return groups.select(np.flatnonzero(~chosen)), groups.select(np.flatnonzero(chosen))


def build(
    spec: str,
    chat: Chat,
    task: Task,
    *,
    format: str = "auto",
    on_bad_row: str = "skip",
    max_bad_fraction: float = 0.05,
    workers: int = -1,
    cache_dir: str | Path = "",
    progress: Callable[[str], None] | None = None,
) -> Groups:
    """Reads, renders and tokenizes the sources of `spec`, or maps what an earlier call wrote, if that is whole.

    Args:
        spec: what `sources.open_source` takes.
        chat: tokenizer, template and length policy.
        task: what is learnt: how records become groups, and their labels.
        format: a name in formats.FORMATS, or "auto" for each source.
        on_bad_row: "error" stops at the first; "skip" counts; "keep" counts and keeps those in
            records.KEEPABLE.
        max_bad_fraction: more unusable rows than this are an error; ties are a choice and not among them.
        workers: processes; 0 is none but this one, -1 is one per core. Small data never starts any. They
            import the main module, so a script that calls this needs its `if __name__ == "__main__"`.
        cache_dir: default is $XDG_CACHE_HOME/rmjax or ~/.cache/rmjax.
        progress: is given a line of text now and then.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: data that cannot be read, an unclear format, a bad row (on_bad_row="error"), too many of
            them, or no group at all.
    """
    if on_bad_row not in ("error", "skip", "keep"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is none of error, skip, keep")
    options = [format, type(task).__name__, repr(task), on_bad_row == "keep"]
    fingerprint = _digest([sources.fingerprint(spec), chat.fingerprint(), options])
    versions = [CACHE_VERSION, transformers.__version__, tokenizers.__version__]
    path = _directory(cache_dir) / f"{_digest([fingerprint, versions])}.arrow"
    cached = _cached(path, task)
    if cached is None:
        work = functools.partial(_tokenize, task=task, keep=on_bad_row == "keep")
        reporter = _Progress(spec, progress)
        results = reporter.watch(_run(_jobs(spec, format), work, chat, workers))
        _write(path, _refuse_bad(results) if on_bad_row == "error" else results, schema(task), spec)
        cached = _load(path, task)
    store, audit = cached
    audit.check(on_bad_row, max_bad_fraction)
    return Groups(store, np.arange(len(store)), fingerprint, audit)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Rows of one source, and how to read them."""

    layout: formats.Layout
    source: str
    rows: list[tuple[str, sources.Row]]


@dataclasses.dataclass(frozen=True)
class _Result:
    """The groups of a job's rows, and what became of those rows."""

    groups: pa.RecordBatch
    audit: Audit


def _jobs(spec: str, format: str) -> Iterator[_Job]:
    """The rows of all sources in jobs; the first rows of each source decide how it is read."""
    for item in sources.split_spec(spec):
        rows = sources.open_source(item)
        first = list(itertools.islice(rows, formats.LOOK))
        try:
            layout = formats.detect([row for _, row in first], format)
        except ValueError as error:
            raise ValueError(f"{item}: {error}") from None
        rows = itertools.chain(first, rows)
        while chunk := list(itertools.islice(rows, CHUNK)):
            yield _Job(layout, sources.source_name(item), chunk)


def _run(jobs: Iterator[_Job], work: Callable[[Chat, _Job], _Result], chat: Chat, workers: int) -> Iterator[_Result]:
    """Does the jobs, in processes unless there are few; yields results in the order of the jobs."""
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = cores if cores > 1 else 0
    head = list(itertools.islice(jobs, SMALL // CHUNK))
    jobs = itertools.chain(head, jobs)
    if not workers or len(head) < SMALL // CHUNK:
        yield from (work(chat, job) for job in jobs)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (chat, work)
    )
    pending: collections.deque[concurrent.futures.Future[_Result]] = collections.deque()
    try:
        for job in jobs:
            pending.append(pool.submit(_work, job))
            if len(pending) > 4 * workers:  # bounds memory, and keeps every worker busy
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RuntimeError(
            "a tokenizing process died (out of memory, or a script without `if __name__ == '__main__'`); "
            "config.data.workers=0 works without processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Callable[[_Job], _Result]  # in worker processes


def _start_worker(chat: Chat, work: Callable[[Chat, _Job], _Result]) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
    _worker = functools.partial(work, chat)


def _end_with_parent() -> None:
    """Ends this process when its parent is gone; a killed one cannot tell its workers, which would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: _Job) -> _Result:
    return _worker(job)


def _tokenize(chat: Chat, job: _Job, *, task: Task, keep: bool) -> _Result:
    """Rows to groups. With `keep`, a row with a defect that still allows training is counted and kept."""
    audit = Audit(rows=len(job.rows))
    made: list[tuple[Record, Example]] = []
    for where, row in job.rows:
        read = functools.partial(job.layout.read, row, source=job.source, where=where)
        try:
            records = _or_keep(read, keep, audit, where)
            made += [(record, example) for record in records for example in task.examples(record)]
        except BadRow as bad:
            audit.add(bad.reason, where, bad.detail, bad.tokens)
    groups = []
    for (record, example), group in zip(made, chat.groups([example for _, example in made])):
        if isinstance(group, BadRow):
            kept = keep and group.reason in KEEPABLE
            audit.add(group.reason, record.row, group.detail, group.tokens, kept=kept)
            group = chat.groups([example], keep=True)[0] if kept else group
        if isinstance(group, Labelled):
            groups.append(_columns(record, example, group))
            audit.sources[record.source] = audit.sources.get(record.source, 0) + 1
    columns = schema(task)
    arrays = [pa.array([g[field.name] for g in groups], field.type) for field in columns]
    return _Result(pa.RecordBatch.from_arrays(arrays, schema=columns), audit)


def _or_keep(read: Callable[..., Sequence[Record]], keep: bool, audit: Audit, where: str) -> Sequence[Record]:
    try:
        return read()
    except BadRow as bad:
        if not keep or bad.reason not in KEEPABLE:
            raise
        records = read(keep=True)
        audit.add(bad.reason, where, bad.detail, kept=True)
        return records


def _columns(record: Record, example: Example, group: Labelled) -> dict[str, Any]:
    """One line of the file."""
    tree = group.tree
    keys = [conversation_key(c, record.tools) for c in record.conversations]
    preferred = np.sign(record.wins - record.wins.T).astype(np.int8)
    lengths = np.zeros(len(example.conversations), np.int32)
    np.maximum.at(lengths, tree.end_slot, sequence_lengths(tree))
    sizes = lengths  # of the responses: in tokens, or in characters where they do not stand alone in a sequence
    if example.conversations is not record.conversations:
        sizes = np.array([len(c[-1].get("content") or "") for c in record.conversations])
    longer = 0.5 * (1 + np.sign(sizes[:, None] - sizes[None, :]))
    starts = np.flatnonzero(np.diff(tree.visible_until, prepend=-1) | (np.diff(tree.positions, prepend=-2) - 1))
    runs = np.stack([starts, tree.positions[starts], tree.visible_until[starts]], axis=1)
    return {
        "id": record.row + (f"#{example.name}" if example.name else ""),
        "source": record.source,
        "tokens": tree.tokens,
        "runs": runs.ravel().astype(np.int32),
        "scored": np.stack([tree.end, tree.end_slot], axis=1).ravel(),
        **{f"label/{name}": x.ravel() for name, x in group.labels.items()},
        "lengths": len(tree),
        "responses": len(example.conversations),
        "ends": len(tree.end),
        "unshared": int(lengths.sum()),
        "longest": int(lengths.max()),
        "weights": record.weight,
        "comparisons": int((preferred > 0).sum()),
        "longer_wins": float(longer[preferred > 0].sum()),
        "margins": float(record.margin.max()),
        "agreements": record.agreement,
        "prompt_ids": _hash(conversation_key(record.conversations[0][:-1])),
        "response_sets": _hash(json.dumps([example.name, *sorted(keys)])),
        "label_ids": _label_id(record, preferred, np.argsort(np.array(keys, object), kind="stable")),
    }


def _label_id(record: Record, preferred: np.ndarray, order: np.ndarray) -> int:
    """Equal for equal labels, whatever the order of the responses."""
    said: list[Any] = [preferred[np.ix_(order, order)].tobytes().hex()]
    said += [[name, [repr(values[i]) for i in order]] for name, values in sorted(record.attributes.items())]
    said += [repr(record.steps[i]) for i in order if record.steps]
    return _hash(json.dumps(said))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _refuse_bad(results: Iterator[_Result]) -> Iterator[_Result]:
    for result in results:
        result.audit.check("error", 0.0)
        yield result


class _Progress:
    """Lines like "data.jsonl: 12,000 of 80,000 rows, 4,100 rows/s, 17 s left", every few seconds."""

    def __init__(self, spec: str, say: Callable[[str], None] | None):
        self.spec, self.say = spec, say

    def watch(self, results: Iterator[_Result]) -> Iterator[_Result]:
        """Passes results through and reports on them."""
        start = last = time.monotonic()
        done, total = 0, None
        for result in results:
            yield result
            done += result.audit.rows
            now = time.monotonic()
            if self.say is None or now - last < PROGRESS_SECONDS:
                continue
            if last == start:  # counting can take a moment, so only for data that takes long
                total = sources.count_rows(self.spec)
            last, rate = now, done / (now - start)
            of = f" of {total:,}" if total else ""
            left = f", {(total - done) / rate:,.0f} s left" if total else ""
            self.say(f"{self.spec}: {done:,}{of} rows, {rate:,.0f} rows/s{left}")
        if self.say is not None:
            took = time.monotonic() - start
            self.say(f"{self.spec}: {done:,} rows read and tokenized in {took:,.1f} s")


def _write(path: Path, results: Iterator[_Result], columns: pa.Schema, spec: str) -> None:
    """Writes the file and its audit, each in one step; nothing is left of a build that fails."""
    audit = Audit()
    handle, name = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with open(handle, "wb") as file, pa.ipc.new_file(file, columns) as writer:
            for result in results:
                audit.merge(result.audit)
                if result.groups.num_rows:
                    writer.write_batch(result.groups)
        if not sum(audit.sources.values()):
            raise ValueError(f"{spec}: none of its {audit.rows} rows could be used; {audit.reasons_text()}")
        text = partial.with_suffix(".partial.json")
        text.write_text(audit.to_json())
        text.replace(path.with_suffix(".json"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path, task: Task) -> "tuple[_Store, Audit]":
    return _Store(path, task), Audit.from_json(path.with_suffix(".json").read_text())


def _cached(path: Path, task: Task) -> "tuple[_Store, Audit] | None":
    """What an earlier build wrote; None if it wrote nothing, or if the file is not whole any more."""
    try:
        return _load(path, task)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; Arrow's have no number
            raise
        logging.warning("%s is damaged and is built again (%s)", path, str(error).partition("\n")[0])
        return None


class _Store:
    """A cache file, memory-mapped: the numbers of all groups in memory, the rest as views of the map."""

    def __init__(self, path: Path, task: Task):
        self.fields = dict(task.fields)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.starts = np.cumsum([0] + [batch.num_rows for batch in self.batches])
        self.numbers = {
            name: np.concatenate([batch.column(name).to_numpy() for batch in self.batches]) for name in NUMBERS
        }
        names = [*LISTS, *(f"label/{name}" for name in self.fields)]
        self.lists = [{name: _views(batch.column(name)) for name in names} for batch in self.batches]
        source = pa.chunked_array([batch.column("source") for batch in self.batches]).combine_chunks()
        encoded = source.dictionary_encode()
        self.sources, self.source = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """The batch of a group, and its row there."""
        batch = int(np.searchsorted(self.starts, index, side="right")) - 1
        return batch, index - int(self.starts[batch])

    def id(self, index: int) -> str:
        """The row a group came from."""
        batch, row = self.place(index)
        return self.batches[batch].column("id")[row].as_py()

    def group(self, index: int) -> Group:
        """One group."""
        batch, row = self.place(index)
        cells = {name: x[offsets[row] : offsets[row + 1]] for name, (offsets, x) in self.lists[batch].items()}
        starts, positions, until = cells["runs"].reshape(-1, 3).T
        sizes = np.diff(starts, append=np.int32(len(cells["tokens"])))
        index_in_tree = np.arange(len(cells["tokens"]), dtype=np.int32)
        end, slot = cells["scored"].reshape(-1, 2).T
        tree = Tree(
            tokens=cells["tokens"],
            positions=index_in_tree + np.repeat(positions - starts, sizes),
            visible_until=np.repeat(until, sizes),
            end=end,
            end_slot=slot,
        )
        axis_size: dict[Any, Any] = {"K": int(self.numbers["responses"][index]), "E": len(end), "T": len(tree)}
        labels: dict[str, np.ndarray] = {
            name: cells[f"label/{name}"].reshape([axis_size.get(axis, axis) for axis in axes if axis != "G"])
            for name, axes in self.fields.items()
        }
        return Group(tree, labels, float(self.numbers["weights"][index]), self.id(index))


def _views(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    return column.offsets.to_numpy(), column.values.to_numpy()


def _directory(cache_dir: str | Path) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmjax"
    directory = Path(cache_dir).expanduser() if cache_dir else default
    directory.mkdir(parents=True, exist_ok=True)
    for partial in directory.glob("tmp*.partial*"):  # left by builds that were killed
        with contextlib.suppress(OSError):  # somebody else's, or just deleted by another process
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                partial.unlink()
    return directory


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
