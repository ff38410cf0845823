"""Where the time of a training step goes on a GPU that is not here, by a roofline over its compiled program.

    JAX_PLATFORMS=cpu python benchmarks/roofline.py h200:1

Compiles the steps of the five columns of benchmarks/RESULTS.md (benchmarks/accelerator.py has their settings) and
prints a Markdown table, a line for each. Of each instruction of the optimized HLO, as often as its loops turn it:

    products    FLOPs of matrix products / 774 TFLOP/s, what such products reach on an H200
    kinds       every other kernel's bytes, of its operands and results, / 4.3 TB/s: fusions that reduce, other fusions,
                copies and slices, the rest; an instruction inside a loop that reads a slice of an operand counts that

Attention is left out: what it costs depends on the data (benchmarks/compiled_kernels.py has its code). Estimates, not
run. Needs rmjax[cuda], no GPU.
"""

import argparse
import collections
import math
import re
from typing import Any

import jax
from accelerator import COLUMNS, Column

from rmjax import config as config_lib
from rmjax import objectives, sharding
from rmjax.batches import prepare
from rmjax.batches.random_groups import RandomGroups, read_lengths
from rmjax.benchmark import side
from rmjax.hardware import collectives as hlo
from rmjax.hardware import topology
from rmjax.inference.parameters import abstract_model
from rmjax.train.step import compile_program

PRODUCTS, BYTES = 774e12, 4.3e12  # of an H200, a second
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"iota", "partition-id", "replica-id", "opt-barrier"}

SLICES = {"dynamic-slice", "slice", "gather"}


def dims(shape: str) -> list[int]:
    """Sizes of the first array of a shape."""
    match = hlo.ARRAY.search(shape)
    return [int(n) for n in match[3].split(",") if n] if match else []


def product_flops(instruction: Any, around: Any, computations: Any) -> float:
    """FLOPs of the matrix products that an instruction is, or holds."""
    found = 0.0
    if instruction.opcode == "fusion":
        inner = computations.get(hlo._named("calls", instruction), {})
        return sum(product_flops(x, inner, computations) for x in inner.values())
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.rest)
    if contracted and (instruction.opcode == "dot" or "gemm" in instruction.rest or "matmul" in instruction.rest):
        left = dims(around[instruction.operands[0]].shape)
        inner_size = math.prod(left[int(n)] for n in re.findall(r"\d+", contracted[1]))
        found = 2.0 * math.prod(dims(instruction.shape)) * inner_size
    return found


def moved(instruction: Any, around: Any, computations: Any) -> int:
    """Bytes of operands and results; of an operand that is only sliced, or updated in part, those of the parts."""
    size = lambda name: hlo.array_bytes(around[name].shape) if name in around else 0
    if instruction.opcode in SLICES:
        return 2 * hlo.array_bytes(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * size(instruction.operands[1])
    if instruction.opcode != "fusion":
        return hlo.array_bytes(instruction.shape) + sum(map(size, set(instruction.operands)))
    inner = computations.get(hlo._named("calls", instruction), {})
    total = 0
    updated = [x for x in inner.values() if x.opcode == "dynamic-update-slice"]
    written = hlo.array_bytes(instruction.shape)
    for x in updated:  # in place: the part is read and written
        written += 2 * hlo.array_bytes(inner[x.operands[1]].shape) - hlo.array_bytes(x.shape)
    targets = {x.operands[0] for x in updated}
    for name, x in inner.items():
        if x.opcode != "parameter" or name in targets:
            continue
        users = [y for y in inner.values() if name in y.operands]
        sliced = users and all(y.opcode in SLICES and y.operands[0] == name for y in users)
        total += sum(hlo.array_bytes(y.shape) for y in users) if sliced else hlo.array_bytes(x.shape)
    return total + max(written, 0)


def kind(instruction: Any) -> str:
    """The column of an instruction that is no product."""
    if instruction.opcode == "fusion":
        return "reducing fusions" if "reduce" in instruction.name else "other fusions"
    return "copies, slices" if instruction.opcode.startswith(("copy", "dynamic", "slice", "trans")) else "the rest"


def seconds(text: str) -> tuple[collections.Counter, collections.Counter, int]:
    """Seconds of a program by kind and by source line; and loops whose turns are unknown, which count once."""
    computations, entry = hlo._parse(text)
    kinds, places, unknown = collections.Counter[str](), collections.Counter[str](), 0

    def walk(name: str, times: int) -> None:
        nonlocal unknown
        around = computations.get(name, {})
        for x in around.values():
            if x.opcode == "while":
                turns = hlo._turns(x, around, computations)
                unknown += turns is None
                walk(hlo._named("body", x), times * (1 if turns is None else turns))
            elif x.opcode in ("call", "conditional"):
                branches = hlo._callees(x)
                for callee in branches[-1:] if x.opcode == "conditional" else branches:
                    walk(callee, times)
            elif x.opcode not in FREE and "xla.gpu.triton" not in x.rest:
                flops = product_flops(x, around, computations)
                cost = flops / PRODUCTS if flops else moved(x, around, computations) / BYTES
                kinds["products" if flops else kind(x)] += times * cost
                source = re.search(r'op_name="([^"]*)"', x.rest)
                places[("products: " if flops else "") + (source[1] if source else x.name)] += times * cost

    walk(entry, 1)
    return kinds, places, unknown


def compiled_text(column: Column, hardware: str) -> tuple[str, str]:
    """The optimized HLO of a column's step, and what was chosen for it."""
    config = config_lib.defaults()
    for key, value in column.keys.items():
        kind_of = type(_get(config, key))
        _set(config, key, kind_of(value) if kind_of is not bool else value == "true")
    config.model.init_from = f"Qwen/Qwen2.5-{column.size}"
    values = side.model_values(config)
    config = side.resolved(config, values, side.WARMUP + 4)
    mesh = sharding.make_mesh(config.mesh, topology.devices(hardware)[:1])
    model = abstract_model(config, objectives.make(config.objective), mesh, values)
    triples = read_lengths(column.lengths)
    triples = triples[RandomGroups(triples, model.config.vocab).lengths <= config.plan.row_tokens]
    groups = side.make_groups(config, triples, side.WARMUP + 4, model.config.vocab)
    plan = prepare.plan_training(config, groups)
    program, _, line = compile_program(config, model, groups, plan, topology.memory(hardware))
    return program.step.as_text(), line


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def _set(config: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def main() -> None:
    """Prints the table, and with --places the most expensive lines of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hardware", help="h200:1")
    parser.add_argument("--columns", default="0.5B hh,1.5B hh,1.5B long,7B hh,7B long")
    parser.add_argument("--places", type=int, default=0, help="of the program to show, the most expensive first")
    arguments = parser.parse_args()
    names = ("products", "reducing fusions", "other fusions", "copies, slices", "the rest")
    print("| column, ms of a step | " + " | ".join(names) + " | products, of all |\n|" + "---|" * 7, flush=True)
    for column in COLUMNS:
        if column.name not in arguments.columns.split(","):
            continue
        text, line = compiled_text(column, arguments.hardware)
        kinds, places, unknown = seconds(text)
        cells = [f"{1e3 * kinds[name]:.1f}" for name in names]
        print(f"| {column.name} | {' | '.join(cells)} | {kinds['products'] / kinds.total():.0%} |", flush=True)
        if arguments.places:
            print(line, f"{unknown} loops of unknown length")
            print(
                "\n".join(
                    f"  {1e3 * cost:8.2f} ms  {place[-150:]}" for place, cost in places.most_common(arguments.places)
                )
            )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")

    main()
