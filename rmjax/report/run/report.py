"""The report of a run: one HTML page that needs nothing else, and its plots as PNG files.

    DIR/report.html     verdict, key numbers, curves, rewards, calibration, slices, errors, benchmarks, audit, speed
    DIR/report/*.png    the same plots; a comment at the page's end says which files they are: no other is ever touched

All is made from plain data, so that a run that was stopped, or an evaluation alone, has its report too.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from rmjax.report.run import page as report_page
from rmjax.report.run import sections as report_sections
from rmjax.report.run.curves import unique
from rmjax.runtime import files

Values = Mapping[str, Any]
PAGE, PLOTS = "report.html", "report"
MADE = re.compile(r"<!-- plots of rmjax: (\{.*\}) -->\n\Z")
LINES = {"metrics": "metrics.jsonl", "timings": "timings.jsonl"}
FILES = {name: f"{name}.json" for name in ("audit", "evaluation", "quality", "config", "environment")}


def write(
    directory: Path,
    *,
    metrics: Sequence[Values] = (),
    timings: Sequence[Values] = (),
    audit: Values | None = None,
    evaluation: Values | None = None,
    quality: Values | None = None,
    config: Values | None = None,
    environment: Values | None = None,
    title: str = "",
) -> Path:
    """Writes the report. Page and plots of an earlier one are replaced, each when the new one is whole.

    Other files in report/ stay, and so does a plot that somebody has changed, which is logged; a page that is no
    report of ours gets another name, which is logged, too.

    Args:
        directory: gets report.html and report/.
        metrics: lines of metrics.jsonl.
        timings: lines of timings.jsonl.
        audit: of measure.report.
        evaluation: sets and benchmarks.
        quality: of gate.judge.
        config: the resolved config.
        environment: versions, devices and the like; may be nested.
        title: what ran; "" is the directory's name.

    Returns:
        The path of report.html.
    """
    sections = report_sections.sections(metrics, timings, audit, evaluation, config, environment)
    for section, plots in zip(sections, _named(sections)):
        section.plots = plots
    drawn = {plot.name: plot.draw() for section in sections for plot in section.plots}
    text = report_page.page(
        title or directory.resolve().name,
        report_sections.subtitle(evaluation, config, environment),
        report_sections.verdict(quality),
        sections,
        {name: svg for name, (svg, _) in drawn.items()},
    )
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory, text, {f"{name}.png": png for name, (_, png) in drawn.items()})
    return directory / PAGE


def of_run(directory: Path) -> dict[str, Any]:
    """What `write` takes, from the files of a run's directory; those that are not there are left out.

    Raises:
        ValueError: a file that is no JSON.
    """
    found: dict[str, Any] = {}
    for name, file in {**LINES, **FILES}.items():
        path = directory / file
        if not path.exists():
            continue
        try:
            if name in LINES:  # the last line may be half written, of a run that is under way
                found[name] = [json.loads(x) for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")]
            else:
                found[name] = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it to leave its part out of the report") from None
    return found


def _named(sections: Sequence[report_page.Section]) -> list[list[Any]]:
    """The plots of each section, with names that are unique among all."""
    named = unique(plot for section in sections for plot in section.plots)
    return [[next(named) for _ in section.plots] for section in sections]


def _replace(directory: Path, text: str, plots: Mapping[str, bytes]) -> None:
    """Writes the page and the plots, and removes those of an earlier report that are no more.

    The page knows the old plots and the new ones before the first is written, so that a kill leaves none that nobody
    knows; at last it knows the new ones alone.
    """
    page, folder = directory / PAGE, directory / PLOTS
    before, new = _made(page), {name: _digest(data) for name, data in plots.items()}
    ours: set[str] = set()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        logging.warning("%s is a link or a file, and stays; the plots are in the page alone", folder)
    else:
        folder.mkdir(exist_ok=True)
        known = {name: [*before.get(name, []), *filter(None, [new.get(name)])] for name in {*before, *new}}
        ours = {name for name in known if _is_ours(folder / name, known[name])}
        files.write_whole(page, _marked(text, {name: known[name] for name in ours}))
    for name in sorted(ours):
        if name in plots:
            files.write_whole(folder / name, plots[name])
        else:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(plots.keys() - ours) if folder.is_dir() else ():
        logging.warning("%s is not as a report has made it, and stays; move it away to get the plot", folder / name)
    files.write_whole(page, _marked(text, {name: [digest] for name, digest in new.items() if name in ours}))


def _marked(text: str, made: Mapping[str, Sequence[str]]) -> str:
    return f"{text}<!-- plots of rmjax: {json.dumps(made, sort_keys=True)} -->\n"


def _made(page: Path) -> dict[str, list[str]]:
    """Digests of the plots that an earlier page was written with, by name; what is no such page is put aside."""
    if not page.exists() and not page.is_symlink():
        return {}
    try:
        found = None if page.is_symlink() else MADE.search(page.read_text(encoding="utf-8"))
        made = json.loads(found[1]) if found else None
        if isinstance(made, dict):
            return {name: list(made[name]) for name in made if Path(name).name == name}
    except (ValueError, TypeError, RecursionError):
        pass
    free = next(p for i in itertools.count(1) if not os.path.lexists(p := page.with_stem(f"{page.stem}.before-{i}")))
    logging.warning("%s is no report of this version, or was changed; it is %s now", page, free)
    page.rename(free)
    return {}


def _is_ours(path: Path, made: Sequence[str]) -> bool:
    """Whether nothing would be lost with a file: it is not there, or is what was made."""
    if path.is_symlink():
        return False
    return not path.exists() or (path.is_file() and _digest(path.read_bytes()) in made)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
