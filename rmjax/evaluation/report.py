"""The report of a run: one HTML page that needs nothing else, and its plots as PNG files.

    DIR/report.html     verdict, key numbers, curves, rewards, calibration, slices, errors, benchmarks, audit, speed
    DIR/report/*.png    the same plots

All is made from plain data, so that a run that was stopped, or an evaluation alone, has its report too.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.evaluation import report_page, report_sections
from rmjax.evaluation.report_plots import unique

Values = Mapping[str, Any]
PAGE, PLOTS = "report.html", "report"
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
    """Writes the report; a page or a folder of plots that is there already is replaced when the new one is whole.

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
    _replace_folder(directory / PLOTS, {f"{name}.png": png for name, (_, png) in drawn.items()})
    partial = directory / f"partial.{PAGE}"
    partial.write_text(text, encoding="utf-8")
    return partial.replace(directory / PAGE)


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


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    partial = folder.with_name(f"partial.{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, data in files.items():
        (partial / name).write_bytes(data)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
