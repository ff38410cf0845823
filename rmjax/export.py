"""Writes a Hugging Face directory that transformers, vLLM and SGLang load, with its score contract."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rmjax import contract
from rmjax.data.cache import Groups
from rmjax.data.chat import Chat
from rmjax.models import hf
from rmjax.models.config import ModelConfig
from rmjax.reward_model import RewardModel, float32_scores

GOLDEN = 4  # responses whose scores the contract keeps


def write(
    directory: Path,
    params: Any,
    *,
    config: ConfigDict,
    values: dict[str, Any],
    model: ModelConfig,
    chat: Chat,
    metrics: Mapping[str, float],
    data: str,
    validation: Groups,
    mesh: Any,
) -> None:
    """Exports parameters with tokenizer and contract; the directory appears whole or not at all.

    The golden scores are computed from what was written, loaded back.

    Args:
        directory: where to; an older export there is replaced.
        params: the parameters, sharded or not.
        config: the run's config.
        values: Hugging Face config values of the model.
        model: its shapes.
        chat: tokenizer and template.
        metrics: of the exported step, for the contract.
        data: fingerprint of the training data.
        validation: groups to take golden rows from.
        mesh: mesh to score them on.
    """
    dtype = config.export.dtype
    if dtype == "auto":
        dtype = values.get("dtype") or values.get("torch_dtype") or config.model.param_dtype
    terms = contract.make(
        chat,
        objective=config.objective.name,
        metrics=metrics,
        data=data,
        max_length=chat.max_length,
        over_long=config.data.over_long,
    )

    def complete(partial: Path) -> None:
        chat.tokenizer.save_pretrained(partial)
        golden = golden_sequences(validation)
        scores = float32_scores(RewardModel.load(partial, dtype="float32", mesh=mesh), golden)
        contract.write(partial, {**terms, "golden": contract.golden_rows(chat, golden, scores)})

    pad = chat.tokenizer.pad_token_id
    hf.save(directory, params, values, model, dtype=dtype, pad_token_id=pad, also=complete)


def golden_sequences(groups: Groups) -> list[np.ndarray]:
    """Token sequences of the responses of the shortest groups."""
    sequences: list[np.ndarray] = []
    for i in np.argsort(groups.lengths, kind="stable")[:GOLDEN].tolist():
        sequences += groups.group(i).tree.sequences()
    return sequences[:GOLDEN]
