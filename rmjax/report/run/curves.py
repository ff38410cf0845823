"""The plots of a report, made from plain data; what has no data gives no plot.

ESTIMATE, MEASURED and the like are as in an evaluation; lines are those of metrics.jsonl and timings.jsonl.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rmjax.evaluate.naming import metric
from rmjax.report import plots
from rmjax.report.plots import CHOSEN, REJECTED, SOFT, TRAIN, VALIDATION, Panel
from rmjax.report.run import panels
from rmjax.report.run.panels import Line

Values = Mapping[str, Any]
WIDE, HIGH = 4.7, 2.75  # inches; two stand beside each other on a desk, one on a phone
ROW = 0.23  # inches of a row of `intervals`
QUANTILES = (5, 25, 50, 75, 95)
CURVES = (  # of the metrics that there are, these are shown over time, in this order
    *("loss", "accuracy", "accuracy_averaged", "first_error_accuracy", "verdict_accuracy", "mse", "spearman", "kappa"),
    *("consistency", "ece", "margin"),
)
MOST_CURVES = 4
SETS = {"train_slice": ("training", TRAIN), "validation": ("validation", VALIDATION)}


@dataclasses.dataclass(frozen=True)
class Plot:
    """One panel.

    Attributes:
        name: of its PNG file, without the ending; unique in a report.
        says: what is to be seen, for those who cannot; unique in a report.
        panel: paints it.
        high: inches.
    """

    name: str
    says: str
    panel: Panel
    high: float = HIGH

    def titled(self, prefix: str) -> "Plot":
        """The same plot with more before its title."""

        def paint(axes: plots.Axes) -> None:
            self.panel(axes)
            axes.set_title(prefix + axes.get_title(loc="left"))

        return dataclasses.replace(self, panel=paint)

    def draw(self) -> tuple[str, bytes]:
        """As SVG and as PNG; the title at the left edge, where those of other plots above and below are, too."""

        def paint(axes: plots.Axes) -> None:
            self.panel(axes)
            axes.figure.suptitle(axes.get_title(loc="left"), x=0.012, ha="left", fontsize=10, weight="bold")
            axes.set_title("")

        return plots.draw_both([paint], self.says, high=self.high, wide=WIDE)


def learning(lines: Sequence[Values], step: int | None) -> list[Plot]:
    """Loss and metrics of training and validation over the steps, and what the optimizer did.

    Args:
        lines: of metrics.jsonl.
        step: the one that was measured and exported, which is marked; None marks none.
    """
    found = []
    names = {key.split("/", 1)[1] for line in lines for key in line if key.startswith(("train/", "validation/"))}
    for name in [name for name in CURVES if name in names][:MOST_CURVES]:
        shown = metric(name)
        sets = {"train": ("each step", TRAIN), **SETS} if name == "loss" else SETS
        every = [_over_steps(lines, f"{set}/{name}", *look, marker=set != "train") for set, look in sets.items()]
        drawn = [line for line in every if line]
        if drawn:
            panel = panels.curves(drawn, shown.title, share=shown.percent)
            found.append(Plot(f"learning_{name}", f"{shown.title} over the steps", _mark(panel, drawn, step)))
    for key, title in (("learning_rate", "Learning rate"), ("grad_norm", "Norm of the gradient")):
        line = _over_steps(lines, f"train/{key}", "", TRAIN, marker=False)
        if line:
            found.append(Plot(f"learning_{key}", f"{title} over the steps", panels.curves([line], title)))
    return found


def rewards_over_time(lines: Sequence[Values], step: int | None) -> list[Plot]:
    """How the rewards of chosen and rejected responses of the validation set spread, and whether their mean drifts."""
    keys = {side: {q: f"validation/{side}_p{q:02}" for q in QUANTILES} for side in ("chosen", "rejected")}
    wanted = [key for of in keys.values() for key in of.values()]
    whole = [line for line in lines if all(line.get(key) is not None for key in wanted)]
    found = []
    if len(whole) > 1:
        steps = [line["step"] for line in whole]
        sides = [
            (side, color, {q: [line[key] for line in whole] for q, key in keys[side].items()})
            for side, color in (("chosen", CHOSEN), ("rejected", REJECTED))
        ]
        panel = panels.fans(sides, steps, "Rewards over the steps")
        says = "Quantiles of the rewards of chosen and rejected responses over the steps"
        found.append(Plot("rewards_over_time", says, panel if step is None else panels.marked(panel, step, "exported")))
    drift = _over_steps(lines, "validation/reward_drift", "", VALIDATION)
    if drift and len(drift.x) > 1:
        panel = panels.curves([drift], "Mean reward minus that before training")
        found.append(Plot("reward_drift", "Drift of the mean reward over the steps", panel))
    return found


def rewards(name: str, measured: Values) -> list[Plot]:
    """Distributions at the end: rewards, margins, scores of steps or losses of conversations, as they are there."""
    found = []
    if _counted(measured.get("chosen")) and _counted(measured.get("rejected")):
        sides = [("rejected", REJECTED, measured["rejected"]), ("chosen", CHOSEN, measured["chosen"])]
        panel = panels.overlaid(sides, "Rewards at the end", "reward", "responses")
        found.append(Plot(f"rewards_{name}", f"{name}: histograms of the rewards of chosen and rejected", panel))
    if _counted(measured.get("margins")):
        names = ("wrong", "right")
        panel = panels.split(measured["margins"], (REJECTED, CHOSEN), names, "Margins", "chosen minus rejected")
        found.append(Plot(f"margins_{name}", f"{name}: histogram of reward differences", panel))
    steps = measured.get("scores") or {}
    if all(_counted(steps.get(side)) for side in ("correct", "incorrect")):
        sides = [("wrong steps", REJECTED, steps["incorrect"]), ("right steps", CHOSEN, steps["correct"])]
        panel = panels.overlaid(sides, "Scores of steps", "probability that the step is right", "steps")
        found.append(Plot(f"steps_{name}", f"{name}: histograms of the scores of right and wrong steps", panel))
    if _counted(measured.get("losses")):
        panel = plots.bars(measured["losses"], "Loss of a conversation", "nats a token", "conversations", VALIDATION)
        found.append(Plot(f"losses_{name}", f"{name}: histogram of the mean losses of conversations", panel))
    return found


def attributes(name: str, measured: Values) -> list[Plot]:
    """For each attribute the distributions of labels and scores, and the scores by label."""
    found = []
    for attribute, values in (measured.get("attributes") or {}).items():
        known = values.get("curve") or {}
        if any(mean is not None for mean in known.get("mean", ())):
            panel = panels.against_diagonal(known, f"{panels.cut(attribute)}: score by label", VALIDATION)
            found.append(Plot(f"scores_{name}_{attribute}", f"{name}: mean score of {attribute} by label", panel))
        if _counted(values.get("labels")) and _counted(values.get("scores")):
            sides = [("labels", SOFT, values["labels"]), ("scores", VALIDATION, values["scores"])]
            panel = panels.overlaid(sides, f"{panels.cut(attribute)}: distribution", "score", "responses")
            found.append(Plot(f"distribution_{name}_{attribute}", f"{name}: labels and scores of {attribute}", panel))
    return found


def calibration(name: str, measured: Values) -> list[Plot]:
    """Stated probabilities against the shares that are right."""
    bins = measured.get("reliability")
    if not bins or not sum(bins["counts"]):
        return []
    steps = measured["kind"] == "steps"
    x = "stated probability that a step is right" if steps else "stated probability of the preferred side"
    y = "steps that are right" if steps else "pairs labelled so"
    panel = panels.reliability(bins, "Reliability", x, y, VALIDATION)
    return [Plot(f"reliability_{name}", f"{name}: stated probability against the share that is right", panel, 3.3)]


def slices(name: str, measured: Values) -> list[Plot]:
    """Accuracy of each kind of pairs, with that of all as a line."""
    found = []
    whole = (measured.get("metrics", {}).get("accuracy") or {}).get("value")
    for table, rows in (measured.get("slices") or {}).items():
        known = [{**row, "count": row["pairs"]} for row in rows if row["value"] is not None]
        if known:
            level = None if whole is None else ("all", whole)
            panel = panels.intervals(known, f"Accuracy by {table}", VALIDATION, level)
            plot = Plot(f"slices_{name}_{table}", f"{name}: accuracy by {table}", panel, _tall(known))
            found.append(plot)
    return found


def best_of_n(name: str, measured: Values) -> list[Plot]:
    """How good the response is that the model picks among n, beside the best one and any."""
    curve = measured.get("best_of_n")
    if not curve or not curve["n"]:
        return []
    of = [(n, e) for n, e in zip(curve["n"], curve["model"]) if e["value"] is not None]
    if not of:
        return []
    low, high = ([e[end] for _, e in of] for end in ("low", "high"))
    low, high = ([], []) if None in low + high else (low, high)
    lines = [Line("model", VALIDATION, [n for n, _ in of], [e["value"] for _, e in of], low=low, high=high)]
    for key, label, color in (("oracle", "the best", CHOSEN), ("random", "any", SOFT)):
        known = [(n, y) for n, y in zip(curve["n"], curve[key]) if y is not None]
        lines += [Line(label, color, [n for n, _ in known], [y for _, y in known])] if known else []
    panel = panels.curves(lines, "Labelled worth of the best of n", "responses to choose from", log=True)
    return [Plot(f"best_of_n_{name}", f"{name}: worth of the best of n responses by the model", panel)]


def benchmark(name: str, measured: Values) -> list[Plot]:
    """Sections and subsets of a benchmark."""
    found = []
    sections = {key: x for key, x in measured["metrics"].items() if x["value"] is not None}
    shares = lambda rows: all(0 <= row["value"] <= 1 for row in rows)
    rows = [{"name": key, "count": None, **x} for key, x in sections.items() if key != "overall"]
    overall = ("overall", sections["overall"]["value"]) if "overall" in sections else None
    subsets = [
        {"name": key, **x} for key, x in (measured.get("subsets") or {}).items() if x["value"] is not None
    ]  # fmt: skip
    for what, known in (("sections", rows), ("subsets", subsets)):
        if known and shares(known):
            panel = panels.intervals(known, what.capitalize(), VALIDATION, overall)
            found.append(Plot(f"{what}_{name}", f"{name}: {what}", panel, _tall(known)))
    return found


def speed(lines: Sequence[Values]) -> list[Plot]:
    """Throughput, waiting for data and memory over the steps."""
    found = []
    for key, title, share in SPEED:
        line = _over_steps(lines, f"timing/{key}", "", VALIDATION, marker=False)
        if line and len(line.x) > 1 and (not share or max(line.y) > 0):
            found.append(
                Plot(f"speed_{key}", f"{title} over the steps", panels.curves([line], title, share=share, zero=True))
            )
    return found


SPEED = (
    ("pairs_per_second", "Pairs a second", False),
    ("groups_per_second", "Groups a second", False),
    ("tokens_per_second", "Tokens a second", False),
    ("useful_mfu", "Model FLOP utilization", True),
    ("waiting_for_data", "Waiting for data", True),
    ("memory_peak_gib", "Most memory so far, GiB", False),
)


def _over_steps(lines: Sequence[Values], key: str, name: str, color: str, marker: bool = True) -> Line | None:
    """The points of a key that are known; None if there are none."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return Line(name, color, [x for x, _ in points], [y for _, y in points], marker) if points else None


def _mark(panel: Panel, lines: Sequence[Line], step: int | None) -> Panel:
    return (
        panel if step is None or not max(len(line.x) for line in lines) > 1 else panels.marked(panel, step, "exported")
    )


def _counted(histogram: Values | None) -> bool:
    return bool(histogram) and sum(histogram["counts"]) > 0  # type: ignore[index]


def _tall(rows: Sequence[Any]) -> float:
    """Inches for so many rows with title and axis."""
    return 0.95 + ROW * len(rows)


def unique(plots_of: Iterator[Plot]) -> Iterator[Plot]:
    """The same plots, with names that are safe for files, and none twice."""
    seen: set[str] = set()
    for plot in plots_of:
        name = "".join(c if c.isalnum() and c.isascii() else "_" for c in plot.name)[:80]
        number, free = 1, name
        while free in seen:
            number, free = number + 1, f"{name}_{number + 1}"
        seen.add(free)
        yield dataclasses.replace(plot, name=free)
