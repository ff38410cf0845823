"""The audit in sentences, for the terminal and for the page, from the values of `measure.py`."""

from collections.abc import Mapping
from typing import Any

STRONG = 0.1  # a length AUC this far from 0.5, or a rank correlation of three times that, is pointed out,
ERRORS = 3.0  # if it is that many standard errors from no effect

Values = Mapping[str, Any]


def sections(measured: Values, unit: str) -> dict[str, str]:
    """Heading and words of each section about one set."""
    return {
        "Lengths": _lengths(measured, unit),
        "Fill and sharing": _filling(measured, unit),
        "Labels": _labels(measured),
        "Length against label": _length_against_label(measured),
    }


def lines(report: Values) -> list[str]:
    """What the terminal shows beside the counts of rows and groups (audit.lines) and the `problems`."""
    text = []
    for name, measured in report["sets"].items():
        said = sections(measured, report["unit"])
        text += [f"{name}, {heading.lower()}: {said[heading]}" for heading in said if heading != "Lengths"]
    clean = {name: x for name, x in report["shared"].items() if name not in report["sets"] and not x["prompts"]}
    return text + [_shared(name, shared) for name, shared in clean.items()]


def problems(report: Values) -> list[str]:
    """What should be put right or known before training, a sentence each."""
    found = [_shared(name, shared) for name, shared in report["shared"].items() if shared["prompts"]]
    for name, measured in report["sets"].items():
        if sets := measured["contradicting"]["sets"]:
            examples = "; ".join(" and ".join(rows) for rows in measured["contradicting"]["examples"][:2])
            found.append(f"{name}: {sets:,} sets of conversations are labelled in contradicting ways, e.g. {examples}")
        length = measured["length"]
        auc, n = length.get("auc", 0.5), length.get("comparisons", 0)
        if n and abs(auc - 0.5) > max(STRONG, ERRORS * 0.5 / n**0.5):
            which = "longer" if auc > 0.5 else "shorter"
            found.append(f"{name}: the {which} response is preferred in {max(auc, 1 - auc):.0%} of the comparisons")
        for attribute, x in length.get("attributes", {}).items():
            if abs(x["spearman"]) > max(3 * STRONG, ERRORS / x["responses"] ** 0.5):
                found.append(f"{name}: {attribute} follows the length, with a rank correlation of {x['spearman']:+.2f}")
    return found


def _shared(name: str, shared: Values) -> str:
    examples = "; ".join(" and ".join(rows) for rows in shared["examples"][:2])
    text = f"{shared['prompts']:,} of the {shared['of']:,} prompts in {name} are in the training data too"
    return text + (f" (their scores mislead), e.g. {examples}" if shared["prompts"] else "")


def _lengths(measured: Values, unit: str) -> str:
    trees, whole = measured["trees"], measured["conversations"]
    said = (f"{name} {x['median']:,.0f} (median), {x['p99']:,.0f} (99 %), {x['most']:,.0f} (longest)" for name, x in
            (("trees of", trees), ("longest conversations of", whole)))  # fmt: skip
    return f"{'; '.join(said)} {unit}"


def _filling(measured: Values, unit: str) -> str:
    sharing, plan = measured["sharing"], measured["plan"]
    text = f"sharing what conversations begin with saves {sharing['saved']:.1%} of {sharing['unshared']:,} {unit}"
    if plan is None:
        return text
    rows = f"{plan['rows']:,} rows of {plan['row_tokens']:,} tokens, {plan['fill']:.1%} full"
    return f"{text}; {rows}, {plan['groups_per_row']:.1f} groups in a row"


def _labels(measured: Values) -> str:
    found = measured["labels"]
    if found["kind"] in ("preferences", "verdicts"):
        counts = [f"{name} {n:,}" for name, n in found["comparisons"].items() if n]
        with_margin = [f"{sum(found['margins']['counts']):,} with a margin"] if "margins" in found else []
        return "comparisons: " + ", ".join(counts + with_margin)
    if found["kind"] == "attributes":
        return "; ".join(
            f"{name} {x['mean']:.3g} (sd {x['sd']:.3g}, {x['min']:g} to {x['max']:g}, {x['missing']:,} missing)"
            if x["given"]
            else f"{name} is missing everywhere"
            for name, x in found["attributes"].items()
        )
    if found["kind"] == "steps":
        return (
            f"{found['judged']:,} steps judged, {found['right']:.1%} of them right; {found['not_judged']:,} not judged"
            f"; {found['without_error']:.1%} of the responses have no wrong step"
        )
    shares = ", ".join(f"{name}: {x['share']:.1%}" for name, x in found["fields"].items())
    return f"share of the tokens trained on, of {found['drawn']:,} groups: {shares}"


def _length_against_label(measured: Values) -> str:
    found = measured["length"]
    if found.get("comparisons"):
        return f"the longer one is preferred in {found['auc']:.1%} of {found['comparisons']:,} comparisons"
    if found.get("attributes"):
        said = ", ".join(f"{name} {x['spearman']:+.3f}" for name, x in found["attributes"].items())
        return f"rank correlation with the response's characters: {said}"
    return "nothing to compare it with"
