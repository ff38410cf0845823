"""Writes a Hugging Face directory that transformers, vLLM and SGLang load, with its score contract."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from rmjax import contract, processes
from rmjax.data.chat import PROBE, Chat, load_tokenizer
from rmjax.data.groups import Groups
from rmjax.models import hf
from rmjax.models.config import ModelConfig
from rmjax.objectives.base import Objective
from rmjax.reward_model import RewardModel

GOLDEN = 4  # responses whose scores the contract keeps
SAMPLES = (  # where normalizers and splitting rules differ
    "It's 12345 + 6,789.50 and they'LL don't stop!!!  Two spaces, a\ttab.\r\n\n\n  if a_b == {c: [1]}:\n        d()\n",
    " résumé re\u0301sume\u0301 ﬁne Ａ½ 日本語のテキスト、한국어 Привет مرحبا 🙂👩‍👩‍👧\u00a0\u200b ",
)


def write(
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
    validation: Groups,
    estimates=None,
    card=None,
) -> None:
    """Exports parameters with tokenizer and contract; the directory appears whole or not at all.

    The golden scores are computed from what was written, loaded back. Every process of a run must call it; the first
    one writes.

    Args:
        directory: where to; an older export there is replaced.
        params: the parameters, sharded or not. Arrays on devices are deleted once they are written, so that the golden
            scores need no room beside them.
        objective: what was trained.
        config: the run's config.
        values: Hugging Face config values of the model.
        model: its shapes.
        chat: tokenizer and template.
        metrics: of the exported step, for the contract.
        data: fingerprint of the training data.
        validation: groups to take golden rows from.
    """
    dtype = config.export.dtype
    if dtype == "auto":
        dtype = values.get("dtype") or values.get("torch_dtype") or config.model.param_dtype
    terms = contract.make(
        chat,
        objective={"name": config.objective.name, **objective.terms()},
        architecture=objective.architecture,
        decoding=objective.decoding,
        own=jax.device_get(params.get("objective", {})),
        labels=objective.labels,
        metrics=metrics,
        data=data,
        max_length=chat.max_length,
        over_long=config.data.over_long,
    )

    def complete(partial: Path) -> None:
        golden = contract.golden_rows(chat, golden_sequences(validation))
        if processes.is_first():
            chat.tokenizer.save_pretrained(partial)
            contract.write(partial, {**terms, "golden": golden})  # so that loading replays the tokens
        processes.barrier("tokenizer written")
        mesh = next((x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)), None)
        for array in arrays:
            array.delete()
        outputs = RewardModel.load(partial, dtype="float32", mesh=mesh).replay(golden)
        scored = [{**row, "outputs": values.tolist()} for row, values in zip(golden, outputs)]
        processes.barrier("golden rows replayed")  # nobody reads the contract that is replaced
        if processes.is_first():
            contract.write(partial, {**terms, "golden": scored, "estimates": estimates or {}})
            if card is not None:
                (partial / "README.md").write_text(card(terms, json.loads((partial / "config.json").read_text())))

    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    params = {name: x for name, x in params.items() if name != "objective"}
    pad = chat.tokenizer.pad_token_id
    hf.save(
        directory,
        params,
        values,
        model,
        dtype=dtype,
        pad_token_id=pad,
        architecture=objective.architecture,
        labels=objective.labels,
        problem_type=objective.problem_type,
        also=complete,
    )


def check_tokenizer(chat: Chat, values: Mapping[str, Any]) -> None:
    """Refuses what could not be exported, before any training.

    transformers picks the tokenizer's class by config.json's model_type as well, and some classes put their own
    normalization and splitting around any vocabulary: beside a Qwen2 model, every tokenizer becomes Qwen2's. Such an
    export would not see the tokens that were trained on.

    Args:
        chat: tokenizer and template that will be trained with.
        values: Hugging Face config values of the model.

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
