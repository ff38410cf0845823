"""Trees of tokens: several sequences that share prefixes, each shared run laid out once.

The trie of the sequences is laid depth first. Two integers per token describe attention exactly:

    key j is visible to query i  <=>  visible_from[i] <= j <= i  and  i < visible_until[j]

`visible_from` is the start of the tree (0 here, shifted when the tree is placed in a row) and `visible_until` the
end of the subtree of the token's node. Nodes split one token *before* the sequences differ, so every sequence has a
last token of its own, and the next-token target of any token stands at the next index.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Tokens = Sequence[int] | np.ndarray  # token ids of one sequence
WORTH = 16  # tokens: sharing fewer spares less than a block of keys costs that attention visits for each sequence


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """One group's sequences, laid depth first. n tokens, E scored tokens."""

    tokens: np.ndarray  # int32 [n] token ids
    positions: np.ndarray  # int32 [n] distance from the start of the sequence, counted along the path
    visible_until: np.ndarray  # int32 [n] index after the last token of the node's subtree
    end: np.ndarray  # int32 [E] index of each scored token
    end_slot: np.ndarray  # int32 [E] the response (0..K-1) that each scored token belongs to

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, end: int) -> np.ndarray:
        """Indices of the tokens that the token at `end` sees, itself last."""
        return np.flatnonzero(self.visible_until[: end + 1] > end)

    def scored(self, at: Sequence[Sequence[int]]) -> "Tree":
        """The tree with other scored tokens: for each sequence their places in it, in order."""
        ends = [self.path(int(end))[list(places)] for end, places in zip(self.end, at, strict=True)]
        slots = np.repeat(np.arange(len(at), dtype=np.int32), [len(places) for places in at])
        return dataclasses.replace(self, end=np.concatenate(ends).astype(np.int32), end_slot=slots)

    def sequences(self) -> list[np.ndarray]:
        """The token sequence of each scored token: what it sees, in order."""
        return [self.tokens[self.path(e)] for e in self.end]

    def distinct(self) -> tuple["Tree", np.ndarray]:
        """The tree without what stands in it twice, and int [E], the scored token there for each one here.

        A tree with several scored tokens in a response stays whole; of equal ones the first counts.
        """
        if len(self.end) == 1:
            return self, np.zeros(1, np.int64)
        sequences, index = distinct(self.sequences())
        if len(sequences) == len(index):
            return self, index
        if len(np.unique(self.end_slot)) < len(self.end):
            return self, np.unique(index, return_index=True)[1][index]
        return build_tree(sequences), index


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Number of leading tokens that all sequences share."""
    shortest = min(len(s) for s in sequences)
    first = sequences[0][:shortest]
    differs = np.zeros(shortest, bool)
    for s in sequences[1:]:
        differs |= first != s[:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def distinct(sequences: Sequence[Tokens]) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct sequences in order, and int [n], which of them each one is."""
    arrays = [np.asarray(s, np.int32) for s in sequences]
    first: dict[bytes, int] = {}
    index = np.array([first.setdefault(array.tobytes(), len(first)) for array in arrays], np.int64)
    return [arrays[i] for i in np.unique(index, return_index=True)[1]], index


def build_tree(sequences: Sequence[Tokens]) -> Tree:
    """Builds the tree of K token sequences; the last token of each is its scored token.

    >>> t = build_tree([[1, 2, 3, 4], [1, 2, 5]])   # they share 1 2; the split is one token before
    >>> t.tokens.tolist(), t.positions.tolist()
    ([1, 2, 3, 4, 2, 5], [0, 1, 2, 3, 1, 2])
    >>> t.visible_until.tolist(), t.end.tolist()
    ([6, 4, 4, 4, 6, 6], [3, 5])

    Raises:
        ValueError: no sequences, or an empty one.
    """
    arrays = [np.asarray(s, np.int32) for s in sequences]
    if not arrays or any(len(a) == 0 for a in arrays):
        raise ValueError(f"a tree needs sequences of at least one token, got lengths {[len(a) for a in arrays]}")
    nodes: list[np.ndarray] = []
    depths: list[int] = []  # of each node's first token
    until: list[int] = []
    end = np.zeros(len(arrays), np.int32)
    laid = 0
    # What is to be done, the last first: members that agree before a depth, or the node whose branches are all laid.
    todo: list[tuple[list[int], int] | int] = [(list(range(len(arrays))), 0)]
    while todo:
        if isinstance(job := todo.pop(), int):
            until[job] = laid
            continue
        members, depth = job
        shared = depth + common_prefix([arrays[m][depth:] for m in members])
        split = shared if len(members) == 1 else max(shared - 1, depth)
        todo.append(len(nodes))
        nodes.append(arrays[members[0]][depth:split])
        depths.append(depth)
        until.append(0)
        laid += split - depth
        if len(members) == 1:
            end[members[0]] = laid - 1
        else:
            todo += [(branch, split) for branch in reversed(_branches(arrays, members, shared))]
    sizes = [len(node) for node in nodes]
    positions = [np.arange(depth, depth + size, dtype=np.int32) for depth, size in zip(depths, sizes)]
    slots = np.arange(len(arrays), dtype=np.int32)
    visible_until = np.repeat(np.array(until, np.int32), sizes)
    return Tree(np.concatenate(nodes), np.concatenate(positions), visible_until, end, slots)


