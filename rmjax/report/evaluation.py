"""Sections about what was measured of a model: for the report of its run, its card, and `rmjax.evaluate`.

`sets` and `benchmarks` are those of an evaluation by their names, `measured` is one of them. What has no data gives
nothing.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmjax.report import naming, panels
from rmjax.report.drawing import CHOSEN, REJECTED, SOFT, VALIDATION
from rmjax.report.naming import number, with_interval
from rmjax.report.panels import Line, Mark
from rmjax.report.section import Bad, Caption, Cell, Folded, Good, Pair, Part, Plot, Run, Section, Table, capital

Values = Mapping[str, Any]
TILES = 6
OPEN = 5  # wrong pairs that are not folded
LONGEST_TEXT = 4000  # characters of a text that are shown
COMPARED = 600  # words; finding what differs takes time with the square of them
ALIKE = 0.5  # texts less alike than this have no words marked: most would be
CHECKS = {
    "accuracy": "Validation accuracy",
    "gap": "Training against validation",
    "unreadable": "Unreadable judgements",
    "cut_off": "Cut-off judgements",
    "consistency": "Both orders agree",
    "convergence": "Loss converged",
    "beats_length": "Better than length",
    "ece": "Calibration",
}
STATUS = {True: Good("passed"), False: Bad("failed"), None: "not measured"}
NOT_SHOWN = Bad("not shown")


def set_title(name: str) -> str:
    return "training (a slice)" if name == "train_slice" else name


def shown_sets(sets: Values) -> dict[str, Values]:
    """The sets that are looked at closely: all but the slice of the training set, unless that is the only one."""
    return {name: x for name, x in sets.items() if name != "train_slice" or len(sets) == 1}


def verdict(quality: Values | None, advice: bool = True) -> list[Part]:
    """The verdict of the quality gate, and a row for each of its checks; with advice also what to do about it."""
    if not quality:
        return []
    checks = quality["checks"]
    status = [NOT_SHOWN if x["passed"] is False and not x.get("shown", True) else STATUS[x["passed"]] for x in checks]
    failed, unknown, unshown = (status.count(x) for x in (STATUS[False], STATUS[None], NOT_SHOWN))
    known = len(checks) - unknown
    counted = failed or unshown or known
    some = f"all {known} checks" if counted == known else f"{counted} of {known} checks"
    which = f"{some if known != 1 else 'the one check'} of the quality gate"
    which += f"; {unshown} not shown" if failed and unshown else ""
    which += f"; {unknown} not measured" if unknown else ""
    text: str = Good(f"Good enough: passes {which}")
    if failed or unshown:
        text = Bad(
            f"Not good enough: fails {which}" if failed else f"Not shown to be good enough by so few data: {which}"
        )
    if not known:
        text = "The quality gate checked nothing: what it asks for was not measured"
    to_do = lambda check: f"What to do: {check['advice']}." if advice and check["advice"] else ""
    rows: list[list[Cell]] = [
        [shown, CHECKS.get(x["name"], x["name"]), (f"{capital(x['reason'])}.", to_do(x))]
        for shown, x in zip(status, checks)
    ]
    return [text, Table(rows)]


def key_numbers(sets: Values) -> Section:
    if not sets:
        return Section("Key numbers")
    sets = {**shown_sets(sets), **sets}
    counts = "; ".join(f"{set_title(name)}: {_counts(x)}".removeprefix(": ") for name, x in sets.items())
    words = f"{counts}. With each number stands its 95 % interval, by the bootstrap over prompts."
    name, first = next(iter(sets.items()))
    large = Caption(f"Large are those of {set_title(name)}." if len(sets) > 1 else "")
    table = metrics_table(sets, naming.HEADLINES.get(first["kind"], ()))
    return Section("Key numbers", capital(words), large, table)


def metrics_table(parts: Values, headlines: Sequence[str] = ()) -> Table:
    """A row for each metric that is known of a set or benchmark, a column for each of these, and what it means."""
    keys = list(dict.fromkeys(key for x in parts.values() for key, e in x["metrics"].items() if _is_known(e)))
    rows: list[list[Cell]] = []
    for key in keys:
        kinds = {x.get("kind", "") for x in parts.values() if key in x["metrics"]}
        estimates = [x["metrics"].get(key) or {} for x in parts.values()]
        metric = naming.metric(key, kinds.pop() if len(kinds) == 1 else "", next(filter(_is_known, estimates)))
        cells = [naming.value_and_interval(estimate, metric.percent) for estimate in estimates]
        rows.append([metric.title, *cells, metric.meaning])
    last, large = 1 + len(parts), [keys.index(key) for key in headlines if key in keys][:TILES]
    return Table(rows, ["", *map(set_title, parts), ""], range(1, last), quiet=(last,), large=large)


def benchmark(name: str, measured: Values) -> Section:
    missing = [Bad(f"The data lacks {', '.join(measured['missing'])}.")] if measured.get("missing") else []
    rows = [
        [key, naming.value_and_interval(x, naming.is_share(x)), f"{x['count']:,}"]
        for key, x in (measured.get("subsets") or {}).items()
    ]
    return Section(
        f"Benchmark {name}",
        capital(f"{_counts(measured)}."),
        *(f"{capital(note)}." for note in measured.get("notes") or ()),
        *missing,
        *_overlap(measured),
        benchmark_plots(name, measured),
        Folded("Subsets as numbers", [Table(rows, ("", "score", "groups"), (1, 2))]),
    )


def _overlap(measured: Values) -> list[Any]:
    """The metrics; beside those of all groups, those without groups that overlap the training data."""
    if not (known := measured.get("overlapping")):
        return [metrics_table({"": measured}, list(measured["metrics"]))]
    share = f"{known['groups']:,} of its groups overlap the training data"
    names = list(measured["metrics"])
    if not known["metrics"]:
        return [Bad(f"{share}; without them too little is left."), metrics_table({"": measured}, names)]
    return [Bad(f"{share}."), metrics_table({"all": measured, "without them": known}, names)]


def _counts(measured: Values) -> str:
    pairs = f"{measured['pairs']:,} pairs in " if "pairs" in measured else ""
    prompts = f" with {measured['prompts']:,} prompts" if "prompts" in measured else ""
    return f"{pairs}{measured['groups']:,} groups{prompts}"


def _is_known(estimate: Values | None) -> bool:
    return bool(estimate) and estimate["value"] is not None  # type: ignore[index]


def calibration(sets: Values) -> Section:
    """Stated probabilities against the shares that are right, and how good the best of n is by the model."""
    words, plots, chosen = [], of_all(reliability_plots, sets), of_all(best_of_n_plots, sets)
    for name, measured in sets.items():
        error = measured["metrics"].get("ece")
        if plots and _is_known(error):
            which = f"of {set_title(name)} " if name else ""
            words.append(f"The expected calibration error {which}is {with_interval(error, True)}.")
    if plots:
        words.append("Points below the diagonal are right less often than stated. Grey bars: how many there are.")
    if chosen:
        words.append("Best of n: how good the response is that the model picks among n, by the labels.")
    title = " and ".join(["Calibration"] * bool(plots) + ["best of n"] * bool(chosen))
    return Section(capital(title), Caption(" ".join(words)), plots + chosen)


def slices(sets: Values) -> Section:
    """Accuracy of kinds of pairs, and which of them are worse than all together."""
    plots = of_all(slice_plots, sets)
    words = Caption("Accuracy with its 95 % interval; in brackets the number of pairs.") if plots else ""
    worse = [Bad(line) for measured in sets.values() for line in failing(measured)]
    return Section("Slices", words, *worse, plots)


def failing(measured: Values) -> list[str]:
    return [
        f"{capital(str(row['name']))} ({row['table']}): accuracy {with_interval(row, True)} is below that of all pairs "
        f"({row['pairs']:,} pairs)."
        for row in measured.get("failing") or ()
    ]


def worst(sets: Values) -> Section:
    attributes = sets and all(measured["kind"] == "attributes" for measured in sets.values())
    tables, pairs = [], []
    for name, measured in sets.items():
        shown = [(entry, wrong_pair(entry)) for entry in measured.get("worst") or []]
        pairs += [pair for _, pair in shown if pair]
        rest = [entry for entry, pair in shown if not pair]
        if rest and "attribute" in rest[0]:
            rows = [[str(x["id"]), str(x["attribute"]), number(x["score"]), number(x["label"])] for x in rest]
            tables.append(Table(rows, ["row", "attribute", "score", "label"], (2, 3), set_title(name)))
        elif rest:
            numbers = lambda x: [number(x["probability"], True), *(number(x.get(y)) for y in ("difference", "margin"))]
            labelled = lambda x: [str(x["id"]), str(x.get("source") or ""), f"{x['preferred']} over {x['rejected']}"]
            rows = [[*labelled(x), *numbers(x)] for x in rest]
            head = ["row", "source", "labelled", "model's probability of it", "rewards differ by", "gold margin"]
            tables.append(Table(rows, head, (3, 4, 5), set_title(name)))
    title = "Farthest from their labels" if attributes else "Most confidently wrong"
    return Section(title, *tables, pairs[:OPEN], Folded(f"{len(pairs) - OPEN} more", [pairs[OPEN:]]))


def wrong_pair(entry: Mapping[str, Any]) -> Pair | None:
    """One of "worst" of an evaluation; None where its texts are not known."""
    preferred, rejected = entry.get("preferred_text"), entry.get("rejected_text")
    if preferred is None or rejected is None:
        return None
    heading = f"The model gives the label a probability of {number(entry['probability'], True)}"
    if entry.get("difference") is not None:
        heading += f"; the preferred response gets {number(abs(entry['difference']))} less reward"
    place = " · ".join(str(x) for x in (entry["id"], entry.get("source")) if x)
    prompt, preferred, rejected = map(_shorten, (entry.get("prompt") or "", preferred, rejected))
    return Pair(heading, place, prompt, *differing(preferred, rejected))


def _shorten(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return f"{text[:LONGEST_TEXT]} … ({more:,} more characters)" if more > 0 else text


def differing(first: str, second: str) -> tuple[list[Run], list[Run]]:
    """Splits two texts where they differ, by words.

    >>> differing("every old river", "every old garden")
    ([(True, 'every old '), (False, 'river')], [(True, 'every old '), (False, 'garden')])
    """
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (first, second))
    whole = [(True, first)], [(True, second)]
    if max(len(a), len(b)) > COMPARED:
        return whole
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    if matcher.ratio() < ALIKE:
        return whole
    runs: tuple[list[Run], list[Run]] = [], []
    for kind, i, j, k, l in matcher.get_opcodes():
        for side, words in zip(runs, (a[i:j], b[k:l])):
            if words:
                side.append((kind == "equal", "".join(words)))
    return runs


def of_all(plots: Callable[[str, Values], list[Plot]], sets: Values) -> list[Plot]:
    """The plots of every set; their titles say which set it is where there are several."""
    named = lambda name, plot: dataclasses.replace(plot, title=f"{name}: {plot.title}") if len(sets) > 1 else plot
    return [named(name, plot) for name, measured in sets.items() for plot in plots(name, measured)]


def reward_plots(name: str, measured: Values) -> list[Plot]:
    """Distributions of rewards, margins, scores of steps or losses of conversations, as they are there."""
    steps, margins = measured.get("scores") or {}, measured.get("margins")
    rewards = [(side, color, measured.get(side)) for side, color in (("rejected", REJECTED), ("chosen", CHOSEN))]
    scores = [("wrong steps", REJECTED, steps.get("incorrect")), ("right steps", CHOSEN, steps.get("correct"))]
    losses = [("", VALIDATION, measured.get("losses"))]
    margin_plots = []
    if margins and _counted(margins):
        sides = panels.split_at_zero(margins, ("wrong", "right"), (REJECTED, CHOSEN))
        panel = panels.histograms(sides, "chosen minus rejected", "pairs")
        margin_plots.append(Plot(f"margins_{name}", "Margins", panel, f"{name}: histogram of reward differences"))
    return [
        *_histograms(f"rewards_{name}", "Rewards at the end", rewards, "reward", "responses",
                     f"{name}: histograms of the rewards of chosen and rejected"),
        *margin_plots,
        *_histograms(f"steps_{name}", "Scores of steps", scores, "probability that the step is right", "steps",
                     f"{name}: histograms of the scores of right and wrong steps"),
        *_histograms(f"losses_{name}", "Loss of a conversation", losses, "nats a token", "conversations",
                     f"{name}: histogram of the mean losses of conversations"),
    ]  # fmt: skip


def attribute_plots(name: str, measured: Values) -> list[Plot]:
    plots = []
    for attribute, values in (measured.get("attributes") or {}).items():
        curve = values.get("curve") or {"label": (), "mean": (), "sd": ()}
        known = [x for x in zip(curve["label"], curve["mean"], curve["sd"]) if x[1] is not None]
        if known:
            label, mean = [x for x, *_ in known], [y for _, y, _ in known]
            low, high = ([y + sign * (sd or 0.0) for _, y, sd in known] for sign in (-1, 1))
            lines = [Line("", None, label, label), Line("", VALIDATION, label, mean, bands=[(low, high, 0.18)])]
            title, panel = f"{panels.cut(attribute)}: score by label", panels.curves(lines, "label", "score")
            alt = f"{name}: mean score of {attribute} by label"
            plots.append(Plot(f"scores_{name}_{attribute}", title, panel, alt))
        sides = [("labels", SOFT, values.get("labels")), ("scores", VALIDATION, values.get("scores"))]
        title, alt = f"{panels.cut(attribute)}: distribution", f"{name}: labels and scores of {attribute}"
        plots += _histograms(f"distribution_{name}_{attribute}", title, sides, "score", "responses", alt)
    return plots


def _histograms(
    name: str, title: str, sides: Sequence[tuple[str, str, Values | None]], x: str, y: str, alt: str
) -> list[Plot]:
    filled = [(label, color, counts) for label, color, counts in sides if counts and _counted(counts)]
    return [Plot(name, title, panels.histograms(filled, x, y), alt)] if len(filled) == len(sides) else []


def reliability_plots(name: str, measured: Values) -> list[Plot]:
    bins = measured.get("reliability")
    if not bins or not sum(bins["counts"]):
        return []
    steps = measured["kind"] == "steps"
    x = "stated probability that a step is right" if steps else "stated probability of the preferred side"
    y = "steps that are right" if steps else "pairs labelled so"
    alt = f"{name}: stated probability against the share that is right"
    return [Plot(f"reliability_{name}", "Reliability", panels.reliability(bins, x, y), alt, 3.3)]


def slice_plots(name: str, measured: Values) -> list[Plot]:
    whole = (measured.get("metrics", {}).get("accuracy") or {}).get("value")
    level = None if whole is None else (whole, "all")
    plots = []
    for table, slices in (measured.get("slices") or {}).items():
        names = (f"slices_{name}_{table}", f"Accuracy by {table}", f"{name}: accuracy by {table}")
        plots += _interval_plots(names, [{**row, "count": row["pairs"]} for row in slices], level, "pairs")
    return plots


def best_of_n_plots(name: str, measured: Values) -> list[Plot]:
    """How good the response is that the model picks among n, beside the best one and any."""
    curve = measured.get("best_of_n") or {"n": (), "model": ()}
    known = [(n, x) for n, x in zip(curve["n"], curve["model"]) if x["value"] is not None]
    if not known:
        return []
    low, high = ([x[end] for _, x in known] for end in ("low", "high"))
    bands = [] if None in low + high else [(low, high, 0.18)]
    lines = [Line("model", VALIDATION, [n for n, _ in known], [x["value"] for _, x in known], bands=bands)]
    for key, label, color in (("oracle", "the best", CHOSEN), ("random", "any", SOFT)):
        points = [(n, y) for n, y in zip(curve["n"], curve[key]) if y is not None]
        lines += [Line(label, color, [n for n, _ in points], [y for _, y in points])] if points else []
    rows: list[list[Cell]] = [
        [f"{n}", naming.value_and_interval(model), number(best), number(random)]
        for n, model, best, random in zip(*(curve[key] for key in ("n", "model", "oracle", "random")))
    ]
    table = Table(rows, ("n", "gold rank of the model's pick", "of the best", "of any"), (0, 1, 2, 3), "Best of n")
    panel = panels.curves(lines, "responses to choose from", log=True)
    alt = f"{name}: worth of the best of n responses by the model"
    return [Plot(f"best_of_n_{name}", "Labelled worth of the best of n", panel, alt, table=table)]


def benchmark_plots(name: str, measured: Values) -> list[Plot]:
    """Sections and subsets of a benchmark that are shares."""
    metrics = measured["metrics"]
    level = (metrics["overall"]["value"], "overall") if _is_known(metrics.get("overall")) else None
    sections = [{"name": key, "count": None, **x} for key, x in metrics.items() if key != "overall"]
    subsets = [{"name": key, **x} for key, x in (measured.get("subsets") or {}).items()]
    plots = []
    for what, rows in (("sections", sections), ("subsets", subsets)):
        if all(naming.is_share(row) for row in rows if _is_known(row)):
            plots += _interval_plots((f"{what}_{name}", capital(what), f"{name}: {what}"), rows, level, "groups")
    return [dataclasses.replace(plot, table=None) for plot in plots]  # both stand in tables of the section


def _interval_plots(names: tuple[str, str, str], rows: Sequence[Values], level: Mark | None, unit: str) -> list[Plot]:
    """The plot of shares with their intervals, if any is known; `names` are its name, title and alt text."""
    known = [row for row in rows if _is_known(row)]
    if not known:
        return []
    cells: list[list[Cell]] = [
        [str(x["name"]), naming.value_and_interval(x, True), f"{x['count'] or 0:,} {unit}"] for x in rows
    ]
    name, title, alt = names
    panel = panels.intervals(known, level)
    return [Plot(name, title, panel, alt, panels.tall(known), Table(cells, numbers=(1, 2), title=title))]


def _counted(histogram: Values | None) -> bool:
    return bool(histogram) and sum(histogram["counts"]) > 0  # type: ignore[index]
