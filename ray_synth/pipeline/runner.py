"""A whole run: checked before anything is spent, watched while it goes on, reported in the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ray_synth.cluster.connection import connect
from ray_synth.config import Config
from ray_synth.monitoring.driver_lock import sole_driver
from ray_synth.monitoring.heartbeat import watched
from ray_synth.pipeline.estimate import Estimate, compare, priced
from ray_synth.pipeline.kept import check_kept
from ray_synth.pipeline.probe import forecast, share_cores
from ray_synth.pipeline.results import write_report
from ray_synth.pipeline.run import Run, begin, check_run
from ray_synth.pipeline.steps import run_stages
from ray_synth.preflight import Reach, preflight
from ray_synth.service.apps import remove_left_behind
from ray_synth.stages import REPORT, up_to
from ray_synth.storage.secrets import redact_value_of

log = logging.getLogger("ray_synth")


def run_pipeline(
    config: Config,
    *,
    until: str = REPORT,
    force_stage: str | None = None,
    estimate: bool = False,
) -> dict[str, Any]:
    """Run all stages up to `until`; the metrics, or what the stage left in `stages/<until>.json`.

    Args:
        until: one of `stages.STAGES`, or `report`.
        estimate: first probe the cluster, and in the end say how far off the estimate was.

    Raises:
        UserError: there is no such stage, something is wrong with the config, its data or what the run
            has kept, or another driver works on the run.
    """
    up_to(until)
    started = time.perf_counter()
    with opened(config, force_stage) as run:
        return _run(run, until, force_stage, estimate, started)


@contextmanager
def opened(config: Config, force_stage: str | None = None) -> Iterator[Run]:
    """A run that is checked, what it has kept included, and no other driver's while it is open."""
    redact_value_of(config.meaning.llm.api_key_env)
    run = check_run(config, force_stage)
    for line in run.left_out:
        log.warning("%s", line)
    with sole_driver(run.folder):
        check_kept(run)
        yield run


def start(run: Run, until: str, force_stage: str | None, watching: ExitStack) -> Reach:
    """Begin the stages up to one on the cluster that is connected to, watched until `watching` ends."""
    reach = preflight(run.config, run.sizes, run.todo(until))
    remove_left_behind()
    begin(run, force_stage)
    watching.enter_context(watched(run.folder, until))
    return reach


def _run(
    run: Run, until: str, force_stage: str | None, estimate: bool, started: float
) -> dict[str, Any]:
    """The stages of a run that is open."""
    if until == REPORT and run.folder.exists("metrics.json") and not run.todo("evaluation"):
        begin(run)
        write_report(run, time.perf_counter() - started)
        return run.folder.read_json("metrics.json")
    with ExitStack() as watching:
        with connect(run.config.cluster):
            reach = start(run, until, force_stage, watching)
            tracker = _tracker(run)
            try:
                expected = _forecast(run, until, reach) if estimate else None
                estimated = time.perf_counter()
                run_stages(run, until, tracker)
            except BaseException as error:
                if tracker:
                    tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
        if until == REPORT:
            left = write_report(run, time.perf_counter() - started)
        else:
            left = (run.records.record(until) or {}).get("result", {})
        if expected:
            _compare(run, expected, time.perf_counter() - estimated)
        if tracker and until == REPORT:
            _track_results(run, tracker, left)
        elif tracker:
            tracker.end()
        return left


def _forecast(run: Run, until: str, reach: Reach) -> Estimate:
    """Of the stages that are to do, from a short probe; kept in estimate.json."""
    found = forecast(run, until, shared=share_cores(run.config, reach))
    run.folder.write_json("estimate.json", found.as_dict())
    return found


def _compare(run: Run, expected: Estimate, total: float) -> None:
    """How far off the estimate was, in the log and in estimate.json."""
    done = run.records.seconds()
    seconds = {stage: done[stage] for stage in expected.seconds if stage in done}
    seconds["around"] = total - sum(seconds.values())
    taken = priced(run.config, run.sizes, seconds)
    run.folder.write_json("estimate.json", {**expected.as_dict(), "taken": taken.as_dict()})
    log.info("%s", compare(expected, taken))


def _tracker(run: Run) -> Any:
    if not run.config.tracking.enabled:
        return None
    from ray_synth.monitoring.mlflow_run import Tracker

    tracker = Tracker(run.config, run.runs, run.folder)
    tracker.datasets({"training": run.train, **run.tests})
    return tracker


def _track_results(run: Run, tracker: Any, metrics: dict[str, Any]) -> None:
    tracker.metrics({key: value for key, value in metrics.items() if key != "corrupt"})
    tracker.artifacts()
    tracker.models()
    tracker.end()
