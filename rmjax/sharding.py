"""The device mesh, and which axis of it each parameter and activation is split over.

Three axes: `data` (replicas of the parameters), `fsdp` (rows of a batch and parameters both split) and
`tensor` (heads, mlp columns and vocabulary split). Batches are split over `data` and `fsdp` together.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
    (r".*/scale", P()),
    (r"score/kernel", P()),
    (r"objective/.*", P()),
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
            f"mesh {asked} does not divide the {len(devices)} devices that are here; "
            f"config.mesh must multiply to {len(devices)} (one axis may be -1)"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def named(mesh: Mesh, *spec: Any) -> NamedSharding:
    """The sharding of an array whose axes are split as `spec` says; fewer entries than axes are fine."""
    return NamedSharding(mesh, P(*spec))


def param_shardings(mesh: Mesh, params: Any, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """Shardings of a tree of parameters (arrays or shapes) by `rules`.

    Raises:
        ValueError: an uncovered name, or every axis that a mesh axis does not divide, all in one message.
    """
    problems = []

    def one(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = first_match(rules, name, "sharding")
        spec = P(*[None] * (len(leaf.shape) - len(spec)), *spec)
        for size, axis in zip(leaf.shape, spec):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(f"{name} {tuple(leaf.shape)}: {size} is not divisible by {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(one, params)
    if problems:
        raise ValueError(
            "the mesh does not divide these parameters; choose smaller config.mesh.fsdp or config.mesh.tensor "
            "and put the rest on config.mesh.data:\n  " + "\n  ".join(problems)
        )
    return shardings


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Pins the sharding of an activation; without a mesh (one device, debugging) it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*spec))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Puts shardings on a tree of shapes."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device; what is in the host's memory counts nothing."""
    here = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in here)
