"""Tiny random models made by transformers, and rows of trees to run through ours."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from rmjax.batches.trees import build_tree

PAD = 0  # in no sequence here
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
CAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # 4 * 16 is not 48
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"sliding_window": 5},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, **CAPS},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "layer_types": TYPES},
    "olmo2": {},
    "olmo3": {"sliding_window": 5, "layer_types": TYPES},
    "phi3": {"sliding_window": 7, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
WRITERS = {  # with those that transformers has no classifier of
    **FAMILIES,
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
}


def make_hf_model(
    family: str,
    directory: str | Path,
    *,
    head: bool = True,
    seed: int = 0,
    dtype: str = "float32",
    **overrides: Any,
) -> Any:
    """Saves a tiny random model as a Hugging Face directory and returns it, a torch module in float32 and eval mode.

    Every parameter is random, norms and biases too, so that none can be left out without being seen.

    Args:
        family: a key of WRITERS.
        directory: where to save it.
        head: with a score head of one label; else a causal language model.
        seed: of the weights.
        dtype: of the weights on disk; the returned model has the same rounded values.
        overrides: values of the config.
    """
    import torch

    values = {**SIZES, **WRITERS[family], **overrides}
    config = transformers.AutoConfig.for_model(family, **values, **({"num_labels": 1} if head else {}))
    kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            value = 1 + 0.3 * noise if "norm" in name else 0.2 * noise
            parameter.copy_(value.to(getattr(torch, dtype)))
    # A copy, since `to` rounds the buffers of the rotary embedding too, which are not saved.
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(directory)
    return model.eval()


def random_groups(seed: int, groups: int, vocab: int = SIZES["vocab_size"]) -> list[list[list[int]]]:
    """Pairs of sequences of 11 to 31 tokens that share a prompt of 6 to 16."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, vocab, rng.integers(low, high)).tolist()
    pairs = []
    for _ in range(groups):
        prompt = draw(6, 17)
        pairs.append([prompt + draw(5, 16) for _ in range(2)])
    return pairs


def tree_rows(rows: Sequence[Sequence[Sequence[Sequence[int]]]], row_tokens: int) -> dict[str, np.ndarray]:
    """A batch of rows of groups of sequences: the trees of a row end to end, then padding.

    `end` is [B, E] with E the largest number of sequences in a row, in the order in which they are given.
    """
    b, e = len(rows), max(sum(map(len, row)) for row in rows)
    own = np.broadcast_to(np.arange(row_tokens, dtype=np.int32), (b, row_tokens))
    batch = {
        "tokens": np.full((b, row_tokens), PAD, np.int32),
        "positions": np.zeros((b, row_tokens), np.int32),
        "visible_from": own.copy(),
        "visible_until": own + 1,
        "end": np.full((b, e), -1, np.int32),
    }
    for r, row in enumerate(rows):
        start = scored = 0
        for tree in map(build_tree, row):
            stop = start + len(tree)
            assert stop <= row_tokens, f"row {r} needs {stop} tokens"
            batch["tokens"][r, start:stop] = tree.tokens
            batch["positions"][r, start:stop] = tree.positions
            batch["visible_from"][r, start:stop] = start
            batch["visible_until"][r, start:stop] = start + tree.visible_until
            batch["end"][r, scored : scored + len(tree.end)] = start + tree.end
            start, scored = stop, scored + len(tree.end)
    return batch
