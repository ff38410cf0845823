"""What "the prompt" of a record is, for splits, for what sets and benchmarks have in common, and for intervals.

A record's histories are what stands before the last turns, case and spacing aside: one, or several where its
conversations begin differently. Records that have one in common are of one prompt.

A history is a system message and other turns, and one of the two tells the prompt: "You are a helpful assistant." does
not make another prompt of a question, and "Go on." after a hundred tasks in system messages does not make one prompt of
them. It is the turns where one of their system messages (none is one, too) stands before at least as many different
turns as these stand behind different system messages; else the system message.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from rmjax.data.records import Conversation, Record


def histories(record: Record) -> list[tuple[int, int]]:
    """Hashes of system message and other turns, 0 for none, of each history of a record.

    Conversations that have no history stand for themselves, so that not all such records are one prompt's.
    """
    parts = {_parts(conversation[:-1]) for conversation in record.conversations} - {("", "")}
    parts = parts or {("", repr(sorted(map(repr, record.conversations))))}
    return sorted((_hash(system), _hash(turns)) for system, turns in parts)


def _parts(history: Conversation) -> tuple[str, str]:
    """The text of a history's system messages, and that of its other turns, each with its role."""
    lines: tuple[list[str], list[str]] = ([], [])
    for message in history:
        if words := " ".join((message.get("content") or "").casefold().split()):
            lines[message["role"] != "system"].append(f"{message['role']}: {words}")
    return "\n".join(lines[0]), "\n".join(lines[1])


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() if text else b""
    return int.from_bytes(digest, "big")


def flat(of_records: Iterable[Sequence[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
    """The histories of n records end to end, uint64 [m, 2], and where each record's begin, int64 [n + 1]."""
    listed = list(of_records)
    begin = np.cumsum([0, *map(len, listed)])
    return np.array([pair for some in listed for pair in some], np.uint64).reshape(-1, 2), begin


def ids(found: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """uint64 [n]: records with equal numbers are of one prompt; of the histories of all of them, as `flat` has them."""
    edges = np.unique(found, axis=0)
    _, system, different_turns = np.unique(edges[:, 0], return_inverse=True, return_counts=True)
    turns, index, different_systems = np.unique(edges[:, 1], return_inverse=True, return_counts=True)
    most = np.zeros(len(turns), np.int64)
    np.maximum.at(most, index, different_turns[system])
    tell = ((most >= different_systems) & (turns != 0))[np.searchsorted(turns, found[:, 1])] | (found[:, 0] == 0)
    keys = np.where(tell, found[:, 1], found[:, 0])
    return keys if len(keys) == len(begin) - 1 else _smallest_linked(keys, begin)


def _smallest_linked(keys: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """For each record the smallest key of all records that it is linked with, directly or through others."""
    from scipy.sparse import coo_array  # takes a quarter of a second to import
    from scipy.sparse.csgraph import connected_components

    n, (distinct, key) = len(begin) - 1, np.unique(keys, return_inverse=True)
    record = np.repeat(np.arange(n), np.diff(begin))
    graph = coo_array((np.ones(len(keys), bool), (record, n + key)), (n + len(distinct),) * 2)
    _, component = connected_components(graph, directed=False)
    first = np.unique(component[n:], return_index=True)[1]  # keys are in order, and each component has one
    smallest = np.zeros(component.max() + 1, np.uint64)
    smallest[component[n + first]] = distinct[first]
    return smallest[component[:n]]


def ids_of_both(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`ids` of two sets of records, so that they can be compared."""
    (some, begin), (others, other_begin) = first, second
    both = ids(np.concatenate([some, others]), np.concatenate([begin, begin[-1] + other_begin[1:]]))
    return both[: len(begin) - 1], both[len(begin) - 1 :]
