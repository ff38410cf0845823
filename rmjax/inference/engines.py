"""What answers prompts for reinforcement learning: the sampler of this package, or a file of what another one drew.

Token ids go in; token ids, log-probabilities and how each answer ended come out. Text would have to be tokenized again,
which gives other tokens than those that were drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from rmjax import sharding
from rmjax.inference.reward_model import RewardModel
from rmjax.inference.sampler import LENGTH, STOP, Prompt, Response, Sampler
from rmjax.runtime import files


class Answering(Protocol):
    """What answers prompts."""

    def responses(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[Response]]]:
        """The index of each prompt and its responses, in any order."""
        ...


class Engine(Answering, Protocol):
    """See the module; `Drawer` and `Recorded` are two."""

    def load(self, params: Any) -> None:
        """Takes these parameters from now on."""


class Recorded:
    """Answers from files of JSON lines, as runs write them (`rollouts/STEP.jsonl`): an engine that draws nothing.

    A line has `prompt` (token ids) and `responses`, each with `tokens`, `finish` ("stop" or "length") and, where they
    are known, `log_probs`.
    """

    def __init__(self, path: str | Path):
        """Reads all of it.

        Args:
            path: a file, or a directory of *.jsonl.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a line that cannot be read; names it.
        """
        place = Path(path)
        found = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
        if not found or not all(file.is_file() for file in found):
            raise FileNotFoundError(f"there are no rollouts at {path}; expected a file of JSON lines, or a directory")
        self._path, self._responses = place, dict[bytes, list[Response]]()
        for file in found:
            for number, line in enumerate(files.read_json_lines(file), 1):
                try:
                    key = _key(line["prompt"])
                    self._responses.setdefault(key, []).extend(_response(said) for said in line["responses"])
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{file}, line {number}: {type(error).__name__}: {error}; expected "
                        '{"prompt": [ids], "responses": [{"tokens": [ids], "log_probs": [...], "finish": "stop"}]}'
                    ) from None

    def load(self, params: Any) -> None:
        """Does nothing: what was drawn is drawn."""

    def missing(self, prompts: Sequence[np.ndarray], least: int) -> int:
        """How many prompts have fewer than `least` responses."""
        return sum(len(self._responses.get(_key(prompt), ())) < least for prompt in prompts)

    def responses(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[Response]]]:
        for i, prompt in enumerate(prompts):
            if (found := self._responses.get(_key(prompt.tokens))) is None:
                raise ValueError(f"{self._path} has no answers to the prompt of {len(prompt.tokens)} tokens of row {i}")
            yield i, found


class Drawer:
    """The sampler of this package, on the devices of this process."""

    def __init__(self, sampler: Sampler, merged: Callable[[Any], Any] = lambda params: params):
        """`merged` makes of the parameters that are trained those of a model without adapters."""
        self._sampler, self._merged = sampler, merged

    def load(self, params: Any) -> None:
        params = self._merged(params)
        self._sampler.load(params if jax.process_count() == 1 else local_params(params, self._sampler.mesh))

    def responses(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[Response]]]:
        yield from self._sampler.responses(prompts)
        self._sampler.free()  # makes room for the update


def on_this_process(model: RewardModel) -> RewardModel:
    """The model with the parameters on the devices of this process alone, where there are several."""
    if jax.process_count() == 1:
        return model
    mesh = local_mesh(model.mesh)
    params = local_params(model.params, mesh)
    return RewardModel(model.chat, model.config, params, mesh, model.dtype, model.kind)


def local_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The devices of this process, with the mesh's own `tensor`.

    Raises:
        ValueError: `tensor` reaches across processes.
    """
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    tensor = mesh.shape["tensor"]
    if len(mine) % tensor or any(len({d.process_index for d in line}) > 1 for line in mesh.devices.reshape(-1, tensor)):
        raise ValueError(
            f"config.mesh.tensor={tensor} reaches across processes, of which each draws answers on its own devices; "
            f"lower it to at most {len(mine)}"
        )
    return jax.sharding.Mesh(np.asarray(mine).reshape(-1, 1, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def local_params(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Parameters of all processes on the devices of this one (`local_mesh`): split over `tensor`, else whole."""
    everywhere = jax.tree.leaves(params)[0].sharding.mesh
    wanted = lambda mesh: sharding.param_shardings(mesh, params, sharding.WRITING_RULES)
    whole = jax.jit(lambda x: x, out_shardings=wanted(everywhere))(params)
    here = lambda x, placed: jax.make_array_from_single_device_arrays(
        x.shape, placed, [shard.data for shard in x.addressable_shards]
    )
    return jax.tree.map(here, whole, wanted(mesh))


def _key(tokens: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def _response(said: dict[str, Any]) -> Response:
    tokens = np.array(said["tokens"], np.int32)
    log_probs = said.get("log_probs")
    known = np.full(len(tokens), np.nan, np.float32) if log_probs is None else np.array(log_probs, np.float32)
    if not len(tokens) or tokens.ndim != 1 or known.shape != tokens.shape:
        raise ValueError(f"{tokens.shape} tokens and {known.shape} log_probs")
    if said["finish"] not in (STOP, LENGTH):
        raise ValueError(f"finish is {said['finish']!r}, expected {STOP!r} or {LENGTH!r}")
    return Response(tokens, known, said["finish"])


def answers(engine: Answering, prompts: Sequence[Prompt], responses: int, most: int) -> list[list[Response]]:
    """The responses to each prompt, on every process: each of them draws those of its share of the prompts.

    Args:
        responses: of a prompt; what an engine has more is left out.
        most: tokens of a response.

    Raises:
        ValueError: several processes, and a response that is longer, for which there is no room between them.
    """
    count, mine = jax.process_count(), jax.process_index()
    share = range(mine, len(prompts), count)
    found = dict(engine.responses([prompts[i] for i in share]))
    own = [found[i][:responses] for i in range(len(share))]
    if count == 1:
        return own
    if (longest := max((len(x.tokens) for of_one in own for x in of_one), default=0)) > most:
        raise ValueError(f"an answer has {longest:,} tokens, at most {most:,} are asked (max_tokens)")
    size = -(-len(prompts) // count)
    ids, log_probs = (np.zeros((size, responses, most), kind) for kind in (np.int32, np.float32))
    lengths = np.zeros((size, responses), np.int32)  # below 0 where a response was cut off
    for i, of_one in enumerate(own):
        for k, response in enumerate(of_one):
            n = len(response.tokens)
            ids[i, k, :n], log_probs[i, k, :n] = response.tokens, response.log_probs
            lengths[i, k] = n if response.finish == STOP else -n
    ids, log_probs, lengths = multihost_utils.process_allgather((ids, log_probs, lengths))
    said = lambda p, i, k: Response(
        ids[p, i, k, : abs(lengths[p, i, k])],
        log_probs[p, i, k, : abs(lengths[p, i, k])],
        STOP if lengths[p, i, k] > 0 else LENGTH,
    )
    return [[said(i % count, i // count, k) for k in range(responses)] for i in range(len(prompts))]
