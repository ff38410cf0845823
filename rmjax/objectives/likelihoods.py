"""How likely a label is: losses (minus log-likelihoods) of pairs and of rankings, from rewards alone.

Pairs take the reward difference d = s_i - s_j, elementwise; rankings take the rewards of a group. All are finite, with
finite gradients, for any finite rewards.

Shape letters: G groups (any leading axes), K responses of a group, L steps within a tie.
"""

import math

import jax
import jax.numpy as jnp

BARRIER = 5.0  # rewards are kept within -5 and 5, as published
BARRIER_END = 0.99  # share of that from which the penalty goes on along its tangent


# Pairs


def bradley_terry(difference: jax.Array) -> jax.Array:
    """-log P(i beats j), P = sigmoid(d). Bradley and Terry 1952."""
    return jax.nn.softplus(-difference)


def focal(difference: jax.Array, gamma: float) -> jax.Array:
    """-(1 - 2 max(0, P - 1/2))^gamma log P, P = sigmoid(d): pairs that are already told apart count less.

    InternLM2, Cai et al. 2024, arXiv:2403.17297, section on the reward model, with gamma = 2. The factor is
    min(1, 2 sigmoid(-d))^gamma, and has a gradient too.
    """
    factor = jnp.minimum(0.0, math.log(2) + jax.nn.log_sigmoid(-difference))
    return jnp.exp(gamma * factor) * bradley_terry(difference)


def rao_kupper(difference: jax.Array, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log P(i beats j) and -log P(tie): differences under a threshold log(theta) tend to be judged equal.

    Rao and Kupper 1967, with worths exp(s):
    P(i beats j) = w_i / (w_i + theta w_j), P(tie) = (theta^2 - 1) w_i w_j / ((w_i + theta w_j) (theta w_i + w_j)).

    Args:
        difference: s_i - s_j.
        raw: log(theta - 1), scalar; theta is above 1.
    """
    threshold = jax.nn.softplus(raw)  # log(theta)
    won, lost = jax.nn.softplus(threshold - difference), jax.nn.softplus(threshold + difference)
    return won, won + lost - raw - jnp.logaddexp(math.log(2), raw)  # theta^2 - 1 = (theta - 1) (theta - 1 + 2)


def davidson(difference: jax.Array, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log P(i beats j) and -log P(tie): ties have a worth of their own, nu sqrt(w_i w_j).

    Davidson 1970, with worths exp(s):
    P(i beats j) = w_i / (w_i + w_j + nu sqrt(w_i w_j)), P(tie) = nu sqrt(w_i w_j) / (the same).

    Args:
        difference: s_i - s_j.
        raw: log(nu), scalar; nu is above 0.
    """
    half, zero = 0.5 * difference, jnp.zeros_like(difference)
    total = lambda *terms: jax.nn.logsumexp(jnp.stack(terms), axis=0)
    return total(zero, -difference, raw - half), total(zero, half - raw, -half - raw)


# Rankings


def order(wins_GKK: jax.Array, ties_GKK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The partial order that the labels of a group state, as whole decisions.

    A pair goes to the side that has more than the other and than the tie; if it is labelled and neither side has, it
    is a tie. Who beats a winner beats whom that one beats. Responses that beat each other in a circle contradict
    themselves and are not ordered; a tie between responses that others put in order is not one.

    Args:
        wins_GKK: float [..., K, K], see data/records.py.
        ties_GKK: float [..., K, K].

    Returns:
        bool [..., K, K] twice: i is above j; i and j are tied.
    """
    swap = lambda x: jnp.swapaxes(x, -1, -2)
    k = wins_GKK.shape[-1]
    better = wins_GKK > jnp.maximum(swap(wins_GKK), ties_GKK)
    tied = (wins_GKK + swap(wins_GKK) + ties_GKK > 0) & ~better & ~swap(better)
    path = better
    for _ in range(max(k - 2, 0).bit_length()):  # each round doubles the length of the paths
        step = path.astype(jnp.float32)
        path = path | (step @ step > 0)
    return path & ~swap(path), tied & ~path & ~swap(path)


def plackett_luce(scores_GK: jax.Array, above_GKK: jax.Array, tied_GKK: jax.Array | None = None) -> jax.Array:
    """-log-likelihood of the rankings of groups: each response is chosen from itself and all that are below it.

    The sum over responses i of log(sum_j w_j) - s_i, with worths w = exp(s) and j over i and what is below it. Luce
    1959; Plackett 1975. For a whole ranking, of any or all of the responses, this is Plackett-Luce; for K = 2 it is
    Bradley-Terry. For a partial order in which nobody is below two responses that are not ordered (a forest: "the best
    of these", disjoint pairs, chains) it is exactly the summed probability of all rankings that agree with it, since
    the choices are then independent. For other partial orders it is a composite likelihood of these choices.

    Ties follow Efron 1977 (for the partial likelihood of Cox, which of ranks is Plackett-Luce): of d tied
    responses the first is chosen from all, and for each next one another share 1/d of the tied worths has gone. A
    response i with d - 1 ties has the mean over l = 0 .. d-1 of log(below + (1 - l/d) tied), where `tied` has i, which
    is the same sum where ties are transitive, and is defined where they are not.

    Args:
        scores_GK: float [..., K].
        above_GKK: bool [..., K, K], transitive; i is above j.
        tied_GKK: bool [..., K, K], symmetric; None leaves tied responses unordered.

    Returns:
        float [...], 0 for a group without order. A response that is in no pair counts nothing.
    """
    step_L = jnp.arange(1 if tied_GKK is None else scores_GK.shape[-1])
    further = scores_GK[..., None, :] - scores_GK[..., :, None]  # [..., i, j]: s_j - s_i
    tied_GKK = jnp.zeros_like(above_GKK) if tied_GKK is None else tied_GKK
    d_GK1 = 1 + tied_GKK.sum(-1)[..., None]
    left = 1 - jnp.minimum(step_L, d_GK1 - 1) / d_GK1  # [..., i, l]: what is left of the worths of i and its ties
    share = above_GKK[..., None, :] + left[..., None] * tied_GKK[..., None, :]  # [..., i, l, j], i itself apart
    alone = ~(above_GKK | tied_GKK).any(-1)[..., None]
    share = jnp.where(alone[..., None], 1.0, share).astype(scores_GK.dtype)  # unused, but a logarithm exists
    # i itself apart: log(1 + x) keeps the digits of a small x.
    choices = jnp.logaddexp(jnp.log(left), jax.nn.logsumexp(further[..., None, :], b=share, axis=-1))
    return (jnp.where(alone | (step_L >= d_GK1), 0.0, choices) / d_GK1).sum((-1, -2))


# Rewards


def barrier(scores: jax.Array) -> jax.Array:
    """-log(1 - (s / 5)^2): 0 at 0, and steep near -5 and 5.

    The published -log(s + 5) - log(5 - s) less its value at 0, a constant (InternLM2, as `focal`). That has no value
    from 5 on; here it goes on along its tangent from 99 % of the way, so that rewards out there come back.
    """
    share = jnp.abs(scores) / BARRIER
    inside = jnp.minimum(share, BARRIER_END)
    slope = 2 * BARRIER_END / (1 - BARRIER_END**2)
    return -jnp.log1p(-(inside**2)) + slope * (share - inside)
