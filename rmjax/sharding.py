"""The device mesh, and which axis of it each parameter and activation is split over.

Three axes: `data` (replicas of the parameters), `fsdp` (rows of a batch and parameters both split) and
`tensor` (heads, mlp columns and vocabulary split). Batches are split over `data` and `fsdp` together.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rmjax.runtime import agreement

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes that the rows of a batch are split over

# (regex over the parameter path, spec). The first match wins and every parameter needs one. Entries of a spec
# count from the last axis, so a stacked [L, in, out] kernel and a plain [in, out] one share a rule.
# The score head [D, A] is replicated: split over fsdp it makes XLA rematerialise the whole gradient.
RULES: tuple[tuple[str, P], ...] = (
    (r".*/embedding", P("tensor", "fsdp")),
    (r".*/(q|k|v|gate|up)/kernel", P("fsdp", "tensor")),
    (r".*/(o|down)/kernel", P("tensor", "fsdp")),
    (r".*/(q|k|v|gate|up)/bias", P("tensor")),
    (r".*/(o|down)/bias", P()),
    (r".*/(q|k|v|gate|up)/kernel/(nf4|nf4_absmax|int8)", P("fsdp", "tensor")),
    (r".*/(o|down)/kernel/(nf4|nf4_absmax|int8)", P("tensor", "fsdp")),
    (r".*/(q|k|v|gate|up)/kernel/int8_absmax", P("tensor")),
    (r".*/(o|down)/kernel/int8_absmax", P("fsdp")),
    (r".*/(q|k|v|gate|up)/lora_a", P("fsdp", None)),
    (r".*/(q|k|v|gate|up)/lora_b", P(None, "tensor")),
    (r".*/(o|down)/lora_a", P("tensor", None)),
    (r".*/(o|down)/lora_b", P(None, "fsdp")),
    (r".*/scale", P()),
    (r"score/kernel", P()),
    (r"objective/.*", P()),
)

# Of a model that writes: each weight is read at every step, so none is split over rows.
WRITING_RULES = tuple(
    (pattern, P(*("tensor" if axis == "tensor" else None for axis in spec))) for pattern, spec in RULES
)


def first_match(rules: Sequence[tuple[str, Any]], path: str, what: str) -> Any:
    """Returns the value of the first rule whose regex matches all of `path`.

    Raises:
        ValueError: no rule matches; names the path and `what` the rules decide.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    patterns = ", ".join(repr(pattern) for pattern, _ in rules)
    raise ValueError(f"no {what} rule matches parameter {path!r}; the rules are {patterns}")


def path_name(path: Sequence[Any]) -> str:
    """A tree path as in regex rules: 'decoder/layers/q/kernel'."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of axes `data`, `fsdp`, `tensor`; one entry may be -1 and takes what is left.

    Processes that share it all make it, and are connected then (agreement.py).

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [int(shape[axis]) for axis in AXES]
    asked = "x".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {asked}: sizes must be positive, and at most one may be -1 (what is left)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if -1 in sizes or math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {asked} does not divide the {len(devices)} devices that there are; "
            f"config.mesh must multiply to {len(devices)} (one axis may be -1)"
        )
    mesh = Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    agreement.connect_mesh(mesh)
    return mesh


def named(mesh: Mesh, *spec: Any) -> NamedSharding:
    """The sharding of an array whose axes are split as `spec` says; fewer entries than axes are fine."""
    return NamedSharding(mesh, P(*spec))


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """Puts a host array that every process has whole onto the devices; `jax.device_put` would make all compare it."""
    x = np.asarray(x)
    return assemble(x.shape, sharding, lambda index: x[index])


def assemble(shape: Sequence[int], sharding: NamedSharding, part: Callable[[tuple[slice, ...]], Any]) -> jax.Array:
    """An array of this shape from what `part` gives for each device of this process.

    `jax.make_array_from_callback` does the same, but the transfer guard forbids it.
    """
    places = sharding.addressable_devices_indices_map(tuple(shape))
    arrays = [jax.device_put(part(index or ()), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, arrays)


def param_shardings(mesh: Mesh, params: Any, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """Shardings of a tree of parameters (arrays or shapes) by `rules`.

    An axis that its mesh axis does not divide stays whole, which costs memory and changes no number; one line of the
    log for each mesh axis says where and how much.

    Raises:
        ValueError: an uncovered name.
    """
    whole: dict[str, list[tuple[int, str]]] = {}

    def one(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = first_match(rules, name, "sharding")
        spec = P(*[None] * (len(leaf.shape) - len(spec)), *spec)
        uneven = {axis for size, axis in zip(leaf.shape, spec) if axis is not None and size % mesh.shape[axis]}
        placed = NamedSharding(mesh, P(*(None if axis in uneven else axis for axis in spec)))
        for axis in uneven:
            held = math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            whole.setdefault(axis, []).append((held - held // mesh.shape[axis], f"{name} {list(leaf.shape)}"))
        return placed

    shardings = jax.tree_util.tree_map_with_path(one, params)
    for axis, found in whole.items():
        names = [name for _, name in sorted(found, key=lambda cost: -cost[0])]
        logging.warning(
            "config.mesh.%s=%d does not divide %s%s: whole along it, %.1f MiB more of parameters on each device, and "
            "as many numbers more of gradients and of each moment",
            *(axis, mesh.shape[axis], ", ".join(names[:6]), f" and {len(names) - 6} more" if len(names) > 6 else ""),
            sum(cost for cost, _ in found) / 2**20,
        )
    return shardings


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins the sharding of an activation; an axis that its mesh axes do not divide stays whole, as in parameters.

    Without a mesh (one device, debugging) it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts = lambda axes: math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    return jax.lax.with_sharding_constraint(
        x, P(*(None if size % parts(axes) else axes for size, axes in zip(x.shape, spec)))
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Puts shardings on a tree of shapes."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device; what is in the host's memory counts nothing."""
    here = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in here)
