"""RewardModel: load a Hugging Face directory and score conversations, pairs or steps."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmjax import objectives, sharding
from rmjax.batches.chat import Chat, Labelled, load_tokenizer
from rmjax.batches.frame import Frame, NotWhole
from rmjax.batches.groups import Groups
from rmjax.batches.tasks import Example
from rmjax.batches.trees import Tokens, build_tree, shared_trees
from rmjax.data.records import BadRow, Conversation, check_conversation
from rmjax.inference import contract, parameters
from rmjax.inference.engine import LONGEST_ROW, Inference, call_tokens
from rmjax.judging.verdicts import Judgements
from rmjax.models import heads, hf, lora, peft
from rmjax.models.config import ModelConfig, from_hf
from rmjax.models.lora import Lora
from rmjax.objectives.base import Objective
from rmjax.objectives.pairwise import average_orders
from rmjax.runtime import notes

GROUPS = 2048  # packed together
# Places move a score by up to so many units, the norm of the head times the final norm: see RewardModel.resolution.
RESOLUTION = {"float32": 2.0**-17, "bfloat16": 2.0**-4}
ARCHITECTURES = ("SequenceClassification", "TokenClassification", "CausalLM")


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
        architecture: "SequenceClassification", "TokenClassification" or "CausalLM".
        labels: names of the head's outputs, A of them.
        objective: what it was trained for; plain rewards for a directory that is not ours.
        own: what the objective itself learnt.
        stops: of a language model, the token ids that end a response, beside those of tokenizer and template.
        longest: tokens that the model knows positions for; 0 where config.json does not say it.
    """

    def __init__(
        self,
        chat: Chat,
        config: ModelConfig,
        params: Any,
        mesh: Any,
        dtype: str,
        kind: "Kind",
        adapters: Lora | None = None,
    ):
        """`adapters` are those among the parameters, which are not merged."""
        self.chat, self.config, self.params, self.mesh, self.dtype = chat, config, params, mesh, dtype
        self.contract, self.architecture, self.labels = kind.contract, kind.architecture, kind.labels
        self.objective, self.own = kind.objective, kind.own
        self.stops, self.longest = kind.stops, kind.longest
        self.inference = Inference(config, params, mesh, dtype, kind.architecture, len(kind.labels), adapters)
        self._answered: tuple[Groups, list[np.ndarray]] | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        mesh: Any = None,
        template_kwargs: Mapping[str, Any] | None = None,
        writes: bool = False,
    ) -> "RewardModel":
        """Loads a Hugging Face directory (or hub id) of a supported family, ours or not.

        Args:
            path: directory or hub id with weights, config.json and tokenizer.
            dtype: of the computation: float32, bfloat16, or auto: float32 on CPUs and bfloat16 elsewhere. Parameters
                keep float32 with float32, else the computation's dtype.
            mesh: mesh to put it on; default is all devices of this process on `fsdp`.
            template_kwargs: arguments of the chat template, where no score contract says them.
            writes: without a score contract it is a language model, which needs no score head.

        Raises:
            ValueError: no score head, an unsupported family, weights that do not match the config, a tokenizer
                without a usable template, or tokenizer, template or arguments other than the score contract's.
        """
        directory = hf.resolve(path)
        values = hf.read_config(directory)
        config = from_hf(values)
        kind = Kind.of(directory, values, writes)
        if kind.contract:
            template_kwargs = contract.template_kwargs(kind.contract, template_kwargs)
        chat = Chat(load_tokenizer(hf.tokenizer_of(directory)), template_kwargs=template_kwargs)
        if why := parameters.tokens_without_row(chat.tokenizer, config.vocab):
            notes.tell(f"{directory}: {why}; conversations with these tokens are refused")
        if kind.contract:
            # An adapter has no config.json that could say the pad token, and its base may have another or none.
            pad = {"pad_token_id": kind.contract["pad_token_id"]} if peft.is_adapter(directory) else {}
            contract.check(kind.contract, chat, {**values, **pad})
        mesh = mesh or sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.local_devices())
        dtype = heads.compute_dtype(dtype)
        _, shapes = heads.abstract(config, len(kind.labels), dtype, dtype, architecture=kind.architecture)
        shardings = sharding.param_shardings(mesh, shapes)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        base = contract.base_kept_as(kind.contract)
        params, _ = hf.load(directory, shapes, config, seed=0, require_head=True, kept=lora.rounded_as(base))
        return cls(chat, config, params, mesh, dtype, kind)

    @property
    def kind(self) -> "Kind":
        """What the model is, without its parameters."""
        said = self.architecture, self.labels, self.contract, self.objective, self.own, self.stops, self.longest
        return Kind(*said)

    def drop_params(self) -> None:
        """Frees the parameters, where another model took them over; nothing can be computed from here on."""
        self.params, self.inference = None, dataclasses.replace(self.inference, params=None)

    @functools.cached_property
    def resolution(self) -> float:
        """How far apart two scores must be to differ: what the score of one sequence varies by with its place in a row.

        Sums of the same numbers in another order are rounded otherwise. That turns the last hidden state by an angle
        that depends on the dtype, so scores move in units of what the head makes of a hidden state of random direction.
        0 where there is no score.
        """
        if self.architecture == "CausalLM":
            return 0.0
        norm = np.asarray(self.params["decoder"]["norm"]["scale"], np.float64)
        kernel = np.asarray(self.params["score"]["kernel"], np.float64)
        moved = RESOLUTION[self.dtype] * np.sqrt(((norm[:, None] * kernel) ** 2).sum(0))
        decoded = self.decode(np.concatenate([np.zeros((1, len(moved))), np.diag(moved)]).astype(np.float32))
        score = decoded.get("score", np.zeros(1))
        return float(np.abs(score[1:] - score[0]).sum())

    def score(
        self, conversations: Sequence[Conversation], *, tools: Sequence[Sequence[Any] | None] | None = None
    ) -> list[float]:
        """Scalar rewards; what conversations share at their beginning is computed once.

        Args:
            conversations: each a list of {"role", "content"} that ends with an assistant turn.
            tools: for each conversation its tool descriptions for the chat template, or None.

        Returns:
            One float per conversation, in order.

        Raises:
            BadConversation: one that cannot be scored.
            ValueError: a model whose outputs are no reward of a conversation: a judge, a model of steps or of text.
        """
        values = self.values(conversations, tools=tools)
        if "score" not in values:
            raise ValueError(f"this model gives {', '.join(values)}, not one reward; call `values`")
        return values["score"].tolist()

    def values(
        self, conversations: Sequence[Conversation], *, tools: Sequence[Sequence[Any] | None] | None = None
    ) -> dict[str, np.ndarray]:
        """Everything the model says of each conversation: `score`, and attributes by name on their scales, or the
        `spread` of the heads whose mean the score is.

        Args:
            conversations, tools: as for `score`.

        Returns:
            float arrays [n] by name.

        Raises:
            BadConversation, ValueError: as `score`.
        """
        self._expect("SequenceClassification")
        if self.objective is not None and isinstance(self.objective.task, Judgements):
            raise ValueError("this model compares two responses; call `judge`")
        texts = []
        tools = [None] * len(conversations) if tools is None else tools
        for index, (conversation, described) in enumerate(zip(conversations, tools, strict=True)):
            try:
                checked = check_conversation(conversation)
                texts.append(self.chat.render(checked, described))
                texts[-1].encode()
            except BadRow as bad:
                raise BadConversation(index, bad.detail) from None
            except UnicodeEncodeError as error:  # half of a surrogate pair; tokenizers would stop at it
                raise BadConversation(index, f"the text is no Unicode: {error.reason}") from None
        return self.decode(self.outputs(self.chat.encode(texts)))

    def steps(
        self, conversations: Sequence[Conversation], steps: Sequence[Sequence[str]], *, separator: str = "\n"
    ) -> list[list[float]]:
        """Probabilities that the steps of responses are right, of a model that was trained on steps (`prm`).

        Args:
            conversations: the prompts: each a list of {"role", "content"} without the response.
            steps: the response of each, step by step.
            separator: what stands between two steps, as in the data that it was trained on.

        Returns:
            For each conversation one float per step.

        Raises:
            BadConversation: one that cannot be scored.
            ValueError: a model of another kind.
        """
        whole, stops = [], []
        for prompt, pieces in zip(conversations, steps, strict=True):
            texts = [separator * bool(i) + piece for i, piece in enumerate(pieces)]
            stops.append(np.cumsum([len(text) for text in texts]).tolist())
            whole.append((*prompt, {"role": "assistant", "content": "".join(texts)}))
        return self.steps_at(whole, stops)

    def steps_at(
        self,
        conversations: Sequence[Conversation],
        stops: Sequence[Sequence[int]],
        *,
        tools: Sequence[Sequence[Any] | None] | None = None,
    ) -> list[list[float]]:
        """Like `steps`, of whole conversations.

        Args:
            conversations, tools: as for `score`.
            stops: for each, the characters of its last turn up to and including the last one of each step.

        Returns:
            For each conversation one float per step.

        Raises:
            BadConversation, ValueError: as `steps`.
        """
        self._expect("TokenClassification")
        if self.objective is None and len(self.labels) != 1:
            raise ValueError(
                f"which of the outputs {', '.join(self.labels)} is a step's score is not known; see `replay`"
            )
        tools = [None] * len(conversations) if tools is None else tools
        examples = [
            Example((tuple(conversation),), scored=(tuple(ends),), tools=described)
            for conversation, ends, described in zip(conversations, stops, tools, strict=True)
        ]
        outputs = self.inference.trees([made.tree for made in self._groups(examples)])
        return [self.decode(values)["score"].tolist() for values in outputs]

    def judge(self, first: Sequence[Conversation], second: Sequence[Conversation]) -> list[dict[str, float]]:
        """Which of two responses is better, of a model that was trained to compare (`pairwise`).

        Both orders are computed, as one tree, and their probabilities averaged.

        Args:
            first: conversations that end with response A.
            second: the same with response B.

        Returns:
            For each pair the probabilities of its labels: {"A": ..., "B": ..., "tie": ...}.

        Raises:
            BadConversation: one that cannot be judged.
            ValueError: a model of another kind.
        """
        task = self.objective.task if self.objective else None
        if not isinstance(task, Judgements):
            raise ValueError("this model does not compare responses; call `score`")
        examples = []
        for index, both in enumerate(zip(first, second, strict=True)):
            try:
                examples.append(Example(task.questions(*map(check_conversation, both))))
            except BadRow as bad:
                raise BadConversation(index, bad.detail) from None
        outputs = self.inference.trees([made.tree for made in self._groups(examples)])
        decoded = [self.decode(both) for both in outputs]  # of each pair both orders
        orders = np.array([[values[label] for label in self.labels] for values in decoded])  # [n, C, 2]
        averaged = average_orders(orders[..., 0], orders[..., 1])
        return [dict(zip(self.labels, map(float, row))) for row in averaged]

    def decode(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """What raw outputs [n, A] mean, by name; see the objective's `decode`."""
        if self.objective is not None:
            return self.objective.decode(outputs, self.own)
        named = {label: outputs[:, i] for i, label in enumerate(self.labels)}
        return {"score": outputs[:, 0]} if len(named) == 1 else named

    @property
    def has_spread(self) -> bool:
        """Whether the reward is made of those of several heads or members, so that `values` has their `spread`."""
        return self.objective is not None and self.objective.heads > 1

    def member_rewards(self, outputs: np.ndarray) -> np.ndarray:
        """The rewards [n, M] that the score of raw outputs [n, A] is made of, where the model `has_spread`."""
        return outputs

    def outputs(self, sequences: Sequence[Tokens]) -> np.ndarray:
        """Raw outputs of token sequences at their last token, whatever they are; `score_tokens` checks them.

        What sequences share at their beginning is computed once, wherever they stand.

        Args:
            sequences: token ids of whole renderings.

        Returns:
            float32 [n, A].

        Raises:
            ValueError: a token that the embedding has no row for, or a sequence without tokens.
        """
        if not sequences:
            return np.zeros((0, max(1, len(self.labels))), np.float32)
        if any(len(sequence) == 0 for sequence in sequences):
            raise ValueError("a sequence has no tokens")
        arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
        trees, index = shared_trees(arrays, call_tokens(), LONGEST_ROW)
        _, first = np.unique(index, return_index=True)
        self.inference.work.add(0, sum(map(len, arrays)) - sum(len(arrays[i]) for i in first))
        return np.concatenate(self.inference.trees(trees))[index]

    def score_tokens(self, sequences: Sequence[Tokens], *, complete: bool = False) -> list[float]:
        """The first output of each token sequence, of several heads their mean; see `outputs`.

        Args:
            complete: adds what a sequence lacks of a BOS, an end of turn and what follows it; otherwise it is refused.

        Raises:
            BadConversation: a sequence that does not begin and end as the template's renderings do.
            ValueError: a token that the embedding has no row for.
        """
        outputs = self.outputs([self._whole(*each, complete) for each in enumerate(sequences)])
        return (self.decode(outputs)["score"] if self.has_spread else outputs[:, 0]).tolist()

    def score_texts(self, texts: Sequence[str], *, complete: bool = False) -> list[float]:
        """The same for texts, which are tokenized without adding special tokens."""
        if complete:
            texts = [self._framed(index, self.frame.completed_text, text) for index, text in enumerate(texts)]
        return self.score_tokens(self.chat.encode(texts))

    @functools.cached_property
    def frame(self) -> Frame:
        """How renderings begin and end."""
        return Frame(self.chat)

    def _whole(self, index: int, ids: Tokens, complete: bool) -> Tokens:
        if not len(ids) or max(ids) >= self.config.vocab:
            return ids  # `outputs` says what is wrong
        whole = self._framed(index, self.frame.completed_ids, ids) if complete else ids
        self._framed(index, self.frame.check, whole)
        return whole

    @staticmethod
    def _framed(index: int, use: Callable[[Any], Any], given: Any) -> Any:
        try:
            return use(given)
        except NotWhole as problem:
            raise BadConversation(index, str(problem)) from None

    def replay(self, golden: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """Outputs [scored tokens, A] of a contract's golden rows.

        Those of a language model are [1, 1]: the mean negative log-likelihood of the tokens after the first.
        """
        return self.inference.trees([build_tree([row["token_ids"]]).scored([row["at"]]) for row in golden])

    def norms(self) -> dict[str, list[float]]:
        """The Euclidean norm of every parameter, by its path; of those of the layers one number for each layer."""
        names = [(sharding.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(self.params)]
        with jax.set_mesh(self.mesh):
            found = jax.device_get(_norms(dict(names), sharding.named(self.mesh)))
        return {name: list(map(float, np.atleast_1d(x))) for name, x in found.items()}

    def answers(self, groups: Groups, progress: Callable[[int], None] = lambda done: None) -> list[np.ndarray]:
        """Outputs [scored tokens, A] of each group, in the order of its scored tokens; see also `replay`.

        Args:
            groups: read with this model's tokenizer and template.
            progress: is told now and then how many groups are done. Asked about the same groups again, as a member
                is after its ensemble, the model remembers what it said.
        """
        if self._answered is not None and self._answered[0] is groups:
            progress(len(groups))
            return self._answered[1]
        outputs: list[np.ndarray] = []
        for start in range(0, len(groups), GROUPS):
            trees = [groups.group(i).tree for i in range(start, min(start + GROUPS, len(groups)))]
            outputs += self.inference.trees(trees, lambda done: progress(start + done))  # noqa: B023
        self._answered = groups, outputs
        return outputs

    def outcomes(self, groups: Groups) -> dict[str, np.ndarray]:
        """The objective's outcomes (objectives/base.py) of groups of its own task."""
        assert self.objective is not None
        return self.inference.outcomes(groups, self.objective, self.own)

    def _expect(self, architecture: str) -> None:
        if self.architecture == architecture:
            return
        calls = {
            "SequenceClassification": "it scores whole conversations; call `score`",
            "TokenClassification": "it scores the steps of a response; call `steps`",
            "CausalLM": "it writes its verdicts; generate with transformers or a server, and read them with "
            "rmjax.judging.verdicts.parse_verdict",
        }
        raise ValueError(f"this model is a {self.architecture}: {calls[self.architecture]}")

    def _groups(self, examples: Sequence[Example]) -> list[Labelled]:
        made = self.chat.groups(examples, keep=True)
        for index, group in enumerate(made):
            if isinstance(group, BadRow):
                raise BadConversation(index, group.detail)
        return made  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a model is, from config.json and its contract, or from its run; see RewardModel."""

    architecture: str
    labels: tuple[str, ...]
    contract: dict[str, Any] | None
    objective: Objective | None
    own: dict[str, np.ndarray]
    stops: tuple[int, ...] = ()
    longest: int = 0

    @classmethod
    def trained(
        cls, objective: Objective, own: Mapping[str, Any], stops: tuple[int, ...] = (), longest: int = 0
    ) -> "Kind":
        """Of a run: its objective, the parameters of the objective itself, and what its model starts from says."""
        return cls(objective.architecture, objective.labels, None, objective, dict(own), stops, longest)

    @classmethod
    def of(cls, directory: Path, values: Mapping[str, Any], writes: bool = False) -> "Kind":
        """Reads it; with `writes`, of a directory without a contract that of a language model.

        Raises:
            ValueError: a contract that cannot be read.
        """
        longest = longest_context(values)
        terms = contract.read(directory)
        named = str(next(iter(values.get("architectures") or ()), "ForSequenceClassification")).rpartition("For")[2]
        architecture = named if named in ARCHITECTURES else "SequenceClassification"
        names = _labels(values) or {str(i): f"LABEL_{i}" for i in range(_outputs(directory, values))}
        if terms and terms.get("labels"):  # an adapter has no config.json that says them
            names = {str(i): name for i, name in enumerate(terms["labels"])}
        labels = () if architecture == "CausalLM" else tuple(names[i] for i in sorted(names, key=int))
        if terms is None and writes:
            return cls("CausalLM", (), None, None, {}, hf.generation_stops(directory, values), longest)
        if terms is None:
            if architecture == "CausalLM":  # most likely a base model, which has no head to score with
                architecture, labels = "SequenceClassification", ("LABEL_0",)
            return cls(architecture, labels, None, None, {}, (), longest)
        own = {name: np.array(value, np.float32) for name, value in terms["objective_params"].items()}
        stops = hf.generation_stops(directory, values) if architecture == "CausalLM" else ()
        return cls(architecture, labels, terms, objectives.make(terms["objective"]), own, stops, longest)


def longest_context(values: Mapping[str, Any]) -> int:
    """The tokens that a model knows positions for, by its config.json; 0 where that does not say it."""
    return int(values.get("max_position_embeddings") or 0)


def _labels(values: Mapping[str, Any]) -> dict[str, str]:
    """The names of the head's outputs in config.json, by their numbers; {} if it has none.

    Raises:
        ValueError: they are no names by number.
    """
    names = values.get("id2label") or {}
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        raise ValueError(f'config.json has id2label {json.dumps(names)[:80]}, expected names by number: {{"0": ...}}')
    return {str(number): str(name) for number, name in names.items()}


def _outputs(directory: Path, values: Mapping[str, Any]) -> int:
    """Outputs of the head of a directory whose config.json names none: transformers leaves out its default of two."""
    return int(values.get("num_labels") or hf.head_outputs(directory) or 1)


@functools.partial(jax.jit, static_argnames="out")
def _norms(params: dict[str, jax.Array], out: jax.sharding.Sharding) -> dict[str, jax.Array]:
    def norm(name: str, x: jax.Array) -> jax.Array:
        axes = tuple(range(1 if "/layers/" in f"/{name}" else 0, x.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes))

    return jax.lax.with_sharding_constraint({name: norm(name, x) for name, x in params.items()}, out)


def load_checked(
    path: str | Path,
    *,
    dtype: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    writes: bool = False,
) -> RewardModel:
    """Like RewardModel.load, but first replays the score contract, if there is one, in float32: norms and golden rows.

    Raises:
        ValueError: as RewardModel.load; or a weight or the score of a golden row is not that of the contract.
    """
    directory = hf.resolve(path)
    load = functools.partial(RewardModel.load, directory, template_kwargs=template_kwargs, mesh=mesh, writes=writes)
    terms = contract.read(directory)
    if terms is None:
        return load(dtype=dtype)
    model = load(dtype="float32")
    contract.check_weights(terms, model.norms())
    contract.check_outputs(terms, model.replay(terms["golden"]))
    if heads.compute_dtype(dtype) != "float32":
        del model  # makes room
        model = load(dtype=dtype)
    return model
