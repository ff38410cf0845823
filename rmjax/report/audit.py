"""Sections about data: for the page and the terminal of `rmjax.data audit`, and for the report of a run.

`report` is that of `measure.report`, `measured` one of its sets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.data.ledger import REMEDY
from rmjax.report import audit_plots
from rmjax.report.section import Bad, Cell, Folded, Items, Section, Table, capital

STRONG = 0.1  # a length AUC this far from 0.5, or a rank correlation of three times that, is pointed out,
ERRORS = 3.0  # if it is that many standard errors from no effect

Values = Mapping[str, Any]


def overview(report: Values, problem_lines: Sequence[str] = ()) -> Section:
    """What became of the rows, and each set in words.

    Args:
        report: see above.
        problem_lines: of `problems` and others.
    """
    words = [sentences(measured, report["unit"]) for measured in report["sets"].values()]
    rows = [[heading, *(capital(of[heading]) for of in words)] for heading in words[0]]
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
    lines = [_shared_problem(name, shared) for name, shared in report["shared"].items() if shared["prompts"]]
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


def _shared_problem(name: str, shared: Values) -> str:
    examples = "; ".join(_pairs(shared["examples"][:2]))
    some = f"{shared['prompts']:,} of the {shared['of']:,} prompts in {name}"
    return f"{some} are in the training data too (their scores mislead), e.g. {examples}"


# ----------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------


def _counts(report: Values) -> Table:
    """Rows, groups and prompts of each set; a set that was split off another has no rows of its own."""
    rows = []
    for name, measured in report["sets"].items():
        reading = report["reading"].get(name)
        read = ["", ""] if reading is None else [f"{reading[key]:,}" for key in ("rows", "unusable")]
        rows.append([name, *read, f"{measured['groups']:,}", f"{measured['prompts']:,}"])
    return Table(rows, ["", "rows", "unusable", "groups", "prompts"], range(1, 5))


def _folded(report: Values) -> list[Folded]:
    """The reasons of rows that were left out or changed, the sources, and the augmentations."""
    reasons: list[list[Cell]] = [
        [name, reason, f"{x['rows']:,}", f"{x['kept']:,}", f"{x['meaning']}{_remedy(reason, x)}", _places(x)]
        for name, reading in report["reading"].items()
        for reason, x in reading["reasons"].items()
    ]
    sources = [
        [name, source, f"{groups:,}"]
        for name, reading in report["reading"].items()
        for source, groups in reading["sources"].items()
    ]
    augmented = [
        [name, augmentation, f"{changed:,}", f"{new:,}"]
        for name, reading in report["reading"].items()
        for augmentation, (changed, new) in reading.get("augmented", {}).items()
    ]
    head = ["set", "reason", "rows", "kept", "meaning", "where"]
    return [
        Folded("Rows that could not be used as they are", [Table(reasons, head, (2, 3))]),
        Folded("Sources", [Table(sources, ["set", "source", "groups"], (2,))]),
        Folded("Augmented", [Table(augmented, ["set", "by", "groups", "new groups"], (2, 3))]),
    ]


def _remedy(reason: str, count: Values) -> str:
    if not count.get("tokens") or reason not in REMEDY:
        return ""
    return f"; config.{REMEDY[reason]}={count['tokens']} takes all of them"


def _places(count: Values) -> tuple[str, str]:
    return f"e.g. {count['example']}", ", ".join(f"{n:,} in {file}" for file, n in count["files"].items())


def _pairs(examples: Sequence[Sequence[str]]) -> list[str]:
    return [f"{first} and {second}" for first, second in examples]


# ----------------------------------------------------------------------------------------------------
# A set
# ----------------------------------------------------------------------------------------------------


def _set_section(name: str, measured: Values, unit: str) -> Section:
    spreads = {"tree": measured["trees"], "longest conversation": measured["conversations"]}
    keys = {"median": "median", "p90": "90 %", "p99": "99 %", "most": "most"}
    rows = [[f"{unit} of the {of}", *(f"{x[key]:,.0f}" for key in keys)] for of, x in spreads.items()]
    repeated, contradicting = measured["repeated"], measured["contradicting"]
    return Section(
        f"{capital(name)}: {measured['groups']:,} groups, {measured['prompts']:,} prompts",
        Table(rows, ["", *keys.values()], range(1, 5)),
        _attributes(measured),
        f"{repeated['groups']:,} groups repeat the conversations of one before them; {contradicting['sets']:,} sets of "
        "conversations have contradicting labels.",
        Items(_pairs(contradicting["examples"] or repeated["examples"])),
        audit_plots.of_set(name, measured, unit),
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
    return {
        "Lengths": _lengths(measured, unit),
        "Fill and sharing": _filling(measured, unit),
        "Labels": _labels(measured),
        "Length against label": _length_against_label(measured),
    }


def _lengths(measured: Values, unit: str) -> str:
    trees, whole = measured["trees"], measured["conversations"]
    spread = lambda x: f"{x['median']:,.0f} (median), {x['p99']:,.0f} (99 %), {x['most']:,.0f} (longest)"
    return f"trees of {spread(trees)}; longest conversations of {spread(whole)} {unit}"


def _filling(measured: Values, unit: str) -> str:
    sharing, plan = measured["sharing"], measured["plan"]
    text = f"sharing what conversations begin with saves {sharing['saved']:.1%} of {sharing['unshared']:,} {unit}"
    if plan is None:
        return text
    rows = f"{plan['rows']:,} rows of {plan['row_tokens']:,} tokens, {plan['fill']:.1%} full"
    return f"{text}; {rows}, {plan['groups_per_row']:.1f} groups in a row"


def _labels(measured: Values) -> str:
    labels = measured["labels"]
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


def _length_against_label(measured: Values) -> str:
    length = measured["length"]
    if length.get("comparisons"):
        return f"the longer one is preferred in {length['auc']:.1%} of {length['comparisons']:,} comparisons"
    if length.get("attributes"):
        correlations = ", ".join(f"{name} {x['spearman']:+.3f}" for name, x in length["attributes"].items())
        return f"rank correlation with the response's characters: {correlations}"
    return "nothing to compare it with"
