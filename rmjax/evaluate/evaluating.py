"""Asks a model about data and measures its answers: what `rmjax.evaluate`, the training loop and a run's end share."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Mapping
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
from rmjax.inference.reward_model import RewardModel
from rmjax.judging.writing import Writing

SHOWN = 1_200  # characters of a text of the error analysis

Tell = Callable[[int], None]  # is told how many groups are done


def read(source: str, chat: Chat, task: Task, **options: Any) -> Groups:
    """Reads and tokenizes what a model is to be asked about; nothing is left out for its length.

    `options` and errors are those of `token_cache.build`.
    """
    unlimited = Chat(chat.tokenizer, template_kwargs=chat.template_kwargs)
    return token_cache.build(source, unlimited, task, progress=sys.stderr, **options)


def read_benchmark(benchmark: Benchmark, source: str, chat: Chat, learnt: Task | None, **options: Any) -> Groups:
    """The groups of a benchmark; rows that training would refuse count, as they do in its official score.

    `learnt` is the task of the model's objective, None of a foreign model; ValueError if the model cannot run it.
    """
    of_steps = bool(benchmark.rule and benchmark.rule.steps)
    if of_steps and not isinstance(learnt, Steps):
        raise ValueError(
            f"{benchmark.name} asks which step of a solution is wrong; it is for models trained with `prm`"
        )
    task = learnt if benchmark.rule is None or of_steps else asking.task_for(learnt)
    if benchmark.rule is None and not isinstance(task, Attributes):
        raise ValueError(f"{benchmark.name} has ratings of attributes; it is for models trained with `pointwise`")
    assert task is not None
    if benchmark.rule and not benchmark.rule.judges and hasattr(task, "classes"):
        raise ValueError(f"{benchmark.name} needs a score of every response; a judge of pairs cannot run it")
    options |= {"format": benchmark.format or benchmark.name, "on_bad_row": "keep", "max_bad_fraction": 1.0}
    return read(source, chat, task, **options)


def read_benchmarks(config: ConfigDict, chat: Chat, learnt: Task) -> list[tuple[Benchmark, Groups]]:
    """Those of config.eval.benchmarks; errors as of `read_benchmark`, or ValueError for an unknown name."""
    options = {"workers": config.data.workers, "cache_dir": config.data.cache_dir}
    asked = benchmarks.parse(config.eval.benchmarks) if config.eval.benchmarks else []
    return [(test, read_benchmark(test, source, chat, learnt, **options)) for test, source in asked]


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is that of an evaluation in the loop."""
    return any(name.startswith("validation/") for name in line)


