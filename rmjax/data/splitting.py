"""Splitting rows into named parts: a prompt stands on one side only, and every kind of row is shared out alike."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rmjax.data.records import Record


def parse_shares(text: str) -> dict[str, float]:
    """Reads the shares of a split; ValueError for what is none.

    >>> parse_shares("train=0.8,validation=0.2")
    {'train': 0.8, 'validation': 0.2}
    """
    text = text.replace(" ", "")
    pairs = re.findall(r"([\w.-]+)=([0-9.]+)(?:,|$)", text)
    try:
        shares = {name: float(share) for name, share in pairs}
    except ValueError:
        shares = {}
    whole = ",".join(f"{name}={share}" for name, share in pairs) == text
    if not whole or len(shares) != len(pairs) or not shares or min(shares.values()) <= 0:
        raise ValueError(f"{text!r} is no split; write names with their shares: train=0.8,validation=0.1,test=0.1")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares of {text!r} add up to {sum(shares.values()):g}, expected 1")
    return shares


def label_kind(record: Record) -> str:
    """The kind of label that a record has, whatever the order and the length of its responses.

    A tie or a preference by its largest margin, the mean of the first attribute, or whether all steps are right;
    numbers are rounded to one digit, so that kinds are few.
    """
    responses = len(record.conversations)
    number = lambda x: f"{float(f'{x:.1g}'):g}"
    if record.wins.any():
        name = "preference" if responses == 2 else f"ranking of {responses}"
        return name + (f", margin {number(record.largest_margin)}" if record.largest_margin else "")
    if record.ties.any():
        return "tie"
    for name, values in record.attributes.items():
        given = [value for value in values if value == value]
        return f"{name} {number(sum(given) / len(given))}" if given else f"{name} missing"
    judged = [step.label for steps in record.steps for step in steps if step.label == step.label]
    return ("all steps right" if min(judged) >= 0.5 else "a step is wrong") if judged else "no label"


def assign_parts(
    prompts: np.ndarray, kinds: Sequence[tuple[str, ...]], shares: Mapping[str, float], seed: int
) -> np.ndarray:
    """Puts every row into a part; all rows of a prompt into the same.

    Prompts are drawn in random order within their kind, the kinds one after the other, and each goes where most
    rows are missing so far. So the whole, each kind and each source are off by a prompt or two, not by the luck of
    the draw (systematic sampling; see Tijdeman 1980, "The chairman assignment problem", for such bounds). The kind of
    a prompt is that of most of its rows. The result does not depend on the order of the rows.

    Args:
        prompts: uint64 [n], equal for rows of one prompt (prompts.py).
        kinds: (source, label) of each row.
        shares: of each part; they add up to 1. The result, int64 [n], counts parts in this order.
    """
    ids, prompt, rows = np.unique(prompts, return_inverse=True, return_counts=True)
    number = {name: i for i, name in enumerate(sorted(set(kinds)))}
    kind = np.array([number[k] for k in kinds], np.int64)
    kind_of_prompt = _most_frequent(prompt, kind, len(ids))
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    # The largest first: what they leave uneven, the small ones fill.
    order = np.lexsort((shuffled, -rows, kind_of_prompt))
    share = np.array(list(shares.values()))
    missing = np.zeros(len(share))
    part_of_prompt = np.zeros(len(ids), np.int64)
    for i in order.tolist():
        missing += share * rows[i]
        part_of_prompt[i] = part = int(missing.argmax())
        missing[part] -= rows[i]
    return part_of_prompt[prompt]


def _most_frequent(group: np.ndarray, value: np.ndarray, groups: int) -> np.ndarray:
    """For each group the value that most of its members have, the smallest of equally frequent ones."""
    pairs, counts = np.unique(np.stack([group, value]), axis=1, return_counts=True)
    order = np.lexsort((-pairs[1], counts, pairs[0]))  # the last of each group is what is wanted
    chosen = np.zeros(groups, np.int64)
    chosen[pairs[0][order]] = pairs[1][order]
    return chosen


def shares_table(
    kinds: Sequence[tuple[str, ...]], parts: np.ndarray, shares: Mapping[str, float], most: int = 30
) -> list[str]:
    """A table of how the rows of the `most` largest kinds, and all together, are shared out."""
    counts = {kind: np.zeros(len(shares), np.int64) for kind in sorted(set(kinds))}
    for kind, part in zip(kinds, parts.tolist()):
        counts[kind][part] += 1
    largest = sorted(counts, key=lambda kind: -counts[kind].sum())[:most]
    shown = {" / ".join(kind): counts[kind] for kind in counts if kind in largest}
    if len(counts) > most:
        shown[f"{len(counts) - most} other kinds"] = np.sum([counts[k] for k in counts if k not in largest], axis=0)
    shown["all"] = np.sum(list(counts.values()), axis=0)
    wide = max(map(len, ("source / label", *shown)))
    lines = [" ".join([f"{'source / label':{wide}}", *(f"{name:>18}" for name in shares)])]
    for name, row in shown.items():
        cells = (f"{f'{n:,} ({n / row.sum():.1%})':>18}" for n in row.tolist())
        lines.append(" ".join([f"{name:{wide}}", *cells]))
    return lines
