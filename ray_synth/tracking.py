"""MLflow: one run per pipeline run, made by the driver, joined by rank 0 of the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_synth.config import Config
from ray_synth.storage import Folder


def tracking_uri(config: Config, runs: Folder) -> str:
    """The configured server, or an sqlite file beside the runs (MLflow's file store is gone)."""
    if config.tracking.uri:
        return config.tracking.uri
    if runs.is_local:
        Path(runs.path()).mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{runs.path('mlflow.db')}"
    raise ValueError(
        f"runs_dir {runs.uri} is remote, where MLflow cannot keep an sqlite file: set tracking.uri "
        "to an MLflow server, or tracking.enabled: false"
    )


class Tracker:
    """The pipeline's MLflow run; a run directory keeps its id, so that a restart joins it.

    Args:
        runs: the folder that holds all runs; MLflow's default files go there.
        folder: this run's directory.
    """

    def __init__(self, config: Config, runs: Folder, folder: Folder) -> None:
        from mlflow.tracking import MlflowClient

        self.uri = tracking_uri(config, runs)
        self.client = MlflowClient(tracking_uri=self.uri)
        if folder.exists("mlflow.json") and folder.read_json("mlflow.json")["uri"] == self.uri:
            self.run_id: str = folder.read_json("mlflow.json")["run_id"]
            return
        experiment = self.client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            artifacts = Path(runs.path("mlflow-artifacts")).as_uri() if runs.is_local else None
            experiment_id = self.client.create_experiment(config.tracking.experiment, artifacts)
        else:
            experiment_id = experiment.experiment_id
        self.run_id = self.client.create_run(experiment_id, run_name=config.name).info.run_id
        folder.write_json("mlflow.json", {"uri": self.uri, "run_id": self.run_id})
        self._params(config.model_dump(mode="json", exclude={"tracking", "cluster"}))

    @property
    def handle(self) -> dict[str, str]:
        """What a worker needs to log to the same run."""
        return {"uri": self.uri, "run_id": self.run_id}

    def _params(self, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:6000]) for key, value in flatten(values).items()]
        for start in range(0, len(flat), 100):
            self.client.log_batch(self.run_id, params=flat[start : start + 100])

    def metrics(self, values: dict[str, Any]) -> None:
        """Log the numbers of a nested mapping under dotted names."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        flat = {k: v for k, v in flatten(values).items() if isinstance(v, (int, float))}
        entries = [Metric(key, float(value), now, 0) for key, value in flat.items()]
        for start in range(0, len(entries), 500):
            self.client.log_batch(self.run_id, metrics=entries[start : start + 500])

    def artifact(self, path: str) -> None:
        """Keep a local file with the run."""
        self.client.log_artifact(self.run_id, path)

    def end(self, status: str = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status)


def metric_logger(
    handle: dict[str, str], *, prefix: str
) -> Callable[[dict[str, float], int], None]:
    """A function (values, step) that logs under `prefix.`; for rank 0 of a trainer."""
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=handle["uri"])

    def log(values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        entries = [Metric(f"{prefix}.{key}", value, now, step) for key, value in values.items()]
        client.log_batch(handle["run_id"], metrics=entries)

    return log


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
