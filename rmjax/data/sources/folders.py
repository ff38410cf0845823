"""Which files of a folder are its data: what its makers say, else what its names say.

`datasets` says it in files beside the data: `state.json` names the files of a set saved to disk, `dataset_dict.json`
its splits, and `dataset_info.json` the splits and shards of a set in its cache. What is left out is told in one line;
what is there twice is refused, because which of the two is stale cannot be seen.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rmjax.data.sources import files
from rmjax.runtime import notes

STATE, SPLIT_NAMES, INFO = "state.json", "dataset_dict.json", "dataset_info.json"
NOT_DATA = (STATE, SPLIT_NAMES, INFO, "dataset_infos.json")
HIDDEN = (".", "_")  # begin the names of files and folders that Spark, Arrow and notebooks keep for themselves
RESULTS = re.compile(r"cache-.*\.arrow")  # what `datasets` keeps of map and filter beside the data
SHARD = re.compile(r"(.*?)[-_](\d+)[-_]of[-_](\d+)(?:[-_][0-9a-f]+)?")  # name, number, total, digest
ONE = "keep one of them, or choose it with a glob"
SPLITS = {  # words in a path that say which split a file belongs to
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def data_files(fs: Any, item: str, folder: str, names: Sequence[str], *, whole: bool) -> list[str]:
    """The data among files below a folder of a file system, in their order.

    Args:
        item: the source, for messages.
        names: paths that begin with `folder`: all of them (`whole`), or those that match a glob, which may choose
            among splits, kinds and shards. A glob that matches no data at all is taken at its word.

    Raises:
        ValueError: files of several kinds or splits, two sets of shards, a file twice, or one that is not there.
    """
    left_out: dict[str, str] = {}  # why, by path relative to the folder
    paths = _usable([Path(name).relative_to(folder) for name in names], left_out)
    if not paths and not whole:
        return list(names)
    if whole:
        paths = _one_split(fs, item, folder, paths, left_out)
    for parent in dict.fromkeys(path.parent for path in paths):
        here = [path for path in paths if path.parent == parent]
        named, maker = _said_by_makers(fs, item, folder, here, whole)
        strange = set(here).difference(named)
        left_out |= {str(path): f"not named in {maker}" for path in here if path in strange}
        paths = [path for path in paths if path not in strange]
    if whole:
        _refuse_mixed(item, paths)
    _refuse_copies(item, paths, whole)
    if left_out:
        notes.tell(f"{item}: not read: {_reasons(left_out)}")
    return [os.path.join(folder, path) for path in paths]


def _reasons(left_out: dict[str, str]) -> str:
    """The first file of each reason, and how many more it has."""
    texts = []
    for why in dict.fromkeys(left_out.values()):
        first, *others = (name for name, reason in left_out.items() if reason == why)
        texts.append(f"{first}{f' and {len(others)} more' if others else ''} ({why})")
    return "; ".join(texts)


def _usable(paths: Iterable[Path], left_out: dict[str, str]) -> list[Path]:
    usable = []
    for path in paths:
        if not files.kind(path) or path.name in NOT_DATA:
            continue
        if any(part.startswith(HIDDEN) for part in path.parts):
            left_out[str(path)] = "hidden"
        elif RESULTS.fullmatch(path.name):
            left_out[str(path)] = "a result that `datasets` keeps"
        else:
            usable.append(path)
    return usable


def _one_split(fs: Any, item: str, folder: str, paths: list[Path], left_out: dict[str, str]) -> list[Path]:
    """The files of the only split of a saved set of splits; those of any other folder as they are."""
    said = _json(fs, folder, Path(SPLIT_NAMES))
    if said is None:
        return paths
    splits = said.get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise ValueError(f'{item}: {SPLIT_NAMES} does not name its splits; expected {{"splits": [...]}}')
    if len(splits) > 1:
        one = f"{item.rstrip('/')}/{splits[0]}"
        raise ValueError(f"{item} holds several splits ({', '.join(splits)}); choose one, as {one}")
    if not (chosen := [path for path in paths if path.parts[0] == splits[0]]):
        raise ValueError(f"{item} lacks the data of {splits[0]!r}, which its {SPLIT_NAMES} names")
    left_out |= {str(path): f"of no split that {SPLIT_NAMES} names" for path in paths if path not in chosen}
    return chosen


def _said_by_makers(fs: Any, item: str, folder: str, here: Sequence[Path], whole: bool) -> tuple[Sequence[Path], str]:
    """Those of the files in one folder that its state.json, or else its dataset_info.json, names; and which did."""
    parent = here[0].parent
    if (state := _json(fs, folder, parent / STATE)) is not None:
        data = {parent / name for name in _data_of_state(item, parent, state)}
        if whole and (missing := sorted(data.difference(here))):
            raise ValueError(f"{item} lacks {missing[0]}, which its {parent / STATE} names")
        return [path for path in here if path in data], STATE
    info = _json(fs, folder, parent / INFO) or {}
    by_split = {
        split: [path for path in here if pattern.fullmatch(path.name.removesuffix(".gz"))]
        for split, pattern in _names_of_splits(info).items()
    }
    splits = [split for split, paths in by_split.items() if paths]
    if whole and len(splits) > 1:
        raise ValueError(f"{item} holds several splits ({', '.join(splits)}); choose one with a glob")
    named = {path for paths in by_split.values() for path in paths}
    return ([path for path in here if path in named], INFO) if named else (here, "")  # else it is of other files


def _data_of_state(item: str, parent: Path, state: dict[str, Any]) -> list[str]:
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError(
            f"{item}: {parent / STATE} chooses rows by a file of indices, as old versions of `datasets` did; load it "
            "with a newer one, and save it again"
        )
    try:
        return [str(Path(entry["filename"])) for entry in state["_data_files"]]
    except (LookupError, TypeError):
        raise ValueError(
            f'{item}: {parent / STATE} names no data files; expected {{"_data_files": [{{"filename": ...}}]}}'
        ) from None


def _names_of_splits(info: dict[str, Any]) -> dict[str, re.Pattern[str]]:
    """How the files of each split are called: `NAME-SPLIT.arrow`, or `NAME-SPLIT-00000-of-00002.arrow`."""
    splits = info.get("splits")
    patterns = {}
    for split, about in splits.items() if isinstance(splits, dict) else ():
        lengths = about.get("shard_lengths") if isinstance(about, dict) else None
        total = len(lengths) if isinstance(lengths, list) else 1
        shard = rf"-\d{{5}}-of-{total:05d}" if total > 1 else "(-00000-of-00001)?"
        patterns[split] = re.compile(rf"(.+-)?{re.escape(split)}{shard}\.\w+")
    return patterns


def _json(fs: Any, folder: str, name: Path) -> dict[str, Any] | None:
    """The object in a small file beside the data; None where there is no such file."""
    path = os.path.join(folder, name)
    if not fs.isfile(path):
        return None
    try:
        said = json.loads(fs.cat_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); save the set again, or choose by a glob") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds a {type(said).__name__}, expected an object")
    return said


def _refuse_mixed(item: str, paths: Sequence[Path]) -> None:
    kinds = sorted({files.kind(path) for path in paths})
    if len(kinds) > 1:
        raise ValueError(f"{item} holds files of several kinds ({', '.join(kinds)}); choose with a glob")
    words = {word for path in paths for word in re.split(r"[^a-z]+", str(path).lower())}
    splits = [split for split, synonyms in SPLITS.items() if words.intersection(synonyms)]
    if len(splits) > 1:
        raise ValueError(f"{item} holds several splits ({', '.join(splits)}); choose one with a glob")


def _refuse_copies(item: str, paths: Sequence[Path], whole: bool) -> None:
    """Refuses what is there twice: plain and gzipped, whole and in shards, in two sets of shards; and half a set."""
    found: dict[Path, dict[tuple[int, bool], list[tuple[int, Path]]]] = {}  # by name: by shards and gzipped: numbers
    for path in paths:
        name = Path(path.name.removesuffix(".gz"))
        shard = SHARD.fullmatch(name.stem)
        stem, number, total = (shard[1], int(shard[2]), int(shard[3])) if shard else (name.stem, 0, 0)
        forms = found.setdefault(path.with_name(stem + name.suffix), {})
        forms.setdefault((total, path.suffix == ".gz"), []).append((number, path))
    for whole_name, forms in found.items():
        ((total, _), shards), *others = forms.items()
        numbers = {number for number, _ in shards}
        if others or len(numbers) < len(shards):
            twice = [of[0][1] for of in forms.values()] if others else [path for _, path in shards]
            raise ValueError(f"{item} holds {whole_name} more than once: {_and(twice)}; {ONE}")
        if whole and len(numbers) < total:
            start = 0 if 0 in numbers else 1  # some count from 1
            missing = next(number for number in range(start, start + total) if number not in numbers)
            raise ValueError(
                f"{item} holds {len(numbers)} of the {total} shards of {whole_name}, not number {missing}; get the "
                "others, or name these by a glob"
            )


def _and(paths: Sequence[Path]) -> str:
    shown = [str(path) for path in paths[:4]]
    return " and ".join(shown) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
