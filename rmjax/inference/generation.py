"""GenerativeModel: load a causal language model and let it write."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmjax import sharding
from rmjax.batches.chat import Chat
from rmjax.data.records import BadRow, Conversation
from rmjax.inference import runs
from rmjax.inference.reward_model import BadConversation, RewardModel, load_checked
from rmjax.inference.sampler import STOP, Drawing, Prompt, Response, Sampler, writing_params
from rmjax.models import hf
from rmjax.models.config import ModelConfig

GROUPS = {"cpu": 8}  # prompts under way at a time
DEFAULT_GROUPS = 64


@dataclasses.dataclass(frozen=True)
class Written:
    """A response.

    Attributes:
        text: without what stopped it.
        tokens: int32 [n], with the id that stopped it.
        log_probs: float32 [n] in nats, of the model itself: before temperature, top_k and top_p.
        finish: "stop", or "length" where it was cut off.
    """

    text: str
    tokens: np.ndarray
    log_probs: np.ndarray
    finish: str


class GenerativeModel:
    """A language model that writes responses.

    Attributes:
        chat: tokenizer and chat template.
        config: shapes of the model.
        params: its parameters on `mesh`, as `sampler.writing_params` makes them; all its samplers share them.
        dtype: of the computation.
        stops: token ids that end a response.
        longest: tokens of a prompt and its response together; 0 where config.json does not say it.
    """

    def __init__(
        self,
        chat: Chat,
        config: ModelConfig,
        params: Any,
        mesh: jax.sharding.Mesh,
        dtype: str,
        *,
        stops: Sequence[int] = (),
        longest: int = 0,
    ):
        """`params` are those of a LanguageModel, `stops` ids beside those of the tokenizer and the template."""
        self.chat, self.config, self.mesh, self.dtype = chat, config, mesh, dtype
        self.stops, self.longest = sorted({*chat.stops, *stops}), longest
        self.params: Any = None
        self.replace_params(params)

    def replace_params(self, params: Any) -> None:
        """Writes with these parameters from now on; samplers made before are given theirs by `Sampler.load`."""
        self.params = None  # makes room
        self.params = writing_params(params, self.config, self.mesh, self.dtype)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        mesh: Any = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> "GenerativeModel":
        """Loads a causal language model, a Hugging Face directory or hub id of a supported family.

        Args:
            path: directory or hub id with weights, config.json and tokenizer.
            dtype: of the computation: float32, bfloat16, or auto: float32 on CPUs and bfloat16 elsewhere.
            mesh: of this process's devices; default is all of them on `data`.
            template_kwargs: arguments of the chat template, where no score contract says them.

        Raises:
            ValueError: a model with a score head, an unsupported family, weights that do not match the config, or a
                tokenizer without a usable template.
        """
        directory = hf.resolve(path)
        values = hf.read_config(directory)
        named = str(next(iter(values.get("architectures") or ()), ""))
        if named.endswith(("ForSequenceClassification", "ForTokenClassification")):
            raise ValueError(f"{path} is a {named}: it scores, and does not write; name a causal language model")
        mesh = mesh or _default_mesh()
        return cls.of(load_checked(directory, dtype=dtype, template_kwargs=template_kwargs, mesh=mesh, writes=True))

    @classmethod
    def of(cls, judge: RewardModel) -> "GenerativeModel":
        """The model of a judge that writes, with the judge's stops and longest context.

        It has parameters of its own where those of the judge are not as a sampler reads them; where the judge computes
        nothing more, `judge.drop_params()` makes room.

        Raises:
            ValueError: a judge that does not write.
        """
        if judge.architecture != "CausalLM":
            raise ValueError(f"a {judge.architecture} scores, and does not write; name a causal language model")
        parts = judge.chat, judge.config, judge.params, judge.mesh, judge.dtype
        return cls(*parts, stops=judge.stops, longest=judge.longest)

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        tools: Sequence[Sequence[Any] | None] | None = None,
        rows: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        groups: int = 0,
        **drawing: Any,
    ) -> list[list[Written]]:
        """Writes responses to conversations.

        Args:
            conversations: each a list of {"role", "content"} that the assistant is to answer.
            tools: for each conversation its tool descriptions for the chat template, or None.
            rows: a number for each, of its random numbers; default is its place. With the same seed and number a
                conversation gets the same responses, whatever stands beside it.
            stop: texts that end a response, which is cut off before them.
            groups: conversations that are under way at a time, at most; 0 chooses by the device.
            drawing: the fields of sampler.Drawing: responses, max_tokens, temperature, top_k, top_p, seed.

        Returns:
            For each conversation its responses.

        Raises:
            BadConversation: one that the template refuses, that is too long, or with a token that the model lacks.
            ValueError: values out of their range.
        """
        rows = range(len(conversations)) if rows is None else rows
        tools = [None] * len(conversations) if tools is None else tools
        sampler = self.sampler(Drawing(**drawing), groups)
        prompts = self.prompts(conversations, tools, rows)
        for index, prompt in enumerate(prompts):
            if why := self.too_long(prompt, sampler.drawing):
                raise BadConversation(index, why)
        return self.write(sampler, prompts, stop)

    def prompts(
        self, conversations: Sequence[Conversation], tools: Sequence[Sequence[Any] | None], rows: Sequence[int]
    ) -> list[Prompt]:
        """What the sampler is asked; BadConversation as of `generate`, but any length is let through."""
        texts = []
        for index, (conversation, described) in enumerate(zip(conversations, tools, strict=True)):
            try:
                texts.append(self.chat.render_prompt(conversation, described))
            except BadRow as bad:
                raise BadConversation(index, bad.detail) from None
        encoded = self.chat.encode(texts)
        for index, ids in enumerate(encoded):
            if (largest := max(ids, default=0)) >= self.config.vocab:
                raise BadConversation(index, f"token {largest} has no row in the embedding of {self.config.vocab}")
        return [Prompt(list(map(int, ids)), row) for ids, row in zip(encoded, rows, strict=True)]

    def too_long(self, prompt: Prompt, drawing: Drawing) -> str:
        """Why a prompt and its response do not fit into the model; "" if they do."""
        tokens, most = len(prompt.tokens), drawing.max_tokens
        if not self.longest or tokens + most <= self.longest:
            return ""
        return f"its {tokens:,} tokens and a response of up to {most:,} are more than the model's {self.longest:,}"

    def write(self, sampler: Sampler, prompts: Sequence[Prompt], stop: Sequence[str] = ()) -> list[list[Written]]:
        """The responses to each prompt."""
        ended = functools.partial(self._ended, stop) if stop else lambda tokens: None
        found = dict(sampler.responses(prompts, ended))
        return [[self.written(response, stop) for response in found[i]] for i in range(len(prompts))]

    def sampler(self, drawing: Drawing, groups: int = 0) -> Sampler:
        """The engine, which takes token ids."""
        groups = groups or default_groups()
        return Sampler(self.config, self.params, self.mesh, self.dtype, drawing, stops=self.stops, groups=groups)

    def _text(self, tokens: Any) -> str:
        return self.chat.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True)

    def _ended(self, stop: Sequence[str], tokens: np.ndarray) -> int | None:
        """The fewest tokens whose text has one of the texts; None where all of them have none."""
        found = lambda n: any(text in self._text(tokens[:n]) for text in stop)
        if not found(len(tokens)):
            return None
        low, high = 0, len(tokens)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if found(middle) else (middle, high)
        return high

    def written(self, response: Response, stop: Sequence[str] = ()) -> Written:
        """A response as text, cut off before the first of the texts."""
        tokens = response.tokens
        text = self._text(tokens[:-1] if response.finish == STOP and tokens[-1] in self.stops else tokens)
        cuts = [at for each in stop if (at := text.find(each)) >= 0]
        return Written(text[: min(cuts, default=len(text))], tokens, response.log_probs, response.finish)


def _default_mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())


def default_groups() -> int:
    """Prompts under way at a time, by the device."""
    return GROUPS.get(jax.default_backend(), DEFAULT_GROUPS)


def open_model(path: str, *, dtype: str = "auto", template_kwargs: Mapping[str, Any] | None = None) -> GenerativeModel:
    """The model of a Hugging Face directory or hub id, or of a run's checkpoint; ValueError where it does not write."""
    if (place := runs.find(path)) is None:
        return GenerativeModel.load(path, dtype=dtype, template_kwargs=template_kwargs)
    opened = runs.open_checkpoint(place, _default_mesh())
    return GenerativeModel.of(runs.reward_model(opened.model, opened.chat, opened.params, dtype))
