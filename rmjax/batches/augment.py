"""More groups for training out of those that are there; validation keeps them as they are.

`config.data.augment` names rows of AUGMENTATIONS, separated by commas, which are done in that order.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from rmjax.data.records import Record
from rmjax.suggestions import did_you_mean

# What a group serves for: anything, training alone (it was made), or evaluation alone (others took its place).
ANY, TRAINING, EVALUATION = range(3)


def all_pairs(record: Record) -> list[Record]:
    """A ranking of more than two responses becomes its labelled pairs, each with the weight of the whole.

    Example: of responses 0, 1, 2 with `wins` of 0 over 1 and over 2, the pairs (0, 1) and (0, 2).
    """
    k = len(record.conversations)
    said = (record.wins + record.wins.T + record.ties) > 0
    pairs = [pair for pair in itertools.combinations(range(k), 2) if said[pair]]
    if k < 3 or not pairs:
        return [record]
    return [dataclasses.replace(record.select(pair), row=f"{record.row}#{pair[0]}-{pair[1]}") for pair in pairs]


def swap(record: Record) -> list[Record]:
    """A group and its copy with the responses in the opposite order, for judges, which read them in order."""
    k = len(record.conversations)
    return [record] if k < 2 else [record, dataclasses.replace(record.select(range(k)[::-1]), row=f"{record.row}#swap")]


AUGMENTATIONS: dict[str, Callable[[Record], list[Record]]] = {"all_pairs": all_pairs, "swap": swap}


def parse(text: str) -> tuple[str, ...]:
    """Reads `config.data.augment`.

    >>> parse("all_pairs, swap")
    ('all_pairs', 'swap')
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in AUGMENTATIONS:
            hint = did_you_mean(name, AUGMENTATIONS)
            raise ValueError(f"config.data.augment={text!r}: {name!r} is none of {', '.join(AUGMENTATIONS)}{hint}")
        if names.count(name) > 1:
            raise ValueError(f"config.data.augment={text!r} names {name!r} twice; name it once")
    return names


def augment(record: Record, names: Sequence[str], counts: dict[str, tuple[int, int]]) -> list[tuple[Record, int]]:
    """The record and what `names` make of it, each with its use; `counts` gets the groups changed and made by name."""
    records, replaced = [(record, ANY)], []
    for name in names:
        augmented: list[tuple[Record, int]] = []
        for old, use in records:
            results = AUGMENTATIONS[name](old)
            new = [result for result in results if result is not old]
            augmented += [(result, use if result is old else TRAINING) for result in results]
            if len(new) == len(results) and use == ANY:
                replaced.append((old, EVALUATION))
            if new:
                changed, before = counts.get(name, (0, 0))
                counts[name] = changed + 1, before + len(new)
        records = augmented
    return records + replaced
