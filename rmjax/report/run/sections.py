"""What a report says, section by section, from plain data; what is not known is left out."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rmjax.evaluate import naming
from rmjax.evaluate.naming import number, with_interval
from rmjax.report.audit import text as audit_text
from rmjax.report.card import KINDS
from rmjax.report.run import curves, texts
from rmjax.report.run.page import Cell, Section, Table

Values = Mapping[str, Any]
TILES = 6
CHECKS = {
    "accuracy": "Validation accuracy",
    "gap": "Training against validation",
    "convergence": "Loss converged",
    "beats_length": "Better than length",
    "ece": "Calibration",
}
STATUS = {True: ("passed", "good"), False: ("failed", "bad"), None: ("not measured", "note")}


def sections(
    metrics: Sequence[Values],
    timings: Sequence[Values],
    audit: Values | None,
    evaluation: Values | None,
    config: Values | None,
    environment: Values | None,
) -> list[Section]:
    """All sections that have something to show, in reading order; arguments as of `report.write`."""
    evaluation = evaluation or {}
    sets = shown_sets(evaluation.get("sets") or {})
    every = [
        _key_numbers(evaluation.get("sets") or {}),
        _learning(metrics, evaluation.get("step")),
        _rewards(metrics, sets, evaluation.get("step")),
        _calibration(sets),
        _slices(sets),
        _worst(sets),
        *(_benchmark(name, x) for name, x in (evaluation.get("benchmarks") or {}).items()),
        _audit(audit),
        _speed(timings),
        _config(config),
        _environment(environment),
    ]
    return [section for section in every if section]


def verdict(quality: Values | None) -> dict[str, Any] | None:
    """The gate's verdict as the page shows it."""
    if quality is None:
        return None
    checks = quality["checks"]
    failed = sum(check["passed"] is False for check in checks)
    known = sum(check["passed"] is not None for check in checks)
    said, look = f"Good enough: passes {_checks(known, known)}", "good"
    if failed:
        said, look = f"Not good enough: fails {_checks(failed, known)}", "bad"
    elif not known:
        said, look = "The quality gate checked nothing: what it asks for was not measured", ""
    shown = [
        {**check, "status": STATUS[check["passed"]][0], "look": STATUS[check["passed"]][1],
         "reason": f"{_capital(check['reason'])}.", "name": CHECKS.get(check["name"], check["name"])}
        for check in checks
    ]  # fmt: skip
    return {"said": said, "look": look, "checks": shown}


def _checks(some: int, known: int) -> str:
    many = f"all {known}" if some == known > 1 else f"{some} of {known}"
    return "the one check of the quality gate" if known == 1 else f"{many} checks of the quality gate"


def subtitle(evaluation: Values | None, config: Values | None, environment: Values | None) -> str:
    """One line: what kind of model, from what, on what data, which step, when."""
    config, parts = config or {}, []
    objective, model = config.get("objective") or {}, config.get("model") or {}
    if objective.get("name"):
        parts.append(KINDS[objective["name"]].what if objective["name"] in KINDS else objective["name"])
    if model.get("init_from"):
        parts.append(f"from {model['init_from']}")
    elif model.get("scratch"):
        parts.append(f"{model['scratch'].get('model_type', 'model')} from scratch")
    if (config.get("data") or {}).get("train"):
        parts.append(f"trained on {config['data']['train']}")
    if (evaluation or {}).get("step") is not None:
        parts.append(f"step {evaluation['step']:,}")  # type: ignore[index]
    if (environment or {}).get("date"):
        parts.append(str(environment["date"]))  # type: ignore[index]
    return _capital(" · ".join(parts))


def shown_sets(sets: Values) -> dict[str, Values]:
    """The sets that are looked at closely: all but the slice of the training set, unless that is the only one."""
    return {name: x for name, x in sets.items() if name != "train_slice" or len(sets) == 1}


# ----------------------------------------------------------------------------------------------------
# Sections
# ----------------------------------------------------------------------------------------------------


def _key_numbers(sets: Values) -> Section:
    section = Section("Key numbers")
    if not sets:
        return section
    name, first = next(iter(shown_sets(sets).items()))
    kind, known = first["kind"], {k: e for k, e in first["metrics"].items() if e["value"] is not None}
    section.words = [
        f"Of {_title(name)}: {_many(first)}. Below each number its 95 % interval, by the bootstrap over prompts."
    ]
    for key in [key for key in naming.HEADLINES.get(kind, ()) if key in known][:TILES]:
        shown = naming.metric(key, kind)
        ends = naming.interval(known[key], shown.percent)
        section.tiles.append((shown.title, number(known[key]["value"], shown.percent), ends))
    section.tables = [_metrics_table(sets)]
    return section


