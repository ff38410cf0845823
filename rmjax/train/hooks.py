"""Functions of the user's that are told what happens in a run: `config.hooks="module:function"`, with commas between.

    def notify(event: str, values: dict) -> None: ...

event         values
start         workdir; config, nested dicts; step, from which it begins or goes on; steps in all
log           step; metrics and timings since the last line, by their names in metrics.jsonl and timings.jsonl
evaluation    step; metrics, likewise
save          step; directory of the checkpoint, which is finished by then
end           status: "finished", "stopped" (the same command goes on) or "failed". A finished run has step, metrics,
              export and passed (the quality gate), the others message

Values are plain: numbers, strings, dicts. The first process calls the functions, in order, between two steps: what
takes long delays the run. An error in one is logged with its traceback; with config.on_hook_error="stop" it ends the
run, which goes on from its last checkpoint.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from rmjax.runtime import processes
from rmjax.runtime.signals import Stopped
from rmjax.suggestions import did_you_mean

Hook = Callable[[str, dict[str, Any]], None]


class HookError(RuntimeError):
    """A hook raised an error, and config.on_hook_error is "stop"."""


def find(named: str) -> list[tuple[str, Hook]]:
    """The functions that config.hooks names, and their names; modules are also looked for in the current directory.

    Raises:
        ValueError: there is no such module or function, or the module cannot be imported.
    """
    return [(name, _find(name)) for name in map(str.strip, named.split(",")) if name]


def _find(name: str) -> Hook:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"config.hooks={name!r}: expected MODULE:FUNCTION")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:  # as with `python -m`, unlike with a console script
        sys.path.insert(0, here)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"config.hooks={name!r}: importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    found = getattr(loaded, function, None)
    if not callable(found):
        known = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"config.hooks={name!r}: {module} has no function {function!r}{did_you_mean(function, known)}")
    return found


class Hooks:
    """The hooks of a run; `tell` calls them."""

    def __init__(self, functions: Sequence[tuple[str, Hook]], on_error: str):
        self._functions, self._on_error = functions if processes.is_first() else (), on_error
        self._ended = False

    def tell(self, event: str, **values: Any) -> None:
        """Calls every hook with an event of the table above, each with a dict of its own; "end" is told once.

        Raises:
            HookError: one failed, and the run is to stop then; never at the end.
        """
        if self._ended:
            return
        self._ended = event == "end"
        for name, function in self._functions:
            try:
                with jax.transfer_guard("allow"):  # the loop's own is for the loop
                    function(event, dict(values))
            except Exception as error:
                what = f"the hook {name} failed at {event!r}: {type(error).__name__}: {error}"
                if self._on_error == "stop" and not self._ended:
                    raise HookError(f"{what}. The same workdir goes on from its last checkpoint") from error
                logging.warning("%s", what, exc_info=True)

    @contextlib.contextmanager
    def told_of_the_end(self) -> Iterator[None]:
        """Tells of an end that is not a finished run's."""
        try:
            yield
        except Stopped as stopped:
            self.tell("end", status="stopped", message=str(stopped))
            raise
        except Exception as error:
            self.tell("end", status="failed", message=f"{type(error).__name__}: {error}")
            raise
