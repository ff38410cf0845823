"""Trackio: a database on this machine (`trackio show`), or a Space of Hugging Face (TRACKIO_SPACE_ID)."""

from collections.abc import Mapping
from pathlib import Path

from rmjax.train.sinks import Opening, run_id


def check(project: str) -> None:
    """Trackio asks for a login itself, and only where a Space is named."""


def open_sink(opening: Opening) -> "Trackio":
    return Trackio(opening)


class Trackio:
    """A run of the project, called by the workdir and the id in WORKDIR/trackio_id."""

    def __init__(self, opening: Opening):
        import trackio

        number = run_id(opening.workdir, "trackio")
        name = f"{opening.workdir.absolute().name}-{number[:8]}"
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self._run = trackio.init(opening.project, name=name, config=dict(opening.config), resume="allow", **quiet)
        # It has no other word for the first step that is not there yet.
        self._first: int = self._run._next_step
        for step, values in opening.earlier:
            self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row, unless one of this step was there before: Trackio would keep both."""
        if step >= self._first:
            self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def sync(self) -> None:
        """A thread of Trackio's writes a few times a second."""

    def keep(self, file: Path) -> None:
        self._run.log_artifact(str(file), name=f"{self._run.name}-{file.stem}", type=file.stem)

    def close(self) -> None:
        self._run.finish()