def _branches(arrays: list[np.ndarray], members: list[int], shared: int) -> list[list[int]]:
    """Splits members by their token after the shared part; one that ends there is a branch of its own."""
    branches: dict[tuple[str, int], list[int]] = {}
    for m in members:
        ends = len(arrays[m]) == shared
        branches.setdefault(("end", m) if ends else ("token", int(arrays[m][shared])), []).append(m)
    return list(branches.values())


def parts(tree: Tree, most: int) -> list[Tree]:
    """The tree in several of at most `most` tokens, where its sequences allow; what these share is then repeated.

    A sequence is counted without what it shares with the one before it, so a part may have fewer tokens than it could.

    Args:
        tree: with one scored token for each response, in order; one with several is left whole.
        most: tokens of a part; a sequence that is longer is a part of its own.

    Returns:
        Trees whose scored tokens, one part after the other, are those of `tree`.
    """
    if len(tree) <= most or len(np.unique(tree.end_slot)) < len(tree.end):
        return [tree]
    return build_trees(tree.sequences(), most)


def build_trees(sequences: Sequence[np.ndarray], most: int) -> list[Tree]:
    """Trees of neighbouring sequences, each of at most `most` tokens; see `parts`."""
    return [build_tree(run) for run in _runs(sequences, most, most, lambda shared, shortest: True)]


def shared_trees(sequences: Sequence[np.ndarray], room: int, most: int) -> tuple[list[Tree], np.ndarray]:
    """Trees of those sequences that are worth one, wherever they stand, and int [n]: each one's scored token.

    The scored tokens are counted through all trees, in order. Sequences whose beginnings are equal become neighbours
    (they are sorted), equal sequences one.

    Args:
        sequences: int32 arrays of at least one token.
        room: tokens of a tree, beyond which it only takes sequences that share half of theirs.
        most: tokens of a tree, unless one sequence alone is longer.
    """
    different, which = distinct(sequences)
    order = sorted(range(len(different)), key=lambda i: sort_key(different[i]))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    runs = _runs([different[i] for i in order], room, most, worth)
    return [build_tree(run) for run in runs], place[which]


def sort_key(tokens: Tokens) -> bytes:
    """Bytes that sort as the tokens do, the first one first."""
    return np.asarray(tokens, ">u4").tobytes()


def worth(shared: int, shortest: int) -> bool:
    """Whether two sequences, of which one has `shortest` tokens, belong in one tree for these first tokens."""
    return shared >= WORTH or 2 * shared >= shortest


def _runs(
    sequences: Sequence[np.ndarray], room: int, most: int, worth: Callable[[int, int], bool]
) -> list[list[np.ndarray]]:
    """Neighbours that make a tree each; see `shared_trees`."""
    runs: list[list[np.ndarray]] = []
    used = 0
    for sequence in sequences:
        shared = common_prefix([runs[-1][-1], sequence]) if runs else 0
        new = len(sequence) - max(shared - 1, 0)  # nodes split one token before the sequences differ
        full = used + new > (most if 2 * new <= len(sequence) else room)
        if not runs or full or not worth(shared, min(len(sequence), len(runs[-1][-1]))):
            runs.append([])
            used, new = 0, len(sequence)
        runs[-1].append(sequence)
        used += new
    return runs
