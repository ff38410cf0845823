"""Samples from a language model: prompts in, K responses of each out; token ids, never text.

A group of K slots belongs to one prompt, whose keys are read once for all of them. Two programs do everything: one
reads the prompts of free groups, the other writes up to CHUNK tokens in every slot. Between chunks the host takes what
is finished and gives free groups the next prompts, the longest first. Nothing depends on timing, and what is drawn for
a token depends on the seed, its prompt's `row`, the response and the token's place alone: never on the slot, or on what
stands beside it. Few prompts get few groups, and programs of other sizes may round the last digits otherwise.

Shape letters: P groups, K slots of a group, S = P * K slots, T tokens of a prompt, C tokens that a slot has room for,
V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmjax import sharding
from rmjax.kernels.tree_attention import choose
from rmjax.models.config import ModelConfig
from rmjax.models.decoding import KeysValues, Writer, layers_apart, merged

CHUNK = 32  # tokens that are written between two looks of the host
LEAST = 64  # tokens that a slot, or a prompt, has room for at least; rooms are powers of two, so few are compiled
PREFILL_TOKENS = {"cpu": 4_096}  # of the prompts that are read at once
DEFAULT_PREFILL_TOKENS = 32_768
STOP, LENGTH = "stop", "length"  # how a response ends


class Prompt(NamedTuple):
    """What responses are drawn for."""

    tokens: Sequence[int]
    row: int  # a number of its own, for its random numbers


class Response(NamedTuple):
    """What was drawn."""

    tokens: np.ndarray  # int32 [n], with the one that stopped it
    log_probs: np.ndarray  # float32 [n], in nats, by the model itself: before temperature, top_k and top_p
    finish: str  # STOP or LENGTH


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How responses are drawn.

    Raises:
        ValueError: a value out of its range.
    """

    responses: int = 1  # K, of each prompt
    max_tokens: int = 1024  # of a response
    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    top_k: int = 0  # only so many of the likeliest tokens; 0 is all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"responses": 1, "max_tokens": 1, "top_k": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least {low}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}, expected a number from 0 (the likeliest token) on")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}, expected a probability above 0, up to 1")


