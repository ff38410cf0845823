"""What a decoder of a supported family looks like, read from a Hugging Face config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from rmjax.models.families import FAMILIES
from rmjax.models.rope import Rope, rope_from_hf

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Sizes beyond any model that there is, from which nothing is made: a loop over 10**9 layers would not end.
MOST = {
    "num_hidden_layers": 2**12,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16),
    **{"hidden_size": 2**20, "intermediate_size": 2**24, "vocab_size": 2**28},
}
NUMBERS = (
    *("rms_norm_eps", "rope_theta", "initializer_range", "query_pre_attn_scalar", "embedding_multiplier"),
    *("logits_scaling", "residual_multiplier", "attention_multiplier", "partial_rotary_factor"),
)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # by their names in transformers; decoder.ACTIVATIONS has the functions
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; frozen and hashable, so that it can be a static part of a compiled function."""

    family: str  # the `model_type` of config.json, a key of FAMILIES
    vocab: int  # V, rows of the embedding
    width: int  # D, of the residual stream
    layers: int  # L
    heads: int  # N, query heads
    kv_heads: int  # M, key/value heads; N is a multiple of it
    head_dim: int  # H, width of one head; N * H need not be D
    mlp: int  # F, width of the gated MLP
    ropes: tuple[Rope, ...]  # rotary position embedding of each layer
    # Of each layer: how many keys a query sees along its path, itself included; None is all
    windows: tuple[int | None, ...]
    norm_eps: float = 1e-6  # epsilon of every RMSNorm
    qkv_bias: bool = False  # whether the query, key and value projections have biases
    o_bias: bool = False  # whether the attention's output projection has one
    mlp_bias: bool = False  # whether the three MLP projections have
    qk_norm: str = ""  # whether queries and keys are normalised: by "head", "all" heads together, or "" not
    norms: str = "before"  # where the two parts of a layer have norms: "before", "after", or "both"
    one_plus: bool = False  # whether norms multiply by 1 + scale
    activation: str = "silu"  # of the MLP's gate: one of ACTIVATIONS
    embed_scale: float = 1.0  # what embeddings are multiplied by, rounded to the type of the computation
    attention_scale: float | None = None  # what logits of attention are multiplied by; None is H**-0.5
    softcap: float | None = None  # c of attention's logits x, that become c tanh(x / c)
    logit_softcap: float | None = None  # the same of a language model's logits
    residual_scale: float = 1.0  # what the two parts of a layer are multiplied by before they are added
    output_scale: float = 1.0  # what a language model's logits are multiplied by
    init_std: float = 0.02  # standard deviation of newly initialised kernels
    tied: bool = False  # whether a language model's output embedding is its input embedding


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json of transformers v4 or v5; what is missing, impossible or not supported is a ValueError."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported families: {', '.join(FAMILIES)}")
    config = {**FAMILIES[family].defaults, **config}
    if missing := [name for name in REQUIRED if not config.get(name)]:
        raise ValueError(f"config.json of this {family} model lacks {', '.join(missing)}")
    limits = ", ".join(f"{name} {most:,}" for name, most in MOST.items())
    for names, allowed, advice in (
        (SIZES, lambda _, value: type(value) is int and value > 0, "expected whole numbers above 0"),
        (MOST, lambda name, value: value <= MOST[name], f"the most is {limits}"),
        (NUMBERS, lambda _, value: type(value) in (int, float) and 0 < value < math.inf, "expected numbers above 0"),
    ):
        given = {name: config[name] for name in names if config.get(name)}
        if wrong := [f"{name} {value!r}" for name, value in given.items() if not allowed(name, value)]:
            raise ValueError(f"config.json of this {family} model has {', '.join(wrong)}; {advice}")
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act {activation!r} is not supported; the MLP's activation must be one of "
            f"{', '.join(map(repr, ACTIVATIONS))}"
        )
    if config.get("quantization_config"):
        raise ValueError("the checkpoint is quantized (quantization_config in config.json); use the original weights")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}, "
            f"and head_dim {head_dim} must be even"
        )
    layers, features = config["num_hidden_layers"], FAMILIES[family].features(config)
    features.setdefault("windows", (None,) * layers)
    if "ropes" not in features:
        features["ropes"] = (rope_from_hf(config),) * layers
    return ModelConfig(
        family=family,
        vocab=config["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=config["intermediate_size"],
        activation=activation,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        init_std=float(config.get("initializer_range") or 0.02),
        tied=bool(config.get("tie_word_embeddings")),
        **features,
    )


def parameter_count(shapes: Mapping[str, Any]) -> tuple[int, int]:
    """Number of parameters of a tree of arrays or shapes: all, and all but the embedding."""
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return total, total - math.prod(shapes["decoder"]["embed"]["embedding"].shape)
