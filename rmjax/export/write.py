"""Writes a Hugging Face directory that transformers, vLLM and SGLang load, with its score contract."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from rmjax import objectives
from rmjax.batches.chat import PROBE, Chat, load_tokenizer
from rmjax.batches.groups import Groups
from rmjax.inference import contract
from rmjax.inference.reward_model import RewardModel
from rmjax.models import hf, peft
from rmjax.models.config import ModelConfig
from rmjax.models.lora import Lora
from rmjax.objectives.base import Objective
from rmjax.report import card
from rmjax.runtime import agreement, files, processes

GOLDEN = 4  # responses whose scores the contract keeps
# Metrics in the rewards' unit.
IN_REWARDS = r"(.*/)?(reward_(mean|std|min|max|drift|spread)|margin|(chosen|rejected)(_p\d\d)?)"
SAMPLES = (  # where normalizers and splitting rules differ
    "It's 12345 + 6,789.50 and they'LL don't stop!!!  Two spaces, a\ttab.\r\n\n\n  if a_b == {c: [1]}:\n        d()\n",
    " résumé re\u0301sume\u0301 ﬁne Ａ½ 日本語のテキスト、한국어 Привет مرحبا 🙂👩‍👩‍👧\u00a0\u200b ",
)


def write_export(
    directory: Path,
    params: Any,
    *,
    objective: Objective,
    config: ConfigDict,
    values: dict[str, Any],
    model: ModelConfig,
    chat: Chat,
    metrics: Mapping[str, float],
    data: str,
    golden: Sequence[tuple[Any, Sequence[int]]],
    evaluation: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    card_name: str = "",
    parameters: int | None = None,
    unit_std: bool = False,
    stops: Sequence[int] = (),
    max_shard_bytes: float = 5e9,
    run: str = "",
    adapters: Lora | None = None,
) -> None:
    """Exports parameters with tokenizer and contract; the directory appears whole or not at all.

    The golden scores are computed from what was written, loaded back. Every process of a run must call it; the first
    one writes.

    Args:
        directory: an older export there is replaced, and files in it that are not ours are kept.
        params: the parameters, sharded or not. Arrays on devices are deleted once they are written, so that the golden
            scores need no room beside them.
        objective, config, model, chat: of the run.
        values: Hugging Face config values of the model.
        metrics, evaluation: of the exported step, for contract and card.
        data: fingerprint of the training data.
        golden: token sequences and the places in them that are scored, for golden rows; see `golden_sequences`.
        quality, parameters: verdict of the gate and number of parameters, for the card.
        card_name: of the model; "" writes no card.
        unit_std: the head is divided by the rewards' standard deviation on the validation set.
        stops: of a model that writes, the ids that end what it writes beside those of tokenizer and template.
        max_shard_bytes: size of the largest weight file.
        run: id of the run, for the export's marker.
        adapters: those among the parameters, of which a PEFT directory is made; None exports a whole model.

    Raises:
        ValueError: with `unit_std`, rewards that are not linear in the head, or whose deviation is not known.
    """
    dtype = dtype_of(config, values)
    parts = {**evaluation["sets"], **evaluation["benchmarks"]} if evaluation else {}
    terms = contract.make(
        chat,
        objective={"name": objectives.name_of(objective), **objective.terms()},
        architecture=objective.architecture,
        decoding=objective.decoding,
        own=jax.device_get(params.get("objective", {})),
        labels=objective.labels,
        metrics=metrics,
        data=data,
        max_length=chat.max_length,
        over_long=config.data.over_long,
        estimates={f"{name}/{metric}": x for name, part in parts.items() for metric, x in part["metrics"].items()},
    )
    if unit_std:
        params, terms = scaled(params, terms)

    def complete(partial: Path) -> None:
        rows = contract.golden_rows(chat, golden)
        if processes.is_first():
            chat.tokenizer.save_pretrained(partial)
            if objective.architecture == "CausalLM":
                files.write_json(partial / hf.GENERATION_CONFIG, generation_config(chat, stops))
            contract.write(partial, {**terms, "golden": rows})  # so that loading replays the tokens
        agreement.barrier("tokenizer written")
        mesh = next((x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)), None)
        for array in arrays:
            array.delete()
        written = RewardModel.load(partial, dtype="float32", mesh=mesh)
        outputs, norms = written.replay(rows), written.norms()
        scored = [{**row, "outputs": values.tolist()} for row, values in zip(rows, outputs)]
        agreement.barrier("golden rows replayed")  # nobody reads the contract that is replaced
        if not processes.is_first():
            return
        contract.write(partial, {**terms, "golden": scored, "weight_norms": norms})
        if card_name:
            text = card.text(
                card_name,
                config=card.public_config(config),
                contract=terms,
                model=hf.read_config(partial),
                evaluation=_scaled_evaluation(evaluation, terms.get("reward_scale")),
                quality=quality,
                parameters=parameters,
                base_model=card.base_model(config),
            )
            (partial / "README.md").write_text(text)

    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    if adapters:
        base = base_name(config)
        terms["base"] = {"kept_as": adapters.base, "rank": adapters.rank}
        hf.save_adapter(
            directory,
            {name: x for name, x in params.items() if name != "objective"},
            model,
            adapters,
            base=base,
            root_scale=config.lora.root_scale,
            architecture=objective.architecture,
            also=complete,
            run=run,
        )
        return
    hf.save(
        directory,
        {name: x for name, x in params.items() if name != "objective"},
        values,
        model,
        dtype=dtype,
        pad_token_id=chat.tokenizer.pad_token_id,
        architecture=objective.architecture,
        labels=objective.labels,
        problem_type=objective.problem_type,
        also=complete,
        max_shard_bytes=max_shard_bytes,
        run=run,
    )


def dtype_of(config: ConfigDict, values: Mapping[str, Any]) -> str:
    """The dtype of a run's export, by its config and the values of its model's config.json."""
    automatic = values.get("dtype") or values.get("torch_dtype") or config.model.param_dtype
    return automatic if config.export.dtype == "auto" else config.export.dtype


def base_name(config: ConfigDict) -> str:
    """What a run's adapters belong to: a hub id, or an absolute path."""
    start = config.model.init_from
    directory = hf.resolve(start)
    if peft.is_adapter(directory):
        start = config.model.base or str(peft.read_config(directory)["base_model_name_or_path"])
    return str(Path(start).absolute()) if Path(start).is_dir() else start


