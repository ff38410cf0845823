"""Trees in, outputs out: a model on a mesh, with rows of few shapes, so that little is ever compiled.

Shape letters: B rows, T tokens, E scored tokens in a row, A outputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rmjax import sharding
from rmjax.batches import loader, packing
from rmjax.batches.groups import Group, Groups
from rmjax.batches.tasks import Axes
from rmjax.batches.trees import Tree, parts
from rmjax.kernels.tree_attention import choose
from rmjax.models import heads
from rmjax.models.config import ModelConfig
from rmjax.models.lora import Lora
from rmjax.objectives.base import Objective

LONGEST_ROW = 8_192  # tokens of a row, unless one conversation alone is longer
LEAST_ROW = 256  # tokens of the shortest row; see row_tokens
BATCH_TOKENS = {"cpu": 2_048}  # per device and call; with 8,192 a CPU took an eighth longer (benchmarks/RESULTS.md)
DEFAULT_BATCH_TOKENS = 32_768
CALL = 256  # tokens: what a call costs beside its own; 50 to 250 by the rates of a CPU, of TPUs and of the H200
SAMPLE = 1_024  # trees by which the length of rows is chosen


class Unlabelled:
    """Groups of trees without labels, as the loader reads them."""

    def __init__(self, trees: Sequence[Tree]):
        self.trees = trees

    def group(self, index: int) -> Any:
        """The group of one tree, with empty labels."""
        return Group(self.trees[index], {}, 0.0, "")


@dataclasses.dataclass
class Work:
    """Tokens that were computed, and those of all conversations, each whole."""

    computed: int = 0
    unshared: int = 0

    def add(self, computed: int, unshared: int) -> None:
        self.computed += computed
        self.unshared += unshared


@dataclasses.dataclass(frozen=True, eq=False)
class Inference:
    """A model that is asked, not trained.

    Attributes:
        config: shapes of the decoder.
        params: its parameters, sharded over `mesh`.
        dtype: of the computation, float32 or bfloat16.
        labels: outputs of the head, A.
        adapters: those among the parameters; None where there are none.
        work: of `trees` so far.
    """

    config: ModelConfig
    params: Any
    mesh: jax.sharding.Mesh
    dtype: str
    architecture: str
    labels: int
    adapters: Lora | None = None
    work: Work = dataclasses.field(default_factory=Work)

    def trees(self, trees: Sequence[Tree], progress: Callable[[int], None] = lambda done: None) -> list[np.ndarray]:
        """Outputs [scored tokens, A] of each tree, in the order of its scored tokens; equal sequences get equal ones.

        What is equal is computed once. A tree of more than LONGEST_ROW tokens is computed in parts.

        Those of a language model are [scored tokens, 1]: the mean negative log-likelihood of what each sees after the
        first token, itself last; float64, so that verdicts on one long question can be compared.

        Args:
            trees: of token ids that the model knows.
            progress: is told after each batch how many trees are done.

        Raises:
            ValueError: a token that the embedding has no row for.
        """
        largest = max((int(tree.tokens.max()) for tree in trees), default=0)
        if largest >= self.config.vocab:
            raise ValueError(
                f"token {largest} has no row in the model's embedding of {self.config.vocab}; the tokenizer is another "
                "model's, or has tokens that were added after training"
            )
        distinct = [tree.distinct() for tree in trees]
        cut = [parts(tree, LONGEST_ROW) for tree, _ in distinct]
        stops = np.cumsum([len(pieces) for pieces in cut])
        pieces = [piece for several in cut for piece in several]
        self.work.add(sum(map(len, pieces)), sum(int(tree.positions[tree.end].sum()) + len(tree.end) for tree in trees))
        outputs: dict[int, np.ndarray] = {}
        for plan, batch, raw in self._batches(pieces) if pieces else ():
            for b, groups in enumerate(plan):
                start = 0
                for g, index in enumerate(groups):
                    if self.architecture == "CausalLM":
                        outputs[index] = _mean_nll(pieces[index], raw[b, start:])
                    else:
                        outputs[index] = raw[b][batch["end_group"][b] == g]
                    start += len(pieces[index])
            progress(int(np.searchsorted(stops, len(outputs), side="right")))
        joined = [
            np.concatenate([outputs[i] for i in range(stop - len(several), stop)]) for several, stop in zip(cut, stops)
        ]
        return [values[index] for values, (_, index) in zip(joined, distinct)]

    def _batches(self, trees: Sequence[Tree]) -> Any:
        """Yields (groups of each row, the batch on the host, what `heads.inference_outputs` makes of it)."""
        lengths, ends = np.array([len(t) for t in trees]), np.array([len(t.end) for t in trees])
        return self._run(_forward, Unlabelled(trees), lengths, ends)

    def outcomes(self, groups: Groups, objective: Objective, own: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The objective's outcomes (objectives/base.py) of labelled groups, in rows of the engine's own.

        Args:
            own: its own parameters.
        """
        most = int(groups.responses.max())
        run = functools.partial(_outcomes, own=own, objective=objective)
        sizes = (groups.lengths, groups.ends)
        found = [seen for *_, seen in self._run(run, groups, *sizes, labels=groups.fields, responses=most)]
        return {name: np.concatenate([x[name] for x in found]) for name in found[0]}

    def _run(
        self,
        run: Any,
        source: Any,
        lengths: np.ndarray,
        ends: np.ndarray,
        *,
        labels: Mapping[str, Axes] | None = None,
        responses: int = 0,
    ) -> Iterator[tuple[list[np.ndarray], dict[str, np.ndarray], Any]]:
        """Yields (groups of each row, the batch on the host, what `run` makes of it) until all groups are computed."""
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows, row = call_shape(lengths, devices)
        plan = packing.make_plan(lengths, ends, row_tokens=row, rows_per_step=rows, seed=None)
        most = responses or int(ends.max())
        shape = loader.plan_shape(plan, most, micro_rows=rows // devices, row_devices=devices, labels=labels)
        shape = dataclasses.replace(loader.rounded(shape), rows=rows)
        shape = shape if labels else _roomy(shape)
        batches = loader.StepSource(source, plan, shape, range(shape.rows))
        placed = sharding.named(self.mesh, sharding.BATCH)
        form, _ = choose("auto", self.mesh.devices.flat[0].platform, self.config.head_dim, self.dtype)
        static = {"config": self.config, "dtype": self.dtype, "labels": self.labels, "attention": form}
        static |= {"architecture": self.architecture, "out": sharding.named(self.mesh), "adapters": self.adapters}
        with jax.set_mesh(self.mesh):
            for step in range(plan.steps):
                batch = {name: x[0] for name, x in batches[step].items()}
                arrays = {name: sharding.place(x, placed) for name, x in batch.items()}
                yield plan.rows(step), batch, jax.device_get(run(self.params, arrays, **static))


def _roomy(shape: loader.Shape) -> loader.Shape:
    """The shape with room for one sequence in two tokens, so that few others are compiled.

    In a tree that is what a response of one token takes, beside the end of its turn.
    """
    least = shape.tokens // 2
    return dataclasses.replace(shape, groups=max(shape.groups, least), ends=max(shape.ends, least))


@functools.partial(
    jax.jit, static_argnames=("config", "dtype", "labels", "architecture", "attention", "out", "adapters")
)
def _forward(
    params: Any,
    batch: Any,
    *,
    config: ModelConfig,
    dtype: str,
    labels: int,
    architecture: str,
    attention: str,
    out: jax.sharding.Sharding,
    adapters: Lora | None,
) -> jax.Array:
    """What `heads.inference_outputs` makes of a batch; models of one config share what is compiled."""
    graph, _ = heads.abstract(config, labels, dtype, dtype, architecture, attention, adapters)
    # Accelerators round float32 products to TF32 or bfloat16 unless told otherwise.
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        outputs = heads.inference_outputs(heads.merge(graph, params), batch)
    return jax.lax.with_sharding_constraint(outputs, out)


@functools.partial(
    jax.jit, static_argnames=("objective", "config", "dtype", "labels", "architecture", "attention", "out", "adapters")
)
def _outcomes(
    params: Any,
    batch: Any,
    *,
    own: Any,
    objective: Objective,
    config: ModelConfig,
    dtype: str,
    labels: int,
    architecture: str,
    attention: str,
    out: jax.sharding.Sharding,
    adapters: Lora | None,
) -> dict[str, jax.Array]:
    """The objective's outcomes of a labelled batch."""
    graph, _ = heads.abstract(config, labels, dtype, dtype, architecture, attention, adapters)
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        outputs = heads.merge(graph, params)(batch, remat="none")
    return jax.lax.with_sharding_constraint(objective.outcomes(outputs, batch, own), out)


def _mean_nll(tree: Tree, nll: np.ndarray) -> np.ndarray:
    """[E, 1]: see Inference.trees; `nll` [>= n] begins where the tree does."""
    paths = [tree.path(int(end))[:-1] for end in tree.end]
    return np.array([[nll[path].astype(np.float64).mean() if len(path) else 0.0] for path in paths])


def call_tokens() -> int:
    """Tokens that a call computes on a device in one row, where no tree is longer."""
    return min(_budget(), LONGEST_ROW)


def _budget() -> int:
    """Tokens of a call on a device, in all its rows."""
    return BATCH_TOKENS.get(jax.default_backend(), DEFAULT_BATCH_TOKENS)


def call_shape(lengths: np.ndarray, devices: int) -> tuple[int, int]:
    """Rows of a call, on all devices, and their tokens: the shape that computes trees of these lengths soonest.

    The cost of a call is taken to be its tokens, padding included, and CALL more. A device computes one row; several
    only where rows are as long as they get, so that few shapes are ever compiled (`call_shapes`). Tokens of other trees
    in a row cost nothing: attention passes over them.
    """
    least, sample = row_tokens(int(lengths.max())), lengths[:SAMPLE]
    best: tuple[float, int, int] | None = None
    for per_device, row in call_shapes(least, min(max(call_tokens(), 2 * least), max(least, LONGEST_ROW))):
        packed = len(packing.pack(sample, row)) * len(lengths) / len(sample)
        calls = np.ceil(packed / (devices * per_device))
        cost = calls * devices * (per_device * row + CALL)
        if best is None or cost < best[0]:
            best = cost, devices * per_device, row
    assert best is not None
    return best[1:]


def call_shapes(least: int, most: int) -> Iterator[tuple[int, int]]:
    """All rows of a device and their tokens that `call_shape` chooses from, of rows of `least` to `most` tokens."""
    row, budget = least, _budget()
    while row <= most:
        per_device = 1
        while per_device == 1 or (row >= call_tokens() and per_device * row <= budget):
            yield per_device, row
            per_device *= 2
        row = row_tokens(row + 1)


def row_tokens(longest: int) -> int:
    """Length of a row that holds `longest` tokens: 2 or 3 times a power of two, so that few shapes are compiled."""
    power = max(LEAST_ROW, 1 << (longest - 1).bit_length())
    return power * 3 // 4 if longest <= power * 3 // 4 and power > LEAST_ROW else power
