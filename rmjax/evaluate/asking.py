"""Between groups of tokens and what a model said of them: how each kind of model is asked about preferences.

    records -> task -> groups -> model -> outputs -> `Scored` -> benchmarks and measures

A reward model scores every response. A judge that classifies sees each labelled pair in both orders
(judging/verdicts.py). A judge that writes is asked how likely each verdict is (judging/questions.py).

Shape letters: K responses, E scored tokens of a group, A outputs, C verdicts, R ratings.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rmjax.batches import measure
from rmjax.batches.groups import Groups
from rmjax.batches.tasks import Attributes, Preferences, Task
from rmjax.evaluate.scored import Scored, Traced
from rmjax.inference.reward_model import RewardModel
from rmjax.judging.questions import Ratings, Verdicts
from rmjax.judging.verdicts import Judgements
from rmjax.judging.writing import Writing
from rmjax.statistics import softmax

PAIR = re.compile(r"(.*)#(\d+)-(\d+)")  # the row of a pair of its responses


def task_for(learnt: Task | None) -> Task:
    """How a model is asked about preferences, by the task of its objective; None is a foreign model's one reward.

    Raises:
        ValueError: it cannot be asked.
    """
    if learnt is None or isinstance(learnt, Preferences | Attributes):
        return Preferences("keep")
    if isinstance(learnt, Judgements):
        return learnt
    if isinstance(learnt, Writing) and learnt.target == "pair":
        return Verdicts(learnt.template, learnt.ties)
    if isinstance(learnt, Writing) and learnt.target == "score":
        if len(learnt.attributes) > 1:
            raise ValueError(
                f"a judge that writes ratings of {', '.join(learnt.attributes)} gives no single score; generate with "
                "it, and read what it wrote with rmjax.judging.verdicts.parse_verdict"
            )
        return Ratings(learnt.template, learnt.scale, *learnt.attributes)
    what = "writes conversations, not verdicts" if isinstance(learnt, Writing) else "scores steps, not whole responses"
    raise ValueError(f"the model {what}: it prefers no response to another, and cannot run a benchmark of preferences")


def ask(model: RewardModel, groups: Groups, progress: Callable[[int], None] = lambda done: None) -> list[Scored]:
    """What a model says of groups that were read for `task_for`; a judge's pairs of one record are put together.

    `progress` is told how many groups are done.
    """
    task = task_for(model.objective.task if model.objective else None)
    outputs = model.answers(groups, progress)  # of a language model the mean negative log-likelihood after token 1
    if isinstance(task, Preferences):
        scores = _split(model.decode(np.concatenate(outputs))["score"], outputs)
        members = [model.member_rewards(x) for x in outputs] if model.has_spread else None
        log_odds = (model.contract or {}).get("reward_scale", 1.0)
        return _with_scores(groups, scores, measure.response_tokens(groups), log_odds, members)
    if isinstance(task, Ratings):  # the texts' lengths are characters, as a question holds more than the response
        levels = np.array(task.ratings, np.float64)
        ratings = [softmax(x.reshape(-1, len(levels))) @ levels for x in _log_likelihoods(groups, outputs)]
        return _with_scores(groups, ratings, groups.column("characters"))
    if isinstance(task, Verdicts):
        orders = [softmax(x.reshape(2, task.classes)) for x in _log_likelihoods(groups, outputs)]
    else:
        orders = _split(np.stack(list(model.decode(np.concatenate(outputs)).values()), -1), outputs)
    return list(_from_orders(groups, orders))


def trace(model: RewardModel, groups: Groups, progress: Callable[[int], None] = lambda done: None) -> list[Traced]:
    """What a model of steps (`prm`) says of solutions, one in each group: the first step that it finds wrong.

    `progress` is told how many groups are done.
    """
    outputs = model.answers(groups, progress)
    scores = _split(model.decode(np.concatenate(outputs))["score"], outputs)
    value, mask = (groups.column(f"label/{name}")[0] for name in ("value", "mask"))
    labels = _split(np.where(mask > 0, value, 1), outputs)  # steps after the first wrong one are not judged
    first = lambda wrong: int(wrong.argmax()) if wrong.any() else -1
    ids, prompts, source = groups.ids(), groups.prompt_ids.tolist(), groups.source.tolist()
    return [
        Traced(ids[n], prompts[n], groups.sources[source[n]], first(labels[n] < 0.5), first(scores[n] <= 0.5))
        for n in range(len(groups))
    ]


def _split(values: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(x) for x in like])[:-1])


def _log_likelihoods(groups: Groups, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """[E] of each sequence, up to what those of one question share."""
    tokens, _ = measure.response_tokens(groups)
    return [-x[:, 0].astype(np.float64) * (n - 1) for x, n in zip(outputs, _split(tokens, outputs))]


def _with_scores(
    groups: Groups,
    scores: Sequence[np.ndarray],
    lengths: tuple[np.ndarray, np.ndarray],
    log_odds: float = 1.0,
    members: Sequence[np.ndarray] | None = None,
) -> list[Scored]:
    """Scores [K] of each group beside its labels; `lengths` of all responses, and where each group's begin; rewards
    [K, M] of an ensemble's members."""
    sizes, begin = lengths
    columns = {name: groups.column(f"label/{name}") for name in ("wins", "ties", "margin")}
    ids = groups.ids()

    def labels(n: int, k: int) -> dict[str, Any]:
        size = int(groups.responses[n])  # K, or K R of which the first K are labelled
        square = lambda flat, at: flat[at[n] : at[n + 1]].reshape(size, size)[:k, :k]
        return {name: square(*column) for name, column in columns.items()}

    return [
        Scored(
            **_origin(groups, n, ids[n]),
            **labels(n, len(values)),
            tokens=sizes[begin[n] : begin[n] + len(values)],
            scores=np.asarray(values, np.float64),
            log_odds=log_odds,
            members=members[n] if members else None,
        )
        for n, values in enumerate(scores)
    ]


