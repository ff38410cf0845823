"""The optimizer: an optax chain, learning-rate schedules, and regex lists that decide it per parameter."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rmjax.sharding import first_match, path_name

Schedule = Callable[[Any], jax.Array]


def schedule(config: ConfigDict, total: int, warmup: int, decay: int) -> Schedule:
    """The learning rate of each step, step counting from 0.

    Rises linearly to the peak at step `warmup - 1`; then cosine or linear to 0 at `total`, constant, or (wsd) the
    peak until the last `decay` steps and linear to 0 at `total`. `total` is one past the last step, so that every step
    moves the parameters.

    Args:
        config: `config.optim`.
        total: optimizer steps of the run, from the plan.
        warmup: steps of warm-up.
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


def make(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW up to the learning rate, which the step multiplies in: updates are to be subtracted times the rate.

    Clip by global norm, Adam, decoupled weight decay where `decays` says, per-parameter factors; frozen parameters have
    no state, and their update is their gradient, which `trainable` has made 0.
    Loshchilov and Hutter 2019, arXiv:1711.05101.

    Args:
        config: `config.optim`.
    """
    factors = by_rules(config.lr_factors, "lr_factors")
    scale = lambda updates, _: jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors(updates))
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=by_rules(config.decays, "decays")),
        optax.stateless(scale),
    )
    frozen = by_rules(config.freezes, "freezes")
    trained = lambda tree: jax.tree.map(lambda f: not f, frozen(tree))
    return optax.masked(chain, trained)


def state_shardings(state: Any, params_shardings: Any, replicated: Any) -> Any:
    """Shardings of an optimizer state: as its parameter where a path ends in a parameter's, else replicated.

    Args:
        state: the optimizer state, or its shapes.
        params_shardings: tree of the parameters' shardings.
        replicated: the sharding of everything else (step counts).
    """
    known = {path_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(params_shardings)}

    def one(path: tuple, leaf: Any) -> Any:
        parts = path_name(path).split("/")
        names = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((known[name] for name in names if name in known and leaf.ndim), replicated)

    return jax.tree_util.tree_map_with_path(one, state)


def trainable(config: ConfigDict, grads: Any) -> Any:
    """Gradients with those of frozen parameters set to 0, so that XLA never computes them."""
    frozen = by_rules(config.freezes, "freezes")(grads)
    return jax.tree.map(lambda g, f: jnp.zeros_like(g) if f else g, grads, frozen)


def check(config: ConfigDict, shapes: Any) -> None:
    """Refuses regex lists that do not fit the model's parameters.

    Raises:
        ValueError: a parameter that no rule covers, a rule that no parameter reaches (a last ".*" may), or nothing
            left to train.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    for key in ("decays", "freezes", "lr_factors"):
        rules = config[key]
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
