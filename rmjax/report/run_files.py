"""Where a report lies: report.html and report/*.png, of which no file that is not the report's own is ever touched.

A comment at the page's end says which plots are its own, by their digests.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from rmjax.runtime import files

PAGE, PLOTS = "report.html", "report"
OWN = re.compile(r"<!-- plots of rmjax: (\{.*\}) -->\n\Z")


def replace(directory: Path, text: str, plots: Mapping[str, bytes]) -> Path:
    """Writes the page and the plots, each when it is whole, and removes those of an earlier report that are no more.

    Other files in report/ stay, and so does a plot that somebody has changed, which is logged; a page that is no
    report of ours gets another name, which is logged, too. The page knows the old plots and the new ones before the
    first is written, so that a kill leaves none that nobody knows; at last it knows the new ones alone.

    Returns:
        The path of report.html.
    """
    page, folder = directory / PAGE, directory / PLOTS
    directory.mkdir(parents=True, exist_ok=True)
    before, new = _own(page), {name: _digest(data) for name, data in plots.items()}
    ours: set[str] = set()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        logging.warning("%s is a link or a file, and stays; the plots are in the page alone", folder)
    else:
        folder.mkdir(exist_ok=True)
        known = {name: [*before.get(name, []), *filter(None, [new.get(name)])] for name in {*before, *new}}
        ours = {name for name in known if _is_own(folder / name, known[name])}
        files.write_whole(page, _marked(text, {name: known[name] for name in ours}))
    for name in sorted(ours):
        if name in plots:
            files.write_whole(folder / name, plots[name])
        else:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(plots.keys() - ours) if folder.is_dir() else ():
        logging.warning("%s is not as a report has made it, and stays; move it away to get the plot", folder / name)
    files.write_whole(page, _marked(text, {name: [digest] for name, digest in new.items() if name in ours}))
    return page


def _marked(text: str, own: Mapping[str, Sequence[str]]) -> str:
    return f"{text}<!-- plots of rmjax: {json.dumps(own, sort_keys=True)} -->\n"


def _own(page: Path) -> dict[str, list[str]]:
    """Digests of the plots that an earlier page was written with, by name; what is no such page is put aside."""
    if not page.exists() and not page.is_symlink():
        return {}
    try:
        comment = None if page.is_symlink() else OWN.search(page.read_text(encoding="utf-8"))
        own = json.loads(comment[1]) if comment else None
        if isinstance(own, dict):
            return {name: list(own[name]) for name in own if Path(name).name == name}
    except (ValueError, TypeError, RecursionError):
        pass
    free = next(p for i in itertools.count(1) if not os.path.lexists(p := page.with_stem(f"{page.stem}.before-{i}")))
    logging.warning("%s is no report of this version, or was changed; it is %s now", page, free)
    page.rename(free)
    return {}


def _is_own(path: Path, digests: Sequence[str]) -> bool:
    """Whether nothing would be lost with a file: it is not there, or is what was written."""
    if path.is_symlink():
        return False
    return not path.exists() or (path.is_file() and _digest(path.read_bytes()) in digests)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
