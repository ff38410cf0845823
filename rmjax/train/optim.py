"""The optimizer: AdamW, Adafactor or Muon, learning-rate schedules, and regex lists that decide it per parameter."""

import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rmjax.sharding import first_match, path_name
from rmjax.train import low_memory

Schedule = Callable[[Any], jax.Array]

# Their last two axes are a layer's matrix; of others the last is a layer's vector.
MATRICES = r".*/(kernel|embedding|lora_[ab])"
HIDDEN = r"decoder/.*/kernel"  # what Muon steps


def schedule(config: ConfigDict, total: int, warmup: int, decay: int) -> Schedule:
    """The learning rate of each step, step counting from 0.

    Rises linearly to the peak at step `warmup - 1`; then cosine or linear to 0 at `total`, constant, or (wsd) the
    peak until the last `decay` steps and linear to 0 at `total`. `total` is one past the last step, so that every step
    moves the parameters.

    Args:
        total: optimizer steps of the run, from the plan.
        decay: steps of decay, for wsd.

    Raises:
        ValueError: warm-up and decay do not fit into the run.
    """
    if warmup > total or (config.schedule == "wsd" and warmup + decay > total):
        raise ValueError(
            f"config.optim: warm-up of {warmup} steps and decay of {decay} do not fit into a run of {total} steps"
        )
    start = {"wsd": total - decay}.get(config.schedule, warmup)

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        done = jnp.clip((step - start) / max(total - start, 1), 0.0, 1.0)
        fall = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "linear": 1 - done,
            "wsd": 1 - done,
            "constant": jnp.ones_like(done),
        }[config.schedule]
        return config.learning_rate * rise * fall

    return rate


def by_rules(rules: Any, what: str) -> Callable[[Any], Any]:
    """A function from a tree of parameters to the tree of values that `rules` give their paths."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: first_match(rules, path_name(p), what), tree)


def make(config: ConfigDict, seed: int = 0) -> optax.GradientTransformation:
    """The optimizer up to the learning rate, which `apply` multiplies in.

    `config.name`; decoupled weight decay where `decays` says (Loshchilov and Hutter 2019, arXiv:1711.05101: a decayed
    parameter loses rate x weight_decay of itself in a step, whatever the optimizer); per-parameter factors. It computes
    in float32 whatever the dtype of parameters and gradients. Nothing here depends on more than one parameter, so trees
    of some of them get the same updates; frozen ones (`parameters.split`) are not in them.
    """
    factors = by_rules(config.lr_factors, "lr_factors")
    scale = lambda updates, _: jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors(updates))
    chain = optax.chain(
        OPTIMIZERS[config.name](config, seed),
        optax.add_decayed_weights(config.weight_decay, mask=by_rules(config.decays, "decays")),
        optax.stateless(scale),
    )
    chain = optax.masked(chain, lambda tree: jax.tree.map(lambda _: True, tree))  # names checkpoints as they were
    return optax.GradientTransformation(
        lambda params: chain.init(low_memory.widen(params)),
        lambda updates, state, params: chain.update(low_memory.widen(updates), state, low_memory.widen(params)),
    )


def adamw(config: ConfigDict, seed: int) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1) with its moments in `mu_dtype` and `nu_dtype`."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return low_memory.stored(adam, config.mu_dtype, config.nu_dtype, seed)


def adafactor(config: ConfigDict, seed: int) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4) without momentum.

    A matrix of at least 128 x 128 keeps the means of its squared gradients over rows and over columns, anything else
    all of them; their decay in step t is 1 - t ** -0.8. The update of a layer's parameter is scaled down to a root mean
    square of 1 where it is larger. It is not multiplied by the parameter's own size (the paper's relative steps), so
    learning rates mean what they mean with AdamW.
    """
    del config, seed

    def limited(path: tuple, u: jax.Array) -> jax.Array:
        axes = (-2, -1) if re.fullmatch(MATRICES, path_name(path)) else (-1,)
        mean = jnp.mean(jnp.square(u), axis=axes if u.ndim else None, keepdims=True)
        return u / jnp.maximum(1.0, jnp.sqrt(mean))

    limit = lambda updates, _: jax.tree_util.tree_map_with_path(limited, updates)
    return optax.chain(optax.scale_by_factored_rms(), optax.stateless(limit))


