"""A study in MLflow: a parent run, and a child run for each trial. Logged once, also over restarts."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

from ray_synth.cluster.connection import runs_folder
from ray_synth.config import Config
from ray_synth.monitoring.mlflow_names import leaves, safe_names
from ray_synth.monitoring.mlflow_run import Quietly, tracking_uri
from ray_synth.studies.grid import workspace
from ray_synth.studies.measures import Measured

PARENT = "mlflow.parentRunId"
FILES = ("study.json", "table.md", "table.parquet", "plot.png", "plot.svg")


class StudyTracker:
    """Logs a finished study.

    Raises:
        ValueError: there is no place for MLflow; see `tracking_uri`.
    """

    def __init__(self, config: Config, name: str) -> None:
        from mlflow.tracking import MlflowClient

        self.config, self.name = config, name
        self.folder = workspace(config).child(name)
        self.uri = tracking_uri(config, runs_folder(config.runs_dir))
        self.client = MlflowClient(tracking_uri=self.uri)
        self.quietly = Quietly()

    def log(self, measured: Measured) -> None:
        """Trials that are not logged yet, the study's figures, and its files."""
        with self.quietly("studies"):
            known = (
                self.folder.read_json("mlflow.json") if self.folder.exists("mlflow.json") else {}
            )
            if known.get("uri") != self.uri:
                known = {"uri": self.uri, "parent": self._create(self.name, {}), "children": {}}
            for trial in measured.grid.trials:
                if trial.digest in known["children"]:
                    continue
                tags = {PARENT: known["parent"], "arm": trial.arm.name, "seed": str(trial.seed)}
                run_id = self._create(f"{trial.arm.name}, seed {trial.seed}", tags)
                self._params(run_id, {**trial.arm.settings, "scale": trial.arm.scale})
                results = measured.grid.results(trial)
                self._metrics(run_id, results)
                self.client.set_terminated(run_id)
                known["children"][trial.digest] = run_id
                self.folder.write_json("mlflow.json", known)
            self.folder.write_json("mlflow.json", known)
            self._metrics(known["parent"], measured.figures)
            self._artifacts(known["parent"])
            self.client.set_terminated(known["parent"])

    def _create(self, name: str, tags: dict[str, str]) -> str:
        experiment = self.client.get_experiment_by_name(self.config.tracking.experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self.client.create_experiment(self.config.tracking.experiment)
        )
        return self.client.create_run(experiment_id, tags=tags, run_name=name).info.run_id

    def _params(self, run_id: str, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        names = safe_names([(key,) for key in values])
        params = [
            Param(name, str(value)[:6000])
            for name, value in zip(names, values.values(), strict=True)
        ]
        self.client.log_batch(run_id, params=params)

    def _metrics(self, run_id: str, values: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [
            (path, value)
            for path, value in leaves(values)
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        names = safe_names([path for path, _ in found])
        metrics = [
            Metric(name, float(value), now, 0)
            for name, (_, value) in zip(names, found, strict=True)
        ]
        for start in range(0, len(metrics), 500):
            self.client.log_batch(run_id, metrics=metrics[start : start + 500])

    def _artifacts(self, run_id: str) -> None:
        with tempfile.TemporaryDirectory() as local:
            for name in FILES:
                if self.folder.exists(name):
                    path = Path(local) / name
                    path.write_bytes(self.folder.read_bytes(name))
                    self.client.log_artifact(run_id, str(path))


__all__ = ["StudyTracker"]
