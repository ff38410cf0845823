"""Exports any checkpoint of a run; what `python -m rmjax.export --run` does."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub

from rmjax.batches import prepare
from rmjax.evaluate import evaluating
from rmjax.export import write as export
from rmjax.inference import contract, runs
from rmjax.models import hf, hf_export
from rmjax.runtime import command_line, exits, files, ownership


class NotUploaded(RuntimeError):
    """The Hub refused, or could not be reached."""

    exit_code = exits.FAILED


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the run that they name as `place`; before anything is read.

    Raises:
        ValueError: something is missing or wrong.
    """
    if not args.run or not args.output:
        raise ValueError("--run and --output are required, or --average, or --verify; --help shows commands that run")
    place = runs.find(args.run)
    if place is None:
        what = "no run of rmjax, nor a checkpoint of one (there is no config.json of a run)"
        raise ValueError(f"--run={args.run} is {what}")
    if args.step:
        if place.step != "best":
            raise ValueError(f"--run={args.run} is a checkpoint already; leave out --step={args.step}")
        place = dataclasses.replace(place, step=args.step)
    if not args.max_shard_gb > 0:
        raise ValueError(f"--max_shard_gb={args.max_shard_gb} must be above 0")
    if args.push_to and not hf.is_hub_id(args.push_to):
        raise ValueError(f"--push_to={args.push_to} must be of the form OWNER/NAME")
    command_line.check_writable(Path(args.output), f"--output={args.output}")
    run = runs.find(args.output)
    if run is not None and Path(args.output).resolve() == run.workdir.resolve():
        raise ValueError(f"--output={args.output} is a run, which an export would replace; name another directory")
    hf_export.require_replaceable(Path(args.output), "--output")
    args.place = place
    return args


def export_checkpoint(args: argparse.Namespace) -> runs.Opened:
    """Writes the export; golden rows are those of the run's own export where there is one, else of its data."""
    opened = runs.open_checkpoint(args.place)
    workdir, config = opened.workdir, opened.config
    config.export.dtype = args.dtype if args.dtype != "auto" else config.export.dtype
    lines = files.read_json_lines(workdir / "metrics.jsonl")
    evaluated = [x for x in lines if x["step"] == opened.step and evaluating.is_evaluation(x)]
    before = None
    with contextlib.suppress(ValueError):  # that of another version
        before = contract.read(workdir / "export")
    if before is not None:
        data = before["data_fingerprint"]
        golden: Any = [(row["token_ids"], row["at"]) for row in before["golden"][1:]]  # the first is made up
    else:
        train, validation = prepare.read_groups(config, opened.chat, opened.model.objective.task)
        data, golden = train.fingerprint, export.golden_sequences(validation)
    evaluation = quality = None
    with contextlib.suppress(OSError, ValueError):
        measured = json.loads((workdir / "evaluation.json").read_text())
        if measured["step"] == opened.step:
            quality = json.loads((workdir / "quality.json").read_text())
            evaluation = measured
    model, params = opened.model, opened.params
    if args.adapter and model.adapters is None:
        raise ValueError(f"--adapter: {workdir} trained every parameter (config.lora.rank is not set); leave it out")
    if not args.adapter:
        params, model = model.merged(params, export.dtype_of(config, model.values)), model.plain
    export.write_export(
        Path(args.output),
        params,
        adapters=model.adapters,
        objective=opened.model.objective,
        config=config,
        values=opened.model.values,
        model=opened.model.config,
        chat=opened.chat,
        metrics=evaluated[-1] if evaluated else {"step": float(opened.step)},
        data=data,
        golden=golden,
        evaluation=evaluation,
        quality=quality,
        card_name=Path(args.push_to or args.output).name,
        unit_std=args.unit_std,
        stops=opened.model.stops,
        max_shard_bytes=args.max_shard_gb * 1e9,
        run=runs.run_id(workdir),
    )
    return opened


def export_and_push(args: argparse.Namespace) -> list[str]:
    """Exports, uploads if that is asked for, and says what there is now.

    Raises:
        ValueError: as runs.open_checkpoint and write_export.
        NotUploaded: the repository cannot be made, before anything is written; or the upload failed, after it.
    """
    if args.push_to:
        with _reached(args, "nothing was exported"):
            huggingface_hub.create_repo(args.push_to, private=args.private, exist_ok=True)
    opened = export_checkpoint(args)
    said = [f"step {opened.step} of {opened.workdir}: {args.output}"]
    if contract.read(args.output)["metrics"].keys() <= {"step"}:  # type: ignore[index]
        said.append(f"step {opened.step} was not evaluated: its contract has no metrics, nor what --normalize needs")
    if args.push_to:
        own = [ownership.MARKER]
        with _reached(args, f"the export is {args.output}; `hf upload {args.push_to} {args.output}` uploads it"):
            huggingface_hub.upload_folder(repo_id=args.push_to, folder_path=args.output, ignore_patterns=own)
        said.append(f"uploaded to https://huggingface.co/{args.push_to}")
    return [*said, f"check it with: python -m rmjax.export --verify {args.output}"]


@contextlib.contextmanager
def _reached(args: argparse.Namespace, otherwise: str) -> Iterator[None]:
    """Says in a sentence that the Hub refused or cannot be reached; its client has errors of many classes."""
    try:
        yield
    except Exception as error:
        raise NotUploaded(f"--push_to={args.push_to}: {error}; {otherwise}") from error