def _metrics_table(sets: Values) -> Table:
    keys = list(dict.fromkeys(key for x in sets.values() for key, e in x["metrics"].items() if e["value"] is not None))
    rows: list[list[Cell]] = []
    for key in keys:
        kinds = {x["kind"] for x in sets.values() if key in x["metrics"]}
        shown = naming.metric(key, kinds.pop() if len(kinds) == 1 else "")
        cells = [_cell(x["metrics"].get(key) or {}, shown.percent) for x in sets.values()]
        rows.append([shown.title, *cells, shown.meaning])
    return Table(["", *map(_title, sets), ""], rows, range(1, 1 + len(sets)), quiet=(1 + len(sets),))


def _learning(metrics: Sequence[Values], step: int | None) -> Section:
    section = Section("Learning curves", plots=curves.learning(metrics, step))
    for name in ("loss", "accuracy", "mse"):
        found = [line[f"validation/{name}"] for line in metrics if line.get(f"validation/{name}") is not None]
        if len(found) > 1 and section.plots:
            percent = naming.metric(name).percent
            before, after = (number(x, percent) for x in (found[0], found[-1]))
            section.words.append(f"Validation {name} went from {before} to {after} in {len(found)} evaluations.")
    section.words = [" ".join(section.words)] if section.words else []
    return section


def _rewards(metrics: Sequence[Values], sets: Values, step: int | None) -> Section:
    section = Section("Rewards", plots=curves.rewards_over_time(metrics, step))
    if any(plot.name == "rewards_over_time" for plot in section.plots):
        section.words = [
            "Over the steps: the median as a line, half of the responses in the darker band, 90 % in both."
        ]
    section.plots += _of_all(curves.rewards, sets) + _of_all(curves.attributes, sets)
    kinds = {measured["kind"] for measured in sets.values()}
    named = {"attributes": "Scores", "steps": "Scores of steps", "tokens": "Losses"}
    section.title = named.get(next(iter(kinds)), "Rewards") if len(kinds) == 1 else "Rewards"
    return section


def _calibration(sets: Values) -> Section:
    section = Section("Calibration", plots=_of_all(curves.calibration, sets))
    for name, measured in sets.items():
        found = measured["metrics"].get("ece")
        if found and found["value"] is not None:
            said = f"The expected calibration error of {_title(name)} is {with_interval(found, True)}."
            section.words.append(said)
    if section.plots:
        section.words.append(
            "Points below the diagonal are right less often than stated. Grey bars: how many there are."
        )
    if chosen := _of_all(curves.best_of_n, sets):
        section.title, section.plots = "Calibration and best of n", section.plots + chosen
        section.words.append("Best of n: how good the response is that the model picks among n, by the labels.")
    return section


def _slices(sets: Values) -> Section:
    section = Section("Slices", plots=_of_all(curves.slices, sets))
    if section.plots:
        section.words = ["Accuracy with its 95 % interval; in brackets the number of pairs."]
    for measured in sets.values():
        for row in measured.get("failing") or ():
            said = f"{row['table']}, {row['name']}: accuracy {with_interval(row, True)} is below that of all pairs"
            section.problems.append(f"{_capital(said)} ({row['pairs']:,} pairs).")
    return section


def _worst(sets: Values) -> Section:
    section = Section("Most confidently wrong")
    if sets and all(measured["kind"] == "attributes" for measured in sets.values()):
        section.title = "Farthest from their labels"
    for name, measured in sets.items():
        entries = measured.get("worst") or []
        section.pairs += [found for found in map(texts.pair, entries) if found]
        rest = [entry for entry in entries if texts.pair(entry) is None]
        if rest and "attribute" in rest[0]:
            rows = [[str(x["id"]), str(x["attribute"]), number(x["score"]), number(x["label"])] for x in rest]
            section.tables.append(Table(["row", "attribute", "score", "label"], rows, (2, 3), _title(name)))
        elif rest:
            rows = [
                [str(x["id"]), str(x.get("source") or ""), f"{x['preferred']} over {x['rejected']}",
                 number(x["probability"], True), number(x.get("difference")), number(x.get("margin"))]
                for x in rest
            ]  # fmt: skip
            head = ["row", "source", "labelled", "model's probability of it", "rewards differ by", "gold margin"]
            section.tables.append(Table(head, rows, (3, 4, 5), _title(name)))
    return section


