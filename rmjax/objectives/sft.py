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

    Keys that have no comment are those of judging/writing.py.
    """

    turns: str = "all"
    target: str = "messages"
    template: str = ""  # Jinja2 file with the judging question (judging/verdicts.py), or its text; "" is the packaged
    attributes: tuple[str, ...] = ()
    scale: tuple[float, float] = (1.0, 5.0)
    ties: bool = True  # if not, pairs judged equal are skipped (counted)
    both_orders: bool = False  # if not, one order is drawn by a hash

    architecture = "CausalLM"
    decoding = "the verdict is what it writes; rmjax.judging.verdicts.parse_verdict reads it"
    shown = ("loss", "accuracy", "verdict_accuracy")

    def __post_init__(self) -> None:
        ordered = len(self.scale) == 2 and self.scale[0] < self.scale[1]
        self._require("scale", ordered, "must be the lowest and the highest rating")
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
        return ()

    @property
    def task(self) -> Writing:
        return Writing(**dataclasses.asdict(self))

    def loss_sums(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        """The loss as numerator and denominator: nats, and the summed weight of the learnt tokens.

        Args:
            outputs: `nll`, `correct` float32 [B, T] of the next token; read where `loss_weight` is not 0.
            batch: `loss_weight`, `verdict` [B, T] (see judging/writing.py), `visible_from` [B, T], `end` [B, E].
        """
        arrays = [outputs[name] for name in ("nll", "correct")]
        arrays += [batch[name] for name in ("loss_weight", "verdict", "visible_from")]
        if len(set(shapes := [x.shape for x in arrays])) > 1:
            raise ValueError(f"nll, correct, loss_weight, verdict and visible_from are {shapes}: not all [B, T]")
        return (batch["loss_weight"] * outputs["nll"]).sum(), batch["loss_weight"].sum()

    def outcomes(self, outputs: Mapping[str, jax.Array], batch: Batch, params: Params) -> Outcomes:
        """Of each conversation, [B, E]: `nll`, `correct` and `count`, weighted sums over its learnt tokens; `tokens`,
        how many these are; `verdict_weight`, 0 without a verdict, and `verdict_errors`, wrong tokens in verdicts."""
        weight, verdict, end = batch["loss_weight"], batch["verdict"], batch["end"]
        start_BE = jnp.take_along_axis(batch["visible_from"], jnp.maximum(end, 0), 1)  # where its conversation starts
        zeros = jnp.zeros_like(weight)
        total = jax.vmap(lambda x, start, end: jnp.zeros_like(x).at[start].add(x)[end])
        most = jax.vmap(lambda x, start, end: jnp.zeros_like(x).at[start].max(x)[end])
        reduced = lambda reduce, x: jnp.where(end >= 0, reduce(zeros + x, batch["visible_from"], start_BE), 0.0)
        return {
            "nll": reduced(total, weight * outputs["nll"]),
            "correct": reduced(total, weight * outputs["correct"]),
            "count": reduced(total, weight),
            "tokens": reduced(total, weight > 0),
            "verdict_weight": reduced(most, verdict),
            "verdict_errors": reduced(total, (verdict > 0) * (1 - outputs["correct"])),
        }
