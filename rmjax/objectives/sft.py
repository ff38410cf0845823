"""Supervised fine-tuning: a language model learns to write what stands in the data, for example a judge's verdicts.

    loss = sum over the learnt tokens of w_t * -log p(token t | tokens before) / sum of w_t

Sources: maximum likelihood of the responses as in Ouyang et al. 2022, arXiv:2203.02155, section 3.5; judges that write
their verdicts Kim et al. 2023 (Prometheus), arXiv:2310.08491; perplexity Jelinek et al. 1977.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.judging.verdicts import load_template
from rmjax.judging.writing import TEMPLATES, Writing
from rmjax.objectives.base import Batch, Objective, Params
from rmjax.objectives.sums import Sums, fraction, ratios


@dataclasses.dataclass(frozen=True)
class SFT(Objective):
    """The objective; every field is a key of `config.objective` with the same name.

    Attributes:
        turns: learn "all" assistant turns, or the "last".
        target: "messages": the conversations as they are (of a preference group the preferred one); "score" or "pair":
            records turned into a judge's conversations, which answer `<score>3</score>` or `<better>A</better>`. See
            judging/writing.py.
        template: Jinja2 file that states the judging question (judging/verdicts.py), or its text; "" is the packaged.
        attributes: names of the attributes that are rated, for "score"; () is all that a record has.
        scale: lowest and highest rating, for "score".
        ties: whether a verdict may be "tie", for "pair"; if not, pairs judged equal are skipped (counted).
        both_orders: show each pair in both orders, for "pair"; else in one, drawn by a hash.
    """

    turns: str = "all"
    target: str = "messages"
    template: str = ""
    attributes: tuple[str, ...] = ()
    scale: tuple[float, float] = (1.0, 5.0)
    ties: bool = True
    both_orders: bool = False

    architecture = "CausalLM"
    decoding = "the verdict is what it writes; rmjax.judging.verdicts.parse_verdict reads it"
    shown = ("loss", "accuracy", "verdict_accuracy")

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not self.scale[0] < self.scale[1]:
            raise ValueError(f"config.objective.scale={self.scale} must be the lowest and the highest rating")
        if self.template and self.target == "messages":
            raise ValueError("config.objective.template does nothing with config.objective.target='messages'")
        if default := TEMPLATES.get(self.target, ""):
            try:  # once, so that a run is exported with the template it was trained with
                object.__setattr__(self, "template", load_template(self.template, default))
            except (ValueError, OSError) as error:
                raise ValueError(f"config.objective.template: {error}") from None
        try:
            self.task  # noqa: B018 - checks the rest
        except ValueError as error:
            raise ValueError(f"config.objective.{error}") from None

    @property
    def labels(self) -> tuple[str, ...]:
        """None: a language model has no score head."""
        return ()

    @property
    def task(self) -> Writing:
        """Conversations and which of their tokens are learnt."""
        return Writing(**dataclasses.asdict(self))

    def sums(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> Sums:
        """Loss and metrics of a batch as sums over its learnt tokens.

        Args:
            outputs: `nll`, `correct` float32 [B, T] of the next token; read where `loss_weight` is not 0.
            batch: `loss_weight`, `verdict` [B, T] (see judging/writing.py), `visible_from` [B, T].
            params: none.

        Returns:
            loss, in nats a token; accuracy of single tokens, given those before it; verdict_accuracy: share of
            conversations in which every token of every verdict is the likeliest; tokens_count, how many are learnt.

        Raises:
            ValueError: outputs or labels of other shapes.
        """
        weight, verdict, start = batch["loss_weight"], batch["verdict"], batch["visible_from"]
        nll, correct = outputs["nll"], outputs["correct"]
        if not nll.shape == correct.shape == weight.shape == verdict.shape == start.shape:
            shapes = [x.shape for x in (nll, correct, weight, verdict, start)]
            raise ValueError(f"nll, correct, loss_weight, verdict and visible_from are {shapes}: not all [B, T]")
        worth, wrong = _verdicts(verdict, correct, start)
        return {
            "loss": fraction((weight * nll).sum(), weight.sum()),
            "accuracy": fraction((weight * correct).sum(), weight.sum()),
            "verdict_accuracy": fraction((worth * (wrong == 0)).sum(), worth.sum()),
            "tokens_count": fraction((weight > 0).sum()),
        }

    def outcomes(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> dict[str, jax.Array]:
        """Of each conversation, [B T], at the index where it starts: weighted sums over its learnt tokens.

        `nll`, `correct` and `count`, and `verdict`: whether all its verdicts are the likeliest; NaN without one.
        """
        weight, start = batch["loss_weight"], batch["visible_from"]
        total = jax.vmap(lambda x, at: jnp.zeros_like(x).at[at].add(x))
        worth, wrong = _verdicts(batch["verdict"], outputs["correct"], start)
        count = total(weight, start)
        found = {
            "nll": total(weight * outputs["nll"], start),
            "correct": total(weight * outputs["correct"], start),
            "count": count,
            "verdict": jnp.where(worth > 0, (wrong == 0).astype(jnp.float32), jnp.nan),
        }
        return {name: jnp.where(count > 0, x, jnp.nan).ravel() for name, x in found.items()}

    def summary(
        self, sums: Mapping[str, np.ndarray], outcomes: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, float]:
        """Metrics of host sums: the ratios, perplexity (exp of the loss) and the number of learnt tokens."""
        values = ratios(sums)
        values["tokens"] = values.pop("tokens_count")
        if "loss" in values:
            values["perplexity"] = math.exp(min(values["loss"], 700.0))  # no float holds more
        return values


def _verdicts(verdict: jax.Array, correct: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each conversation, [B, T], at the index where it starts: its verdict's weight, and how many of its tokens are
    wrong."""
    worth = jax.vmap(lambda v, at: jnp.zeros_like(v).at[at].max(v))(verdict, start)
    wrong = jax.vmap(lambda v, at: jnp.zeros_like(v).at[at].add(v))((verdict > 0) * (1 - correct), start)
    return worth, wrong
