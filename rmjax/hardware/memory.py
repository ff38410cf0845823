"""The memory that a step needs by the compiler's own account, and the cheapest settings that fit."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from rmjax.models.config import ModelConfig
from rmjax.models.decoder import saved_names

# What "auto" tries, by what the backward pass recomputes: norms, rotations and the MLP's product; also gate and up
# (reckoned 19 % more operations); all but attention (about 30 %); all (33 %). Not "none": to keep what is computed in
# one pass over memory takes a pass to write and one to read it, and twice the memory; kernels in the compute dtype too.
POLICIES = ("q,k,v,attention,mid,gate,up", "q,k,v,attention,mid", "attention", "full")

# Tokens of a micro-batch on a device. Products of 8,192 tokens keep any accelerator busy, and with fewer than that the
# gradients' sums are read and written too often; more only need more memory.
TOKENS = 16_384

# Of the limit that a device reports; the rest is for what the compiler does not see: fragments, the next batch.
SHARE = 0.95


@dataclasses.dataclass(frozen=True)
class Fit:
    """A compiled step that fits."""

    remat: str  # the policy, as `config.model.remat`
    micro_rows: int  # rows of a micro-batch on a device
    compiled: Any
    line: str  # the choice and its needs, for people


def program_bytes(compiled: Any) -> tuple[int, int]:
    """Bytes on each device: arguments and results together, and temporaries."""
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes  # what is donated is counted once
    return memory.argument_size_in_bytes + new, memory.temp_size_in_bytes


def limit(device: Any) -> int:
    """Bytes that a program may use on this device; of a CPU its share of the machine's."""
    if stats := device.memory_stats() if device.platform != "cpu" else None:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def kept(model: ModelConfig, remat: str) -> int:
    """Numbers that a layer keeps of each token for the backward pass, at least."""
    heads, kv_heads = model.heads * model.head_dim, model.kv_heads * model.head_dim
    widths = {"q": heads, "k": kv_heads, "v": kv_heads, "attention": heads, "mid": model.width}
    widths |= {"gate": model.mlp, "up": model.mlp, "lse": 0}
    names = widths if remat == "none" else saved_names(remat)
    return model.width + sum(widths[name] for name in names)  # its input is always kept


def candidates(remat: str, micro_rows: int, row_tokens: int, most: int) -> Iterator[tuple[str, int]]:
    """Policies and rows of a micro-batch, the cheapest first: recomputing costs more than smaller products.

    `remat` and `micro_rows` are the config's: "auto" is every policy; 0 is as many rows as have TOKENS tokens, or half
    of them, and fewer only where everything is recomputed. A row has `row_tokens` tokens, a device's step `most` rows.
    """
    policies = POLICIES if remat == "auto" else (remat,)
    large = micro_rows or max(1, min(most, TOKENS // row_tokens))
    if not micro_rows:  # rather a number that leaves no row of the last micro-batch empty
        large = next((n for n in range(large, (large - 1) // 2, -1) if most % n == 0), large)
    for policy in policies:
        rows = large
        while rows >= 1:
            yield policy, rows
            if micro_rows or rows == 1 or (policy != policies[-1] and rows < large):
                break
            rows //= 2


def settle(
    choices: Iterator[tuple[str, int]],
    compile_step: Callable[[str, int], Any],
    least: Callable[[str, int], int],
    most: int,
) -> Fit:
    """Compiles one choice after the other, until one fits into a device with `most` bytes.

    A choice that needs more by `least`, bytes for sure, is not compiled.

    Raises:
        ValueError: none fits; says what is missing and what to change.
    """
    start, tried = time.perf_counter(), 0
    for remat, rows in choices:
        needed = least(remat, rows)
        if needed > SHARE * most:
            continue
        tried += 1
        try:
            compiled = compile_step(remat, rows)
        except jax.errors.JaxRuntimeError as error:  # the compiler for TPUs refuses what does not fit
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        fixed, temporary = program_bytes(compiled)
        needed = fixed + temporary
        if needed <= SHARE * most:
            line = (
                f"step: remat {remat!r}, micro-batches of {rows} rows per device; per device {size(fixed)} of "
                f"parameters, optimizer state and batch, {size(temporary)} of temporaries, together {size(needed)} of "
                f"{size(most)} by the compiler's account; {tried} compiled in {time.perf_counter() - start:.1f} s"
            )
            return Fit(remat, rows, compiled, line)
    raise ValueError(
        f"a step needs {size(needed)} of a device that has {size(most)}, with config.model.remat={remat!r} and "
        f"config.plan.micro_rows={rows}; use more devices, config.model.remat='auto', config.plan.micro_rows=0, "
        "a shorter config.plan.row_tokens, config.model.param_dtype='bfloat16', or config.optim.state_on='host'"
    )


def size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
