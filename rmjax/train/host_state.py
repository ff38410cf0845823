"""The optimizer state in the host's memory: it visits the devices one parameter at a time, after the gradients.

In one program, XLA starts every copy to the devices as early as it can, before the backward pass, so that more memory
is needed and not less; it removes the barriers that should stop it. So there is a program for the gradients, and one
for each parameter's update.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from optax import MaskedNode

from rmjax.inference import parameters
from rmjax.sharding import path_name
from rmjax.train.optim import parameter_of


def on_host(shardings: Any, params: Any) -> Any:
    """Shardings of an optimizer state in the memory of the host; what belongs to no parameter stays on the devices."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    moved = lambda path, s: s if parameter_of(path, names) is None else s.with_memory_kind("pinned_host")
    return jax.tree_util.tree_map_with_path(moved, shardings)


def only(tree: Any, name: str, names: Collection[str]) -> Any:
    """A tree of parameters, or an optimizer state, with the leaves of one parameter and those of none (step counts)."""
    keep = lambda path, x: x if parameter_of(path, names) in (name, None) else MaskedNode()
    return jax.tree_util.tree_map_with_path(keep, tree)


def together(parts: Collection[Any]) -> Any:
    """The inverse of `only` over all parameters."""
    masked = lambda x: isinstance(x, MaskedNode)
    return jax.tree.map(lambda *xs: next((x for x in xs if not masked(x)), xs[0]), *parts, is_leaf=masked)


@dataclasses.dataclass(frozen=True)
class HostStep:
    """A `Step` around which the optimizer state stays on the host; lowered, compiled and called like a jitted one.

    Its memory is that of the gradients; the updates need one parameter's state instead of the activations.

    Attributes:
        gradients: (params, batch, number, halted) -> (grads, sums, halted, move), jitted.
        updates: by the name of the parameter, jitted, their first two arguments donated.
        on_device: shardings of the optimizer state while it is used.
        home: shardings of the optimizer state between steps.
        split: parameters into what is trained and what is frozen.
    """

    gradients: Any
    updates: Mapping[str, Any]
    on_device: Any
    home: Any
    split: Callable[[Any], tuple[Any, Any]]

    @classmethod
    def wrap(cls, step: Any, params: Any, shardings: dict[str, Any], replicated: Any) -> tuple["HostStep", Any]:
        """Jits both halves of a step.

        Args:
            params: shapes of the parameters, with shardings.
            shardings: of {"params", "opt"} on the devices.
            replicated: the sharding of scalars.

        Returns:
            The step, and the shardings of {"params", "opt"} between steps.
        """
        trained, _ = parameters.split(step.config, params)
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
        of_params, on_device = parameters.split(step.config, shardings["params"])[0], shardings["opt"]
        home = on_host(on_device, trained)
        jitted = lambda name: jax.jit(
            step.update,
            donate_argnums=(0, 1),
            out_shardings=(only(of_params, name, names), only(on_device, name, names)),
        )
        gradients = jax.jit(step.gradients, out_shardings=(of_params, replicated, replicated, replicated))
        split = functools.partial(parameters.split, step.config)
        wrapped = cls(gradients, {name: jitted(name) for name in names}, on_device, home, split)
        return wrapped, {"params": shardings["params"], "opt": home}

    def lower(self, state: Any, *rest: Any) -> "HostStep":
        """With the gradients lowered for these arguments."""
        return dataclasses.replace(self, gradients=self.gradients.lower(state["params"], *rest))

    def compile(self) -> "HostStep":
        """With the gradients compiled; the updates are when they are first called."""
        return dataclasses.replace(self, gradients=self.gradients.compile())

    def memory_analysis(self) -> Any:
        return self.gradients.memory_analysis()

    def as_text(self) -> str:
        """HLO of the gradients' program, which has nearly all communication."""
        return self.gradients.as_text()

    def __call__(self, state: Any, *rest: Any) -> tuple[Any, Any, Any]:
        """One step; the state is donated."""
        grads, sums, halted, move = self.gradients(state["params"], *rest)
        trained, frozen = self.split(state["params"])
        parts = []
        for name, update in self.updates.items():
            params, opt, grad, here, home = (
                only(tree, name, self.updates) for tree in (trained, state["opt"], grads, self.on_device, self.home)
            )
            # Step counts are copied too: every part needs them, and donates what it is given.
            params, new = update(params, jax.device_put(opt, here, may_alias=False), grad, move)
            parts.append({"params": params, "opt": jax.device_put(new, home)})
            jax.block_until_ready(parts[-1])  # or the next parameters' states would be on their way already
            held = [x for x in jax.tree.leaves(opt) if x.sharding.memory_kind == "pinned_host"]
            for x in (*held, *jax.tree.leaves(grad)):
                x.delete()
        state = together(parts)
        return {**state, "params": parameters.join(state["params"], frozen)}, sums, halted