def _benchmark(name: str, measured: Values) -> Section:
    section = Section(f"Benchmark {name}", plots=curves.benchmark(name, measured))
    section.words = [f"{measured['groups']:,} groups.", *(measured.get("notes") or ())]
    if measured.get("missing"):
        section.problems.append(f"The data lacks {', '.join(measured['missing'])}.")
    known = {key: e for key, e in measured["metrics"].items() if e["value"] is not None}
    tiles = [(key, number(e["value"], _is_share(e)), naming.interval(e, _is_share(e))) for key, e in known.items()]
    section.tiles = tiles[:TILES]
    rows = [[key, _cell(e, _is_share(e)), ""] for key, e in known.items()] if len(tiles) > TILES else []
    rows += [[key, _cell(e, _is_share(e)), f"{e['count']:,}"] for key, e in (measured.get("subsets") or {}).items()]
    section.folded = [Table(["", "score", "count"], rows, (1, 2), "All subsets as numbers")] if rows else []
    return section


def _audit(audit: Values | None) -> Section:
    section = Section("Data")
    if not audit:
        return section
    section.problems = [f"{problem}." for problem in audit_text.problems(audit)]
    rows = [
        [set, reason, count["meaning"], f"{count['rows']:,}", f"{count['kept']:,}"]
        for set, reading in audit["reading"].items()
        for reason, count in reading["reasons"].items()
    ]
    counted = [
        [name, *_read(audit["reading"].get(name)),
         f"{x['groups']:,}", f"{x['prompts']:,}", f"{x['trees']['median']:,.0f}", f"{x['trees']['most']:,.0f}"]
        for name, x in audit["sets"].items()
    ]  # fmt: skip
    head = ["", "rows", "unusable", "groups", "prompts", f"{audit['unit']} of a tree, median", "most"]
    section.tables.append(Table(head, counted, range(1, 7)))
    said = [audit_text.sections(measured, audit["unit"]) for measured in audit["sets"].values()]
    section.tables.append(Table(["", *audit["sets"]], [[key, *(words[key] for words in said)] for key in said[0]]))
    if rows:
        head = ["set", "reason", "meaning", "rows", "kept"]
        section.folded.append(Table(head, rows, (3, 4), "Rows that could not be used as they are"))
    return section


def _read(reading: Values | None) -> list[str]:
    """Rows and unusable rows; nothing of a set that was split off another."""
    return ["" if reading is None else f"{reading[key]:,}" for key in ("rows", "unusable")]


def _speed(timings: Sequence[Values]) -> Section:
    section = Section("Speed", plots=curves.speed(timings))
    rows = []
    for key in dict.fromkeys(key for line in timings for key in line if key.startswith("timing/")):
        found = [line[key] for line in timings if line.get(key) is not None]
        if found:
            share = key.endswith(("mfu", "waiting_for_data"))
            cells = [number(x, share) for x in (statistics.median(found), min(found), max(found))]
            rows.append([key.removeprefix("timing/").replace("_", " "), *cells])
    if rows:
        section.tables = [Table(["", "median", "least", "most"], rows, (1, 2, 3))]
    return section


def _config(config: Values | None) -> Section:
    rows = [[f"config.{key}", value] for key, value in _flat(config or {})]
    return Section("Config", folded=[Table(["key", "value"], rows, (), f"{len(rows)} keys")] if rows else [])


def _environment(environment: Values | None) -> Section:
    rows = [[key.replace("_", " "), value] for key, value in _flat(environment or {})]
    return Section("Environment", tables=[Table([], rows)] if rows else [])


# ----------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------


def _title(name: str) -> str:
    return {"train_slice": "training (a slice)", "validation": "validation"}.get(name, name)


def _cell(estimate: Values, percent: bool) -> tuple[str, str]:
    return number(estimate.get("value"), percent), naming.interval(estimate, percent)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _many(measured: Values) -> str:
    pairs = f"{measured['pairs']:,} pairs in " if "pairs" in measured else ""
    return f"{pairs}{measured['groups']:,} groups with {measured['prompts']:,} prompts"


def _is_share(estimate: Values) -> bool:
    return estimate["value"] is not None and 0 <= estimate["value"] <= 1


def _of_all(plots: Any, sets: Values) -> list[curves.Plot]:
    """The plots of every set; their titles say which set it is where there are several."""
    named = lambda name, plot: plot.titled(f"{name}: ") if len(sets) > 1 else plot
    return [named(name, plot) for name, measured in sets.items() for plot in plots(name, measured)]


def _flat(values: Values, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("optim.learning_rate", "1e-05") for every leaf; what is empty and lists are written as JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
