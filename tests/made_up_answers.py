"""Answers of models beside labels, made up: for the tests of what is measured of them."""

import functools

import jax
import numpy as np

from rmjax.evaluate import outcomes
from rmjax.evaluate.scored import Scored
from rmjax.objectives import sums as sums_lib


def group(wins, scores=None, orders=None, ties=None, margin=None, tokens=None, **rest):
    k = len(wins)
    of = lambda x: np.zeros((k, k), np.float32) if x is None else np.array(x, np.float32)
    said = {"scores": None if scores is None else np.array(scores, float), "orders": orders}
    tokens = np.arange(k) + 10 if tokens is None else np.array(tokens)
    rest = {"id": "x:0", "prompt": 0, "source": "x"} | rest
    return Scored(wins=of(wins), ties=of(ties), margin=of(margin), tokens=tokens, **said, **rest)


def pairs(n=400, seed=0, noise=1.0, per_prompt=1, **rest):
    """Pairs whose labels come from a logistic model of the scores; response 0 or 1 is preferred."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        scores = rng.normal(size=2) * 2
        first = rng.random() < 1 / (1 + np.exp(-noise * (scores[0] - scores[1])))
        wins = [[0, float(first)], [float(not first), 0]]
        margin = rng.choice([0.5, 1, 2, 3])
        made.append(
            group(
                wins, scores, margin=np.array(wins) * margin, tokens=rng.integers(5, 60, 2), id=f"x:{i}",
                prompt=i // per_prompt, source=f"s{i % 3}", **rest,
            )
        )  # fmt: skip
    return made


def rankings(n=60, k=5, seed=0):
    """Groups with soft labels, ties and pairs that were not compared."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        wins, ties, upper = np.zeros((k, k)), np.zeros((k, k)), np.triu(rng.random((k, k)), 1)
        for a, b in zip(*np.nonzero(upper > 0.3)):
            said = rng.choice([0, 1, 0.2, 0.9, -1])
            wins[a, b], wins[b, a] = (said, 1 - said) if said >= 0 else (0, 0)
            ties[a, b] = ties[b, a] = said < 0
        scores = rng.integers(0, 6, k) * 0.5
        made.append(group(wins, scores, ties=ties, prompt=i, id=f"r:{i}", weight=float(rng.choice([0.5, 1, 2]))))
    return made


def judged(n=50, k=3, classes=3, seed=0, hidden=0.1):
    """Groups of a judge, some pairs not asked."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        orders = rng.dirichlet(np.ones(classes), (k, k))
        asked = np.triu(rng.random((k, k)) > hidden, 1)
        orders[~(asked | asked.T)] = np.nan
        gold = rng.permutation(k).astype(float)
        made.append(group(gold[:, None] > gold, orders=orders, prompt=i, id=f"j:{i}"))
    return made


def value(measured, name):
    return measured["metrics"][name]["value"]


def rated(n=300, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, (n, 2)).astype(float)
    scores = labels + rng.normal(0, 0.9, (n, 2))
    labels[rng.random((n, 2)) < 0.2] = np.nan
    prompt, tokens = np.arange(n) // 2, rng.integers(5, 50, n)
    given = {"prompt": prompt, "ids": [f"x:{i // 2}" for i in range(n)], "tokens": tokens, "rewards": scores.mean(1)}
    return scores, labels, given | {"names": ("a", "b"), "limits": ((0, 4), (0, 4))}


def stepped(n=80, seed=0):
    rng = np.random.default_rng(seed)
    response = np.repeat(np.arange(n), rng.integers(1, 6, n))
    label = rng.choice([0.0, 0.3, 0.7, 1.0], len(response))
    p = 1 / (1 + np.exp(-(3 * label - 1.5 + rng.normal(0, 1, len(label)))))
    return np.round(p, 2), label, response, response // 2


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_outcomes(objective, outputs, batch, params):
    loss = sums_lib.fraction(*objective.loss_sums(outputs, batch, params))
    return loss, objective.outcomes(outputs, batch, params)


def sums_of(objective, outputs, batch, params=None):
    """What a training step tells of a batch, on the host."""
    loss, seen = jax.device_get(_loss_and_outcomes(objective, outputs, batch, params or {}))
    return {**outcomes.step_sums(objective.task, seen), "loss": loss.astype(np.float64)}


def metrics_of(objective, outputs, batch, params=None):
    """What an evaluation of a run tells of a batch."""
    loss, seen = jax.device_get(_loss_and_outcomes(objective, outputs, batch, params or {}))
    return outcomes.evaluation_metrics(objective.task, seen, loss.astype(np.float64))
