"""The plots of a run over its steps, from lines of metrics.jsonl and timings.jsonl; what has no data gives no plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.report import panels
from rmjax.report.drawing import CHOSEN, REJECTED, TRAIN, VALIDATION
from rmjax.report.naming import metric
from rmjax.report.panels import Line, Mark
from rmjax.report.section import Plot
from rmjax.statistics import QUANTILES

Values = Mapping[str, Any]
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


def learning(lines: Sequence[Values], step: int | None) -> list[Plot]:
    """Loss and metrics of training and validation over the steps, and what the optimizer did.

    Args:
        lines: of metrics.jsonl.
        step: the one that was measured and exported, which is marked; None marks none.
    """
    plots = []
    names = {key.split("/", 1)[1] for line in lines for key in line if key.startswith(("train/", "validation/"))}
    for name in [name for name in CURVES if name in names][:MOST_CURVES]:
        shown = metric(name)
        sets = {"train": ("each step", TRAIN), **SETS} if name == "loss" else SETS
        every = [_over_steps(lines, f"{set}/{name}", *look, marker=set != "train") for set, look in sets.items()]
        drawn = [line for line in every if line]
        if drawn:
            mark = _exported(step) if max(len(line.x) for line in drawn) > 1 else None
            panel = panels.curves(drawn, share=shown.percent, mark=mark)
            plots.append(Plot(f"learning_{name}", shown.title, panel, f"{shown.title} over the steps"))
    for key, title in (("learning_rate", "Learning rate"), ("grad_norm", "Norm of the gradient")):
        line = _over_steps(lines, f"train/{key}", "", TRAIN, marker=False)
        if line:
            plots.append(Plot(f"learning_{key}", title, panels.curves([line]), f"{title} over the steps"))
    return plots


def rewards_over_time(lines: Sequence[Values], step: int | None) -> list[Plot]:
    """How the rewards of chosen and rejected responses of the validation set spread, and whether their mean drifts."""
    keys = {side: [f"validation/{side}_p{q:02}" for q in QUANTILES] for side in ("chosen", "rejected")}
    whole = [line for line in lines if all(line.get(key) is not None for of in keys.values() for key in of)]
    plots = []
    if len(whole) > 1:
        steps, sides = [line["step"] for line in whole], []
        for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
            p05, p25, p50, p75, p95 = ([line[key] for line in whole] for key in keys[side])
            sides.append(Line(side, color, steps, p50, False, [(p05, p95, 0.14), (p25, p75, 0.26)]))
        alt = "Quantiles of the rewards of chosen and rejected responses over the steps"
        panel = panels.curves(sides, mark=_exported(step))
        plots.append(Plot("rewards_over_time", "Rewards over the steps", panel, alt))
    drift = _over_steps(lines, "validation/reward_drift", "", VALIDATION)
    if drift and len(drift.x) > 1:
        title, alt = "Mean reward minus that before training", "Drift of the mean reward over the steps"
        plots.append(Plot("reward_drift", title, panels.curves([drift]), alt))
    return plots


def speed(lines: Sequence[Values]) -> list[Plot]:
    """Throughput, waiting for data and memory over the steps; lines are of timings.jsonl."""
    plots = []
    for key, title, share in SPEED:
        line = _over_steps(lines, f"timing/{key}", "", VALIDATION, marker=False)
        if line and len(line.x) > 1 and (not share or max(line.y) > 0):
            panel = panels.curves([line], share=share, zero=True)
            plots.append(Plot(f"speed_{key}", title, panel, f"{title} over the steps"))
    return plots


def _over_steps(lines: Sequence[Values], key: str, name: str, color: str, marker: bool = True) -> Line | None:
    """The points of a key that are known; None if there are none."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return Line(name, color, [x for x, _ in points], [y for _, y in points], marker) if points else None


def _exported(step: int | None) -> Mark | None:
    return None if step is None else (step, "exported")
