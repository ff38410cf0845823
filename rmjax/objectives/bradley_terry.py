"""Bradley-Terry: the difference of two rewards is the log-odds that the first is preferred.

    loss(i beats j) = softplus(-(s_i - s_j))

Source: Bradley and Terry 1952; as a reward-model loss Ouyang et al. 2022, arXiv:2203.02155, eq. 1. What else the loss
may be, each by its key: see BradleyTerry.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.batches.groups import Groups
from rmjax.batches.measure import longer_by_tokens
from rmjax.batches.resampling import FIELD
from rmjax.batches.tasks import Preferences
from rmjax.objectives import likelihoods
from rmjax.objectives.base import SPREAD, Batch, Objective, Outcomes, Params
from rmjax.objectives.gather import gather_groups

LEARNED = ("rao_kupper", "davidson")
MOST_LOG_ODDS = 10.0  # of a length_expert, where lengths tell every comparison
MOST_WEIGHT = 10.0  # of a pair that lengths speak against
TIES = {"pairs": ("skip", "half", *LEARNED), "plackett_luce": ("skip", "efron")}

OF_PAIRS = ("label_smoothing", "margin_scale", "scaled", "focal", "length_balance")
# A key and what it may be, the keys that mean nothing beside it, and why.
EXCLUDES = (
    ("rankings", ("plackett_luce",), OF_PAIRS, "has no single pairs"),
    ("ties", LEARNED, ("margin_scale", "focal"), "has three outcomes, those have two"),
)


@dataclasses.dataclass(frozen=True)
class BradleyTerry(Objective):
    """The objective; every field is a key of `config.objective` with the same name, `heads` one of `config.model`.

    A group of K > 2 is either its labelled pairs, each of which counts once, or one ranking, which counts once
    whatever its K. The formulas of rankings, ties, focal and barrier are in likelihoods.py.

    A tie parameter is learnt as `objective/tie`, from the start where equal rewards tie in a third of the cases. Adam
    moves it by about the learning rate in a step: below 1e-3 give it one of its own, for example
    config.optim.lr_factors = ((r"objective/.*", 1000.0), (r".*", 1.0)).

    With several heads, M columns of the score kernel are drawn independently, and each learns the loss of its own
    rewards on its own resample of the groups (batches/resampling.py). What is resampled is the group, since the pairs
    of a group go together. The loss is the mean over heads of the summed losses over the mean of their denominators, so
    the trunk's gradient is as large as with one head. In evaluation every head counts every group. The reward is the
    mean over heads, and their population standard deviation the spread. Heads share a trunk, so what that has learnt
    wrongly shows in no spread; even models of their own that start from one pretraining err alike (Eisenstein et al.
    2023, arXiv:2312.09244).
    """

    # "pairs", the pairwise reduction: every labelled pair on its own, also those of a ranking (Ouyang et al. 2022); or
    # "plackett_luce", rankings with ties and partial orders: the loss is nats per group. There a soft label or a vote
    # is a whole win of its likeliest side.
    rankings: str = "pairs"
    # Pairs judged equal: "skip" them; train them as "half" a win each way; as their own outcome with a learnt
    # parameter, "rao_kupper" (1967, theta) or "davidson" (1970, nu); or, of rankings, as "efron" (1977).
    ties: str = "skip"
    label_smoothing: float = 0.0  # probability that a label is the wrong way round: cDPO, Mitchell 2023
    # The reward difference is asked to exceed margin_scale * margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    margin_scale: float = 0.0
    # The loss of a pair times its margin, the strength of the preference: Wang et al. 2024, arXiv:2410.01257, the
    # Scaled Bradley-Terry loss; a mean over pairs, not over strengths. A pair whose margin is not known counts once, as
    # does a tie; one whose margin is stated as 0 adds nothing to the loss.
    scaled: bool = False
    focal: float = 0.0  # gamma of the focal loss, Cai et al. 2024, arXiv:2403.17297, who have 2; 0 is off.
    # Weight of (s_i + s_j)^2 of each labelled pair, which keeps rewards near zero: Eisenstein et al. 2023,
    # arXiv:2312.09244. Of a ranking it is the mean over its pairs.
    center: float = 0.0
    # Weight, per response, of the logarithmic barrier that keeps rewards within -5 and 5: of a pair the mean of both
    # rewards' counts, of a ranking the mean over its pairs. Cai et al. 2024 have 0.02 with the penalty of one reward;
    # their code (InternLM/xtuner, xtuner/model/reward.py, `penalty_weight`) has 0.01 with the sum of both: the same.
    barrier: float = 0.0
    # With 1 a pair counts 0.5 / p, where p is the probability of its label by the lengths alone, so that among all that
    # count the longer response wins as often as not, and the reward has nothing to learn from lengths: inverse
    # propensity weights, Horvitz and Thompson 1952. Their mean is 1; none is above MOST_WEIGHT. 0 is off; between, the
    # log-odds of p are that share of what they are.
    length_balance: float = 0.0
    # (a, t): by the lengths alone, i beats j with the log-odds a asinh((tokens of i - tokens of j) / t). () is fitted
    # to the training groups before the first step (`fitted`).
    length_expert: tuple[float, ...] = ()
    heads: int = 1  # M, config.model.heads

    def __post_init__(self) -> None:
        self._require("rankings", self.rankings in TIES, f"is none of {', '.join(TIES)}")
        allowed = TIES[self.rankings]
        with_rankings = f"with config.objective.rankings={self.rankings!r}"
        self._require("ties", self.ties in allowed, f"is none of {', '.join(allowed)} {with_rankings}")
        self._require("label_smoothing", 0 <= self.label_smoothing < 0.5, "must be in [0, 0.5)")
        for name in ("margin_scale", "focal", "center", "barrier", "length_balance"):
            self._require(name, not getattr(self, name) < 0, "must not be negative")
        expert = len(self.length_expert) in (0, 2) and all(value > 0 for value in self.length_expert[1:])
        self._require("length_expert", expert, "must be () or (log-odds, tokens) with tokens above 0")
        if self.heads > 1 and self.ties in LEARNED:
            raise ValueError(
                f"config.objective.ties={self.ties!r} learns one parameter beside one head, which does not "
                f"go with config.model.heads={self.heads}; take 'skip' or 'half', or leave one out"
            )
        for key, values, others, why in EXCLUDES:
            given = [f"config.objective.{name}={getattr(self, name)}" for name in others if getattr(self, name)]
            if getattr(self, key) in values and given:
                raise ValueError(
                    f"config.objective.{key}={getattr(self, key)!r} {why}: it does not go with {', '.join(given)}; "
                    "leave one out"
                )

    @property
    def task(self) -> Preferences:
        return Preferences("skip" if self.ties == "skip" else "keep")

    @property
    def labels(self) -> tuple[str, ...]:
        return super().labels if self.heads == 1 else tuple(f"head_{m}" for m in range(self.heads))

    @property
    def decoding(self) -> str:
        if self.heads == 1:
            return super().decoding
        return (
            f"the reward is the mean of the {self.heads} outputs; their standard deviation, the root of their mean "
            "squared distance from it, is its spread: how far the heads disagree"
        )

    def terms(self) -> dict[str, Any]:
        """Without `heads` where there is one, and what balances lengths where nothing does, as contracts were before
        these keys."""
        unused = {"heads"} if self.heads == 1 else set()
        unused |= set() if self.length_balance else {"length_balance", "length_expert"}
        return {name: value for name, value in super().terms().items() if name not in unused}

    def fitted(self, groups: Groups) -> "BradleyTerry":
        """With `length_expert`, by maximum likelihood over all comparisons, each of which counts once.

        t is the median difference in tokens of those that differ. Where none does, lengths tell nothing.
        """
        if not self.length_balance or self.length_expert:
            return self
        from scipy import optimize, special  # a tenth of a second of every start

        more = longer_by_tokens(groups)
        more = more[more != 0].astype(np.float64)
        if not len(more):
            return dataclasses.replace(self, length_expert=(0.0, 1.0))
        tokens = float(np.median(np.abs(more)))
        x = np.arcsinh(more / tokens)
        slope = lambda a: float((x * special.expit(-a * x)).mean())  # of the log-likelihood; falls with a
        low, high = -MOST_LOG_ODDS, MOST_LOG_ODDS
        if slope(low) <= 0 or slope(high) >= 0:  # the shorter one always wins, or the longer one
            return dataclasses.replace(self, length_expert=(low if slope(low) <= 0 else high, tokens))
        return dataclasses.replace(self, length_expert=(float(optimize.brentq(slope, low, high)), tokens))

    @property
    def found(self) -> str:
        if not self.length_balance:
            return ""
        log_odds, tokens = self.length_expert
        wins = 1 / (1 + math.exp(-log_odds * math.asinh(1)))
        return (
            f"length alone: log-odds {log_odds:.3g} x asinh(tokens more / {tokens:g}), so {tokens:g} tokens more win "
            f"{100 * wins:.0f}% of the time; pairs are weighted against that (config.objective.length_balance)"
        )

    def decode(self, outputs: np.ndarray, params: Params) -> dict[str, np.ndarray]:
        if self.heads == 1:
            return super().decode(outputs, params)
        return {"score": outputs.mean(1), SPREAD: outputs.std(1)}

    def params(self) -> dict[str, np.ndarray]:
        """`tie`, float32 []: log(theta - 1) of Rao and Kupper, log(nu) of Davidson."""
        return {"tie": np.zeros((), np.float32)} if self.ties in LEARNED else {}

    def loss_sums(self, scores_BEA: jax.Array, batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """See `loss`. scores_BEA: float32 [B, E, M]; without `bootstrap` in the batch, all heads count all groups."""
        if self.heads == 1:
            return self.loss(self._group_scores(scores_BEA[..., 0], batch), batch, params)
        weight_BG1 = batch["weight"][..., None]
        weight_BGM = weight_BG1 * batch.get(FIELD, jnp.ones((1, 1, self.heads)))
        if {scores_BEA.shape[-1], weight_BGM.shape[-1]} != {self.heads}:
            found = f"scores {scores_BEA.shape} and {FIELD} weights {weight_BGM.shape}"
            raise ValueError(f"{found}: expected {self.heads} last, one for each head")

        def of_head(scores_BE: jax.Array, weight_BG: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.loss(self._group_scores(scores_BE, batch), {**batch, "weight": weight_BG}, params)

        numerators, denominators = jax.vmap(of_head, in_axes=-1)(scores_BEA, weight_BGM)
        return numerators.mean(), denominators.mean()

    def _group_scores(self, scores_BE: jax.Array, batch: Batch) -> jax.Array:
        """[B, G, K]; 0 where there is no response."""
        wins, weight = batch["wins"], batch["weight"]
        b, g, k, k2 = wins.shape
        others = (batch["margin"].shape, batch["ties"].shape)
        if k != k2 or weight.shape != (b, g) or others != (wins.shape,) * 2:
            found = f"wins {wins.shape}, weight {weight.shape}, margin and ties {others}"
            raise ValueError(f"{found}: not [B,G,K,K] and [B,G]")
        return gather_groups(scores_BE, batch["end_group"], batch["end_slot"], (g, k))

    def outcomes(self, scores_BEA: jax.Array, batch: Batch, params: Params) -> Outcomes:
        """`scores` and `present` (1 where there is a response) [B, G, K], `wins`, `ties` [B, G, K, K], `weight` [B, G].

        With a tie parameter also `tied` [B, G, K, K], the probability of a tie, and the parameter as published,
        `rao_kupper_theta` or `davidson_nu` [B]. With several heads also `members` [B, G, K, M], of which `scores` are
        the mean.
        """
        own_BGKM = [self._group_scores(scores_BEA[..., m], batch) for m in range(self.heads)]
        s_BGK = own_BGKM[0] if self.heads == 1 else jnp.mean(jnp.stack(own_BGKM), 0)
        outcomes = {
            "scores": s_BGK,
            "present": self._group_scores(jnp.ones_like(scores_BEA[..., 0]), batch),
            **{name: batch[name] for name in ("wins", "ties", "weight")},
        }
        if self.heads > 1:
            outcomes["members"] = jnp.stack(own_BGKM, -1)
        if self.ties in LEARNED:
            name, least = {"rao_kupper": ("theta", 1.0), "davidson": ("nu", 0.0)}[self.ties]
            parameter = least + jnp.exp(params["tie"])
            difference = s_BGK[..., :, None] - s_BGK[..., None, :]  # [B, G, K, K]: i - j
            outcomes["tied"] = jnp.exp(-self.outcome(difference, params)[1])
            outcomes[f"{self.ties}_{name}"] = jnp.full(len(s_BGK), parameter, jnp.float32)
        return outcomes

    def loss(self, s_BGK: jax.Array, batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss as numerator and denominator, in the precision of the rewards.

        The denominator is the summed weight of labelled pairs, or of groups with an order for Plackett-Luce. A pair
        has its group's weight.
        """
        weight = batch["weight"]
        if self.rankings == "plackett_luce":
            above, tied = likelihoods.order(batch["wins"], batch["ties"])
            known = tied if self.ties == "efron" else None
            labelled = above + (0.0 if known is None else 0.5 * known)  # a tie stands at [i, j] and at [j, i]
            n_BG = labelled.sum((-1, -2))
            share = labelled / jnp.maximum(n_BG, 1.0)[..., None, None]
            loss = likelihoods.plackett_luce(s_BGK, above, known) + (share * self.penalty(s_BGK)).sum((-1, -2))
            return (weight * loss).sum(), (weight * (n_BG > 0)).sum()
        labelled = batch["wins"] if self.ties == "skip" else batch["wins"] + 0.5 * batch["ties"]
        loss = self.pair_losses(s_BGK, batch, params) + labelled * self.penalty(s_BGK)
        return (weight[..., None, None] * loss).sum(), (weight[..., None, None] * labelled).sum()

    def pair_losses(self, s_BGK: jax.Array, batch: Batch, params: Params) -> jax.Array:
        """[B, G, K, K]: -log-likelihood of what is labelled of i over j, without weights and penalties."""
        wins, ties, margin = batch["wins"], batch["ties"], batch["margin"]
        known = jnp.nan_to_num(margin)
        difference = s_BGK[..., :, None] - s_BGK[..., None, :]
        difference -= self.margin_scale * (known - jnp.swapaxes(known, -1, -2))
        stated = margin + jnp.swapaxes(margin, -1, -2)
        strength = jnp.where(jnp.isnan(stated) | (ties > 0), 1.0, stated) if self.scaled else 1.0
        if self.ties in LEARNED:
            (won, tied), (lost, _) = (self.outcome(d, params) for d in (difference, -difference))
            tied = 0.5 * ties * tied  # stands at [i, j] and at [j, i]
        else:
            nll = lambda d: likelihoods.focal(d, self.focal) if self.focal else likelihoods.bradley_terry(d)
            won, lost, tied = nll(difference), nll(-difference), jnp.zeros_like(difference)
            wins = wins + 0.5 * ties if self.ties == "half" else wins
        wins = wins * self._length_weights(batch) if self.length_balance else wins
        smooth = self.label_smoothing
        return strength * (wins * ((1 - smooth) * won + smooth * lost) + tied)

    def _length_weights(self, batch: Batch) -> jax.Array:
        """[B, G, K, K]: how much i over j counts, see `length_balance`."""
        if not self.length_expert:
            raise ValueError("config.objective.length_balance needs a length_expert: see BradleyTerry.fitted")
        log_odds, tokens = self.length_expert
        at_BE = jnp.maximum(batch["end"], 0)
        tokens_BE = jnp.take_along_axis(batch["positions"], at_BE, axis=1)  # the prompt's too, which cancel
        tokens_BGK = self._group_scores(tokens_BE.astype(jnp.float32), batch)
        more = jnp.arcsinh((tokens_BGK[..., :, None] - tokens_BGK[..., None, :]) / tokens)
        return jnp.minimum(0.5 / jax.nn.sigmoid(self.length_balance * log_odds * more), MOST_WEIGHT)

    def outcome(self, difference: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
        """-log P(i beats j) and -log P(tie) with the learnt tie parameter."""
        return getattr(likelihoods, self.ties)(difference, params["tie"])

    def penalty(self, s_BGK: jax.Array) -> jax.Array | float:
        """[B, G, K, K]: what keeps the rewards of i and j small."""
        total: jax.Array | float = 0.0
        if self.center:
            total = self.center * (s_BGK[..., :, None] + s_BGK[..., None, :]) ** 2
        if self.barrier:
            steep = likelihoods.barrier(s_BGK)
            total = total + 0.5 * self.barrier * (steep[..., :, None] + steep[..., None, :])
        return total
