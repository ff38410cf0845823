"""The report of a run: one HTML page that needs nothing else, and its plots as PNG files.

    DIR/report.html     verdict, key numbers, curves, rewards, calibration, slices, errors, benchmarks, audit, speed
    DIR/report/*.png    the same plots

All is made from plain data, so that a run that was stopped, or an evaluation alone, has its report too.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.report import audit as audit_report
from rmjax.report import evaluation as evaluation_report
from rmjax.report import run_files, run_plots, show
from rmjax.report.card import KINDS
from rmjax.report.naming import flat, metric, number
from rmjax.report.section import Caption, Folded, Section, Table, capital

Values = Mapping[str, Any]
LINES = {"metrics": "metrics.jsonl", "timings": "timings.jsonl"}
FILES = {name: f"{name}.json" for name in ("audit", "evaluation", "quality", "config", "environment")}


def write_report(directory: Path, parts: Values, title: str = "") -> Path:
    """Writes the report; see `run_files.replace` for what becomes of an earlier one.

    Args:
        directory: gets report.html and report/.
        parts: as of `read_parts`: lists of values under the names in LINES, values under those in FILES.
        title: what ran; "" is the directory's name.

    Returns:
        The path of report.html.
    """
    metrics, timings = (parts.get(name) or [] for name in LINES)
    audit, evaluation, quality, config, environment = (parts.get(name) or {} for name in FILES)
    sets, step = evaluation.get("sets") or {}, evaluation.get("step")
    looked_at = evaluation_report.shown_sets(sets)
    sections = [
        Section("", *evaluation_report.verdict(quality)),
        evaluation_report.key_numbers(sets),
        _learning(metrics, step),
        _rewards(metrics, looked_at, step),
        evaluation_report.calibration(looked_at),
        evaluation_report.slices(looked_at),
        evaluation_report.worst(looked_at),
        *(evaluation_report.benchmark(name, x) for name, x in (evaluation.get("benchmarks") or {}).items()),
        *([audit_report.overview(audit, audit_report.problems(audit))] if audit else []),
        _speed(timings),
        _config(config),
        Section("Environment", Table([[key.replace("_", " "), value] for key, value in flat(environment)])),
    ]
    page, plots = show.to_html(
        title or directory.resolve().name,
        [section for section in sections if section],
        kind="Report of a training run",
        notes=[_subtitle(evaluation, config, environment)],
        png=True,
    )
    return run_files.replace(directory, page, plots)


def read_parts(directory: Path) -> dict[str, Any]:
    """What `write_report` takes, from the files of a run's directory; those that are not there are left out.

    Raises:
        ValueError: a file that is no JSON.
    """
    parts: dict[str, Any] = {}
    for name, file in {**LINES, **FILES}.items():
        path = directory / file
        if not path.exists():
            continue
        try:
            if name in LINES:  # the last line may be half written, of a run that is under way
                parts[name] = [json.loads(x) for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")]
            else:
                parts[name] = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it to leave its part out of the report") from None
    return parts


def _subtitle(evaluation: Values, config: Values, environment: Values) -> str:
    """One line: what kind of model, from what, on what data, which step, when."""
    objective, model, parts = config.get("objective") or {}, config.get("model") or {}, []
    if name := objective.get("name"):
        parts.append(KINDS[name].what if name in KINDS else name)
    if model.get("init_from"):
        parts.append(f"from {model['init_from']}")
    elif model.get("scratch"):
        parts.append(f"{model['scratch'].get('model_type', 'model')} from scratch")
    if (config.get("data") or {}).get("train"):
        parts.append(f"trained on {config['data']['train']}")
    if evaluation.get("step") is not None:
        parts.append(f"step {evaluation['step']:,}")
    if environment.get("date"):
        parts.append(str(environment["date"]))
    return capital(" · ".join(parts))


# ----------------------------------------------------------------------------------------------------
# Sections
# ----------------------------------------------------------------------------------------------------


def _learning(metrics: Sequence[Values], step: int | None) -> Section:
    plots, words = run_plots.learning(metrics, step), []
    for name in ("loss", "accuracy", "mse") if plots else ():
        values = [line[f"validation/{name}"] for line in metrics if line.get(f"validation/{name}") is not None]
        if len(values) > 1:
            before, after = (number(x, metric(name).percent) for x in (values[0], values[-1]))
            words.append(f"Validation {name} went from {before} to {after} in {len(values)} evaluations.")
    return Section("Learning curves", " ".join(words), plots)


def _rewards(metrics: Sequence[Values], sets: Values, step: int | None) -> Section:
    plots, words = run_plots.rewards_over_time(metrics, step), Caption("")
    if any(plot.name == "rewards_over_time" for plot in plots):
        words = Caption("Over the steps: the median as a line, half of the responses in the darker band, 90 % in both.")
    for plots_of in (evaluation_report.reward_plots, evaluation_report.attribute_plots):
        plots += evaluation_report.of_all(plots_of, sets)
    titles = {"attributes": "Scores", "steps": "Scores of steps", "tokens": "Losses"}
    kinds = {titles.get(measured["kind"], "Rewards") for measured in sets.values()}
    return Section(kinds.pop() if len(kinds) == 1 else "Rewards", words, plots)


def _speed(timings: Sequence[Values]) -> Section:
    rows = []
    for key in dict.fromkeys(key for line in timings for key in line if key.startswith("timing/")):
        values = [line[key] for line in timings if line.get(key) is not None]
        if values:
            share = key.endswith(("mfu", "waiting_for_data"))
            cells = [number(x, share) for x in (statistics.median(values), min(values), max(values))]
            rows.append([key.removeprefix("timing/").replace("_", " "), *cells])
    return Section("Speed", run_plots.speed(timings), Table(rows, ["", "median", "least", "most"], (1, 2, 3)))


def _config(config: Values) -> Section:
    rows = [[f"config.{key}", value] for key, value in flat(config)]
    return Section("Config", Folded(f"{len(rows)} keys", [Table(rows, ["key", "value"])]))
