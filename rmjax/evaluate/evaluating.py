"""Asks a model about data and measures its answers: what `rmjax.evaluate`, the training loop and a run's end share."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rmjax.batches import measure, token_cache
from rmjax.batches.chat import Chat
from rmjax.batches.groups import Groups
from rmjax.batches.tasks import Attributes, Preferences, Steps, Task
from rmjax.data import formats, reading
from rmjax.data.records import Record
from rmjax.evaluate import asking, benchmarks, measures, outcomes
from rmjax.evaluate.benchmarks import Benchmark
from rmjax.evaluate.scored import Scored
from rmjax.inference.reward_model import RewardModel
from rmjax.judging.writing import Writing

SHOWN = 1_200  # characters of a text of the error analysis

Tell = Callable[[int], None]  # is told how many groups are done


def read(source: str, chat: Chat, task: Task, **options: Any) -> Groups:
    """Reads and tokenizes what a model is to be asked about; nothing is left out for its length.

    Args:
        source: of the data.
        chat: tokenizer and template of the model.
        task: how it is asked.
        **options: of `cache.build`.

    Raises:
        FileNotFoundError, ValueError: as `cache.build`.
    """
    unlimited = Chat(chat.tokenizer, template_kwargs=chat.template_kwargs)
    return token_cache.build(source, unlimited, task, progress=sys.stderr, **options)


def read_benchmark(benchmark: Benchmark, source: str, chat: Chat, learnt: Task | None, **options: Any) -> Groups:
    """The groups of a benchmark; rows that training would refuse count, as they do in its official score.

    Args:
        benchmark: a row of the table.
        source: where its data is.
        chat: tokenizer and template of the model.
        learnt: the task of the model's objective; None of a foreign model.
        **options: `workers` and `cache_dir`, as for `read`.

    Raises:
        FileNotFoundError, ValueError: as `read`; or the model cannot run it.
    """
    task = learnt if benchmark.rule is None else asking.task_for(learnt)
    if benchmark.rule is None and not isinstance(task, Attributes):
        raise ValueError(f"{benchmark.name} has ratings of attributes; it is for models trained with `pointwise`")
    assert task is not None
    if not benchmark.pairwise and not isinstance(task, Preferences | Attributes) and not _rates(task):
        raise ValueError(f"{benchmark.name} needs a score of every response; a judge of pairs cannot run it")
    kept = {"format": benchmark.format, "on_bad_row": "keep", "max_bad_fraction": 1.0}
    return read(source, chat, task, **kept, **options)


def read_benchmarks(config: ConfigDict, chat: Chat, learnt: Task) -> list[tuple[Benchmark, Groups]]:
    """Those of config.eval.benchmarks.

    Raises:
        FileNotFoundError, ValueError: as `read_benchmark`, or an unknown name.
    """
    options = {"workers": config.data.workers, "cache_dir": config.data.cache_dir}
    asked = benchmarks.parse(config.eval.benchmarks) if config.eval.benchmarks else []
    return [(test, read_benchmark(test, source, chat, learnt, **options)) for test, source in asked]


def flat(benchmark: Benchmark, found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a benchmark as metrics of a run: "reward_bench/overall"; what is not known is left out."""
    named = {**found["subsets"], **found["metrics"]}
    return {f"{benchmark.name}/{name}": x["value"] for name, x in named.items() if x["value"] is not None}


def _rates(task: Task) -> bool:
    return not hasattr(task, "classes")  # a judge of pairs has verdicts


def run_benchmark(
    model: RewardModel, benchmark: Benchmark, groups: Groups, *, progress: Tell = lambda done: None
) -> dict[str, Any]:
    """The official numbers, with intervals; see evaluate/benchmarks.py."""
    learnt = model.objective.task if model.objective else None
    if benchmark.rule is None:
        found = measured(model, groups, learnt, worst=0, progress=progress)
        return {"groups": len(groups), "metrics": found["metrics"], "subsets": {}, "missing": [], "notes": []}
    return benchmarks.score(benchmark, ask(model, groups, progress))


def ask(model: RewardModel, groups: Groups, progress: Tell = lambda done: None) -> list[Scored]:
    """What a model says of groups that were read for `asking.task_for`."""
    task = asking.task_for(model.objective.task if model.objective else None)
    log_odds = (model.contract or {}).get("reward_scale", 1.0)
    return asking.scored(groups, model.answers(groups, progress), task, model.decode, log_odds)


def kinds(source: str, format: str, learnt: Task | None) -> dict[str, Task]:
    """What can be measured on data, by what its first records say: "preferences" and what else the model learnt.

    Args:
        source: of the data.
        format: a name, or "auto".
        learnt: the task of the model's objective; None of a foreign model.

    Raises:
        ValueError: nothing can; says what there is.
    """
    first = list(itertools.islice(reading.records(source, format=format), formats.LOOK))
    found: dict[str, Task] = {}
    if isinstance(learnt, Writing | Steps | Attributes) and any(_usable(learnt, record) for record in first):
        found["learnt"] = learnt
    if any(record.wins.any() for record in first):
        with contextlib.suppress(ValueError):
            found["preferences"] = asking.task_for(learnt)
    if not found:
        what = type(learnt).__name__.lower() if learnt else "preferences"
        raise ValueError(f"{source}: its first {len(first)} rows say nothing that can be measured of a model of {what}")
    return found


