"""Reads from a compiled program's text what devices send each other: which collectives, how often, how many bytes.

The text is XLA's optimized HLO, https://openxla.org/xla/operation_semantics, as GPU, TPU and CPU compilers print it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

# Bytes that each of n devices sends for a result of b bytes on a device, by the ring algorithms
# (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): no algorithm needs fewer.
SENT = {
    "all-gather": lambda b, n: b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1),
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "ragged-all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-broadcast": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
}

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{(.*?)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str  # a key of SENT
    times: int  # that it runs
    sent: float  # bytes from each device each time
    group: tuple[int, ...]  # numbers of the devices of the first group; the two ends of a permutation


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands, and everything behind them
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


Computation = Mapping[str, _Instruction]


def collectives(text: str, devices: int) -> tuple[list[Collective], int]:
    """The collectives in one run of a program for `devices` devices, by `compiled.as_text()`.

    A collective in a loop counts as often as the loop turns. Where a TPU overlaps one with computation it stands in
    several fusions, as its parts; it counts once. An all-reduce of which each device then keeps a part is a
    reduce-scatter.

    Returns:
        The collectives, and how many loops send something an unknown number of times; these count once.
    """
    computations, entry = _parse(text)
    unknown: set[str] = set()

    def walk(name: str, times: int) -> Iterator[Collective]:
        computation, overlapped = computations.get(name, {}), set()
        for instruction in computation.values():
            if instruction.opcode == "while":
                turns = _turns(instruction, computation, computations)
                inside = list(walk(_named("body", instruction), times * (1 if turns is None else turns)))
                if inside and turns is None:
                    unknown.add(instruction.name)
                yield from inside
            elif collective := _collective(instruction, computation, times, devices):
                yield collective
            for callee in _callees(instruction):
                channel = _channel(computations.get(callee, {})) if instruction.opcode == "fusion" else None
                if channel not in overlapped:
                    scattered = callee.startswith("all-reduce-scatter")
                    for x in walk(callee, times):
                        yield dataclasses.replace(x, kind="reduce-scatter", sent=x.sent / 2) if scattered else x
                overlapped |= {channel} - {None}

    return list(walk(entry, 1)), len(unknown)


def _named(role: str, instruction: _Instruction) -> str:
    match = re.search(rf"{role}=%?([\w.\-]+)", instruction.rest)
    return match[1] if match else ""


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Instructions by the names of their computations and their own; and the name of the entry computation."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif match := INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            current[name] = _Instruction(name, shape, opcode, rest, bool(root))
    return computations, entry


def _callees(instruction: _Instruction) -> list[str]:
    """The computations that an instruction runs once; reductions, sorts and the like send nothing."""
    names = [name for match in CALLED.finditer(instruction.rest) for name in re.split(r",\s*", match[1] or match[2])]
    if instruction.opcode == "call":
        names.append(_named("to_apply", instruction))
    return [name.lstrip("%") for name in names]


def _channel(computation: Computation) -> str | None:
    for instruction in computation.values():
        if instruction.opcode in SENT and (match := re.search(r"channel_id=(\d+)", instruction.rest)):
            return match[1]
    return None


def _collective(instruction: _Instruction, computation: Computation, times: int, devices: int) -> Collective | None:
    """The collective that an instruction is, or ends (`-done`); the shape of its result is there."""
    kind, start = instruction.opcode, instruction
    if kind.endswith("-done"):
        kind = kind.removesuffix("-done")
        start = computation.get((instruction.operands or [""])[0], instruction)
    if kind not in SENT:
        return None
    group = _group(start.rest, devices)
    sent = SENT[kind](array_bytes(instruction.shape), len(group))
    return Collective(kind, times, sent, group) if len(group) > 1 else None


def array_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays as HLO writes its shape: "(f32[2,3]{1,0}, bf16[8]{0})" has 40."""
    sizes = ((8 if name == "pred" else int(bits), dims) for name, bits, dims in ARRAY.findall(shape))
    return sum(bits * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in sizes) // 8


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices that exchange something, in any of HLO's forms."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,\s]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(iota[2], iota[3])[: int(iota[1])]
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?\s*\{(.*?)\}", attributes):
        return _mesh_group(*mesh.groups())
    return tuple(range(devices))


def _iota(dims: str, order: str | None) -> tuple[int, ...]:
    """0, 1, 2, ... laid out with these dimensions and read with their axes in this order."""
    sizes = [int(n) for n in dims.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(sizes))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    where = itertools.product(*(range(0, sizes[i] * strides[i], strides[i]) for i in axes))
    return tuple(map(sum, where))


def _mesh_group(mesh: str, device_ids: str | None, along: str) -> tuple[int, ...]:
    """The devices along some axes of a named mesh; 'a':(2)4 is 4 steps along axis a, within each of its 2 parts."""
    sizes = {name: int(n) for name, n in re.findall(r"'(.+?)'=(\d+)", mesh)}
    names = list(sizes)
    steps = []
    for name, before, size in re.findall(r"'(.+?)'(?::\((\d+)\)(\d+))?", along):
        behind = math.prod(sizes[n] for n in names[names.index(name) + 1 :])
        count = int(size) if size else sizes[name]
        stride = behind * (sizes[name] // (int(before) * count) if size else 1)
        steps.append(range(0, count * stride, stride))
    places = [sum(where) for where in itertools.product(*steps)]
    order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids or "")
    if not order:
        return tuple(places)
    ids = _iota(order[1], order[2])
    return tuple(ids[place] for place in places)


def _turns(loop: _Instruction, around: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a loop turns: by XLA's count, else (TPU) by its condition, `counter < constant`; None if unknown."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition, body = (computations.get(_named(role, loop), {}) for role in ("condition", "body"))
    root = next((i for i in condition.values() if i.root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    counter, limit = (condition.get(name) for name in root.operands)
    stop = _constant(limit, condition)
    if counter is None or stop is None or not (index := re.search(r"index=(\d+)", counter.rest)):
        return None
    start = _constant(_element(around.get(loop.operands[0]), int(index[1]), around), around)
    moved = _element(next((i for i in body.values() if i.root), None), int(index[1]), body)
    steps = [_constant(body.get(name), body) for name in moved.operands] if moved and moved.opcode == "add" else []
    step = next((n for n in steps if n), None)
    return None if start is None or step is None else max(0, -(-(stop - start) // step))


def _element(pack: _Instruction | None, index: int, computation: Computation) -> _Instruction | None:
    if pack is None or pack.opcode != "tuple" or index >= len(pack.operands):
        return None
    return computation.get(pack.operands[index])


def _constant(instruction: _Instruction | None, computation: Computation) -> int | None:
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"-?\d+", instruction.rest)
    return int(value[0]) if value else None