def muon(config: ConfigDict, seed: int) -> optax.GradientTransformation:
    """Muon for the kernels of the layers, AdamW for everything else.

    Nesterov momentum of 0.95, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon), each layer's matrix by itself. The result is scaled by 0.2 sqrt(max(in, out)),
    which gives it the root mean square of AdamW's updates, so that learning rate and weight decay mean what they mean
    with AdamW (Liu et al. 2025, arXiv:2502.16982, equation 4). The Newton-Schulz steps add 3 to 5 times m / t to the
    products of a training step, m the smaller side of a kernel and t the tokens of a step.
    """
    hidden = lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: bool(re.fullmatch(HIDDEN, path_name(p))), tree)
    other = lambda tree: jax.tree.map(lambda is_hidden: not is_hidden, hidden(tree))
    axes = lambda tree: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree)
    momentum = optax.contrib.scale_by_muon(weight_dimension_numbers=axes)
    matched = lambda updates, _: jax.tree.map(lambda u: u * (0.2 * max(u.shape[-2:]) ** 0.5), updates)
    orthogonal = optax.chain(
        low_memory.stored(momentum, config.mu_dtype, config.nu_dtype, seed), optax.stateless(matched)
    )
    return optax.chain(optax.masked(orthogonal, hidden), optax.masked(adamw(config, seed), other))


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor, "muon": muon}


def apply(params: Any, updates: Any, rate: jax.Array, seed: int, step: jax.Array) -> Any:
    """Parameters minus rate x updates: computed in float32, rounded stochastically where they are bfloat16.

    Args:
        params: float32 or bfloat16.
        updates: what `make` gives, float32.
    """
    moved = jax.tree.map(lambda p, u: p.astype(jnp.float32) - rate * u, params, updates)
    return low_memory.round_as(moved, params, low_memory.seed_of(seed, step, low_memory.PARAMS))


def parameter_of(path: tuple, names: Collection[str]) -> str | None:
    """The parameter that a leaf of an optimizer state belongs to: what its path ends in; None is none (step counts)."""
    parts = path_name(path).split("/")
    return next((name for i in range(len(parts)) if (name := "/".join(parts[i:])) in names), None)


def state_shardings(state: Any, params: Any, replicated: Any) -> Any:
    """Shardings of an optimizer state: as its parameter where it has its shape, else replicated.

    Replicated are step counts and Adafactor's means over rows and columns, which are less than a thousandth of the
    parameters.

    Args:
        params: the parameters, or their shapes, with shardings.
    """
    known = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: tuple, leaf: Any) -> Any:
        name = parameter_of(path, known)
        return known[name].sharding if name is not None and known[name].shape == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(one, state)


def clipped(config: ConfigDict, grads: Any, norm: jax.Array) -> Any:
    """Gradients, or some of them, scaled down so that `norm`, of all of them, is at most `config.clip_norm`."""
    if not config.clip_norm:
        return grads
    return jax.tree.map(lambda g: jnp.where(norm < config.clip_norm, g, g / norm * config.clip_norm), grads)


def check(config: ConfigDict, shapes: Any) -> None:
    """Refuses regex lists that do not fit the model's parameters.

    Raises:
        ValueError: what is no list of rules, a parameter that no rule covers, a rule that no parameter reaches (a
            last ".*" may), or nothing left to train.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    for key in ("decays", "freezes", "lr_factors"):
        rules = config[key]
        try:
            for pattern, _ in rules:
                re.compile(pattern)
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(f"config.optim.{key}={rules!r} is no list of (regex, value): {error}") from None
        reached = {next((i for i, (p, _) in enumerate(rules) if re.fullmatch(p, name)), None) for name in names}
        by_rules(rules, key)(shapes)
        idle = [p for i, (p, _) in enumerate(rules) if i not in reached and p != ".*"]
        if idle:
            raise ValueError(
                f"config.optim.{key}: no parameter is decided by {', '.join(map(repr, idle))}; the first match wins, "
                f"and the parameters are {', '.join(names)}"
            )
    if all(jax.tree.leaves(by_rules(config.freezes, "freezes")(shapes))):
        raise ValueError("config.optim.freezes freezes every parameter; nothing would be trained")
