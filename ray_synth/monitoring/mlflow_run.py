"""MLflow: one run per pipeline run, made by the driver, joined by rank 0 of the trainer.

A restart joins the run again and logs no step twice. A server that stops answering costs its figures,
never the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ray_synth.config import Config
from ray_synth.data.dataset import Index
from ray_synth.errors import UserError
from ray_synth.monitoring import logs
from ray_synth.monitoring.mlflow_names import CHANGED, changed_names, leaves, safe_names
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
ARTIFACTS = ("config.yaml", "meanings.json", "metrics.json", "report/index.html")


def tracking_uri(config: Config, runs: Folder) -> str:
    """The configured server, or an sqlite file beside the runs (MLflow's file store is gone).

    Raises:
        UserError: there is none, and the runs are remote.
    """
    uri = config.tracking.uri
    if uri:
        return uri
    if runs.is_local:
        Path(runs.path()).mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{runs.path('mlflow.db')}"
    raise UserError(
        f"runs_dir {runs.address()} is remote, where MLflow cannot keep an sqlite file: set tracking.uri "
        "to an MLflow server (on one machine, sqlite:////FOLDER/mlflow.db is one), or "
        "tracking.enabled: false"
    )


class Tracker:
    """The pipeline's MLflow run; a run directory keeps its id, so that a restart joins it.

    Args:
        runs: the folder that holds all runs; MLflow's default files go there.
        folder: this run's directory.

    Raises:
        UserError: the server does not answer.
    """

    def __init__(self, config: Config, runs: Folder, folder: Folder) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
        from sqlalchemy.exc import SQLAlchemyError

        logs.adopt("mlflow")
        self.config, self.folder = config, folder
        self.uri = tracking_uri(config, runs)
        self.quietly = Quietly()
        self._monitor: Any = None
        try:
            self.client = MlflowClient(tracking_uri=self.uri)
            self.run_id = self._join() or self._create(runs)
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            raise UserError(
                f"no MLflow server available at {self.uri}: {error}; check tracking.uri, or set "
                "tracking.enabled: false"
            ) from None
        self._start_monitor()

    def _join(self) -> str | None:
        """The id of the run that an earlier start made, running again; or None."""
        if not self.folder.exists("mlflow.json"):
            return None
        saved = self.folder.read_json("mlflow.json")
        if saved["uri"] != self.uri:
            return None
        self.client.update_run(saved["run_id"], status="RUNNING")
        return saved["run_id"]

    def _create(self, runs: Folder) -> str:
        name = self.config.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = Path(runs.path("mlflow-artifacts")).as_uri() if runs.is_local else None
            experiment_id = self.client.create_experiment(name, artifacts)
        else:
            experiment_id = experiment.experiment_id
        run_id = self.client.create_run(experiment_id, run_name=self.config.name).info.run_id
        self.folder.write_json("mlflow.json", {"uri": self.uri, "run_id": run_id})
        self._params(run_id)
        return run_id

    def _params(self, run_id: str) -> None:
        from mlflow.entities import Param

        values = self.config.model_dump(mode="json", exclude={"tracking", "cluster"})
        found = list(leaves(values))
        names = safe_names([path for path, _ in found])
        flat = [
            Param(name, str(value)[:6000]) for name, (_, value) in zip(names, found, strict=True)
        ]
        for start in range(0, len(flat), 100):
            with self.quietly("parameters"):
                self.client.log_batch(run_id, params=flat[start : start + 100])

    def _start_monitor(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        with self.quietly("system metrics"):
            self._monitor = SystemMetricsMonitor(
                self.run_id, resume_logging=True, tracking_uri=self.uri
            )
            self._monitor.start()

    @property
    def handle(self) -> dict[str, str]:
        """What a worker needs to log to the same run."""
        return {"uri": self.uri, "run_id": self.run_id}

    def datasets(self, found: dict[str, Index]) -> None:
        """Log which images were used: name, digest of shards, rows and labels, and how many.

        Args:
            found: by context (`training`, `in_domain`, an out-of-domain set's name).
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        with self.quietly("datasets"):
            logged = self.client.get_run(self.run_id).inputs
            known = {entry.dataset.digest for entry in (logged.dataset_inputs if logged else [])}
            inputs = [
                DatasetInput(
                    Dataset(
                        name=name[:500],
                        digest=digest(index),
                        source_type="local",
                        source=name,
                        profile=f'{{"num_rows": {len(index)}}}',
                    ),
                    [InputTag("mlflow.data.context", name[:500])],
                )
                for name, index in found.items()
                if digest(index) not in known
            ]
            if inputs:
                self.client.log_inputs(self.run_id, inputs)

    def metrics(self, values: dict[str, Any]) -> None:
        """Log the numbers of a nested mapping under dotted names that MLflow takes (`mlflow_names.py`);
        what those that are changed stand for is kept in the artifact `metric_names.json`.
        """
        from mlflow.entities import Metric

        found = [item for item in leaves(values) if isinstance(item[1], (int, float))]
        paths = [path for path, _ in found]
        names = safe_names(paths)
        now = int(time.time() * 1000)
        entries = [
            Metric(name, float(value), now, 0)
            for name, (_, value) in zip(names, found, strict=True)
        ]
        for start in range(0, len(entries), 500):
            with self.quietly("metrics"):
                self.client.log_batch(self.run_id, metrics=entries[start : start + 500])
        if changed := changed_names(paths, names):
            with self.quietly("a table of names"):
                self.client.log_text(self.run_id, json.dumps(changed, indent=1), CHANGED)

    def artifacts(self) -> None:
        """Keep the config, the meanings, the metrics and the report with the run."""
        with self.quietly("artifacts"), tempfile.TemporaryDirectory() as local:
            for name in ARTIFACTS:
                if self.folder.exists(name):
                    path = Path(local) / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(self.folder.read_bytes(name))
                    self.client.log_artifact(self.run_id, str(path))

    def models(self) -> None:
        """Log each trained arm, with its main BN, as an MLflow model; once, also over restarts."""
        from ray_synth.monitoring.mlflow_model import log_model

        saved = self.folder.read_json("mlflow.json")
        for arm in ("real_only", "recipe", "mixed"):
            if arm in saved.get("models", {}) or not self.folder.exists(f"models/{arm}.json"):
                continue
            with self.quietly("models"):
                model_uri = log_model(self.handle, self.folder, arm)
                saved = {**saved, "models": {**saved.get("models", {}), arm: model_uri}}
                self.folder.write_json("mlflow.json", saved)

    def end(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED."""
        if self._monitor is not None:
            with self.quietly("system metrics"):
                self._monitor.finish()
            self._monitor = None
        with self.quietly("status"):
            self.client.set_terminated(self.run_id, status)


class Quietly:
    """A block in which MLflow may fail: the failure is logged, once per kind, and goes no further."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a store may raise anything: requests', SQLAlchemy's, its own
            if what not in self.said:
                self.said.add(what)
                first = (str(error).splitlines() or [type(error).__name__])[0]
                log.warning(
                    "MLflow does not accept %s (%s); the run continues without", what, first[:200]
                )


class MetricLogger:
    """Logs points of a curve to a run that exists, without waiting for it; for rank 0 of a trainer.

    Steps that the run has already are passed over: a worker that was killed logged up to its death,
    and its successor starts from the checkpoint before.
    """

    def __init__(self, handle: dict[str, str], *, prefix: str) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=handle["uri"])
        self.run_id, self.prefix = handle["run_id"], prefix
        self.quietly = Quietly()
        self.last = 0
        self._pending: list[Any] = []
        with self.quietly("metrics"):
            history = self.client.get_metric_history(self.run_id, f"{prefix}.loss")
            self.last = max((metric.step for metric in history), default=0)

    def __call__(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        if step <= self.last:
            return
        self.last = step
        now = int(time.time() * 1000)
        entries = [
            Metric(f"{self.prefix}.{key}", value, now, step) for key, value in values.items()
        ]
        with self.quietly("metrics"):
            self._pending.append(
                self.client.log_batch(self.run_id, metrics=entries, synchronous=False)
            )

    def close(self) -> None:
        """Wait until what was logged has arrived."""
        for operation in self._pending:
            with self.quietly("metrics"):
                operation.wait()
        self._pending.clear()


def digest(index: Index) -> str:
    """A digest of which rows of which shards carry which label; no pixel is read."""
    seen = hashlib.sha256()
    for part in (index.shard, index.row, index.label):
        seen.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    for shard in index.shards:
        seen.update(repr(shard).encode())
    seen.update("\n".join(index.class_names).encode())
    return seen.hexdigest()[:32]
