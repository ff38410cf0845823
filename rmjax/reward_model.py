"""RewardModel: load a Hugging Face directory and score conversations."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmjax import contract, sharding
from rmjax.data import loader, packing
from rmjax.data.cache import Group
from rmjax.data.chat import Chat, load_tokenizer
from rmjax.data.records import BadRow, Conversation, check_conversation
from rmjax.data.trees import Tokens, Tree, build_tree
from rmjax.models import heads, hf
from rmjax.models.config import ModelConfig, from_hf

LEAST_ROW = 256  # rows are a power of two of tokens from here on, so that few shapes are ever compiled
BATCH_TOKENS = {"cpu": 8_192}  # per device and call
DEFAULT_BATCH_TOKENS = 32_768


class Unlabelled:
    """Groups of trees without labels, as the loader reads them."""

    def __init__(self, trees: Sequence[Tree]):
        self.trees = trees

    def group(self, index: int) -> Any:
        """The group of one tree, with empty labels."""
        return Group(self.trees[index], {}, 0.0, "")


class BadConversation(ValueError):
    """A conversation that cannot be scored.

    Attributes:
        index: its place in the list.
        detail: what is wrong with it.
    """

    def __init__(self, index: int, detail: str):
        super().__init__(f"conversation {index}: {detail}")
        self.index, self.detail = index, detail


class RewardModel:
    """A reward model that scores conversations.

    Attributes:
        chat: tokenizer and chat template.
        config: shapes of the model.
        params: its parameters, sharded over `mesh`.
        contract: the export's score contract; None for a directory that is not ours.
        dtype: of the computation.
    """

    def __init__(self, chat: Chat, config: ModelConfig, params: Any, mesh: Any, dtype: str, terms: dict | None):
        self.chat, self.config, self.params, self.mesh, self.contract = chat, config, params, mesh, terms
        self.dtype = dtype

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        mesh: Any = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "RewardModel":
        """Loads a Hugging Face sequence-classification directory (or hub id) of a supported family, ours or not.

        Args:
            path: directory or hub id with weights, config.json and tokenizer.
            dtype: of the computation: float32, bfloat16, or auto: float32 on CPUs and bfloat16 elsewhere. Parameters
                keep float32 with float32, else the computation's dtype.
            mesh: mesh to put it on; default is all devices of this process on `fsdp`.
            template_kwargs: arguments of the chat template, where no score contract says them.

        Raises:
            ValueError: no score head, an unsupported family, weights that do not match the config, a tokenizer
                without a usable template, or tokenizer, template or arguments other than the score contract's.
        """
        directory = hf.resolve(path)
        config = from_hf(hf.read_config(directory))
        terms = contract.read(directory)
        if terms:
            template_kwargs = contract.template_kwargs(terms, template_kwargs)
        chat = Chat(load_tokenizer(directory), template_kwargs=template_kwargs)
        if terms:
            contract.check(terms, chat)
        mesh = mesh or sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())
        dtype = heads.compute_dtype(dtype)
        _, shapes = heads.abstract(config, 1, dtype, dtype)
        shardings = sharding.param_shardings(mesh, shapes)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        params, _ = hf.load(directory, shapes, config, seed=0, require_head=True)
        return cls(chat, config, params, mesh, dtype, terms)

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """Scores conversations; those that follow each other and share their prompt share its computation.

        Args:
            conversations: each a list of {"role", "content"} that ends with an assistant turn.

        Returns:
            One float per conversation, in order.

        Raises:
            BadConversation: one that cannot be scored.
        """
        texts, prompts = [], []
        for index, conversation in enumerate(conversations):
            try:
                checked = check_conversation(conversation)
                texts.append(self.chat.render(checked))
                texts[-1].encode()
            except BadRow as bad:
                raise BadConversation(index, bad.detail) from None
            except UnicodeEncodeError as error:  # half of a surrogate pair; tokenizers would stop at it
                raise BadConversation(index, f"the text is no Unicode: {error.reason}") from None
            prompts.append(checked[:-1])
        return self.score_tokens(self.chat.encode(texts), prompts)

    def score_tokens(self, sequences: Sequence[Tokens], prompts: Sequence[Any] | None = None) -> list[float]:
        """Scores token sequences at their last token.

        Args:
            sequences: token ids of whole renderings.
            prompts: for each, a value that is equal for neighbours worth putting into one tree; default shares nothing.

        Raises:
            ValueError: a token that the embedding has no row for, or a sequence without tokens.
        """
        if not sequences:
            return []
        largest = max(int(max(s, default=0)) for s in sequences)
        if largest >= self.config.vocab:
            raise ValueError(
                f"token {largest} has no row in the model's embedding of {self.config.vocab}; the tokenizer is another "
                "model's, or has tokens that were added after training"
            )
        row = LEAST_ROW
        while row < max(len(s) for s in sequences):
            row *= 2
        trees, owners = [], []
        for members in _runs(sequences, prompts, row):
            trees.append(build_tree([sequences[m] for m in members]))
            owners.append(members)
        scores = np.zeros(len(sequences), np.float32)
        for plan, batch, raw in self._batches(trees, row):
            for b, groups in enumerate(plan):
                here = batch["end"][b] >= 0
                for g, slot, value in zip(batch["end_group"][b][here], batch["end_slot"][b][here], raw[b][here]):
                    scores[owners[groups[g]][slot]] = value
        return scores.tolist()

    def _batches(self, trees: list[Tree], row: int) -> Any:
        """Yields (groups of each row, the batch on the host, its scores [B, E])."""
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        budget = BATCH_TOKENS.get(jax.default_backend(), DEFAULT_BATCH_TOKENS)
        lengths, ends = np.array([len(t) for t in trees]), np.array([len(t.end) for t in trees])
        needed = -(-int(lengths.sum()) // (row * devices))  # rows per device if they were full
        per_device = min(max(1, budget // row), 1 << (needed - 1).bit_length())
        plan = packing.make_plan(lengths, ends, row_tokens=row, rows_per_step=per_device * devices, seed=None)
        shape = loader.plan_shape(plan, int(ends.max()), micro_rows=per_device, row_devices=devices)
        shape = loader.rounded(shape)
        source = loader.StepSource(Unlabelled(trees), plan, shape, (0, shape.rows))
        placed = sharding.named(self.mesh, sharding.BATCH)
        with jax.set_mesh(self.mesh):
            for step in range(plan.steps):
                batch = source[step]
                arrays = {name: jax.device_put(x[0], placed) for name, x in batch.items()}
                raw = _forward(self.params, arrays, config=self.config, dtype=self.dtype, out=sharding.named(self.mesh))
                yield (
                    plan.rows(step),
                    {name: x[0] for name, x in batch.items()},
                    np.asarray(jax.device_get(raw)),
                )


@functools.partial(jax.jit, static_argnames=("config", "dtype", "out"))
def _forward(params: Any, batch: Any, *, config: ModelConfig, dtype: str, out: jax.sharding.Sharding) -> jax.Array:
    """Scores [B, E] of a batch; models of one config share what is compiled."""
    graph, _ = heads.abstract(config, 1, dtype, dtype)
    # Accelerators round float32 products to TF32 or bfloat16 unless told otherwise.
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        scores = heads.merge(graph, params)(batch, remat="none")[..., 0]
    return jax.lax.with_sharding_constraint(scores, out)


def _runs(sequences: Sequence[Tokens], prompts: Sequence[Any] | None, row: int) -> list[list[int]]:
    """Neighbours with equal prompts, as long as their unshared tokens surely fit a row and are at most 64."""
    runs: list[list[int]] = []
    used = 0
    for i, sequence in enumerate(sequences):
        joins = bool(runs) and prompts is not None and prompts[runs[-1][0]] == prompts[i]
        if joins and used + len(sequence) <= row and len(runs[-1]) < 64:
            runs[-1].append(i)
            used += len(sequence)
        else:
            runs.append([i])
            used = len(sequence)
    return runs


def load_checked(
    path: str | Path, *, dtype: str = "auto", template_kwargs: Mapping[str, Any] | None = None
) -> RewardModel:
    """Like RewardModel.load, but first replays the golden rows of the score contract, if there is one, in float32.

    Raises:
        ValueError: as RewardModel.load, or a golden row has another score than in its contract.
    """
    directory = hf.resolve(path)
    load = functools.partial(RewardModel.load, directory, template_kwargs=template_kwargs)
    terms = contract.read(directory)
    if terms is None:
        return load(dtype=dtype)
    model = load(dtype="float32")
    contract.check_scores(terms, model.score_tokens([row["token_ids"] for row in terms["golden"]]))
    if heads.compute_dtype(dtype) != "float32":
        del model  # makes room
        model = load(dtype=dtype)
    return model