class Sampler:
    """A language model that draws responses; see the module."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        mesh: jax.sharding.Mesh,
        dtype: str,
        drawing: Drawing,
        *,
        stops: Sequence[int],
        groups: int,
        chunk: int = CHUNK,
    ):
        """Takes the parameters as `load` does.

        Args:
            config: shapes of the model.
            params: of a LanguageModel, or what `writing_params` made of them; None where `load` follows.
            mesh: of this process's own devices.
            dtype: of the computation, float32 or bfloat16.
            drawing: how responses are drawn.
            stops: token ids that end a response.
            groups: P, prompts that are under way at a time, at most.
            chunk: tokens that are written between two looks.
        """
        self.config, self.mesh, self.dtype, self.drawing = config, mesh, dtype, drawing
        self._row_devices = rows = mesh.shape["data"] * mesh.shape["fsdp"]
        self.groups, self.chunk = -(-groups // rows) * rows, min(chunk, drawing.max_tokens)
        form, _ = choose("auto", mesh.devices.flat[0].platform, config.head_dim, dtype)
        self._writer = Writer(config, dtype, form)
        self._stops = np.array(sorted(set(stops)) or [-1], np.int32)
        self._rows = sharding.named(mesh, sharding.BATCH)
        if params is not None:
            self.load(params)

    def load(self, params: Any) -> None:
        """Writes with these parameters, of the same shapes, from the next call of `responses` on.

        Those of before are let go first, and nothing is compiled again. Arrays that are on the mesh as they are read
        are shared, not copied: where a step of training has donated them, load its new ones before `responses`.

        Args:
            params: of a LanguageModel, or what `writing_params` made of them.
        """
        self.params: Any = None
        self.params = writing_params(params, self.config, self.mesh, self.dtype)

    def programs(self, params: Any, prompt_tokens: int) -> dict[str, Any]:
        """What `responses` runs, compiled for prompts and responses of the greatest length; nothing is run.

        Args:
            params: shapes of a LanguageModel's parameters.
            prompt_tokens: of a prompt.

        Returns:
            By name the programs that read prompts and write responses.
        """
        c, drawing, p = self.config, self.drawing, self.groups
        slots, rooms = p * drawing.responses, (room(prompt_tokens - 1), room(drawing.max_tokens))
        cast = lambda x: jax.tree.map(lambda y: y.astype(self.dtype), layers_apart(x, c.layers))
        apart = jax.eval_shape(cast, params)
        params = sharding.with_shardings(apart, sharding.param_shardings(self.mesh, apart, sharding.WRITING_RULES))

        def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, dtype)

        def cache(n: int, length: int) -> list[Any]:
            each = jax.ShapeDtypeStruct((n, c.kv_heads, length, c.head_dim), self.dtype, sharding=self._rows)
            return [(each, each)] * c.layers

        prompt, own, at_once = cache(p, rooms[0]), cache(slots, rooms[1]), self._read_at_once(p, rooms[0])
        state = (
            *(shape(p), shape(p, dtype=jnp.uint32), shape(slots), shape(slots), shape(slots, dtype=jnp.bool_)),
            self._stops,
        )
        keys = {"drawing": dataclasses.replace(drawing, seed=0), "chunk": self.chunk}
        with jax.set_mesh(self.mesh):
            read = _read.lower(self._writer, params, prompt, shape(at_once, rooms[0]), shape(at_once), shape(at_once))
            write = _write.lower(self._writer, params, prompt, own, state, shape(dtype=jnp.uint32), **keys)
            return {"reads prompts": read.compile(), "writes answers": write.compile()}

    def _read_at_once(self, groups: int, prompt_room: int) -> int:
        """Prompts that are read by one call."""
        budget = PREFILL_TOKENS.get(self.mesh.devices.flat[0].platform, DEFAULT_PREFILL_TOKENS)
        return min(groups, max(1, budget // prompt_room))

    def free(self) -> None:
        """Lets the parameters go, to make room; `load` comes before the next responses."""
        self.params = None

    def groups_of(self, prompts: int) -> int:
        """The groups for so many prompts: a power of two on each row of devices, so few are compiled, or `groups`."""
        each = -(-prompts // self._row_devices)
        return min(self.groups, self._row_devices << max(0, each - 1).bit_length())

    def responses(
        self, prompts: Sequence[Prompt], ended: Callable[[np.ndarray], int | None] = lambda tokens: None
    ) -> Iterator[tuple[int, list[Response]]]:
        """The index of each prompt and its K responses, as they are done.

        Args:
            prompts: each of at least one token.
            ended: says of the tokens of a response that goes on, after each chunk, how many are left of it if it ends
                there; None lets it go on.
        """
        if not prompts:
            return
        longest = max(len(prompt.tokens) for prompt in prompts)
        waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].tokens), i))
        with jax.set_mesh(self.mesh):
            state = _State(self, self.groups_of(len(prompts)), room(longest - 1))
            while waiting or state.busy:
                if waiting and state.free:
                    waiting = state.begin(prompts, waiting)
                yield from state.write(ended)


class _State:
    """The groups under way, on the devices and on the host."""

    def __init__(self, sampler: Sampler, groups: int, prompt_room: int):
        self.s, self.groups, p, k = sampler, groups, groups, sampler.drawing.responses
        self.prompt_room, self.own_room = prompt_room, room(sampler.chunk)
        self.owner: list[int | None] = [None] * p  # the prompt of each group
        self.prompt_keys, self.row = np.zeros(p, np.int32), np.zeros(p, np.uint32)
        self.last, self.own_keys = np.zeros(p * k, np.int32), np.zeros(p * k, np.int32)
        self.live = np.zeros(p * k, bool)
        self.pieces: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(p * k)]
        self.finish = [LENGTH] * (p * k)
        self.prompt = self._empty(p, prompt_room)
        self.own = self._empty(p * k, self.own_room)

    def _empty(self, rows: int, length: int) -> list[KeysValues]:
        c = self.s.config
        shape = (rows, c.kv_heads, length, c.head_dim)
        return _empty(c.layers, shape, self.s.dtype, self.s._rows)

    @property
    def busy(self) -> bool:
        return any(owner is not None for owner in self.owner)

    @property
    def free(self) -> list[int]:
        return [g for g, owner in enumerate(self.owner) if owner is None]

    def begin(self, prompts: Sequence[Prompt], waiting: Sequence[int]) -> list[int]:
        """Gives free groups the first of the waiting prompts; the others are left."""
        begun = list(zip(self.free, waiting))
        # Prompts are read with others that need as much room, not with room for the longest of all.
        for wide, these in itertools.groupby(begun, lambda x: room(len(prompts[x[1]].tokens) - 1)):
            while some := list(itertools.islice(these, self.s._read_at_once(self.groups, wide))):
                self._read(prompts, some, wide)
        return list(waiting[len(begun) :])

    def _read(self, prompts: Sequence[Prompt], some: Sequence[tuple[int, int]], wide: int) -> None:
        """Reads the prompts of some groups, (group, index of the prompt) each, with room for `wide` tokens."""
        k, at_once = self.s.drawing.responses, self.s._read_at_once(self.groups, wide)
        tokens, lengths = np.zeros((at_once, wide), np.int32), np.zeros(at_once, np.int32)
        where = np.full(at_once, self.groups, np.int32)  # outside: dropped
        for i, (g, index) in enumerate(some):
            *before, last = prompts[index].tokens
            tokens[i, : len(before)], lengths[i], where[i] = before, len(before), g
            self.owner[g], self.prompt_keys[g], self.row[g] = index, len(before), prompts[index].row
            mine = slice(g * k, (g + 1) * k)
            self.last[mine], self.own_keys[mine], self.live[mine] = last, 0, True
            for slot in range(g * k, (g + 1) * k):
                self.pieces[slot], self.finish[slot] = [], LENGTH
        self.prompt = _read(self.s._writer, self.s.params, self.prompt, tokens, lengths, where)

    def write(self, ended: Callable[[np.ndarray], int | None]) -> Iterator[tuple[int, list[Response]]]:
        """Writes a chunk; yields what is done by then."""
        drawing, chunk = self.s.drawing, self.s.chunk
        self._make_room(min(int(self.own_keys[self.live].max(initial=0)) + chunk, drawing.max_tokens))
        before = self.own_keys.copy()
        self.own, *outputs = _write(
            self.s._writer,
            self.s.params,
            self.prompt,
            self.own,
            (self.prompt_keys, self.row, self.last, self.own_keys, self.live, self.s._stops),
            np.uint32(drawing.seed),
            drawing=dataclasses.replace(drawing, seed=0),
            chunk=chunk,
        )
        tokens, log_probs, stopped, steps = jax.device_get(outputs)
        for slot in np.flatnonzero(self.live):
            new = min(int(steps), drawing.max_tokens - int(before[slot]))
            new = min(new, int(stopped[slot]) + 1)
            self.pieces[slot].append((tokens[:new, slot].copy(), log_probs[:new, slot].copy()))
            self.own_keys[slot], self.last[slot] = before[slot] + new, tokens[new - 1, slot]
            if stopped[slot] < new:
                self.finish[slot], self.live[slot] = STOP, False
            elif (left := ended(np.concatenate([t for t, _ in self.pieces[slot]]))) is not None:
                self.finish[slot], self.live[slot], self.own_keys[slot] = STOP, False, left
            elif self.own_keys[slot] >= drawing.max_tokens:
                self.live[slot] = False
        k = drawing.responses
        for g, owner in enumerate(self.owner):
            if owner is not None and not self.live[g * k : (g + 1) * k].any():
                self.owner[g] = None
                yield owner, [self._response(slot) for slot in range(g * k, (g + 1) * k)]

    def _response(self, slot: int) -> Response:
        tokens, log_probs = map(np.concatenate, zip(*self.pieces[slot]))
        n = int(self.own_keys[slot])
        return Response(tokens[:n], log_probs[:n], self.finish[slot])

    def _make_room(self, tokens: int) -> None:
        if (wanted := room(tokens)) != self.own_room:
            self.own = _resized(self.own, wanted)
            self.own_room = wanted


def room(tokens: int) -> int:
    """The room for so many tokens."""
    return max(LEAST, 1 << max(0, tokens - 1).bit_length())


def writing_params(params: Any, config: ModelConfig, mesh: jax.sharding.Mesh, dtype: str) -> Any:
    """The parameters of a LanguageModel as a Sampler reads them: layers apart, in this dtype, none split over rows.

    An array that is so already is the same array in the result, and what this made is returned as it is.
    """
    if "each" in params["decoder"]:
        return params
    with jax.set_mesh(mesh):  # training has set its own, which may reach across processes
        made = _apart(params, layers=config.layers, dtype=dtype, mesh=mesh)
    given = {name: x for name, x in params["decoder"].items() if name not in ("layers", "last")}
    given["each"] = [*made["decoder"]["each"][:-1], params["decoder"]["last"]]
    return jax.tree.map(_given_if_equal, {**params, "decoder": given}, made)


def _given_if_equal(given: jax.Array, made: jax.Array) -> jax.Array:
    same = given.dtype == made.dtype and given.sharding.is_equivalent_to(made.sharding, made.ndim)
    return given if same else made


@functools.partial(jax.jit, static_argnames=("layers", "dtype", "mesh"))
def _apart(params: Any, *, layers: int, dtype: str, mesh: jax.sharding.Mesh) -> Any:
    apart = jax.tree.map(lambda x: x.astype(dtype), layers_apart(params, layers))
    return jax.lax.with_sharding_constraint(apart, sharding.param_shardings(mesh, apart, sharding.WRITING_RULES))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(layers: int, shape: tuple[int, ...], dtype: str, placed: jax.sharding.Sharding) -> list[KeysValues]:
    make = lambda: jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), placed)
    return [(make(), make()) for _ in range(layers)]


@functools.partial(jax.jit, static_argnums=1)
def _resized(own: list[KeysValues], length: int) -> list[KeysValues]:
    def one(x: jax.Array) -> jax.Array:
        more = max(0, length - x.shape[2])
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))[:, :, :length]

    return jax.tree.map(one, own)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(
    writer: Writer, params: Any, prompt: list[KeysValues], tokens: jax.Array, lengths: jax.Array, where: jax.Array
) -> list[KeysValues]:
    """The prompts' keys and values with those of groups `where` replaced; a group that there is not is dropped."""
    with _precise(writer):
        found = writer.read_prompts(params, tokens, lengths)
    put = lambda old, new: old.at[where, :, : tokens.shape[1]].set(new, mode="drop")
    return jax.tree.map(put, prompt, found)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3, static_argnames=("drawing", "chunk"))