def flat(benchmark: Benchmark, scores: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a benchmark as metrics of a run: "reward_bench/overall"; what is not known is left out."""
    named = {**scores["subsets"], **scores["metrics"]}
    return {f"{benchmark.name}/{name}": x["value"] for name, x in named.items() if x["value"] is not None}


def run_benchmark(
    model: RewardModel,
    benchmark: Benchmark,
    groups: Groups,
    *,
    overlapping: np.ndarray | None = None,
    progress: Tell = lambda done: None,
) -> dict[str, Any]:
    """The numbers of a benchmark, as `benchmarks.score` gives them.

    Of groups that overlap the training data (`overlapping`, bool [n]), "overlapping" says how many they are, and the
    "metrics" without them; {} where too few are left.
    """
    learnt = model.objective.task if model.objective else None
    known = np.flatnonzero(overlapping) if overlapping is not None else np.zeros(0, np.int64)
    if benchmark.rule is None:
        metrics = measured(model, groups, learnt, worst=0, progress=progress)["metrics"]
        found: dict[str, Any] = {"groups": len(groups), "metrics": metrics, "subsets": {}, "missing": [], "notes": []}
        if len(known):
            rest = groups.select(np.setdiff1d(np.arange(len(groups)), known))
            of_rest = measured(model, rest, learnt, worst=0)["metrics"] if len(rest) else {}
            found["overlapping"] = {"groups": len(known), "metrics": of_rest}
        return found
    said: Any = (asking.trace if benchmark.rule.steps else asking.ask)(model, groups, progress)
    found = benchmarks.score(benchmark, said)
    if len(known):
        rows = {_row(groups.id(index)) for index in known.tolist()}
        clean = [one for one in said if _row(one.id) not in rows]
        without: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # none is left, or too few for the rule
            without = benchmarks.score(benchmark, clean)["metrics"]
        found["overlapping"] = {"groups": len(said) - len(clean), "metrics": without}
    return found


def _row(name: str) -> str:
    """The row of a group, without which of its pairs it is."""
    return name.partition("#")[0]


def measurable_tasks(source: str, format: str, learnt: Task | None, columns: str = "") -> dict[str, Task]:
    """What can be measured on data, by what its first records say: "preferences", and "learnt" where it is other.

    `learnt` is the task of the model's objective, None of a foreign model; ValueError if nothing can be measured.
    """
    first = list(itertools.islice(reading.records(source, format=format, columns=columns), formats.LOOK))
    tasks: dict[str, Task] = {}
    if isinstance(learnt, Writing | Steps | Attributes) and any(_usable(learnt, record) for record in first):
        tasks["learnt"] = learnt
    if any(record.wins.any() for record in first):
        with contextlib.suppress(ValueError):
            tasks["preferences"] = asking.task_for(learnt)
    if not tasks:
        what = type(learnt).__name__.lower() if learnt else "preferences"
        raise ValueError(f"{source}: its first {len(first)} rows say nothing that can be measured of a model of {what}")
    return tasks


def _usable(task: Task, record: Record) -> bool:
    with contextlib.suppress(Exception):
        return bool(task.examples(record))
    return False


def measured(
    model: RewardModel, groups: Groups, task: Task | None, *, worst: int = 20, progress: Tell = lambda done: None
) -> dict[str, Any]:
    """Everything about one set of groups, that were read for `task`, None of a foreign model (see measures.py).

    `worst` is how many of the most confidently wrong pairs are listed.
    """
    if isinstance(task, Writing):
        written = outcomes.conversation_outcomes(model.outcomes(groups))
        nll, count, correct, verdict = (written[name] for name in ("nll", "count", "correct", "verdict"))
        return measures.tokens(nll, count, correct, verdict, np.arange(len(nll)), written["verdict_weight"])
    if isinstance(task, Attributes):
        return _attributes(model, groups, task, progress)
    if isinstance(task, Steps):
        return _steps(model, groups, progress)
    values = measures.preferences(asking.ask(model, groups, progress), worst=worst)
    rows = {id: n for n, id in enumerate(groups.ids())} if values["worst"] else {}
    for entry in values["worst"]:
        entry |= _texts(model.chat, groups, rows, entry, isinstance(task, Preferences))
    return values


def _attributes(model: RewardModel, groups: Groups, task: Attributes, progress: Tell) -> dict[str, Any]:
    outputs = np.concatenate(model.answers(groups, progress))
    decoded, (tokens, begin) = model.decode(outputs), measure.response_tokens(groups)
    index = np.repeat(np.arange(len(groups)), np.diff(begin))
    value, mask = (groups.column(f"label/{name}")[0].reshape(-1, len(task.names)) for name in ("value", "mask"))
    ids = groups.ids()
    return measures.attributes(
        np.stack([decoded[name] for name in task.names], -1).astype(np.float64),
        np.where(mask > 0, value, np.nan).astype(np.float64),
        prompt=groups.prompt_ids[index],
        ids=[ids[i] for i in index.tolist()],
        tokens=tokens,
        rewards=decoded["score"].astype(np.float64),
        names=task.names,
        limits=task.scales,
        weight=groups.weights[index].astype(np.float64),
    )


def _steps(model: RewardModel, groups: Groups, progress: Tell) -> dict[str, Any]:
    p = model.decode(np.concatenate(model.answers(groups, progress)))["score"].astype(np.float64)
    value, mask = (groups.column(f"label/{name}")[0] for name in ("value", "mask"))
    scored, begin = groups.column("scored")  # (end, end_slot)
    index = np.repeat(np.arange(len(groups)), np.diff(begin) // 2)
    response = index * int(groups.responses.max()) + scored.reshape(-1, 2)[:, 1]
    judged = (mask > 0) & (groups.weights[index] > 0)
    prompt, weight = groups.prompt_ids[index[judged]], groups.weights[index[judged]].astype(np.float64)
    return measures.steps(p[judged], value[judged], response[judged], prompt, weight)


def _texts(
    chat: Chat, groups: Groups, rows: Mapping[str, int], entry: Mapping[str, Any], apart: bool
) -> dict[str, str]:
    """The prompt and both responses of a pair, readable, as the model saw them.

    Where they are not `apart`, each in a sequence of its own, it is the first question that a judge was asked.
    """
    i, j = entry["preferred"], entry["rejected"]
    ids = (entry["id"], f"{entry['id']}#{min(i, j)}-{max(i, j)}")
    tree = groups.group(next(rows[id] for id in ids if id in rows)).tree

    def text(slot: int) -> str:
        end = tree.end[np.flatnonzero(tree.end_slot == slot)[-1]]
        return chat.tokenizer.decode(tree.tokens[tree.path(int(end))].tolist())

    if not apart:
        return {"prompt": _short(text(0))}
    first, second = text(i), text(j)
    same = next((n for n, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    begins = first.rfind("\n", 0, same) + 1  # what both begin with, in whole lines
    names = ("prompt", "preferred_text", "rejected_text")
    return dict(zip(names, map(_short, (first[:begins].strip(), first[begins:], second[begins:]))))


def _short(text: str) -> str:
    """At most SHOWN characters, without the middle of what is longer."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