def generation_config(chat: Chat, stops: Sequence[int]) -> dict[str, Any]:
    """generation_config.json: where a server must stop. Nothing is said of temperature, top_k and top_p, so that it
    draws as training and evaluation did, not as the model was shipped that this one started from."""
    return {"eos_token_id": sorted({*chat.stops, *stops}), "pad_token_id": chat.tokenizer.pad_token_id}


def scaled(params: Mapping[str, Any], terms: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and contract of rewards that are divided by their standard deviation on the validation set.

    The contract says by what they were divided ("reward_scale"): that times a difference of scores is the log-odds
    that loss and calibration were measured with, which stay as they were. Errors are those of `write_export`.
    """
    objective = terms["objective"]
    if objective["name"] != "bradley_terry" or terms["objective_params"]:
        raise ValueError(
            "--unit_std is for rewards of `bradley_terry` without a learnt tie parameter; the outputs of this "
            f"{objective['name']} model have a scale that decoding knows"
        )
    if not terms["reward_std"]:
        deviation = "none: it was not evaluated" if terms["reward_std"] is None else "one of 0"
        raise ValueError(
            "--unit_std divides by the rewards' standard deviation on the validation set, and this step has "
            f"{deviation}; take another, as --step=best"
        )
    mean, std = contract.normalization(terms)
    head = {**params["score"], "kernel": params["score"]["kernel"] / std}
    log_odds = "the log-odds that one response is preferred to another are the difference of their"
    decoding = f"the output is the reward divided by {std:.9g}; {log_odds} outputs times that"
    if len(terms["labels"]) > 1:
        decoding = f"{terms['decoding']}; the outputs were divided by {std:.9g}, and {log_odds} rewards times that"
    changed = {
        "decoding": decoding,
        "reward_mean": mean / std,
        "reward_std": 1.0,
        "reward_scale": std,
        "metrics": in_unit(terms["metrics"], std),
        "estimates": in_unit(terms["estimates"], std),
    }
    return {**params, "score": head}, {**terms, **changed}


def in_unit(metrics: Mapping[str, Any], unit: float) -> dict[str, Any]:
    """Metrics by name ("margin", "validation/margin"), numbers or estimates, those that are rewards over `unit`."""

    def divided(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: divided(x) for name, x in value.items()}
        return None if value is None else value / unit

    return {name: divided(value) if re.fullmatch(IN_REWARDS, name) else value for name, value in metrics.items()}


def _scaled_evaluation(evaluation: Mapping[str, Any] | None, scale: float | None) -> Mapping[str, Any] | None:
    if not evaluation or not scale:
        return evaluation
    scaled_set = lambda part: {**part, "metrics": in_unit(part["metrics"], scale)}
    return {**evaluation, "sets": {name: scaled_set(part) for name, part in evaluation["sets"].items()}}


def check_tokenizer(chat: Chat, values: Mapping[str, Any]) -> None:
    """Refuses what could not be exported, before any training.

    transformers picks the tokenizer's class by config.json's model_type as well, and some classes put their own
    normalization and splitting around any vocabulary: beside a Qwen2 model, every tokenizer becomes Qwen2's. Such an
    export would not see the tokens that were trained on. `values` are those of the model's config.json.

    Raises:
        ValueError: the tokenizer, saved beside such a config.json and loaded back, gives other tokens; or padding is
            not to be told from text, since the pad token is missing, is EOS or is one that the template ends with.
    """
    tokenizer = chat.tokenizer
    if tokenizer.pad_token_id in {None, tokenizer.eos_token_id, *chat.closing}:
        raise ValueError(
            f"pad token {tokenizer.pad_token!r} is missing, is EOS or ends the chat template, so that transformers "
            "would score another token than the last; set an unused reserved token as pad_token"
        )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(dict(values)))
        tokenizer.save_pretrained(scratch)
        again = Chat(load_tokenizer(scratch), template_kwargs=chat.template_kwargs)
    texts = [chat.render(PROBE), *SAMPLES, "".join(tokenizer.get_added_vocab())]
    same = again.render(PROBE) == texts[0] and again.tokenizer.pad_token_id == tokenizer.pad_token_id
    if not same or again.encode(texts) != chat.encode(texts):
        here, there = type(tokenizer).__name__, type(again.tokenizer).__name__
        raise ValueError(
            f"this tokenizer cannot be exported with a {values['model_type']} model: transformers loads it as {there} "
            f"there and as {here} here, and these give other tokens. Take the tokenizer that belongs to the model "
            "(leave config.model.tokenizer empty), or a model of another family"
        )


def golden_sequences(groups: Groups) -> list[tuple[np.ndarray, list[int]]]:
    """Token sequences of the shortest groups, each up to its last scored token, and where in it tokens are scored."""
    sequences: list[tuple[np.ndarray, list[int]]] = []
    for i in np.argsort(groups.lengths, kind="stable")[:GOLDEN].tolist():
        tree = groups.group(i).tree
        for slot in np.unique(tree.end_slot):
            ends = np.sort(tree.end[tree.end_slot == slot])
            sequences.append((tree.tokens[tree.path(int(ends[-1]))], tree.positions[ends].tolist()))
    return sequences[:GOLDEN]