def _usable(task: Task, record: Record) -> bool:
    try:
        return bool(task.examples(record))
    except Exception:
        return False


def measured(
    model: RewardModel, groups: Groups, task: Task | None, *, worst: int = 20, progress: Tell = lambda done: None
) -> dict[str, Any]:
    """Everything about one set of groups (see the modules of `evaluation`).

    Args:
        model: is asked.
        groups: of `task`.
        task: the task they were read for; None is that of a foreign model.
        worst: the most confidently wrong pairs to show.
        progress: is told how many groups are done.
    """
    if isinstance(task, Writing):
        written = outcomes.conversation_outcomes(model.outcomes(groups))
        nll, count, correct, verdict = (written[name] for name in ("nll", "count", "correct", "verdict"))
        return measures.tokens(nll, count, correct, verdict, np.arange(len(nll)), written["verdict_weight"])
    if isinstance(task, Attributes):
        return _attributes(model, groups, task, progress)
    if isinstance(task, Steps):
        return _steps(model, groups, progress)
    found = measures.preferences(ask(model, groups, progress), worst=worst)
    rows = {groups.id(n): n for n in range(len(groups))} if found["worst"] else {}
    for entry in found["worst"]:
        entry |= _texts(model.chat, groups, rows, entry, isinstance(task, Preferences))
    return found


def _attributes(model: RewardModel, groups: Groups, task: Attributes, progress: Tell) -> dict[str, Any]:
    outputs = np.concatenate(model.answers(groups, progress))
    decoded, (tokens, begin) = model.decode(outputs), measure.response_tokens(groups)
    of = np.repeat(np.arange(len(groups)), np.diff(begin))
    value, mask = (groups.column(f"label/{name}")[0].reshape(-1, len(task.names)) for name in ("value", "mask"))
    return measures.attributes(
        np.stack([decoded[name] for name in task.names], -1).astype(np.float64),
        np.where(mask > 0, value, np.nan).astype(np.float64),
        prompt=groups.prompt_ids[of],
        ids=[groups.id(int(i)) for i in of],
        tokens=tokens,
        rewards=decoded["score"].astype(np.float64),
        names=task.names,
        limits=task.scales,
        weight=groups.weights[of].astype(np.float64),
    )


def _steps(model: RewardModel, groups: Groups, progress: Tell) -> dict[str, Any]:
    p = model.decode(np.concatenate(model.answers(groups, progress)))["score"].astype(np.float64)
    value, mask = (groups.column(f"label/{name}")[0] for name in ("value", "mask"))
    scored, begin = groups.column("scored")  # (end, end_slot)
    of = np.repeat(np.arange(len(groups)), np.diff(begin) // 2)
    response = of * int(groups.responses.max()) + scored.reshape(-1, 2)[:, 1]
    judged = (mask > 0) & (groups.weights[of] > 0)
    of = of[judged]
    weight = groups.weights[of].astype(np.float64)
    return measures.steps(p[judged], value[judged], response[judged], groups.prompt_ids[of], weight)


def _texts(
    chat: Chat, groups: Groups, rows: Mapping[str, int], entry: Mapping[str, Any], apart: bool
) -> dict[str, str]:
    """The prompt and both responses of a pair, readable, as the model saw them.

    Where they are not `apart`, each in a sequence of its own, it is the first question that a judge was asked.
    """
    i, j = entry["preferred"], entry["rejected"]
    names = (entry["id"], f"{entry['id']}#{min(i, j)}-{max(i, j)}")
    tree = groups.group(next(rows[name] for name in names if name in rows)).tree
    of = lambda slot: tree.tokens[tree.path(int(tree.end[np.flatnonzero(tree.end_slot == slot)[-1]]))].tolist()
    if not apart:
        return {"prompt": _short(chat.tokenizer.decode(of(0)))}
    return _divided([chat.tokenizer.decode(of(slot)) for slot in (i, j)])


def _divided(texts: Sequence[str]) -> dict[str, str]:
    """What two renderings begin with, in whole lines, and how each goes on."""
    same = next((n for n, (a, b) in enumerate(zip(*texts)) if a != b), min(map(len, texts)))
    begins = texts[0].rfind("\n", 0, same) + 1
    names = ("prompt", "preferred_text", "rejected_text")
    return dict(zip(names, map(_short, (texts[0][:begins].strip(), texts[0][begins:], texts[1][begins:]))))


def _short(text: str) -> str:
    """At most SHOWN characters, without the middle of what is longer."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
