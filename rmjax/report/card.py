"""The model card of an export: README.md with the metadata block that the Hugging Face Hub reads.

Made from plain data: config, evaluation, score contract and Hugging Face config values. What is not known is left out.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from ml_collections import ConfigDict

from rmjax.data import sources
from rmjax.models import hf
from rmjax.models.families import vllm_overrides
from rmjax.report import card_usage, show
from rmjax.report.evaluation import benchmark, failing, key_numbers, shown_sets, verdict
from rmjax.report.naming import flat, metric
from rmjax.report.section import Items, Markdown, Part, Section, Table

Values = Mapping[str, Any]
HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an export is, by its objective."""

    what: str  # a noun phrase
    task: str  # the Hub's pipeline tag
    tags: tuple[str, ...]  # for finding it
    says: str  # what its outputs mean


KINDS = {
    "bradley_terry": Kind(
        *("Bradley-Terry reward model", "text-classification", ("reward-model", "bradley-terry")),
        "It gives a conversation that ends with a response one number, its reward: higher is better. The probability "
        "that people prefer one response to another is the sigmoid of the difference of their rewards.",
    ),
    "pointwise": Kind(
        *("reward model of rated attributes", "text-classification", ("reward-model", "pointwise")),
        "It rates a conversation that ends with a response by each of its attributes, on the scales it was trained "
        "with; the reward is their weighted mean.",
    ),
    "pairwise": Kind(
        *("pairwise judge", "text-classification", ("reward-model", "pairwise", "judge")),
        "It reads a prompt with two responses and says how likely it is that A is better, that B is, or that they are "
        "equally good. Both orders have to be asked and averaged, since it may favour a place.",
    ),
    "prm": Kind(
        *("process reward model", "token-classification", ("reward-model", "process-reward-model")),
        "It gives each step of a solution the probability that the step is right.",
    ),
    "sft": Kind(
        *("language model that writes verdicts", "text-generation", ("judge", "generative-reward-model")),
        "It writes its verdict, which has to be read from its text; an unreadable one is no score.",
    ),
}
BASELINES = ("coin", "longer_is_better")  # which are no results of the model
SHAPE = {  # keys of a Hugging Face config.json that say what a model is made of
    **{"model_type": "family", "num_hidden_layers": "layers", "hidden_size": "width"},
    **{"intermediate_size": "width of the MLP", "num_attention_heads": "attention heads"},
    **{"num_key_value_heads": "key and value heads", "vocab_size": "vocabulary", "dtype": "type of the weights"},
}
SHOWN = (  # keys of the run's config that are hyper-parameters
    *("duration", "seed", "optim.name", "optim.learning_rate", "optim.schedule", "optim.warmup", "optim.weight_decay"),
    *("optim.clip_norm", "optim.b1", "optim.b2", "plan.groups_per_step", "plan.rows_per_step", "plan.row_tokens"),
    *("model.param_dtype", "model.compute_dtype"),
)


def text(
    name: str,
    *,
    config: Values,
    contract: Values,
    model: Values,
    evaluation: Values | None = None,
    quality: Values | None = None,
    parameters: int | None = None,
    base_model: str = "",
) -> str:
    """Writes the card: Markdown after a block of YAML.

    Args:
        name: of the model, "owner/name" or that of a directory.
        config, contract: the run's resolved config, and the score contract.
        model: values of the export's config.json.
        evaluation, quality: of the exported step, and the verdict of the gate.
        parameters: how many the model has.
        base_model: hub id of what it was trained from; "" where it has none.
    """
    objective = contract["objective"]["name"]
    if objective not in KINDS:
        raise ValueError(f"there is no card for the objective {objective!r}, only for {', '.join(KINDS)}")
    kind, evaluation = KINDS[objective], evaluation or {}
    says, scale = kind.says, contract.get("reward_scale")
    if scale:  # rewards that were divided by it
        says = says.replace("the difference", f"{scale:.6g} times the difference")
    origin = f"of the {model.get('model_type', 'decoder')} family"
    if base_model:
        origin = f"fine-tuned from [{base_model}](https://huggingface.co/{base_model})"
    words = Markdown(f"A {kind.what}, {origin}, trained with rmjax. {says}")
    head = f"---\n{_metadata(name, kind, config, evaluation, base_model)}\n---\n\n# {name}\n\n"
    return head + show.to_markdown(
        [
            Section("", words, *verdict(quality, advice=False)),
            Section("How to use it", *_usage(objective, name, contract, base_model, model)),
            *_metrics(evaluation),
            Section("Architecture", Table(_architecture(model, contract, parameters))),
            Section("Data", Table(_data(config, contract))),
            Section("Hyper-parameters", Table(_hyper_parameters(config), ("key", "value"))),
            Section("Limits", Items(_limits(objective, contract, evaluation))),
        ]
    )


def _usage(objective: str, name: str, contract: Values, base_model: str, model: Values) -> list[Part]:
    adapter = contract.get("base") or {}
    base = (base_model or "DIRECTORY_OF_THE_BASE") if adapter else ""
    return card_usage.parts(
        objective, name, base, len(contract["labels"]), adapter.get("rank", 0), vllm_overrides(model)
    )


