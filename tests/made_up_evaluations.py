"""Evaluations, metrics and timings as a run leaves them, made up: for the tests of what a person looks at after it."""

import numpy as np

from rmjax.batches import measure

SCRIPT = "<script>alert(1)</script>"


def estimate(value, half=0.02):
    """An estimate with an interval; `half` None is one without."""
    return {
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
    }


def over_edges(values, low, high, bins=24):
    counts, edges = np.histogram(values, bins, (low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def preferences(accuracy=0.86, pairs=1200, seed=0):
    """Of a model that scores, with every part."""
    rng = np.random.default_rng(seed)
    gold = rng.gamma(2.0, 0.6, pairs)
    difference = gold * 1.6 + rng.normal(0, 1.4, pairs) - (0.86 - accuracy) * 6
    middle = rng.normal(0, 1.2, pairs)
    chosen, rejected = middle + difference / 2, middle - difference / 2
    probability = 1 / (1 + np.exp(-np.abs(difference)))
    right = difference > 0
    at = np.clip(((probability - 0.5) * 20).astype(int), 0, 9)
    counts = np.bincount(at, minlength=10)
    mean = lambda x: [None if not n else float(s / n) for s, n in zip(np.bincount(at, x, 10), counts)]
    named = lambda names, *values: [{"name": n, "pairs": 90 + 31 * i, **estimate(v, 0.05)} for i, (n, v) in
                                    enumerate(zip(names, values))]  # fmt: skip
    metrics = {
        **{"accuracy": accuracy, "nll": 0.34, "ece": 0.041, "tie_rate": 0.0, "margin": float(difference.mean())},
        **{"longer_is_better": 0.56, "coin": 0.5, "reward_length_correlation": 0.12},
        **{"reward_mean": 0.31, "reward_std": 1.9},
    }
    return {
        "kind": "preferences",
        **{"groups": pairs, "prompts": 800, "pairs": pairs},
        "metrics": {name: estimate(value) for name, value in metrics.items()},
        "reliability": {
            "edges": np.linspace(0.5, 1, 11).tolist(),
            **{"counts": counts.tolist(), "predicted": mean(probability), "observed": mean(right.astype(float))},
        },
        "margins": over_edges(difference, -6, 10, 32),
        "chosen": over_edges(chosen, -8, 8, 32),
        "rejected": over_edges(rejected, -8, 8, 32),
        "slices": {
            "gold margin": named(("0 to 0.5", "0.5 to 1", "1 to 2", "above 2"), 0.66, 0.8, 0.91, 0.97),
            "length difference": named(("shorter", "about as long", "longer", "much longer"), 0.71, 0.82, 0.88, 0.93),
            "source": named(("helpsteer", "hh-rlhf", "a source of $1 whose name has many characters"), 0.9, 0.79, 0.87),
        },
        "failing": [{"table": "length difference", "name": "shorter", "pairs": 90, **estimate(0.71, 0.05)}],
        "best_of_n": {
            "n": [1, 2, 4, 8],
            "model": [estimate(x, 0.03) for x in (0.5, 0.62, 0.7, 0.75)],
            **{"oracle": [0.5, 0.68, 0.8, 0.88], "random": [0.5, 0.5, 0.5, 0.5]},
        },
        "worst": [
            {
                **{"id": f"validation.jsonl:{i}", "source": "hh-rlhf", "preferred": 0, "rejected": 1},
                **{"probability": 0.01 * (i + 1), "difference": -4.6 + 0.4 * i, "margin": 1.0},
                "prompt": f"Which of the two is the older river? {SCRIPT}",
                "preferred_text": f"Every old river is deep and late; {i} of them are $5 to $10 away.",
                "rejected_text": f"Every old garden is deep and late; {i} of them are $5 to $10 away.",
            }
            for i in range(7)
        ],
    }  # fmt: skip


def attributes():
    """Of a pointwise model of two attributes."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 600)
    scores = labels + rng.normal(0, 0.4, 600)
    at = np.arange(5)
    one = {
        **{"labels": over_edges(labels, -1, 5.5), "scores": over_edges(scores, -1, 5.5)},
        "curve": {
            "label": at.tolist(),
            "mean": [float(scores[labels == x].mean()) for x in at],
            "sd": [float(scores[labels == x].std()) for x in at],
            "counts": np.bincount(labels).tolist(),
        },
    }
    names = ("mse", "mae", "pearson", "spearman", "kappa")
    values = dict(zip(names, (0.11, 0.24, 0.96, 0.95, 0.94)))
    metrics = {f"{n}{part}": estimate(v) for part in ("", "/relevance", "/style") for n, v in values.items()}
    return {
        **{"kind": "attributes", "groups": 600, "prompts": 400},
        "metrics": {**metrics, "reward_length_correlation": estimate(0.03)},
        "attributes": {"relevance": one, "style": one},
        "worst": [{"id": "v:3", "attribute": "style", "score": 3.9, "label": 0.0}],
    }


def steps():
    """Of a process reward model."""
    rng = np.random.default_rng(2)
    names = ("accuracy", "accuracy_incorrect", "accuracy_correct", "first_error_accuracy", "nll", "ece", "auc")
    values = dict(zip(names, (0.92, 0.85, 0.95, 0.81, 0.21, 0.03, 0.97)))
    middles = (np.arange(10) + 0.5) / 10
    return {
        **{"kind": "steps", "groups": 300, "prompts": 300},
        "metrics": {name: estimate(value) for name, value in values.items()},
        "reliability": {
            **{"edges": np.linspace(0, 1, 11).tolist(), "counts": [90, 40, 20, 0, 12, 14, 20, 33, 80, 400]},
            "predicted": [None if i == 3 else float(x) for i, x in enumerate(middles)],
            "observed": [None if i == 3 else float(x * 0.9) for i, x in enumerate(middles)],
        },
        "scores": {
            "correct": over_edges(rng.beta(8, 1.5, 800), 0, 1),
            "incorrect": over_edges(rng.beta(1.5, 5, 300), 0, 1),
        },
    }


def tokens():
    """Of a judge that writes."""
    rng = np.random.default_rng(3)
    values = {"loss": 0.4, "perplexity": 1.49, "accuracy": 0.9, "verdict_accuracy": 0.95}
    return {
        **{"kind": "tokens", "groups": 200, "prompts": 200},
        "metrics": {name: estimate(value) for name, value in values.items()},
        "losses": measure.histogram(rng.gamma(4, 0.1, 200)),
    }


KINDS = {"preferences": preferences, "attributes": attributes, "steps": steps, "tokens": tokens}


def benchmark():
    sections = {"overall": 0.78, "Chat": 0.93, "Chat Hard": 0.61, "Safety": 0.84, "Reasoning": 0.75}
    subsets = (
        "alpacaeval-easy",
        "alpacaeval-hard",
        "mt-bench-med",
        "donotanswer",
        "xstest-should-refuse",
        "hep-python",
    )
    return {
        "groups": 480,
        "metrics": {name: estimate(value) for name, value in sections.items()},
        "subsets": {n: {"count": 60 + 9 * i, **estimate(0.6 + 0.06 * i, 0.05)} for i, n in enumerate(subsets)},
        "missing": ["refusals-dangerous"],
        "notes": ["sections weigh equally"],
    }


def evaluation(kind="preferences"):
    """Of a validation set and a slice of the training set, and of a benchmark where pairs are compared."""
    of = {"validation": KINDS[kind](), "train_slice": KINDS[kind]()}
    if kind == "preferences":
        of["train_slice"] = preferences(0.91, 256, seed=1)
    benchmarks = {"reward_bench": benchmark()} if kind == "preferences" else {}
    return {"version": 1, "model": "runs/x/export", "step": 300, "sets": of, "benchmarks": benchmarks}


def lines(steps=300, every=10, evaluated=30, metric="accuracy", rewards=True, last=0.35):
    """metrics.jsonl: the training loss falls from 0.69 to `last` and stays there from the middle on."""
    rng, found = np.random.default_rng(4), []
    loss = lambda step: last + (0.69 - last) * max(0.0, 1 - 2 * step / steps)
    for step in range(0, steps + 1, every):
        if step:
            now = {"train/loss": loss(step) + rng.normal(0, 0.004), "train/learning_rate": 1e-5 * (1 - step / steps)}
            found.append({"step": step, **now, "train/grad_norm": 1 + rng.random()})
        if step % evaluated == 0:
            now = {f"{name}/loss": loss(step) + more for name, more in (("validation", 0.03), ("train_slice", 0.0))}
            now |= {
                f"{name}/{metric}": 1.2 - loss(step) - more for name, more in (("validation", 0.02), ("train_slice", 0))
            }
            if rewards:
                apart = 4 * (0.69 - loss(step)) / (0.69 - last)
                for side, sign in (("chosen", 0.5), ("rejected", -0.5)):
                    at = {5: -2, 25: -0.7, 50: 0, 75: 0.7, 95: 2}
                    now |= {f"validation/{side}_p{q:02}": sign * apart + x for q, x in at.items()}
                now["validation/reward_drift"] = 0.001 * step
            found.append({"step": step, **now})
    return found


def timings(steps=300):
    rng = np.random.default_rng(5)
    return [
        {
            **{"step": step, "timing/pairs_per_second": 310 + 9 * rng.random(), "timing/step_seconds": 0.2},
            **{"timing/waiting_for_data": 0.02 * rng.random(), "timing/memory_gib": 1.5},
        }
        for step in range(20, steps + 1, 10)
    ]
