"""Weights & Biases: one run, known by WORKDIR/wandb_id; offline in WORKDIR/wandb."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from rmjax.suggestions import install
from rmjax.train.sinks import Opening, run_id

ONLINE = (None, "online", "shared")  # modes of W&B in which it sends what is logged
REACH_SECONDS = 10.0  # that W&B may take to answer at all
FINISH_SECONDS = 600  # that W&B may take to upload what is left at the end; what it does not, `wandb sync` does


def open_sink(opening: Opening) -> "Wandb":
    return Wandb(opening.workdir, opening.project, opening.config, opening.earlier)


def _wandb() -> Any:
    """The package; where it cannot upload what is left at the end, it gives up instead of waiting for days."""
    try:
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))
        import wandb
    except ImportError as error:
        raise ImportError(f"config.log.to has wandb, which needs a package: {install('wandb')}") from error
    return wandb


def _out_of_reach(wandb: Any) -> str:
    """Why W&B, which is to be used online, cannot be reached; "" if it can, or is not to be."""
    settings = wandb.setup().settings
    if settings.mode not in ONLINE:
        return ""
    try:
        with urllib.request.urlopen(settings.base_url, timeout=REACH_SECONDS):
            return ""
    except urllib.error.HTTPError as error:  # an answer all the same
        return str(error) if error.code >= 500 else ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error)


def check(project: str) -> None:
    """Checks the login of W&B, if it is to be used online; whether the key is right, only where W&B can be reached.

    Raises:
        ValueError: nobody is logged in, or W&B refuses the key.
    """
    wandb = _wandb()
    advice = "log in with `wandb login`, set WANDB_API_KEY, or log to files alone with WANDB_MODE=offline"
    if wandb.setup().settings.mode not in ONLINE:
        return
    try:
        known = wandb.login(verify=not _out_of_reach(wandb))
    except wandb.Error as error:
        raise ValueError(f"config.log.to has wandb: {error}; {advice}") from error
    if not known and wandb.setup().settings.mode in ONLINE:
        raise ValueError(f"config.log.to has wandb: nobody is logged in to W&B; {advice}")


class Wandb:
    """A run on Weights & Biases; a resumed one goes on in the same run, known by `directory`/wandb_id.

    Where W&B cannot be reached the run is kept in `directory`/wandb, for `wandb sync`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        project: str,
        config: Mapping[str, Any],
        earlier: Sequence[tuple[int, Mapping[str, float]]] = (),
    ):
        """Starts or resumes the run, and logs again what it lacks of `earlier`: steps, never decreasing, and values.

        A killed process takes with it what it had not sent yet, and a run that is kept in files has nothing of those
        before it.

        Raises:
            ImportError: wandb is not installed.
        """
        wandb = _wandb()
        options = {
            **{"project": project, "id": run_id(Path(directory), "wandb"), "resume": "allow"},
            **{"dir": str(directory), "config": dict(config)},
        }
        why = _out_of_reach(wandb)
        try:
            self._run = wandb.init(**options, mode="offline" if why else None)
        except wandb.Error as error:
            why = str(error)
            self._run = wandb.init(**options, mode="offline")
        if why:
            logging.warning(
                "W&B cannot be reached (%s), so the run goes on offline; afterwards: wandb sync %s",
                why,
                Path(directory) / "wandb" / "latest-run",
            )
        first = self._run.step  # the first that W&B does not have
        for step, values in earlier:
            if step >= first:
                self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs `values`. The service ignores steps it has already; a resumed run repeats the same numbers."""
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def sync(self) -> None:
        """W&B keeps its own files."""

    def keep(self, file: Path) -> None:
        """Logs the file as an artifact of the run."""
        artifact = _wandb().Artifact(f"{file.stem}-{self._run.id}", type=file.stem)
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """Uploads the rest and ends the run."""
        self._run.finish()
