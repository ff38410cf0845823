"""The directory of a run's checkpoints: which steps it has, whose they are, and what may be deleted there.

    directory/120/...             the arrays, as Orbax lays them out
                  host.json       what the host remembers, and the metrics of the step
                  host-amended.json   what replaces it, if that has changed since
                  manifest.json   written last (sealing.py)
    directory/.rmjax.json         whose checkpoints these are, who writes them now, and the steps begun (ownership.py)

Only steps that the marker names are ever deleted, replaced or set aside; other files and folders in the directory stay,
whatever their names. Each start of a run takes the directory over under a token of its own; one that finds another
token there ends before it writes: locks do not reach buckets.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging
from etils import epath

from rmjax.runtime import exits, files, ownership, sealing
from rmjax.runtime.sealing import MANIFEST

HOST, AMENDED = "host.json", "host-amended.json"
UNNAMED = ".orbax-checkpoint-tmp"  # Orbax's suffix of a directory that it has not finished writing


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what is there cannot be used."""

    exit_code = exits.BAD_INPUT  # of what is there; command_line.under_way knows when it is the other


class StepDirectory:
    """Steps here or in a bucket. Of several processes the first alone calls what looks at them or writes.

    CheckpointError: another start or run has the directory, or something else has a step's name.
    """

    def __init__(self, path: epath.Path, owner: Mapping[str, Any]):  # what the marker says of the run, its id as "run"
        self.path, self._owner, self._token = path, dict(owner), ""

    def step_path(self, step: int) -> epath.Path:
        return self.path / str(step)

    def sealed_steps(self) -> list[int]:
        """Steps with a manifest, ascending: this run's in any state, and whole checkpoints of others (copies, say)."""
        if not self.path.exists():
            return []
        begun = set(self.begun_steps())
        paths = [path for path in self.path.iterdir() if path.name.isdecimal() and (path / MANIFEST).exists()]
        return sorted(int(path.name) for path in paths if int(path.name) in begun or _is_checkpoint(path))

    def finished_steps(self) -> list[int]:
        """Steps that are whole, ascending; large files are only checked for their size."""
        return [step for step in self.sealed_steps() if not sealing.find_damage(self.step_path(step), deep=False)]

    def newest_whole_step(self) -> int | None:
        """The newest step whose every byte is as saved; None without steps, CheckpointError where all are damaged."""
        problems = []
        for step in reversed(self.sealed_steps()):
            problem = sealing.find_damage(self.step_path(step), deep=True)
            if problem is None:
                return step
            logging.warning("the checkpoint of step %d is broken, going back to the one before: %s", step, problem)
            problems.append(f"\n  step {step}: {problem}")
        if problems:
            raise CheckpointError(
                f"every checkpoint in {self.path} is broken; restore the files from a copy, or move "
                f"the directory away to start again from the beginning:{''.join(problems)}"
            )
        return None

    def read_host(self, step: int) -> dict[str, Any]:
        """What was saved beside a step's arrays: {"host": ..., "metrics": ...}."""
        path = self.step_path(step)
        return json.loads((path / (AMENDED if AMENDED in sealing.sealed_files(path) else HOST)).read_text())

    def begun_steps(self) -> list[int]:
        """The steps of this run that were begun and are not deleted; they alone may be deleted or set aside."""
        return list(self._marker().get("steps", ()))

    def take(self) -> None:
        """Takes the directory over for this start of the run; earlier writers fail at their next save."""
        marker = self._marker()
        run = self._owner.get("run", marker.get("run", ""))
        if marker.get("run", run) not in ("", run):
            raise CheckpointError(
                f"{self.path} has the checkpoints of another run by now, whose workdir is "
                f"{marker.get('workdir')}; give each run its own config.checkpoint.dir"
            )
        steps = marker["steps"] if "steps" in marker else self.sealed_steps()
        self._token = ownership.new_id()
        self.path.mkdir(parents=True, exist_ok=True)
        self._change_marker(**{**self._owner, "run": run, "holder": self._token, "steps": steps})

    def go_on_from(self, step: int | None) -> None:
        """Takes the directory over and clears up, for training that starts at a step, or anew (None)."""
        if step is not None or self._marker():
            self.take()
        self.clear_up(after=-1 if step is None else step)

    def begin(self, step: int) -> None:
        """Notes that a step of this run is being written, before anything of it is."""
        self._require_held()
        begun = self.begun_steps()
        if step not in begun:
            if self.step_path(step).exists():
                raise CheckpointError(f"{self.step_path(step)} is there and is no checkpoint of this run; move it away")
            self._change_marker(steps=sorted([*begun, step]))

    def finish(self, step: int, host_json: str) -> None:
        self._require_held()
        ownership.write_text(self.step_path(step) / HOST, host_json)
        sealing.seal_directory(self.step_path(step))
        if "://" not in str(self.path):
            files.sync(self.path)

    def amend(self, step: int, host_json: str) -> None:
        """Replaces what a finished step remembers beside its arrays, at one moment."""
        self._require_held()
        ownership.write_text(self.step_path(step) / AMENDED, host_json)
        sealing.seal_file(self.step_path(step), AMENDED)

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes steps of this run; one that cannot be deleted stays, with a warning."""
        for path in map(self.step_path, steps):
            try:
                (path / MANIFEST).unlink()  # first, so that half a deletion is not taken for a broken save
                path.rmtree()
            except OSError as error:
                logging.warning("could not delete the old checkpoint %s: %s", path, error)
        self._forget_missing()

    def clear_up(self, after: float = math.inf) -> None:
        """Deletes unfinished steps of this run; sets aside broken ones: those after `after`, or seen at a glance."""
        self._require_held()
        begun = self.begun_steps()
        for path in self.path.iterdir() if begun else ():
            number = path.name.partition(UNNAMED)[0]
            if not number.isdecimal() or int(number) not in begun:
                continue
            if path.name != number or not (path / MANIFEST).exists():
                path.rmtree(missing_ok=True)
            elif int(number) > after or sealing.find_damage(path, deep=False):
                aside = self._aside(number)
                path.rename(aside)
                logging.warning("moved the broken checkpoint of step %s to %s", number, aside)
        self._forget_missing()

    def _forget_missing(self) -> None:
        begun = self.begun_steps()
        left = [step for step in begun if self.step_path(step).exists()]
        if left != begun:
            self._change_marker(steps=left)

    def _aside(self, number: str) -> epath.Path:
        names = {path.name for path in self.path.iterdir()}
        tries = itertools.chain([f"broken-{number}"], (f"broken-{number}-{i}" for i in itertools.count(2)))
        return self.path / next(name for name in tries if name not in names)

    def _marker(self) -> dict[str, Any]:
        return ownership.read_marker(self.path, "checkpoints") or {}

    def _change_marker(self, **values: Any) -> None:
        ownership.change_marker(self.path, "checkpoints", **values)

    @property
    def taken(self) -> bool:
        return bool(self._token)

    def _require_held(self) -> None:
        """Raises CheckpointError where a later start writes here."""
        if self.taken and self._marker().get("holder") != self._token:
            raise CheckpointError(
                f"another start has taken over {self.path}; this one ends, and leaves what is there as it is"
            )


def _is_checkpoint(step_path: epath.Path) -> bool:
    """Whether a folder is a finished checkpoint by its manifest, rather than by its name."""
    try:
        return HOST in sealing.sealed_files(step_path)
    except (ValueError, LookupError, TypeError, OSError):
        return False