def base_model(config: ConfigDict) -> str:
    """The hub id that a run started from; "" where it was a directory, or from scratch."""
    base = str(base_config(config).model.init_from)
    return base if hf.is_hub_id(base) and not Path(base).is_dir() else ""


def base_config(config: ConfigDict) -> ConfigDict:
    """The config of the run that a run and those before it (config.start) began with."""
    return base_config(config.start) if config.start else config


def public_config(config: ConfigDict) -> dict[str, Any]:
    """A run's config as an export may tell it: local data by its name, not by its place."""
    values = config.to_dict()
    for key in ("train", "validation"):
        items = sources.split_spec(values["data"][key]) if values["data"][key] else []
        values["data"][key] = ", ".join(item if "://" in item else Path(item).name for item in items)
    return values


def _metadata(name: str, kind: Kind, config: Values, evaluation: Values, base_model: str) -> str:
    data = config.get("data") or {}
    datasets = HUB_DATA.findall(",".join(str(data.get(key) or "") for key in ("train", "validation")))
    results = _results(kind, evaluation)
    card = ModelCardData(
        model_name=name if results else None,
        library_name="transformers",
        pipeline_tag=kind.task,
        base_model=base_model or None,
        datasets=sorted(set(datasets)) or None,
        tags=["rmjax", *kind.tags],
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def _results(kind: Kind, evaluation: Values) -> list[EvalResult]:
    """What was measured, for the Hub's model-index; the slice of the training set is no result."""
    sets = {name: x for name, x in (evaluation.get("sets") or {}).items() if name != "train_slice"}
    return [
        EvalResult(
            task_type=kind.task,
            dataset_type=name,
            dataset_name=name,
            metric_type=key,
            metric_name=metric(key, measured.get("kind", "")).title,
            metric_value=round(float(estimate["value"]), 6),
        )
        for name, measured in [*sets.items(), *(evaluation.get("benchmarks") or {}).items()]
        for key, estimate in measured["metrics"].items()
        if estimate["value"] is not None and key not in BASELINES
    ]


def _metrics(evaluation: Values) -> list[Section]:
    numbers = key_numbers(evaluation.get("sets") or {})
    tests = [benchmark(name, measured) for name, measured in (evaluation.get("benchmarks") or {}).items()]
    parts = numbers.parts if numbers or tests else ["Nothing was measured."]
    return [Section("Metrics", *parts), *(Section(test.title, *test.parts, level=3) for test in tests)]


def _architecture(model: Values, contract: Values, parameters: int | None) -> list[tuple[str, str]]:
    rows = [("class", ", ".join(model.get("architectures") or ()))]
    rows += [("parameters", f"{parameters:,}")] if parameters else []
    shape = [(title, model[key]) for key, title in SHAPE.items() if model.get(key) is not None]
    rows += [(title, f"{x:,}" if type(x) is int else _code(x)) for title, x in shape]
    rows += [("outputs", ", ".join(contract.get("labels") or ())), ("decoding", contract.get("decoding") or "")]
    return [(title, value) for title, value in rows if value]


def _data(config: Values, contract: Values) -> list[tuple[str, str]]:
    keys = ("train", "validation", "weights", "filter", "sample", "augment")
    values = {key: (config.get("data") or {}).get(key) for key in keys}
    values["fingerprint"] = contract.get("data_fingerprint")
    return [(key, _code(value)) for key, value in values.items() if value]


def _hyper_parameters(config: Values) -> list[tuple[str, str]]:
    known = {key: value for key, value in flat(config) if value not in ("", "null", "[]")}
    keys = [*(key for key in SHOWN if key in known), *(key for key in known if key.startswith("objective."))]
    return [(_code(key), _code(known[key])) for key in keys]


def _limits(objective: str, contract: Values, evaluation: Values) -> list[str]:
    limits: list[str] = [
        Markdown(
            f"A score is of this rendering only: {contract['scored_token']}. `reward_contract.json` has the hash of "
            "the template, its arguments and golden rows to check a server against."
        )
    ]
    if contract.get("template_kwargs"):
        limits.append(Markdown(f"The template's arguments are {_code(json.dumps(contract['template_kwargs']))}."))
    if contract.get("max_length"):
        longer = {"drop": "left out"}.get(contract["over_long"], "truncated")
        limits.append(
            f"Conversations of at most {contract['max_length']:,} tokens were learnt from; what is longer was {longer}."
        )
    if objective == "bradley_terry":
        limits.append(
            "Rewards are comparable between responses to one prompt. Between prompts they are not: the loss leaves an "
            "offset of each prompt free."
        )
    if contract.get("reward_std"):
        limits.append(
            f"On the validation set rewards have mean {contract['reward_mean']:.4g} and standard deviation "
            f"{contract['reward_std']:.4g}; subtract the one and divide by the other to normalize them."
        )
    for measured in shown_sets(evaluation.get("sets") or {}).values():
        limits += failing(measured)
    return [*limits, "It has learnt what the people who labelled the data preferred, with their errors and habits."]


def _code(value: Any) -> str:
    return Markdown(f"`{' '.join(str(value).split()).replace('`', chr(39))}`")
