"""What a run leaves: its model measured, judged, exported and described; once, of the step that is exported."""

import functools
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from rmjax.batches.chat import Chat
from rmjax.batches.groups import Groups
from rmjax.batches.overlap import Overlap
from rmjax.evaluate import evaluating, gate
from rmjax.evaluate.benchmarks import Benchmark
from rmjax.export import write as export
from rmjax.inference import runs
from rmjax.inference.parameters import AbstractModel
from rmjax.inference.reward_model import RewardModel
from rmjax.report import card
from rmjax.report import run as run_report
from rmjax.runtime import agreement, exits, files, processes
from rmjax.train.evaluations import Evaluation

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "numpy")


class NotGoodEnough(RuntimeError):
    """The model fails the quality gate, and config.gate.exit_code asks to say so."""

    exit_code = exits.NOT_GOOD_ENOUGH


def measure(
    model: RewardModel,
    sets: Mapping[str, Evaluation],
    tests: Sequence[tuple[Benchmark, Groups]],
    overlaps: Mapping[str, Overlap],
    where: Path,
    step: int,
) -> dict[str, Any]:
    """The evaluation of a run's model: every set and benchmark, with intervals.

    Args:
        sets: by name.
        overlaps: of the benchmarks with the training data, by name.

    Returns:
        evaluation.json; under "errors" why a set or a benchmark could not be measured.
    """
    found: dict[str, Any] = {"version": 1, "model": str(where), "step": step, "sets": {}, "benchmarks": {}}
    asked: list[tuple[str, str, Any]] = [
        ("sets", name, functools.partial(of_set.measured, model)) for name, of_set in sets.items()
    ]
    asked += [
        ("benchmarks", test.name, functools.partial(evaluating.run_benchmark, model, test, groups, overlapping=known))
        for test, groups in tests
        for known in [overlaps[test.name].groups]
    ]
    for part, name, ask in asked:
        try:
            found[part][name] = ask()
        except ValueError as error:  # rewards that are not finite, or nothing to compare: it is exported all the same
            logging.warning("%s cannot be measured: %s", name, error)
            found.setdefault("errors", {})[name] = str(error)
    return found


def write(
    config: ConfigDict,
    workdir: Path,
    model: AbstractModel,
    chat: Chat,
    params: Any,
    step: int,
    sets: Mapping[str, Evaluation],
    tests: Sequence[tuple[Benchmark, Groups]],
    overlaps: Mapping[str, Overlap],
    data: str,
    saved: Mapping[str, float],
    run: str,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Measures, judges, exports and describes a run's model; every process of a run must call it.

    Args:
        workdir: gets evaluation.json, quality.json, environment.json, export/, report.html and report/.
        params: of the exported step; deleted once they are written.
        sets: "validation", and "train_slice" if there is one.
        data: fingerprint of the training data.
        saved: metrics that the exported step was saved with; they count where metrics.jsonl has lost its line.

    Returns:
        The verdict of the quality gate, and the metrics of the exported step.
    """
    lines = files.read_json_lines(workdir / "metrics.jsonl") if processes.is_first() else []
    found = (x for x in reversed(lines) if x["step"] == step and evaluating.is_evaluation(x))
    metrics = next(found, {"step": step, **saved})
    metrics = agreement.agree("metrics", metrics)
    if not config.export.adapter:
        params, model = model.merged(params, export.dtype_of(config, model.values)), model.plain
    judged = runs.reward_model(model, chat, params, config.model.compute_dtype)
    evaluation = measure(judged, sets, tests, overlaps, workdir / "export", step)
    size = sum(x.size for x in jax.tree.leaves(model.plain.shapes))
    del judged
    verdict = agreement.agree("quality", gate.judge(config.gate.to_dict(), evaluation, lines))  # lines are the first's
    if processes.is_first():
        files.write_json(workdir / "evaluation.json", evaluation)
        files.write_json(workdir / "quality.json", verdict)
        files.write_json(workdir / "environment.json", environment(model.mesh))
    base = card.base_config(config).model.init_from
    name = f"{Path(base).name or model.values['model_type']}-{config.objective.name}"
    export.write_export(
        workdir / "export",
        params,
        objective=model.objective.exported,
        config=config,
        values=model.values,
        model=model.config,
        chat=chat,
        metrics=metrics,
        data=data,
        golden=export.golden_sequences(sets["validation"].groups),
        evaluation=evaluation,
        quality=verdict,
        card_name=name.replace("_", "-"),
        parameters=size,
        stops=model.stops,
        run=run,
        adapters=model.adapters,
    )
    if processes.is_first() and config.log.report:
        run_report.write_report(workdir, run_report.read_parts(workdir))
    return verdict, metrics


def environment(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What it ran on and with."""
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return {
        "devices": f"{mesh.size} x {device.device_kind} ({axes}), {jax.process_count()} processes",
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }
