"""Sections about data: for the page and the terminal of `rmjax.data audit`, and for the report of a run.

`report` is that of `measure.report`, `measured` one of its sets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.ledger import REMEDY
from rmjax.report import panels
from rmjax.report.drawing import FILL, VALIDATION
from rmjax.report.panels import Line, Mark
from rmjax.report.section import Bad, Cell, Folded, Items, Plot, Section, Table, capital

STRONG = 0.1  # a length AUC this far from 0.5, or a rank correlation of three times that, is pointed out,
ERRORS = 3.0  # if it is that many standard errors from no effect

Values = Mapping[str, Any]
PREFERENCES = {  # by their key among the labels: title, axes
    "margins": ("Margins above 0", "margin", "comparisons"),
    "soft": ("Soft labels", "share of the likelier", "comparisons"),
    "agreement": ("Agreement", "share of the annotators", "groups"),
}


def overview(report: Values, problem_lines: Sequence[str] = ()) -> Section:
    words = [sentences(measured, report["unit"]) for measured in report["sets"].values()]
    rows = [[heading, *(capital(texts[heading]) for texts in words)] for heading in words[0]]
    look_at = [Bad(f"{capital(line)}.") for line in problem_lines]
    return Section("Data", *look_at, _counts(report), Table(rows, ["", *report["sets"]]), *_folded(report))


def sections(report: Values) -> list[Section]:
    """Each set with its plots, and the prompts that stand in several."""
    sets = [_set_section(name, measured, report["unit"]) for name, measured in report["sets"].items()]
    rows = [
        [name, f"{x['of']:,}", Bad(f"{x['prompts']:,}") if x["prompts"] else "0", "; ".join(_pairs(x["examples"]))]
        for name, x in report["shared"].items()
    ]
    table = Table(rows, ["set", "prompts", "shared", "examples"], (1, 2))
    shared = Section(f"Prompts that stand in {next(iter(report['sets']))} and elsewhere", table)
    return [section for section in [*sets, shared] if section]


def problems(report: Values) -> list[str]:
    """What should be put right or known before training, a sentence each without its full stop."""
    lines = []
    for name, shared in report["shared"].items():
        if shared["prompts"]:
            examples = "; ".join(_pairs(shared["examples"][:2]))
            some = f"{shared['prompts']:,} of the {shared['of']:,} prompts in {name}"
            lines.append(f"{some} are in the training data too (their scores mislead), e.g. {examples}")
    for name, measured in report["sets"].items():
        if sets := measured["contradicting"]["sets"]:
            examples = "; ".join(_pairs(measured["contradicting"]["examples"][:2]))
            lines.append(f"{name}: {sets:,} sets of conversations are labelled in contradicting ways, e.g. {examples}")
        length = measured["length"]
        auc, n = length.get("auc", 0.5), length.get("comparisons", 0)
        if n and abs(auc - 0.5) > max(STRONG, ERRORS * 0.5 / n**0.5):
            which = "longer" if auc > 0.5 else "shorter"
            lines.append(f"{name}: the {which} response is preferred in {max(auc, 1 - auc):.0%} of the comparisons")
        for attribute, x in length.get("attributes", {}).items():
            if abs(x["spearman"]) > max(3 * STRONG, ERRORS / x["responses"] ** 0.5):
                lines.append(f"{name}: {attribute} follows the length, with a rank correlation of {x['spearman']:+.2f}")
    return lines


def _counts(report: Values) -> Table:
    """Rows, groups and prompts of each set; a set that was split off another has no rows of its own."""
    rows = []
    for name, measured in report["sets"].items():
        reading = report["reading"].get(name)
        read = ["", ""] if reading is None else [f"{reading[key]:,}" for key in ("rows", "unusable")]
        rows.append([name, *read, f"{measured['groups']:,}", f"{measured['prompts']:,}"])
    return Table(rows, ["", "rows", "unusable", "groups", "prompts"], range(1, 5))


def _folded(report: Values) -> list[Folded]:
    reasons: list[list[Cell]] = []
    sources, augmented, unread = [], [], []
    for name, reading in report["reading"].items():
        for reason, x in reading["reasons"].items():
            where = f"e.g. {x['example']}", ", ".join(f"{n:,} in {file}" for file, n in x["files"].items())
            known = x.get("tokens") and reason in REMEDY
            remedy = f"; config.{REMEDY[reason]}={x['tokens']} takes all of them" if known else ""
            reasons.append([name, reason, f"{x['rows']:,}", f"{x['kept']:,}", x["meaning"] + remedy, where])
        sources += [[name, source, f"{groups:,}"] for source, groups in reading["sources"].items()]
        for augmentation, (changed, new) in reading.get("augmented", {}).items():
            augmented.append([name, augmentation, f"{changed:,}", f"{new:,}"])
        unread += [[name, path, example] for path, example in reading.get("unread", {}).items()]
    head = ["set", "reason", "rows", "kept", "meaning", "where"]
    return [
        Folded("Rows that could not be used as they are", [Table(reasons, head, (2, 3))]),
        Folded("Columns and keys that are not read", [Table(unread, ["set", "column", "e.g."])]),
        Folded("Sources", [Table(sources, ["set", "source", "groups"], (2,))]),
        Folded("Augmented", [Table(augmented, ["set", "by", "groups", "new groups"], (2, 3))]),
    ]


def _pairs(examples: Sequence[Sequence[str]]) -> list[str]:
    return [f"{first} and {second}" for first, second in examples]


def _set_section(name: str, measured: Values, unit: str) -> Section:
    spreads = {"tree": measured["trees"], "longest conversation": measured["conversations"]}
    keys = {"median": "median", "p90": "90 %", "p99": "99 %", "most": "most"}
    rows = [[f"{unit} of the {what}", *(f"{x[key]:,.0f}" for key in keys)] for what, x in spreads.items()]
    repeated, contradicting = measured["repeated"], measured["contradicting"]
    return Section(
        f"{capital(name)}: {measured['groups']:,} groups, {measured['prompts']:,} prompts",
        Table(rows, ["", *keys.values()], range(1, 5)),
        _attributes(measured),
        f"{repeated['groups']:,} groups repeat the conversations of one before them; {contradicting['sets']:,} sets of "
        "conversations have contradicting labels.",
        Items(_pairs(contradicting["examples"] or repeated["examples"])),
        [
            *_length_plots(name, measured, unit),
            *_filling_plots(name, measured, unit),
            *_label_plots(name, measured),
            *_length_against_label_plots(name, measured),
        ],
    )


def _attributes(measured: Values) -> Table:
    rows = []
    for attribute, x in measured["labels"].get("attributes", {}).items():
        numbers = [f"{x[key]:.3g}" if x["given"] else "" for key in ("mean", "sd", "min", "max")]
        length = measured["length"].get("attributes", {}).get(attribute)
        by_length = f"{length['spearman']:+.3f}" if length else ""
        rows.append([attribute, f"{x['given']:,}", f"{x['missing']:,}", *numbers, by_length])
    head = ["attribute", "given", "missing", "mean", "sd", "min", "max", "rank correlation with length"]
    return Table(rows, head, range(1, 8))


def sentences(measured: Values, unit: str) -> dict[str, str]:
    """Words about one set by their heading, without full stops."""
    sharing, plan = measured["sharing"], measured["plan"]
    spread = lambda x: f"{x['median']:,.0f} (median), {x['p99']:,.0f} (99 %), {x['most']:,.0f} (longest)"
    trees, whole = spread(measured["trees"]), spread(measured["conversations"])
    filling = f"sharing what conversations begin with saves {sharing['saved']:.1%} of {sharing['unshared']:,} {unit}"
    if plan is not None:
        filling += f"; {plan['rows']:,} rows of {plan['row_tokens']:,} tokens, {plan['fill']:.1%} full"
        filling += f", {plan['groups_per_row']:.1f} groups in a row"
    return {
        "Lengths": f"trees of {trees}; longest conversations of {whole} {unit}",
        "Fill and sharing": filling,
        "Labels": _labels(measured["labels"]),
        "Length against label": _length_against_label(measured["length"]),
    }


def _labels(labels: Values) -> str:
    if labels["kind"] in ("preferences", "verdicts"):
        counts = [f"{name} {n:,}" for name, n in labels["comparisons"].items() if n]
        with_margin = [f"{sum(labels['margins']['counts']):,} with a margin"] if "margins" in labels else []
        return "comparisons: " + ", ".join(counts + with_margin)
    if labels["kind"] == "attributes":
        return "; ".join(
            f"{name} {x['mean']:.3g} (sd {x['sd']:.3g}, {x['min']:g} to {x['max']:g}, {x['missing']:,} missing)"
            if x["given"]
            else f"{name} is missing everywhere"
            for name, x in labels["attributes"].items()
        )
    if labels["kind"] == "steps":
        return (
            f"{labels['judged']:,} steps judged, {labels['right']:.1%} of them right; {labels['not_judged']:,} not "
            f"judged; {labels['without_error']:.1%} of the responses have no wrong step"
        )
    shares = ", ".join(f"{name}: {x['share']:.1%}" for name, x in labels["fields"].items())
    return f"share of the tokens trained on, of {labels['drawn']:,} groups: {shares}"


def _length_against_label(length: Values) -> str:
    if length.get("comparisons"):
        return f"the longer one is preferred in {length['auc']:.1%} of {length['comparisons']:,} comparisons"
    if length.get("attributes"):
        correlations = ", ".join(f"{name} {x['spearman']:+.3f}" for name, x in length["attributes"].items())
        return f"rank correlation with the response's characters: {correlations}"
    return "nothing to compare it with"


# ----------------------------------------------------------------------------------------------------
# Plots of a set, from `measured`, that of the set called `name`
# ----------------------------------------------------------------------------------------------------


def _length_plots(name: str, measured: Values, unit: str) -> list[Plot]:
    shown = {"trees": "Tree of a group", "conversations": "Longest conversation of a group"}
    if measured["trees"] == measured["conversations"]:
        del shown["conversations"]
    plots, plan = [], measured["plan"]
    for key, title in shown.items():
        near = plan and measured[key]["most"] >= 0.8 * plan["row_tokens"]
        mark = (plan["row_tokens"], "row") if near else None
        plots.append(_histogram(name, title, measured[key], unit, "groups", mark))
    return plots


def _filling_plots(name: str, measured: Values, unit: str) -> list[Plot]:
    plan, plots = measured["plan"], []
    sharing = plan or measured["sharing"]  # the same, of the groups that fit a row
    counts = {"each alone": sharing["unshared"], "as trees": sharing["tokens"]}
    if plan:
        counts["rows"] = plan["rows"] * plan["row_tokens"]
        percent = {**plan["row_fill"], "edges": [100 * x for x in plan["row_fill"]["edges"]]}
        plots.append(_histogram(name, f"Fill of {plan['rows']:,} rows", percent, "% of a row", "rows"))
    return [*plots, _categories(name, f"{unit.capitalize()} to compute", counts)]


def _label_plots(name: str, measured: Values) -> list[Plot]:
    labels = measured["labels"]
    plots = [_categories(name, "Comparisons", labels["comparisons"])] if "comparisons" in labels else []
    plots += [_histogram(name, title, labels[key], x, y) for key, (title, x, y) in PREFERENCES.items() if key in labels]
    for attribute, values in labels.get("attributes", {}).items():
        plots += [_histogram(name, attribute, values, "value", "responses")] if values["given"] else []
    if labels["kind"] == "steps":
        plots.append(_histogram(name, "Steps of a response", labels["steps"], "steps", "responses"))
        plots.append(_histogram(name, "First wrong step", labels["first_error"], "step (0: none)", "responses"))
    fields = labels.get("fields", {}).items()
    return plots + [_histogram(name, "Share of tokens trained", values, field, "groups") for field, values in fields]


def _length_against_label_plots(name: str, measured: Values) -> list[Plot]:
    """Means by length with twice their standard error, and where length would have no effect."""
    length, plots = measured["length"], []
    if "curve" in length:
        title, x = "Is the longer one preferred?", f"{length['unit']} that one is longer"
        plots.append(_means(name, title, length["curve"], x, "share", level=0.5))
    for attribute, values in length.get("attributes", {}).items():
        plots.append(_means(name, attribute, values["curve"], f"{length['unit']} of the response", "mean"))
    return plots


def _histogram(name: str, title: str, counts: Values, x: str, y: str, mark: Mark | None = None) -> Plot:
    panel = panels.histograms([("", FILL, counts)], x, y, mark)
    return Plot(title, capital(panels.cut(title, 50)), panel, f"{name}: histogram, {title}, by {x}")


def _categories(name: str, title: str, counts: Mapping[str, int]) -> Plot:
    shown = [n for n in counts.values() if n]
    return Plot(title, title, panels.categories(counts), f"{name}: bars, {title}", panels.tall(shown))


def _means(name: str, title: str, points: Values, x: str, y: str, level: float | None = None) -> Plot:
    low, high = ([m + sign * e for m, e in zip(points["mean"], points["error"])] for sign in (-2, 2))
    lines = [Line("", VALIDATION, points["x"], points["mean"], bands=[(low, high, 0.18)])]
    if level is not None:
        lines.append(Line("", None, points["x"], [level] * len(points["x"])))
    return Plot(title, panels.cut(title, 50), panels.curves(lines, x, y), f"{name}: {title}, {y} by {x}")
