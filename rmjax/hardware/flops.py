"""What training costs in floating-point operations (FLOPs), and how many a device can do in a second.

Two counts of the same steps:

    useful      what the groups would cost unshared and unpadded: 6 FLOPs for each token of every conversation and each
                parameter but the embedding's (https://arxiv.org/abs/2001.08361, section 2.1), and in each layer
                12 N H t^2 / 2 of attention for a conversation of t tokens (https://arxiv.org/abs/2204.02311,
                appendix B; halved, because the mask is causal)
    hardware    what is computed for them: each token of a tree once, the last layer's queries, output and MLP at
                scored tokens only (in a language model at all, and its output embedding where the next token is
                learnt), attention where a query sees a key; nothing that is recomputed, no padding

Shape letters: N query heads, H head width, n groups.
"""

import collections
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rmjax.models.config import ModelConfig, parameter_count

# (regex over JAX's device_kind, FLOP/s in bfloat16 without sparsity). The first match wins.
# Data sheets of NVIDIA (they print twice as much, with sparsity) and Google Cloud's pages of each TPU version.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"NVIDIA (GB200|B200).*", 2250e12),
    (r"NVIDIA H[12]00 NVL.*", 835e12),
    (r"NVIDIA H100 PCIe.*", 756e12),
    (r"NVIDIA (H100|H200|GH200).*", 989e12),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA L40S.*", 362e12),
    (r"NVIDIA GeForce RTX 4090.*", 165e12),
    (r"NVIDIA L4", 121e12),
    (r"TPU v6 lite", 918e12),  # v6e
    (r"TPU v5 lite", 197e12),  # v5e
    (r"TPU v5p?", 459e12),  # v5p
    (r"TPU v4", 275e12),
)


TRAINED, FROZEN = 6, 4  # FLOPs of a token and a parameter: its product, and the gradients of its input and of itself


def peak(device_kind: str) -> float | None:
    """FLOP/s of one device in bfloat16, as its data sheet says; None where it is not in the table, as for CPUs."""
    return next((flops for pattern, flops in PEAKS if re.fullmatch(pattern, device_kind)), None)


def parameters(params: Mapping[str, Any]) -> tuple[int, int]:
    """Parameters (arrays or shapes) that every token meets, and those that only scored tokens meet: in a language model
    tokens whose next one is learnt, and the output embedding. The input embedding is in neither.
    """
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    decoder = params["decoder"]
    if "score" not in params:
        return count((decoder.get("layers", {}), decoder["last"])), count(params.get("lm_head", decoder["embed"]))
    keys = {name: x for name, x in decoder["last"].items() if name in ("attention_norm", "k", "k_norm", "v")}
    every = count(decoder.get("layers", {})) + count(keys)
    return every, parameter_count(params)[1] - every


def useful(model: ModelConfig, params: Mapping[str, Any], lengths: np.ndarray, each: int = TRAINED) -> np.ndarray:
    """FLOPs of each group, its conversations apart: float64 [n], by int [n, K] tokens of each conversation.

    `each` is FROZEN where adapters are trained; the base's `params` count, the adapters do not.
    """
    tokens = lengths.astype(np.float64)
    return each * parameter_count(params)[1] * tokens.sum(1) + attention(model, lambda w: causal(tokens, w).sum(1))


def hardware(
    model: ModelConfig,
    params: Mapping[str, Any],
    tokens: np.ndarray,
    scored: np.ndarray,
    pairs: Callable[[int | None], np.ndarray],
    each: int = TRAINED,
) -> np.ndarray:
    """FLOPs of each group as a tree: float64 [n].

    Args:
        model: the decoder.
        params: of the Scorer or the LanguageModel, or their shapes.
        tokens, scored: int [n] tokens of each tree, and scored ones, or those whose next one is learnt.
        pairs: for a layer's window, int [n] pairs of a query and a key that it sees.
        each: as for `useful`.
    """
    every, at_scored = parameters(params)
    return float(each) * (every * tokens + at_scored * scored) + attention(model, pairs)


def attention(model: ModelConfig, pairs: Callable[[int | None], np.ndarray]) -> np.ndarray:
    """Forward and backward in all layers: six products (two forward) of 2 H FLOPs for each pair and head."""
    layers = collections.Counter(model.windows).items()
    return 12.0 * model.heads * model.head_dim * np.sum([count * pairs(window) for window, count in layers], axis=0)


def causal(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """The area under the diagonal, n^2 / 2, or that of a band of `window` keys."""
    band = lengths if window is None else np.minimum(lengths, window)
    return band * lengths - band**2 / 2
