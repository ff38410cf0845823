"""SwanLab: its cloud, or WORKDIR/swanlab with SWANLAB_MODE=offline, for `swanlab sync`."""

import os
from collections.abc import Mapping
from pathlib import Path

from rmjax.train.sinks import Opening, run_id

ONLINE = ("", "online", "cloud")  # values of SWANLAB_MODE with which it sends what is logged


def check(project: str) -> None:
    """Checks the login, where there is to be one.

    Raises:
        ValueError: nobody is logged in, or SwanLab cannot be reached.
    """
    import swanlab

    if os.environ.get("SWANLAB_MODE", "") not in ONLINE:
        return
    advice = "log in with `swanlab login`, set SWANLAB_API_KEY, or log to files alone with SWANLAB_MODE=offline"
    try:
        known = swanlab.login()
    except Exception as error:  # of requests, of its own, or of a terminal that is none
        raise ValueError(f"config.log.to has swanlab: {str(error) or type(error).__name__}; {advice}") from error
    if not known:
        raise ValueError(f"config.log.to has swanlab: nobody is logged in; {advice}")


def open_sink(opening: Opening) -> "Swanlab":
    return Swanlab(opening)


class Swanlab:
    """A run of the project, known by WORKDIR/swanlab_id.

    Online the cloud refuses the steps that it has. Offline each start makes a folder that holds the whole run.
    """

    def __init__(self, opening: Opening):
        import swanlab

        self._run = swanlab.init(
            project=opening.project,
            name=opening.workdir.absolute().name,
            config=dict(opening.config),
            log_dir=str(opening.workdir / "swanlab"),
            id=run_id(opening.workdir, "swanlab"),
            resume="allow",
            reinit=True,
        )
        self._last = 0  # step
        for step, values in opening.earlier:
            self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._last = step
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def sync(self) -> None:
        """SwanLab keeps its own files."""

    def keep(self, file: Path) -> None:
        """Logs an HTML page as such; it has no other place for files."""
        import swanlab

        self._run.log({file.stem: swanlab.Html(str(file))}, step=self._last)

    def close(self) -> None:
        self._run.finish()
