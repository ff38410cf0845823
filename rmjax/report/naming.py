"""What the metrics of an evaluation are called in pages and cards, and how their numbers are written."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    title: str
    percent: bool = False  # whether it is a share
    meaning: str = ""  # one phrase


METRICS = {
    "accuracy": Metric("Accuracy", True, "share that is as labelled; equal rewards count half"),
    "accuracy_averaged": Metric("Accuracy, both orders averaged", True),
    "top1_accuracy": Metric("Best response found", True, "the highest reward is one of the best labelled"),
    "longer_is_better": Metric("Longer is better", True, "accuracy of preferring the longer response: to be beaten"),
    "coin": Metric("A coin", True),
    "nll": Metric("Negative log-likelihood", False, "of the labels, in nats; 0.693 is that of a coin"),
    "ece": Metric("Calibration error", True, "mean distance of stated probability from share that is right"),
    "tie_rate": Metric("Ties", True, "pairs the model finds equal"),
    "margin": Metric("Mean margin", False, "reward of the preferred response minus that of the other"),
    "reward_length_correlation": Metric("Reward and length", False, "correlation; 0 is none"),
    "reward_mean": Metric("Mean reward"),
    "reward_std": Metric("Standard deviation of rewards"),
    "consistency": Metric("Order consistency", True, "both orders of a pair give the same verdict"),
    "conflict_rate": Metric("Conflicts", True, "pairs whose two orders contradict each other"),
    "cycle_rate": Metric("Cycles", True, "triples of responses whose verdicts go in a circle"),
    "mse": Metric("Mean squared error"),
    "mae": Metric("Mean absolute error"),
    "pearson": Metric("Pearson correlation"),
    "spearman": Metric("Rank correlation", False, "Spearman's"),
    "kappa": Metric("Quadratic kappa", False, "agreement with the labels beyond chance"),
    "accuracy_correct": Metric("Accuracy on right steps", True),
    "accuracy_incorrect": Metric("Accuracy on wrong steps", True),
    "first_error_accuracy": Metric("First error found", True, "the first wrong step is the one labelled so"),
    "auc": Metric("Area under the ROC curve", False, "right against wrong steps; 0.5 is chance"),
    "reward_spread": Metric("Spread", False, "standard deviation of the members' rewards, mean over responses"),
    "members_accuracy": Metric("Accuracy of one member", True, "drawn for each pair; the whole has the mean of all"),
    "members_ece": Metric("Calibration error of one member", True, "drawn for each pair"),
    "error_auc_margin": Metric("Errors told by a small margin", False, "area under the ROC curve; 0.5 is chance"),
    "error_auc_spread": Metric("Errors told by the spread", False, "of the members' rewards, mean of both responses"),
    "error_auc_margin_spread": Metric("Errors told by the margins' spread", False, "of what each member finds between"),
    "loss": Metric("Loss"),
    "perplexity": Metric("Perplexity"),
    "verdict_accuracy": Metric("Verdict accuracy", True, "written verdicts that are as labelled"),
    **{
        f"vote_{n}": Metric(f"Vote of {n}", True, f"accuracy of what most of {n} judgements say")
        for n in (2, 4, 8, 16, 32, 64)
    },
    "first_position": Metric("First position", True, "verdicts for the first of two responses; 50 % is no preference"),
    "unreadable": Metric("Unreadable", True, "judgements whose verdict cannot be read"),
    "cut_off": Metric("Cut off", True, "judgements that did not end by themselves"),
    "judgement_tokens": Metric("Tokens of a judgement"),
    "accuracy_greedy": Metric("Likeliest judgement is right", True, "each token is the likeliest one"),
    "dead": Metric("Questions that teach nothing", True, "all of their answers earn the same"),
    "answer_tokens": Metric("Tokens of an answer"),
    "entropy": Metric("Entropy", False, "nats a token, of what was drawn"),
    "mismatch": Metric("Mismatch", False, "nats a token between sampler and training; 0 is none"),
    "clipped": Metric("Clipped", True, "drawn tokens that pull no more"),
    "ratio_max": Metric("Largest ratio", False, "of the probabilities in training and when drawn"),
    "shared": Metric("Spared by sharing", True, "tokens that are computed once for several answers"),
    "length_and_right": Metric("Length and being right", False, "correlation; 0 is none"),
    "mae_of_mean": Metric("Mean absolute error of mean ratings"),
}
OF_KIND = {  # for kinds where a metric says something else
    "tokens": {
        "accuracy": Metric("Token accuracy", True, "the likeliest next token is the one that was written"),
        "loss": Metric("Loss", False, "nats a token"),
    },
    "steps": {"accuracy": Metric("Step accuracy", True, "steps that are judged as labelled")},
    "judgements": {
        "accuracy": Metric("One judgement is right", True, "a tie counts half where one side is labelled better"),
        "consistency": Metric("Order consistency", True, "the votes about both orders name the same response"),
        "tie_rate": Metric("Ties", True, "of the verdicts that can be read"),
        "ece": Metric("Calibration error", True, "mean distance of a majority's share from how often it is right"),
    },
}
HEADLINES = {  # what is shown large, in this order, at most six of them
    "preferences": (
        *("accuracy", "longer_is_better", "consistency", "conflict_rate", "ece", "nll", "top1_accuracy", "margin"),
        *("reward_length_correlation", "tie_rate"),
    ),
    "attributes": ("spearman", "pearson", "kappa", "mse", "mae", "reward_length_correlation"),
    "steps": ("accuracy", "first_error_accuracy", "auc", "ece", "accuracy_incorrect", "nll"),
    "tokens": ("verdict_accuracy", "loss", "perplexity", "accuracy"),
    "judgements": ("accuracy", "vote_8", "consistency", "spearman", "mae", "mae_of_mean", "unreadable", "cut_off"),
}


def metric(name: str, kind: str = "", estimate: Mapping[str, Any] | None = None) -> Metric:
    """How a metric is shown; "mse/style" is that of the attribute "style", and one of no known name is shown as it is.

    `kind` is that of the measures; a benchmark has none, and an unknown number of it is a share if it is from 0 to 1.
    """
    base, _, part = name.partition("/")
    known = OF_KIND.get(kind, {}).get(base) or METRICS.get(base)
    if known is None and not kind and estimate is not None:
        return Metric(name, is_share(estimate))
    known = known or Metric(base.replace("_", " "))
    return dataclasses.replace(known, title=f"{known.title}, {part}") if part else known


def is_share(estimate: Mapping[str, Any]) -> bool:
    """Whether a number without a name of ours is shown as percent."""
    return estimate["value"] is not None and 0 <= estimate["value"] <= 1


def number(value: Any, percent: bool = False) -> str:
    """0.98617 is "0.986" or "98.6%"; what is not known is "–"."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        return f"{value:.1%}"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 or not value else f"{value:.3f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def interval(estimate: Mapping[str, Any], percent: bool = False) -> str:
    """The ends of a 95 % interval, "97.6% to 99.5%"; "" where they are not known, or the same, as of a coin."""
    low, high = estimate.get("low"), estimate.get("high")
    if low is None or high is None or low == high:
        return ""
    return f"{number(low, percent)} to {number(high, percent)}"


def value_and_interval(estimate: Mapping[str, Any], percent: bool = False) -> tuple[str, str]:
    return number(estimate.get("value"), percent), interval(estimate, percent)


def with_interval(estimate: Mapping[str, Any], percent: bool = False) -> str:
    """Value and interval, "98.6% (97.6% to 99.5%)"."""
    value, ends = value_and_interval(estimate, percent)
    return value + (f" ({ends})" if ends else "")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("optim.learning_rate", "1e-05") for every leaf; what is empty and lists are written as JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