def _origin(groups: Groups, n: int, id: str) -> dict[str, Any]:
    return {
        "id": id,
        "prompt": int(groups.prompt_ids[n]),
        "source": groups.sources[groups.source[n]],
        "weight": float(groups.weights[n]),
    }


def _from_orders(groups: Groups, orders: Sequence[np.ndarray]) -> Iterator[Scored]:
    """Puts the pairs of a record together, of which each is a group with verdicts [2, C]: when its first response is
    shown as A, and when its second is. Lengths are the texts' characters."""
    characters, begin = groups.column("characters")
    verdicts, at = groups.column("label/verdict")
    strengths = groups.column("label/strength")[0]
    records: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
    for n, id in enumerate(groups.ids()):
        match = PAIR.fullmatch(id)
        row, i, j = (match[1], int(match[2]), int(match[3])) if match else (id, 0, 1)
        records.setdefault((int(groups.source[n]), row), []).append((n, i, j))
    for (_, row), pairs in records.items():
        first = pairs[0][0]
        k, c = begin[first + 1] - begin[first], orders[first].shape[-1]
        wins, ties, margin = np.zeros((3, k, k), np.float32)
        asked = np.full((k, k, c), np.nan)
        for n, i, j in pairs:
            said = verdicts[at[n] : at[n + 1]]  # of i as A first; a classifying judge's has the other order behind it
            said = said if len(said) in (2, 3) else said[: len(said) // 2]
            wins[i, j], wins[j, i] = said[0], said[1]
            ties[i, j] = ties[j, i] = said[2] if len(said) == 3 else 0.0
            better = (i, j) if said[0] > said[1] else (j, i)
            margin[better] = strengths[n]
            asked[i, j], asked[j, i] = orders[n]
        tokens, origin = characters[begin[first] : begin[first + 1]], _origin(groups, first, row)
        yield Scored(wins=wins, ties=ties, margin=margin, tokens=tokens, orders=asked, **origin)