def _write(
    writer: Writer,
    params: Any,
    prompt: list[KeysValues],
    own: list[KeysValues],
    state: tuple[jax.Array, ...],
    seed: jax.Array,
    *,
    drawing: Drawing,
    chunk: int,
) -> tuple[list[KeysValues], jax.Array, jax.Array, jax.Array, jax.Array]:
    """Up to `chunk` tokens of each slot that is live, fewer where none is left.

    Returns:
        The slots' keys and values; int32 tokens and float32 log-probabilities [chunk, S]; int32 [S], the step at which
        a slot drew a stop, `chunk` if it did not; and the number of steps.
    """
    prompt_keys, row, last, own_keys, live, stops = state
    slots, k = len(last), drawing.responses
    fold = jax.vmap(jax.random.fold_in)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.repeat(row, k))
    keys = fold(keys, jnp.tile(jnp.arange(k, dtype=jnp.uint32), slots // k))

    def under_way(carry: Any) -> jax.Array:
        return (carry[0] < chunk) & carry[3].any()

    def one(carry: Any) -> Any:
        step, new, last, live, tokens, log_probs, stopped = carry
        with _precise(writer):
            logits, new = writer.step(params, last, prompt, prompt_keys, own, own_keys, new, step)
        drawn = draw(logits, fold(keys, (own_keys + step).astype(jnp.uint32)), drawing)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=1)[:, 0]
        stops_here = live & (drawn[:, None] == stops).any(1)
        live &= ~stops_here & (own_keys + step + 1 < drawing.max_tokens)
        return (
            *(step + 1, new, drawn, live, tokens.at[step].set(drawn), log_probs.at[step].set(log_prob)),
            jnp.where(stops_here, step, stopped),
        )

    new = jax.tree.map(lambda x: jnp.zeros_like(x, shape=(*x.shape[:2], chunk, x.shape[3])), own)
    empty = jnp.zeros((chunk, slots), jnp.int32), jnp.zeros((chunk, slots), jnp.float32)
    carry = (jnp.int32(0), new, last, live, *empty, jnp.full(slots, chunk, jnp.int32))
    steps, new, *_, tokens, log_probs, stopped = jax.lax.while_loop(under_way, one, carry)
    return merged(own, own_keys, new), tokens, log_probs, stopped, steps


def draw(logits: jax.Array, keys: jax.Array, drawing: Drawing) -> jax.Array:
    """int32 [S]: a token for each row of float32 logits [S, V], drawn with its own key.

    As in transformers, top_k and then top_p cut off what temperature has made of the distribution.
    """
    if drawing.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / drawing.temperature
    if drawing.top_k and drawing.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, drawing.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if drawing.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        above = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.min(jnp.where(above < drawing.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _precise(writer: Writer) -> Any:
    """Accelerators round float32 products to TF32 or bfloat16 unless told otherwise."""
    return jax.default_matmul_precision("highest" if writer.dtype == "float32" else None)
