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
FITTED = 0.05  # accuracy in training this far above the threshold: the training data is fitted


def judge(gate: Values, evaluation: Values, lines: Sequence[Values]) -> dict[str, Any]:
    """Judges a run by its thresholds.

    Args:
        gate: `config.gate`; a threshold of 0 or False asks nothing.
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
    checks = [{"name": name, **check()} for name, check in asked.items() if gate.get(name)]
    checks = [{"name": "measured", **_broken(*error)} for error in (evaluation.get("errors") or {}).items()] + checks
    return {"passed": all(check["passed"] is not False for check in checks), "checks": checks}


def text(verdict: Values) -> list[str]:
    """The verdict for the terminal, with a row for each check, and advice under each that failed."""
    return show.to_text([Section("", *evaluation_report.verdict(verdict))])


# ----------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------


def _broken(name: str, error: str) -> Check:
    advice = (
        "look at the rewards (validation/reward_max) and at the labels of this set; lower config.optim.learning_rate"
    )
    return {"passed": False, "value": None, "threshold": None, "reason": f"{name}: {error}", "advice": advice}


def _accuracy(least: float, sets: Values) -> Check:
    found = _accuracy_of(sets, "validation")
    if found is None:
        return _not_measured("the validation set has no accuracy", least)
    passed = found["value"] >= least
    reason = f"validation accuracy {with_interval(found, True)}, at least {number(least, True)} is asked"
    reason += _by_a_hair(found, least, passed, "below" if passed else "above")
    return _check(passed, found["value"], least, reason, "" if passed else _raise_accuracy(sets, least))


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
    passed = gap["value"] < most
    reason = f"accuracy in training minus that in validation is {_points(gap)}, less than {100 * most:.3g} is asked"
    reason += _by_a_hair(gap, most, passed, "above" if passed else "below")
    advice = (
        "it learns the training data by heart: fewer epochs in config.duration, config.checkpoint.patience to stop "
        "early, a lower config.optim.learning_rate, config.optim.weight_decay, config.objective.label_smoothing where "
        "the objective has it, or more prompts"
    )
    return _check(passed, gap["value"], most, reason, "" if passed else advice)


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
    passed = share < most
    reason = (
        f"training loss {number(first)} in the first tenth of the steps and {number(last)} in the last, which brought "
        f"{share:.1%} of the fall; less than {number(most, True)} is asked"
    )
    advice = (
        "the loss still falls: raise config.duration, or config.optim.learning_rate, if the validation loss falls as "
        "well; if that rises, it learns by heart: see the gap"
    )
    return _check(passed, share, most, reason, "" if passed else advice)


def _beats_length(sets: Values) -> Check:
    measured = sets.get("validation") or {}
    found, baseline = _accuracy_of(sets, "validation"), _known(measured, "longer_is_better")
    if found is None or baseline is None:
        return _not_measured('the accuracy of "the longer response is better" is not known', None)
    passed = found["value"] > baseline["value"]
    reason = (
        f"validation accuracy {with_interval(found, True)}, that of preferring the longer response is "
        f"{number(baseline['value'], True)}"
    )
    reason += _by_a_hair(found, baseline["value"], passed, "below" if passed else "above")
    advice = (
        'length tells more than the model: see "Length against label" of `python -m rmjax.data audit`, level the '
        "lengths with config.data.filter or other data, and read the slices by length difference in the report"
    )
    return _check(passed, found["value"], baseline["value"], reason, "" if passed else advice)


def _calibration(most: float, sets: Values) -> Check:
    measured = sets.get("validation") or {}
    found = _known(measured, "ece")
    if found is None:
        return _not_measured("the validation set has no calibration error", most)
    passed = found["value"] <= most
    reason = f"expected calibration error {with_interval(found, True)}, at most {number(most, True)} is asked"
    reason += _by_a_hair(found, most, passed, "above" if passed else "below")
    over = overconfidence(measured.get("reliability"))
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
    return _check(passed, found["value"], most, reason, "" if passed else advice)


# ----------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------


def losses_by_tenths(lines: Sequence[Values]) -> tuple[float | None, float | None, float | None]:
    """Mean training loss of the first tenth of the steps, of the last but one, and of the last; lines weigh equally.

    None for a tenth without a line. The share of the fall does not depend on the loss's scale, and is as strict where
    it ends near 0 as where labels are noisy.
    """
    losses = [(x["step"], x["train/loss"]) for x in lines if x.get("train/loss") is not None]
    steps = max((step for step, _ in losses), default=0)
    within = lambda low, high: _mean([loss for step, loss in losses if low * steps < step <= high * steps])
    return within(0.0, 0.1), within(0.8, 0.9), within(0.9, 1.0)


def overconfidence(reliability: Values | None) -> float | None:
    """Stated probability minus share that is right, over all bins by their counts; None where there is none."""
    bins = zip(*(reliability[key] for key in ("counts", "predicted", "observed"))) if reliability else ()
    full = [(n, p - o) for n, p, o in bins if n and p is not None and o is not None]
    total = sum(n for n, _ in full)
    return sum(n * over for n, over in full) / total if total else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _known(measured: Values, name: str) -> Values | None:
    """An estimate of a set whose value is known."""
    found = measured.get("metrics", {}).get(name)
    return found if found is not None and found["value"] is not None else None


def _accuracy_of(sets: Values, name: str) -> Values | None:
    measured = sets.get(name) or {}
    return _known(measured, ACCURACY.get(measured.get("kind", ""), ""))


def _points(estimate: Values) -> str:
    ends = "" if estimate["low"] is None else f" ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"
    return f"{100 * estimate['value']:.1f}{ends} points"


def _by_a_hair(estimate: Values, threshold: float, passed: bool, where: str) -> str:
    """What to add where the interval reaches to the other side of the threshold."""
    end = estimate["low"] if where == "below" else estimate["high"]
    if end is None or not (end < threshold if where == "below" else end > threshold):
        return ""
    return f"; by a hair: the 95 % interval reaches {where} it" + (
        "" if passed else ", more validation data would tell"
    )


def _check(passed: bool, value: float, threshold: float, reason: str, advice: str) -> Check:
    return {"passed": passed, "value": value, "threshold": threshold, "reason": reason, "advice": advice}


def _not_measured(why: str, threshold: float | None) -> Check:
    return {"passed": None, "value": None, "threshold": threshold, "reason": f"not measured: {why}", "advice": ""}
