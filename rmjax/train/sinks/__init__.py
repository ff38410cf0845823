"""Where a run's numbers go beside its own files: the services that `config.log.to` names.

Each is a module of its name, with `check(project)`, which raises ValueError where it cannot be used, and
`open_sink(opening)`. A run that goes on, goes on in the same run of the service: no step stands there twice, and what a
killed process had not sent is sent again.
"""

import dataclasses
import importlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging
from ml_collections import ConfigDict

from rmjax import config as config_lib
from rmjax.runtime import files

Line = tuple[int, Mapping[str, float]]  # a step and its values


class Sink(Protocol):
    """Takes named numbers of a step, which never decreases; a step may be written more than once, with other names."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values`, some of which may not be finite."""

    def sync(self) -> None:
        """Sends what was written to the disk, where the sink has files of its own."""

    def keep(self, file: Path) -> None:
        """Keeps a file with the run: its report."""

    def close(self) -> None:
        """Sends the rest, and ends."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a sink begins with.

    Attributes:
        project: its name in services.
        config: of the run, nested.
        keep: the step that the run goes on from; -1 for one from the beginning.
        earlier: lines up to that step, in their order, with which a sink makes up for what was not sent.
    """

    workdir: Path
    project: str
    config: Mapping[str, Any]
    keep: int = -1
    earlier: Sequence[Line] = ()


def check(config: ConfigDict) -> None:
    """Checks that the services can be used: logins, and whether they are there.

    Raises:
        ValueError: one cannot; says what to do.
    """
    for name in config_lib.sinks(config):
        _module(name).check(config.log.project)


def open_sinks(config: ConfigDict, workdir: Path, keep: int, earlier: Iterable[Line]) -> list[Sink]:
    opening = Opening(workdir, config.log.project, config.to_dict(), keep, list(earlier))
    opened = [(name, _module(name).open_sink(opening)) for name in config_lib.sinks(config)]
    return [sink if name == "tensorboard" else Service(name, sink) for name, sink in opened]


class Service:
    """A sink that may fail, as a server may: that costs a warning and what comes after it there, not the run.

    All numbers are in the run's own files, and where the run goes on it is told again what it lacks.
    """

    def __init__(self, name: str, sink: Sink):
        self._name, self._sink, self._failed = name, sink, False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._try("write", step, values)

    def sync(self) -> None:
        self._try("sync")

    def keep(self, file: Path) -> None:
        self._try("keep", file)

    def close(self) -> None:
        self._try("close")

    def _try(self, what: str, *arguments: Any) -> None:
        if self._failed and what != "close":
            return
        try:
            getattr(self._sink, what)(*arguments)
        except Exception as error:
            self._failed = True
            logging.warning("%s takes no more of this run: %s: %s", self._name, type(error).__name__, error)


def run_id(workdir: Path, name: str) -> str:
    """The run's own id in a service, made at its first start."""
    path = workdir / f"{name}_id"
    if not path.exists():
        files.write_whole(path, uuid.uuid4().hex)
    return path.read_text()


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The keys of a nested config with dots between, and their values as texts."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)}
    return found


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
