"""Pointwise: named attributes of a response, each on its declared scale, and a weighted sum of them as the reward.

Labels y on a scale from low to high; f are an attribute's outputs of the head, n levels l_0 = low ... l_n-1 = high.

    mse           (f - z)^2 with z = (2 y - low - high) / (high - low): the head has no bias, so targets stand around 0
    huber         the same with Huber's function, 1964, in the form of torch: e^2 / 2, from |e| = delta on linear
    ordinal       - sum over k of t_k log(sigmoid(c_k - f) - sigmoid(c_k-1 - f)) with learnt cut points c: proportional
                  odds, McCullagh 1980
    categorical   - sum over k of t_k log softmax(f)_k
    hl_gauss      the same where t is a normal distribution around y, cut to bins: Farebrother et al. 2024,
                  arXiv:2403.03950, section 3.1

t_k is 1 for the level that y is; a y between two levels is divided between them so that the mean is y (two-hot, ibid.).
Scores are read back as (low + high) / 2 + f (high - low) / 2, or as the mean of the levels' distribution.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.batches.tasks import Attributes
from rmjax.objectives.base import Batch, Objective, Outcomes, Params
from rmjax.objectives.gather import at_ends

REGRESSION = ("mse", "huber")
ONE_OUTPUT = (*REGRESSION, "ordinal")  # of the head for each attribute; the others have one for each level
LOSSES = (*ONE_OUTPUT, "categorical", "hl_gauss")
# HL-Gauss has bins for so many standard deviations beyond the scale: cut off there, labels would be drawn inwards.
TAIL = 3.0


@dataclasses.dataclass(frozen=True)
class Pointwise(Objective):
    """The objective; every field is a key of `config.objective` with the same name.

    Missing labels count nowhere. The cut points of "ordinal" are learnt as `objective/cuts`, from where f = 0 makes all
    levels equally likely. Adam moves them by about the learning rate in a step: below 1e-3 give them one of their own,
    for example config.optim.lr_factors = ((r"objective/.*", 1000.0), (r".*", 1.0)).
    """

    attributes: tuple[str, ...] = ("score",)  # names of the attributes in the data, A of them
    # (low, high) of all attributes, or one such pair for each. A row with a score outside is a bad row.
    scales: tuple[Any, ...] = (0.0, 4.0)
    loss: str = "mse"  # a name in LOSSES, see the module
    delta: float = 0.5  # of "huber": errors beyond it count linearly; 1 is half the scale
    # Levels of "ordinal", "categorical" and "hl_gauss", evenly from low to high; 0: one for each whole number
    bins: int = 0
    sigma: float = 0.75  # of "hl_gauss": standard deviation of a label, in widths of a bin; 0.75 as published
    weights: tuple[float, ...] = ()  # of the attributes' scores in the reward; () is their mean

    shown = ("loss", "mse")

    def __post_init__(self) -> None:
        names, require = self.attributes, self._require
        named = all(name and isinstance(name, str) for name in names)
        different = named and 0 < len(names) == len(set(names))
        require("attributes", different, "must be one or several different names of columns")
        reserved = "'score' is what the weighted sum is called; rename the column"
        alone = len(names) == 1 and self.weights in ((), (1.0,))
        require("attributes", "score" not in names or alone, f"has 'score', but {reserved}")
        try:
            limits = self.limits
        except (TypeError, ValueError):
            limits = ()
        ordered = all(math.isfinite(low) and low < high < math.inf for low, high in limits)
        pairs = f"must be (low, high), or such a pair for each of {names!r}"
        require("scales", len(limits) == len(names) and ordered, pairs)
        require("loss", self.loss in LOSSES, f"is none of {', '.join(LOSSES)}")
        for name in ("delta", "sigma"):
            require(name, getattr(self, name) > 0, "must be above 0")
        whole = self.bins % 1 == 0 and self.bins >= 0 and self.bins != 1
        require("bins", whole, "must be 2 or more, or 0 for one at each whole number")
        given = self.loss in REGRESSION or self.bins > 0 or not any(x % 1 for pair in limits for x in pair)
        require("scales", given, "are not whole numbers; say how many config.objective.bins there are")
        complete = len(self.weights) in (0, len(names))
        require("weights", complete, f"must be one number for each of {names!r}, or ()")
        require("weights", all(isinstance(weight, int | float) for weight in self.weights), "must be numbers")
        different = len(set(self.labels)) == len(self.labels)
        require("scales", different, "has bins that are too narrow to be told apart in the export")

    @property
    def decoding(self) -> str:
        reward = "the reward is their sum by `weights`, or their mean"
        if self.loss in REGRESSION:
            return f"a score is the middle of its scale plus half its width times the output; {reward}"
        if self.loss == "ordinal":
            return (
                "P(score above level k) = sigmoid(output - cut k); the cuts of an attribute are the running sum of its "
                "first number in `cuts` and softplus of the others; a score is the sum of levels times probabilities, "
                f"the levels evenly spaced on its scale; {reward}"
            )
        return f"softmax over the labels of each attribute; a score is the sum of levels times probabilities; {reward}"

    @property
    def limits(self) -> tuple[tuple[float, float], ...]:
        shared = not any(isinstance(scale, list | tuple) for scale in self.scales)
        pairs = [self.scales] * len(self.attributes) if shared else self.scales
        return tuple((float(low), float(high)) for low, high in pairs)

    def levels(self, a: int) -> np.ndarray:
        """float64 [n]: the scores that the levels of attribute number `a` stand for; not of regression."""
        low, high = self.limits[a]
        n = self.bins or round(high - low) + 1
        beyond = math.ceil(TAIL * self.sigma) if self.loss == "hl_gauss" else 0
        return low + (high - low) / (n - 1) * np.arange(-beyond, n + beyond)

    @property
    def labels(self) -> tuple[str, ...]:
        """The attributes; for bins "helpfulness=0", "helpfulness=1", ..."""
        if self.loss in ONE_OUTPUT:
            return self.attributes
        return tuple(f"{name}={level:g}" for a, name in enumerate(self.attributes) for level in self.levels(a))

    @property
    def task(self) -> Attributes:
        return Attributes(self.attributes, self.limits)

    def params(self) -> dict[str, np.ndarray]:
        """`cuts`, float32 [A, n - 1] of the most levels: the first cut point of each attribute, then what softplus
        makes the distances to the next ones. An attribute with fewer levels has no use for the last numbers: 0."""
        if self.loss != "ordinal":
            return {}
        sizes = [len(self.levels(a)) for a in range(len(self.attributes))]
        cuts = np.zeros((len(sizes), max(sizes) - 1), np.float32)
        for row, n in zip(cuts, sizes):
            share = np.arange(1, n) / n
            points = np.log(share / (1 - share))
            row[: n - 1] = [points[0], *np.log(np.expm1(np.diff(points)))]
        return {"cuts": cuts}

    def cut_points(self, a: int, params: Params, xp: Any = np) -> Any:
        """[n - 1]: the cut points of attribute number `a`, ascending."""
        raw = params["cuts"][a, : len(self.levels(a)) - 1]
        return xp.cumsum(xp.concatenate([raw[:1], xp.logaddexp(raw[1:], 0.0)]))

    def parts(self, outputs: Any) -> list[Any]:
        """Each attribute's outputs [..., n] of all outputs [..., O]."""
        if outputs.shape[-1] != len(self.labels):
            raise ValueError(f"outputs {outputs.shape}: expected {len(self.labels)} last, {', '.join(self.labels)}")
        numbers = range(len(self.attributes))
        stops = np.cumsum([0] + [1 if self.loss in ONE_OUTPUT else len(self.levels(a)) for a in numbers]).tolist()
        return [outputs[..., start:stop] for start, stop in itertools.pairwise(stops)]

    def log_probabilities(self, part: Any, a: int, params: Params, xp: Any = np) -> Any:
        """[..., n]: of the levels of attribute number `a`, from its own outputs."""
        if self.loss != "ordinal":
            shifted = part - part.max(-1, keepdims=True)
            return shifted - xp.log(xp.exp(shifted).sum(-1, keepdims=True))
        cuts = self.cut_points(a, params, xp)
        # log(sigmoid(x) - sigmoid(y)) = log sigmoid(x) + log sigmoid(-y) + log(1 - exp(y - x)), without cancellation
        under, over = -xp.logaddexp(part - cuts, 0.0), -xp.logaddexp(cuts - part, 0.0)
        sure, none = xp.zeros_like(part), xp.zeros_like(cuts[:1])
        between = xp.concatenate([none, xp.log(-xp.expm1(cuts[:-1] - cuts[1:])), none])
        return xp.concatenate([under, sure], -1) + xp.concatenate([sure, over], -1) + between

    def targets(self, label: jax.Array, a: int) -> jax.Array:
        """[..., n]: the distribution over levels that stands for labels [...] of attribute number `a`."""
        levels = jnp.asarray(self.levels(a), label.dtype)
        width = levels[1] - levels[0]
        if self.loss != "hl_gauss":
            return jnp.maximum(0.0, 1 - jnp.abs(label[..., None] - levels) / width)
        edges = jnp.append(levels, levels[-1] + width) - width / 2
        below = jax.scipy.special.erf((edges - label[..., None]) / (math.sqrt(2) * self.sigma * width))
        return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])

    def losses(self, outputs: jax.Array, labels: jax.Array, params: Params) -> jax.Array:
        """The loss of each label [..., A], which is on its scale, in the precision of the outputs [..., O]."""
        losses = []
        for a, part in enumerate(self.parts(outputs)):
            label, (low, high) = labels[..., a], self.limits[a]
            error = part[..., 0] - (2 * label - low - high) / (high - low)
            if self.loss == "mse":
                losses.append(error**2)
            elif self.loss == "huber":
                far = self.delta * (jnp.abs(error) - self.delta / 2)
                losses.append(jnp.where(jnp.abs(error) < self.delta, error**2 / 2, far))
            else:
                losses.append(-(self.targets(label, a) * self.log_probabilities(part, a, params, jnp)).sum(-1))
        return jnp.stack(losses, -1)

    def scores(self, outputs: Any, params: Params, xp: Any = np) -> Any:
        """[..., A]: the score of each attribute on its scale, from outputs [..., O]; regression can leave the scale."""
        scores = []
        for a, part in enumerate(self.parts(outputs)):
            low, high = self.limits[a]
            if self.loss in REGRESSION:
                scores.append((low + high) / 2 + (high - low) / 2 * part[..., 0])
            else:
                share = xp.exp(self.log_probabilities(part, a, params, xp))
                scores.append((share * xp.asarray(self.levels(a), share.dtype)).sum(-1))
        return xp.stack(scores, -1)

    def reward(self, scores: Any) -> Any:
        """[...]: the weighted sum of the attributes' scores [..., A], or their mean."""
        weights = self.weights or (1 / len(self.attributes),) * len(self.attributes)
        return sum(weight * scores[..., a] for a, weight in enumerate(weights))

    def decode(self, outputs: np.ndarray, params: Params) -> dict[str, np.ndarray]:
        scores = self.scores(outputs, params)
        return {**{name: scores[:, a] for a, name in enumerate(self.attributes)}, "score": self.reward(scores)}

    def at_ends(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The labels at the scored tokens, and their weights: 0 where a label is missing. Both [B, E, A]."""
        value, mask, weight = batch["value"], batch["mask"], batch["weight"]
        if value.shape[-1] != len(self.attributes) or value.shape[:2] != weight.shape or mask.shape != value.shape:
            raise ValueError(f"value {value.shape}, mask {mask.shape}, weight {weight.shape}: not [B,G,K,A] and [B,G]")
        group, slot = batch["end_group"], batch["end_slot"]
        weight = at_ends(mask, group, slot) * at_ends(weight, group)[..., None]
        # A missing label becomes one on the scale: what is computed from it is finite, so that it can be left out.
        return jnp.where(weight > 0, at_ends(value, group, slot), np.array([low for low, _ in self.limits])), weight

    def loss_sums(self, outputs_BEO: jax.Array, batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss as numerator and denominator, which is the labels' summed weight.

        Args:
            outputs_BEO: float32 [B, E, O].
            batch: `end`, `end_group`, `end_slot` [B, E], `weight` [B, G], `value`, `mask` [B, G, K, A].
        """
        label, weight = self.at_ends(batch)
        return (weight * self.losses(outputs_BEO, label, params)).sum(), weight.sum()

    def outcomes(self, outputs_BEO: jax.Array, batch: Batch, params: Params) -> Outcomes:
        """`score`, `label`, `weight` (0 where a label is missing), `loss` [B, E, A]; `reward`, `present` [B, E]."""
        label, weight = self.at_ends(batch)
        score = self.scores(outputs_BEO, params, jnp)
        return {
            **{"score": score, "label": label, "weight": weight, "loss": self.losses(outputs_BEO, label, params)},
            **{"reward": self.reward(score), "present": (batch["end"] >= 0).astype(jnp.float32)},
        }
