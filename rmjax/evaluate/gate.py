"""The quality gate: whether a model is good enough to be used, why not, and what to do about it.

A check of what has an interval passes where all of the interval is on the right side of its threshold, and fails where
all of it is on the other side. Between the two it does not pass either: the set is too small to show it, and the reason
says how large it would have to be. The thresholds are `config.gate`. ESTIMATE is {"value", "low", "high"} as in an
evaluation.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmjax import statistics
from rmjax.report import evaluation as evaluation_report
from rmjax.report import show
from rmjax.report.naming import number, with_interval
from rmjax.report.section import Section

Values = Mapping[str, Any]
Check = dict[str, Any]
ACCURACY = {
    "preferences": "accuracy",
    "steps": "accuracy",
    "tokens": "verdict_accuracy",
    "judgements": "accuracy",
}  # by kind; others have none
BROKEN = "look at the rewards (validation/reward_max) and at the labels of this set; lower config.optim.learning_rate"
FITTED = 0.05  # accuracy in training this far above the threshold: the training data is fitted


def judge(gate: Values, evaluation: Values, lines: Sequence[Values]) -> dict[str, Any]:
    """Judges a run by its thresholds; one of 0 or False asks nothing.

    Args:
        gate: `config.gate`.
        evaluation: with "sets", "validation" and "train_slice" among them; and "errors", why one is not among them,
            which no threshold excuses.
        lines: of metrics.jsonl, for the training loss.

    Returns:
        {"passed": each check that was measured did, "checks": [{"name", "passed", "shown", "value", "threshold",
        "reason", "advice"}]}. One that did not pass is "shown" to fail, or not shown to pass. A check of what was not
        measured has "passed" and "value" None. "advice" is "" where there is nothing to do.
    """
    sets = evaluation.get("sets") or {}
    asked: dict[str, Callable[[], Check]] = {
        "accuracy": lambda: _accuracy(gate["accuracy"], sets),
        "gap": lambda: _gap(gate["gap"], sets),
        "convergence": lambda: _convergence(gate["convergence"], lines),
        "beats_length": lambda: _beats_length(sets),
        "ece": lambda: _calibration(gate["ece"], sets),
    }
    # the validation set, or "sampled" beside it
    written = next((name for name, x in sets.items() if x.get("kind") == "judgements"), "")
    if written == "validation":  # a loss that rewards make does not fall, and nothing is said of lengths
        asked = {name: asked[name] for name in ("accuracy", "gap")}
    if written:
        few = functools.partial(_few, sets, written)
        asked |= {
            "unreadable": lambda: few(gate["unreadable"], "unreadable", "cannot be read", UNREADABLE),
            "cut_off": lambda: few(gate["cut_off"], "cut_off", "are cut off", CUT_OFF),
            "consistency": lambda: _keeps_orders(sets, written, lines),
        }
    broken = lambda name, error: _check(False, None, None, f"{name}: {error}", BROKEN)
    checks = [{"name": "measured", **broken(*error)} for error in (evaluation.get("errors") or {}).items()]
    checks += [{"name": name, **check()} for name, check in asked.items() if gate.get(name)]
    return {"passed": all(check["passed"] is not False for check in checks), "checks": checks}


def text(verdict: Values) -> list[str]:
    return show.to_text([Section("", *evaluation_report.verdict(verdict))])


def _accuracy(least: float, sets: Values) -> Check:
    accuracy = _accuracy_of(sets, "validation")
    if accuracy is None:
        return _not_measured("the validation set has no accuracy", least)
    reason = f"validation accuracy {with_interval(accuracy, True)}, at least {number(least, True)} is asked"
    return _judged(accuracy, least, 1, reason, _raise_accuracy(sets, least), sets)


UNREADABLE = (
    "look at the unreadable samples in the report; teach the form first (`sft`, as config.start), or set "
    "config.objective.unreadable to -1"
)
CUT_OFF = (
    "raise config.eval.max_tokens or config.rollout.max_tokens, or look whether long answers are rewarded "
    "(answer_tokens in metrics.jsonl)"
)


def _few(sets: Values, name: str, most: float, metric: str, what: str, advice: str) -> Check:
    """Whether few judgements of a set are so."""
    share = _known(sets, name, metric)
    if share is None:
        return _not_measured("the validation set has no judgements", most)
    reason = f"{with_interval(share, True)} of the judgements {what}, less than {number(most, True)} is asked"
    return _judged(share, most, -1, reason, advice, {"validation": sets[name]})


def _keeps_orders(sets: Values, name: str, lines: Sequence[Values]) -> Check:
    """Whether both orders of a pair agree as often as before training."""
    now, key = _known(sets, name, "consistency"), f"{name}/consistency"
    before = next((x[key] for x in lines if x.get(key) is not None), None)
    if now is None or before is None:
        return _not_measured("nothing is asked in both orders", None)
    agree = f"{with_interval(now, True)} of the pairs, {number(before, True)} before training"
    reason = f"the verdicts on both orders agree for {agree}"
    fell = now["high"] is not None and now["high"] < before
    advice = "set config.objective.both_orders, or the reward `consistent`"
    return _check(not fell, now["value"], before, reason, advice)


def _raise_accuracy(sets: Values, least: float) -> str:
    train = _accuracy_of(sets, "train_slice")
    if train is None:
        return (
            "set config.eval.train_groups to see whether the training data itself is fitted; if it is not, raise "
            "config.duration or config.optim.learning_rate"
        )
    said = f"accuracy in training is {number(train['value'], True)}, so "
    if train["value"] >= least + FITTED:
        return (
            f"{said}the training data is fitted and does not carry over: more or cleaner data, a larger "
            "config.model.init_from, fewer epochs in config.duration, or config.checkpoint.patience"
        )
    return (
        f"{said}not even the training data is fitted: raise config.duration or config.optim.learning_rate, take a "
        "stronger config.model.init_from, and look for contradicting labels with `python -m rmjax.data audit`"
    )


def _gap(most: float, sets: Values) -> Check:
    train, validation = (_accuracy_of(sets, name) for name in ("train_slice", "validation"))
    if train is None or validation is None:
        missing = "the validation set" if train is not None else "the slice of the training set"
        return _not_measured(f"{missing} has no accuracy (config.eval.train_groups)", most)
    gap = _difference(train, validation)
    ends = "" if gap["low"] is None else f" ({100 * gap['low']:.1f} to {100 * gap['high']:.1f})"
    points = f"{100 * gap['value']:.1f}{ends} points"
    reason = f"accuracy in training minus that in validation is {points}, less than {100 * most:.3g} is asked"
    advice = (
        "it learns the training data by heart: fewer epochs in config.duration, config.checkpoint.patience to stop "
        "early, a lower config.optim.learning_rate, config.optim.weight_decay, config.objective.label_smoothing where "
        "the objective has it, or more prompts"
    )
    return _judged(gap, most, -1, reason, advice, sets, share=False, also=" and as many of config.eval.train_groups")


def _difference(first: Values, second: Values) -> Values:
    """Its interval: Newcombe 1998, Statistics in Medicine 17, method 10 (distances of the ends, squared and added)."""
    value = first["value"] - second["value"]
    if None in (first["low"], first["high"], second["low"], second["high"]):
        return {"value": value, "low": None, "high": None}
    down = math.hypot(first["value"] - first["low"], second["high"] - second["value"])
    up = math.hypot(first["high"] - first["value"], second["value"] - second["low"])
    return {"value": value, "low": value - down, "high": value + up}


def _convergence(most: float, lines: Sequence[Values]) -> Check:
    first, before, last = losses_by_tenths(lines)
    if first is None or before is None or last is None:
        return _not_measured(
            "there is no training loss in the first tenth of the steps, or in one of the last two (config.log.every)",
            most,
        )
    if last >= first:
        reason = (
            f"training loss {number(last)} in the last tenth of the steps, not below the {number(first)} of the first"
        )
        advice = "nothing was learnt: lower config.optim.learning_rate, raise config.optim.warmup, and audit the data"
        return _check(False, 1.0, most, reason, advice)
    share = (before - last) / (first - last)
    reason = (
        f"training loss {number(first)} in the first tenth of the steps and {number(last)} in the last, which brought "
        f"{share:.1%} of the fall; less than {number(most, True)} is asked"
    )
    advice = (
        "the loss still falls: raise config.duration, or config.optim.learning_rate, if the validation loss falls as "
        "well; if that rises, it learns by heart: see the gap"
    )
    return _check(share < most, share, most, reason, advice)


def _beats_length(sets: Values) -> Check:
    accuracy, baseline = _accuracy_of(sets, "validation"), _known(sets, "validation", "longer_is_better")
    if accuracy is None or baseline is None:
        return _not_measured('the accuracy of "the longer response is better" is not known', None)
    reason = (
        f"validation accuracy {with_interval(accuracy, True)}, that of preferring the longer response is "
        f"{with_interval(baseline, True)}"
    )
    advice = (
        'length tells more than the model: see "Length against label" of `python -m rmjax.data audit`, level the '
        "lengths with config.data.filter or other data, and read the slices by length difference in the report"
    )
    judged = _judged(_difference(accuracy, baseline), 0.0, 1, reason, advice, sets, share=False)
    return {**judged, "value": accuracy["value"], "threshold": baseline["value"]}


def _calibration(most: float, sets: Values) -> Check:
    ece = _known(sets, "validation", "ece")
    if ece is None:
        return _not_measured("the validation set has no calibration error", most)
    reason = f"expected calibration error {with_interval(ece, True)}, at most {number(most, True)} is asked"
    over = overconfidence(sets["validation"].get("reliability"))
    if over is not None and over < 0:
        advice = (
            f"it is {-100 * over:.1f} points less sure than it may be: raise config.duration, or lower "
            "config.objective.label_smoothing or center where the objective has them"
        )
    else:
        by = "" if over is None else f"by {100 * over:.1f} points "
        advice = (
            f"it is too sure {by}of what it says: fewer epochs in config.duration, config.objective.label_smoothing or "
            "barrier where the objective has them, or a lower config.optim.learning_rate"
        )
    return _judged(ece, most, -1, reason, advice, sets, share=False)


def losses_by_tenths(lines: Sequence[Values]) -> tuple[float | None, float | None, float | None]:
    """Mean training loss of the first tenth of the steps, of the last but one, and of the last; lines weigh equally.

    None for a tenth without a line. The share of the fall does not depend on the loss's scale, and is as strict where
    it ends near 0 as where labels are noisy.
    """
    losses = [(x["step"], x["train/loss"]) for x in lines if x.get("train/loss") is not None]
    steps = max((step for step, _ in losses), default=0)

    def mean(low: float, high: float) -> float | None:
        within = [loss for step, loss in losses if low * steps < step <= high * steps]
        return sum(within) / len(within) if within else None

    return mean(0.0, 0.1), mean(0.8, 0.9), mean(0.9, 1.0)


def overconfidence(reliability: Values | None) -> float | None:
    """Stated probability minus share that is right, over all bins by their counts; None where there is none."""
    bins = zip(*(reliability[key] for key in ("counts", "predicted", "observed"))) if reliability else ()
    full = [(n, p - o) for n, p, o in bins if n and p is not None and o is not None]
    total = sum(n for n, _ in full)
    return sum(n * over for n, over in full) / total if total else None


def _known(sets: Values, name: str, metric: str) -> Values | None:
    """The estimate of a metric of a set, if its value is known."""
    estimate = (sets.get(name) or {}).get("metrics", {}).get(metric)
    return estimate if estimate is not None and estimate["value"] is not None else None


def _accuracy_of(sets: Values, name: str) -> Values | None:
    return _known(sets, name, ACCURACY.get((sets.get(name) or {}).get("kind", ""), ""))


def _judged(
    estimate: Values,
    threshold: float,
    side: int,
    reason: str,
    advice: str,
    sets: Values,
    *,
    share: bool = True,
    also: str = "",
) -> Check:
    """Judges by the interval, whose value has to be above the threshold (side 1) or below it (-1).

    Where that is not shown, the reason says how many pairs or groups of the validation set would show it: intervals
    narrow with the square root of their number, and where all of a `share` are hits, or none is, their ends are exact.
    """
    near, far = (estimate["low"], estimate["high"])[::side]  # the end that has to be beyond, and the other
    met = side * (estimate["value"] - threshold) > 0
    if near is not None and side * (near - threshold) >= 0:
        return _check(True, estimate["value"], threshold, reason, "")
    if far is not None and side * (far - threshold) < 0:
        return _check(False, estimate["value"], threshold, reason, advice)
    end, across = (near, "below" if side > 0 else "above") if met else (far, "above" if side > 0 else "below")
    why = "one prompt has no interval" if end is None else f"the 95 % interval reaches {across} it"
    few = f"more validation data: {_needed(estimate, threshold, end, sets['validation'], share)}{also}"
    check = _check(
        False, estimate["value"], threshold, f"{reason}; not shown: {why}", few if met else f"{advice}; or {few}"
    )
    return {**check, "shown": False}


def _needed(estimate: Values, threshold: float, end: float | None, measured: Values, share: bool) -> str:
    """How many pairs, or groups, would show on which side of the threshold the value is."""
    what, value = ("pairs" if "pairs" in measured else "groups"), estimate["value"]
    if share and (end is None or value in (0.0, 1.0)):
        least = statistics.least_cases(threshold if value else 1 - threshold)
        return f"it takes {least:,} {what} of different prompts at the least"
    if end is None or value == threshold:
        return f"more {what} than can be said from these"
    count = math.ceil(measured.get(what, measured["prompts"]) * ((end - value) / (value - threshold)) ** 2)
    return f"it takes about {count:,} {what}, if they are as these {measured.get(what, measured['prompts']):,}"


def _check(passed: bool | None, value: float | None, threshold: float | None, reason: str, advice: str) -> Check:
    told = {"value": value, "threshold": threshold, "reason": reason, "advice": "" if passed else advice}
    return {"passed": passed, "shown": passed is not None, **told}


def _not_measured(why: str, threshold: float | None) -> Check:
    return _check(None, None, threshold, f"not measured: {why}", "")
