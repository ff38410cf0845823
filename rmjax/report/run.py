"""The report of a run: one HTML page that needs nothing else, and its plots as PNG files.

    DIR/report.html     verdict, key numbers, curves, rewards, calibration, slices, errors, benchmarks, audit, speed
    DIR/report/*.png    the same plots

All is made from plain data, so that a run that was stopped, or an evaluation alone, has its report too.
"""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmjax.report import audit as audit_report
from rmjax.report import evaluation as evaluation_report
from rmjax.report import panels, run_files, samples, show
from rmjax.report.card import KINDS
from rmjax.report.drawing import CHOSEN, REJECTED, TRAIN, VALIDATION
from rmjax.report.naming import flat, metric, number
from rmjax.report.panels import Line, Mark
from rmjax.report.section import Caption, Folded, Plot, Section, Table, capital
from rmjax.statistics import QUANTILES

Values = Mapping[str, Any]
LINES = {"metrics": "metrics.jsonl", "timings": "timings.jsonl"}
FILES = {name: f"{name}.json" for name in ("audit", "evaluation", "quality", "config", "environment")}
CURVES = (  # of the metrics that there are, these are shown over time, in this order
    *("loss", "accuracy", "accuracy_averaged", "first_error_accuracy", "verdict_accuracy", "mse", "spearman", "kappa"),
    *("consistency", "ece", "margin"),
)
MOST_CURVES = 4
SETS = {"train_slice": ("training", TRAIN), "validation": ("validation", VALIDATION)}
SPEED = (
    ("pairs_per_second", "Pairs a second", False),
    ("groups_per_second", "Groups a second", False),
    ("tokens_per_second", "Tokens a second", False),
    ("useful_mfu", "Model FLOP utilization", True),
    ("waiting_for_data", "Waiting for data", True),
    ("memory_peak_gib", "Most memory so far, GiB", False),
)


def write_report(directory: Path, parts: Values, title: str = "") -> Path:
    """Writes report.html, whose path it returns, and report/; see `run_files.replace` for what becomes of earlier ones.

    Args:
        directory: of the run.
        parts: as of `read_parts`: lists of values under the names in LINES and "rollouts", values under those in FILES.
        title: what ran; "" is the directory's name.
    """
    metrics, timings = (parts.get(name) or [] for name in LINES)
    audit, evaluation, quality, config, environment = (parts.get(name) or {} for name in FILES)
    sets, step = evaluation.get("sets") or {}, evaluation.get("step")
    keys = [[f"config.{key}", value] for key, value in flat(config)]
    exported = None if step is None else (step, "exported")
    looked_at = evaluation_report.shown_sets(sets)
    sections = [
        Section("", *evaluation_report.verdict(quality)),
        evaluation_report.key_numbers(sets),
        _learning(metrics, exported),
        _rewards(metrics, looked_at, exported),
        samples.section(metrics, parts.get("rollouts") or []),
        evaluation_report.calibration(looked_at),
        evaluation_report.slices(looked_at),
        evaluation_report.worst(looked_at),
        *(evaluation_report.benchmark(name, x) for name, x in (evaluation.get("benchmarks") or {}).items()),
        *([audit_report.overview(audit, audit_report.problems(audit))] if audit else []),
        _speed(timings),
        Section("Config", Folded(f"{len(keys)} keys", [Table(keys, ["key", "value"])])),
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
    if drawn := samples.read(directory / "rollouts"):
        parts["rollouts"] = drawn
    return parts


def _subtitle(evaluation: Values, config: Values, environment: Values) -> str:
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


def _learning(metrics: Sequence[Values], exported: Mark | None) -> Section:
    plots, words = _learning_plots(metrics, exported), []
    for name in ("loss", "accuracy", "mse") if plots else ():
        values = [line[f"validation/{name}"] for line in metrics if line.get(f"validation/{name}") is not None]
        if len(values) > 1:
            before, after = (number(x, metric(name).percent) for x in (values[0], values[-1]))
            words.append(f"Validation {name} went from {before} to {after} in {len(values)} evaluations.")
    return Section("Learning curves", " ".join(words), plots)


def _rewards(metrics: Sequence[Values], sets: Values, exported: Mark | None) -> Section:
    plots, words = _rewards_over_time(metrics, exported), Caption("")
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
    return Section("Speed", _speed_plots(timings), Table(rows, ["", "median", "least", "most"], (1, 2, 3)))


# ----------------------------------------------------------------------------------------------------
# Plots over the steps, from lines of metrics.jsonl and timings.jsonl; what has no data gives no plot
# ----------------------------------------------------------------------------------------------------


def _learning_plots(lines: Sequence[Values], exported: Mark | None) -> list[Plot]:
    plots = []
    names = {key.split("/", 1)[1] for line in lines for key in line if key.startswith(("train/", "validation/"))}
    for name in [name for name in CURVES if name in names][:MOST_CURVES]:
        shown = metric(name)
        sets = {"train": ("each step", TRAIN), **SETS} if name == "loss" else SETS
        every = [_over_steps(lines, f"{set}/{name}", *look, marker=set != "train") for set, look in sets.items()]
        drawn = [line for line in every if line]
        if drawn:
            mark = exported if max(len(line.x) for line in drawn) > 1 else None
            panel = panels.curves(drawn, share=shown.percent, mark=mark)
            plots.append(Plot(f"learning_{name}", shown.title, panel, f"{shown.title} over the steps"))
    for key, title in (("learning_rate", "Learning rate"), ("grad_norm", "Norm of the gradient")):
        line = _over_steps(lines, f"train/{key}", "", TRAIN, marker=False)
        if line:
            plots.append(Plot(f"learning_{key}", title, panels.curves([line]), f"{title} over the steps"))
    return plots


def _rewards_over_time(lines: Sequence[Values], exported: Mark | None) -> list[Plot]:
    """How the rewards of chosen and rejected responses of the validation set spread, and whether their mean drifts."""
    keys = {side: [f"validation/{side}_p{q:02}" for q in QUANTILES] for side in ("chosen", "rejected")}
    whole = [line for line in lines if all(line.get(key) is not None for key in itertools.chain(*keys.values()))]
    plots = []
    if len(whole) > 1:
        steps, sides = [line["step"] for line in whole], []
        for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
            p05, p25, p50, p75, p95 = ([line[key] for line in whole] for key in keys[side])
            sides.append(Line(side, color, steps, p50, False, [(p05, p95, 0.14), (p25, p75, 0.26)]))
        alt = "Quantiles of the rewards of chosen and rejected responses over the steps"
        plots.append(Plot("rewards_over_time", "Rewards over the steps", panels.curves(sides, mark=exported), alt))
    drift = _over_steps(lines, "validation/reward_drift", "", VALIDATION)
    if drift and len(drift.x) > 1:
        title, alt = "Mean reward minus that before training", "Drift of the mean reward over the steps"
        plots.append(Plot("reward_drift", title, panels.curves([drift]), alt))
    return plots


def _speed_plots(lines: Sequence[Values]) -> list[Plot]:
    plots = []
    for key, title, share in SPEED:
        line = _over_steps(lines, f"timing/{key}", "", VALIDATION, marker=False)
        if line and len(line.x) > 1 and (not share or max(line.y) > 0):
            panel = panels.curves([line], share=share, zero=True)
            plots.append(Plot(f"speed_{key}", title, panel, f"{title} over the steps"))
    return plots


def _over_steps(lines: Sequence[Values], key: str, name: str, color: str, marker: bool = True) -> Line | None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return Line(name, color, [x for x, _ in points], [y for _, y in points], marker) if points else None
