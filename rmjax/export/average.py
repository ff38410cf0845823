"""The weight average of several exports as one: what `python -m rmjax.export --average=A,B,C` does.

Reward models that started from one base, and were trained with other seeds, data orders or learning rates, are averaged
weight by weight. The average bears noise in labels and other data better than each of them, and costs as much as one
(WARM: Ramé et al. 2024, arXiv:2401.12187). Of models of different bases it is no model at all.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmjax.batches.chat import Chat
from rmjax.config import defaults
from rmjax.export import write as export
from rmjax.inference import contract
from rmjax.inference.reward_model import RewardModel, load_checked
from rmjax.models import hf, hf_export
from rmjax.models.config import from_hf
from rmjax.runtime import command_line

# What of a contract must be the same of all.
ALIKE = ("scored_token", "template_sha256", "template_kwargs", *contract.SPECIAL, "objective", "labels")


def checked(args: argparse.Namespace) -> list[Path]:
    """The directories of the exports, that fit together; before weights are read.

    Raises:
        ValueError: something is missing or wrong, or they differ in more than their weights.
    """
    places = [hf.resolve(name) for name in filter(None, args.average.split(","))]
    if len(places) < 2 or not args.output:
        raise ValueError("--average needs two exports or more, separated by commas, and --output")
    if args.unit_std or args.step or args.run or args.push_to:
        raise ValueError("--average goes with --output, --dtype and --max_shard_gb; leave the other flags out")
    if not args.max_shard_gb > 0:
        raise ValueError(f"--max_shard_gb={args.max_shard_gb} must be above 0")
    output = Path(args.output)
    if output.resolve() in [place.resolve() for place in places]:
        raise ValueError(f"--output={args.output} is one of the models that are averaged; name another directory")
    command_line.check_writable(output, f"--output={args.output}")
    hf_export.require_replaceable(output, "--output")
    found = [(hf.read_config(place), contract.read(place)) for place in places]
    for place, (_, terms) in zip(places, found):
        if terms is None:
            raise ValueError(f"{place} has no score contract, so nothing says that its rewards are of the same kind")
        if terms.get("reward_scale"):
            raise ValueError(f"{place} was divided by its deviation (--unit_std): average the exports without it")
    (values, terms), *others = found
    for place, (other_values, other_terms) in zip(places[1:], others):
        if differ := _differences(values, terms or {}, other_values, other_terms or {}):
            raise ValueError(f"{place} cannot be averaged with {places[0]}: they differ in {', '.join(differ)}")
    return places


def _differences(
    values: Mapping[str, Any], terms: Mapping[str, Any], others: Mapping[str, Any], other_terms: Mapping[str, Any]
) -> list[str]:
    """In what two exports differ beside their weights; the first are values of config.json."""
    architectures = [x.get("architectures") for x in (values, others)]
    differ = ["the model's shapes (config.json)"] * (from_hf(values) != from_hf(others))
    differ += ["the architecture"] * (architectures[0] != architectures[1])
    return differ + [name for name in ALIKE if terms.get(name) != other_terms.get(name)]


def average(args: argparse.Namespace) -> list[str]:
    """Writes the average, and says what there is now; errors as of `checked`, `load_checked` and `write_export`."""
    places = checked(args)
    first = load_checked(places[0], dtype="float32")
    params, own = first.params, dict(first.own)
    first.drop_params()  # whose arrays are added to
    for place in places[1:]:
        model = load_checked(place, dtype="float32", mesh=first.mesh)
        params, own = _added(params, model.params), {name: own[name] + value for name, value in model.own.items()}
        model.drop_params()
    share = 1 / len(places)
    params = {**_scaled(params, share), "objective": {name: np.float32(value * share) for name, value in own.items()}}
    _write(args, places, first, params)
    return [
        f"the average of {', '.join(map(str, places))}: {args.output}",
        "it was not evaluated: its contract has no metrics, nor what --normalize needs",
        f"check it with: python -m rmjax.export --verify {args.output}",
    ]


_added = jax.jit(lambda total, more: jax.tree.map(jax.numpy.add, total, more), donate_argnums=0)
_scaled = jax.jit(lambda total, share: jax.tree.map(lambda x: x * share, total), donate_argnums=0)


def _write(args: argparse.Namespace, places: list[Path], model: RewardModel, params: dict[str, Any]) -> None:
    terms, objective = model.contract, model.objective
    assert terms is not None and objective is not None
    config = defaults(terms["objective"]["name"])
    config.export.dtype, config.data.over_long = args.dtype, terms["over_long"]
    kwargs = {"template_kwargs": model.chat.template_kwargs, "max_length": terms["max_length"]}
    export.write_export(
        Path(args.output),
        params,
        objective=objective,
        config=config,
        values=hf.read_config(places[0]),
        model=model.config,
        chat=Chat(model.chat.tokenizer, over_long=terms["over_long"], **kwargs),
        metrics={},
        data=" + ".join(str((contract.read(place) or {}).get("data_fingerprint")) for place in places),
        golden=[(row["token_ids"], row["at"]) for row in terms["golden"][1:]],  # the first is made up
        stops=model.stops,
        max_shard_bytes=args.max_shard_gb * 1e9,
    )
