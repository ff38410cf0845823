"""What answers the questions of a run: how many prompts at a time its devices hold, and what that needs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rmjax import sharding
from rmjax.batches.chat import Chat
from rmjax.batches.groups import Groups
from rmjax.hardware import memory
from rmjax.inference import engines, parameters
from rmjax.inference.engines import Drawer, Engine, Recorded
from rmjax.inference.parameters import AbstractModel
from rmjax.inference.sampler import CHUNK, Drawing, Sampler, room
from rmjax.models import heads


def make_engine(config: ConfigDict, model: AbstractModel, chat: Chat, train: Groups, state: Any, limit: int) -> Engine:
    """What answers the questions of a run; see `make_sampler`."""
    if config.rollout.source:
        return Recorded(config.rollout.source)
    sampler = make_sampler(config, model, chat, train, state, limit)
    return Drawer(sampler, lambda params: model.merged(params, sampler.dtype))


def make_sampler(
    config: ConfigDict, model: AbstractModel, chat: Chat, train: Groups, state: Any, limit: int
) -> Sampler:
    """The sampler of a run, with as many prompts at a time as a step has, or as fit beside what training keeps.

    Args:
        state: shapes of parameters and optimizer state, which stay on the devices meanwhile.
        limit: bytes of a device.

    Raises:
        ValueError: not even one prompt fits.
    """
    c, rollout = model.config, config.rollout
    mesh = model.mesh if jax.process_count() == 1 else engines.local_mesh(model.mesh)
    dtype = heads.compute_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)
    item, row_devices = jnp.dtype(dtype).itemsize, mesh.shape["data"] * mesh.shape["fsdp"]
    params = (
        sum(x.size for x in jax.tree.leaves(parameters.model_params(model.plain.shapes))) * item // mesh.shape["tensor"]
    )
    kept = params + sum(sharding.bytes_per_device(state[part]) for part in ("params", "opt"))
    own_keys = room(rollout.max_tokens) + min(CHUNK, rollout.max_tokens)
    keys = room(int(train.longest.max())) + rollout.samples * own_keys
    each = 2 * c.layers * c.kv_heads * c.head_dim * item // mesh.shape["tensor"] * keys
    each += 3 * 4 * rollout.samples * c.vocab  # logits, what is made of them, and noise
    most = rollout.prompts_per_step * int(train.responses.max())
    fit = int(max(memory.SHARE * limit - kept, 0) // each) * row_devices
    if not fit and not rollout.prompts_at_once:
        answers = f"{rollout.samples} answers of up to {rollout.max_tokens:,} tokens"
        raise ValueError(
            f"no prompt fits: a device of {memory.size(limit)} keeps {memory.size(kept)} for training and for the "
            f"sampler's parameters, and {answers} need {memory.size(each)}; use more devices, config.mesh.tensor, a "
            "smaller config.rollout.max_tokens or samples, config.model.param_dtype='bfloat16', or "
            "config.optim.state_on='host'"
        )
    whole = 1 << (min(fit, most) // row_devices).bit_length() - 1 if fit else 0
    at_once = rollout.prompts_at_once or (most if fit >= most else whole * row_devices)
    drawing = Drawing(rollout.samples, rollout.max_tokens, seed=config.seed)
    stops = sorted({*chat.stops, *model.stops})
    return Sampler(c, None, mesh, dtype, drawing, stops=stops, groups=at_once)


def compiled(sampler: Sampler, model: AbstractModel, train: Groups) -> dict[str, Any]:
    """The sampler's programs by name, for the longest question and answers; see `Sampler.programs`."""
    return sampler.programs(parameters.model_params(model.plain.shapes), int(train.longest.max()))


def describe_sampler(sampler: Sampler, programs: Mapping[str, Any], limit: int) -> list[str]:
    """What these programs need of a device, in lines."""
    drawing, lines = sampler.drawing, []
    for name, program in programs.items():
        fixed, temporary = memory.program_bytes(program)
        lines.append(
            f"sampler, {name}: {memory.size(fixed)} of parameters, keys and values, {memory.size(temporary)} of "
            f"temporaries, together {memory.size(fixed + temporary)} of {memory.size(limit)} by the compiler's account"
        )
    slots = f"{sampler.groups} prompts x {drawing.responses} answers of up to {drawing.max_tokens:,} tokens at a time"
    return [f"sampler: {slots}", *lines]
