"""MLflow: the server of MLFLOW_TRACKING_URI, or WORKDIR/mlflow.db; `mlflow ui` shows it."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmjax.runtime import files
from rmjax.train.sinks import Opening, flat

BATCH = 500  # metrics of a request; a server takes 1,000
MOST_TEXT = 6_000  # characters of a parameter that a server takes


def check(project: str) -> None:
    """Asks the server, where there is one.

    Raises:
        ValueError: it cannot be reached, or refuses.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        client, error = _client(uri)
        try:
            client.get_experiment_by_name(project)
        except (error, OSError) as problem:
            raise ValueError(f"config.log.to has mlflow; MLFLOW_TRACKING_URI={uri} gives: {problem}") from problem


def open_sink(opening: Opening) -> "Mlflow":
    return Mlflow(opening)


def _client(uri: str) -> tuple[Any, type[Exception]]:
    import mlflow.exceptions
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri), mlflow.exceptions.MlflowException


class Mlflow:
    """A run of the experiment `project`; its id stands in WORKDIR/mlflow_id."""

    def __init__(self, opening: Opening):
        place = opening.workdir.absolute()
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        self._client, _ = _client(uri or f"sqlite:///{place / 'mlflow.db'}")
        path = opening.workdir / "mlflow_id"
        if not path.exists():
            experiment = self._client.get_experiment_by_name(opening.project)
            # What a local database has no place for lies beside it, not in the current directory.
            beside = None if uri else (place / "mlflow_files").as_uri()
            number = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(opening.project, artifact_location=beside)
            )
            made = self._client.create_run(number, run_name=opening.workdir.name)
            files.write_whole(path, made.info.run_id)
        self._run = path.read_text()
        found = self._client.get_run(self._run)
        self._client.update_run(self._run, status="RUNNING")
        self._have: dict[str, int] = {  # the last step of each metric that is there
            name: max(metric.step for metric in self._client.get_metric_history(self._run, name))
            for name in found.data.metrics
        }
        self._parameters({k: v for k, v in flat(opening.config).items() if k not in found.data.params})
        for step, values in opening.earlier:
            self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics that are not there yet: MLflow would keep both of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            Metric(name, float(value), now, step) for name, value in values.items() if step > self._have.get(name, -1)
        ]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(self._run, metrics=new[start : start + BATCH])
        self._have |= {metric.key: step for metric in new}

    def sync(self) -> None:
        """Each write is sent when it returns."""

    def keep(self, file: Path) -> None:
        self._client.log_artifact(self._run, str(file))

    def close(self) -> None:
        self._client.set_terminated(self._run)

    def _parameters(self, values: Mapping[str, str]) -> None:
        """Adds the config; of a key that a changed config gives another value, MLflow keeps the first."""
        from mlflow.entities import Param

        params = [Param(name, value[:MOST_TEXT]) for name, value in values.items()]
        for start in range(0, len(params), 100):  # a request's most
            self._client.log_batch(self._run, params=params[start : start + 100])
