"""Supervised fine-tuning: a language model learns to write what stands in the data, for example a judge's verdicts.

    loss = sum over the learnt tokens of w_t * -log p(token t | tokens before) / sum of w_t

Sources: maximum likelihood of the responses as in Ouyang et al. 2022, arXiv:2203.02155, section 3.5; judges that write
their verdicts Kim et al. 2023 (Prometheus), arXiv:2310.08491; perplexity Jelinek et al. 1977.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rmjax.judging.verdicts import load_template
from rmjax.judging.writing import TEMPLATES, Writing
from rmjax.objectives.base import Batch, Objective, Outcomes, Params


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

    def loss_sums(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss as numerator and denominator: nats, and the summed weight of the learnt tokens.

        Args:
            outputs: `nll`, `correct` float32 [B, T] of the next token; read where `loss_weight` is not 0.
            batch: `loss_weight`, `verdict` [B, T] (see judging/writing.py), `visible_from` [B, T], `end` [B, E].
            params: none.

        Raises:
            ValueError: outputs or labels of other shapes.
        """
        weight, verdict, start = batch["loss_weight"], batch["verdict"], batch["visible_from"]
        nll, correct = outputs["nll"], outputs["correct"]
        if not nll.shape == correct.shape == weight.shape == verdict.shape == start.shape:
            shapes = [x.shape for x in (nll, correct, weight, verdict, start)]
            raise ValueError(f"nll, correct, loss_weight, verdict and visible_from are {shapes}: not all [B, T]")
        return (weight * nll).sum(), weight.sum()

    def outcomes(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> Outcomes:
        """Of each conversation, [B, E]: `nll`, `correct` and `count`, weighted sums over its learnt tokens; `tokens`,
        how many these are; `verdict_weight`, 0 without a verdict, and `verdict_errors`, wrong tokens in verdicts."""
        weight, verdict, end = batch["loss_weight"], batch["verdict"], batch["end"]
        at_BE = jnp.take_along_axis(batch["visible_from"], jnp.maximum(end, 0), 1)  # where its conversation starts
        zeros = jnp.zeros_like(weight)
        total = jax.vmap(lambda x, start, at: jnp.zeros_like(x).at[start].add(x)[at])
        most = jax.vmap(lambda x, start, at: jnp.zeros_like(x).at[start].max(x)[at])
        of = lambda reduce, x: jnp.where(end >= 0, reduce(zeros + x, batch["visible_from"], at_BE), 0.0)
        return {
            "nll": of(total, weight * outputs["nll"]),
            "correct": of(total, weight * outputs["correct"]),
            "count": of(total, weight),
            "tokens": of(total, weight > 0),
            "verdict_weight": of(most, verdict),
            "verdict_errors": of(total, (verdict > 0) * (1 - outputs["correct"])),
        }
