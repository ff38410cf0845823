"""The quality gate: whether a model is good enough to be used, why not, and what to do about it.

The thresholds are `config.gate`. ESTIMATE is {"value", "low", "high"} as in an evaluation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmjax.report import evaluation as evaluation_report
from rmjax.report import show
from rmjax.report.naming import number, with_interval
from rmjax.report.section import Section

Values = Mapping[str, Any]
Check = dict[str, Any]
ACCURACY = {"preferences": "accuracy", "steps": "accuracy", "tokens": "verdict_accuracy"}  # by kind; others have none
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
        {"passed": no check failed, "checks": [{"name", "passed", "value", "threshold", "reason", "advice"}]}. A check
        of what was not measured has "passed" and "value" None. "advice" is "" where nothing failed.
    """
    sets = evaluation.get("sets") or {}
    asked: dict[str, Callable[[], Check]] = {
        "accuracy": lambda: _accuracy(gate["accuracy"], sets),
        "gap": lambda: _gap(gate["gap"], sets),
        "convergence": lambda: _convergence(gate["convergence"], lines),
        "beats_length": lambda: _beats_length(sets),
        "ece": lambda: _calibration(gate["ece"], sets),
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
    return _at_least(accuracy, least, accuracy["value"] >= least, reason, _raise_accuracy(sets, least))


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
    """Its interval: Newcombe 1998, Statistics in Medicine 17, method 10 (distances of the ends, squared and added)."""
    train, validation = (_accuracy_of(sets, name) for name in ("train_slice", "validation"))
    if train is None or validation is None:
        missing = "the validation set" if train is not None else "the slice of the training set"
        return _not_measured(f"{missing} has no accuracy (config.eval.train_groups)", most)
    gap = {"value": train["value"] - validation["value"], "low": None, "high": None}
    if None not in (train["low"], train["high"], validation["low"], validation["high"]):
        down = math.hypot(train["value"] - train["low"], validation["high"] - validation["value"])
        up = math.hypot(train["high"] - train["value"], validation["value"] - validation["low"])
        gap |= {"low": gap["value"] - down, "high": gap["value"] + up}
    ends = "" if gap["low"] is None else f" ({100 * gap['low']:.1f} to {100 * gap['high']:.1f})"
    points = f"{100 * gap['value']:.1f}{ends} points"
    reason = f"accuracy in training minus that in validation is {points}, less than {100 * most:.3g} is asked"
    advice = (
        "it learns the training data by heart: fewer epochs in config.duration, config.checkpoint.patience to stop "
        "early, a lower config.optim.learning_rate, config.optim.weight_decay, config.objective.label_smoothing where "
        "the objective has it, or more prompts"
    )
    return _at_most(gap, most, gap["value"] < most, reason, advice)


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
    least = baseline["value"]
    reason = (
        f"validation accuracy {with_interval(accuracy, True)}, that of preferring the longer response is "
        f"{number(least, True)}"
    )
    advice = (
        'length tells more than the model: see "Length against label" of `python -m rmjax.data audit`, level the '
        "lengths with config.data.filter or other data, and read the slices by length difference in the report"
    )
    return _at_least(accuracy, least, accuracy["value"] > least, reason, advice)


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
    return _at_most(ece, most, ece["value"] <= most, reason, advice)


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


def _at_least(estimate: Values, least: float, passed: bool, reason: str, advice: str) -> Check:
    across = "below" if passed else "above"
    return _check(passed, estimate["value"], least, reason + _by_a_hair(estimate, least, passed, across), advice)


def _at_most(estimate: Values, most: float, passed: bool, reason: str, advice: str) -> Check:
    across = "above" if passed else "below"
    return _check(passed, estimate["value"], most, reason + _by_a_hair(estimate, most, passed, across), advice)


def _by_a_hair(estimate: Values, threshold: float, passed: bool, across: str) -> str:
    """What to add where the interval reaches to the other side of the threshold."""
    end = estimate["low"] if across == "below" else estimate["high"]
    if end is None or not (end < threshold if across == "below" else end > threshold):
        return ""
    more = "" if passed else ", more validation data would tell"
    return f"; by a hair: the 95 % interval reaches {across} it{more}"


def _check(passed: bool | None, value: float | None, threshold: float | None, reason: str, advice: str) -> Check:
    advice = "" if passed else advice
    return {"passed": passed, "value": value, "threshold": threshold, "reason": reason, "advice": advice}


def _not_measured(why: str, threshold: float | None) -> Check:
    return _check(None, None, threshold, f"not measured: {why}", "")
