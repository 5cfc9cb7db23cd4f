"""The stages in order: data, meaning, plan, generation and training, evaluation, report.

Each stage reads what the ones before it left in the run directory and leaves its own. The same command
run again skips what is done and continues what is not.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from ray_synth.cluster.connection import connect
from ray_synth.config import ClipConfig, Config, QualityConfig
from ray_synth.data.dataset import (
    drop,
    inspect,
    read_index,
    require_every_class,
    select,
)
from ray_synth.generation.chunks import missing_rows
from ray_synth.monitoring.heartbeat import watched
from ray_synth.monitoring.logs import hide_value_of
from ray_synth.monitoring.progress import Bar, make_board, watch
from ray_synth.pipeline.estimate import Estimate, compare, priced
from ray_synth.pipeline.results import write_report
from ray_synth.pipeline.run import Run, begin, check_run
from ray_synth.pipeline.steps import resolve_meanings, write_plan
from ray_synth.preflight import Reach, preflight
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")


def run_pipeline(
    config: Config,
    *,
    until: str = "report",
    force_stage: str | None = None,
    estimate: bool = False,
) -> dict[str, Any]:
    """Run all stages up to `until`; the metrics (empty before evaluation).

    Args:
        until: one of `stages.STAGES`, or `report`.
        estimate: first probe the cluster, and in the end say how far off the estimate was.
    """
    started = time.perf_counter()
    hide_value_of(config.meaning.llm.api_key_env)
    run = check_run(config, force_stage)
    if until == "report" and run.folder.exists("metrics.json") and run.stages.record("evaluation"):
        begin(run)
        write_report(run, time.perf_counter() - started)
        return run.folder.read_json("metrics.json")
    with ExitStack() as watching:
        with connect(config.cluster):
            reach = preflight(config, run.sizes, run.todo(until))
            begin(run, force_stage)
            watching.enter_context(watched(run.folder, until))
            tracker = _tracker(run)
            try:
                expected = _forecast(run, until, reach) if estimate else None
                estimated = time.perf_counter()
                _run_stages(run, until, tracker)
            except BaseException as error:
                if tracker:
                    tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
        metrics = write_report(run, time.perf_counter() - started) if until == "report" else {}
        if expected:
            _compare(run, expected, time.perf_counter() - estimated)
        if tracker and metrics:
            _track_results(run, tracker, metrics)
        elif tracker:
            tracker.end()
        return metrics


def _forecast(run: Run, until: str, reach: Reach) -> Estimate:
    """Of the stages that are to do, from a short probe; kept in estimate.json."""
    from ray_synth.pipeline.probe import forecast, share_cores

    found = forecast(run, until, shared=share_cores(run.config, reach))
    run.folder.write_json("estimate.json", found.as_dict())
    return found


def _compare(run: Run, expected: Estimate, total: float) -> None:
    """How far off the estimate was, in the log and in estimate.json."""
    done = run.stages.seconds()
    seconds = {stage: done[stage] for stage in expected.seconds if stage in done}
    seconds["around"] = total - sum(seconds.values())
    taken = priced(run.config, run.sizes, seconds)
    run.folder.write_json("estimate.json", {**expected.as_dict(), "taken": taken.as_dict()})
    log.info("%s", compare(expected, taken))


def inspected(run: Run) -> Run:
    """The run without its corrupt training images, each of which is decoded once."""
    data = run.stages.run("data", lambda: inspect_data(run))
    return replace(run, train=drop(run.train, data["corrupt"]))


def run_words(run: Run, service: Any, *, plan: bool = True) -> None:
    """The stages that ask the service: meanings and, with `plan`, prompts."""
    run.stages.run("meaning", lambda: resolve_meanings(run, service))
    if plan:
        run.stages.run("plan", lambda: write_plan(run, service))


def run_images(run: Run) -> None:
    """The stages that make all images of a plan."""
    run.stages.run("quality", lambda: measure_quality(run))
    run.stages.run("generation", lambda: generate(run))


def _run_stages(run: Run, until: str, tracker: Any) -> None:
    from ray_synth.service.session import Service

    done_at = {"data": 1, "meaning": 2, "plan": 3, "generation": 4, "training": 5}.get(until, 6)
    run = inspected(run)
    if done_at >= 2:
        with Service(run.config) as service:
            run_words(run, service, plan=done_at >= 3)
    if done_at >= 4:
        run.stages.run("quality", lambda: measure_quality(run))
    live = run.config.training.feed != "stored"
    if done_at == 4 or (done_at > 4 and not live):
        run.stages.run("generation", lambda: generate(run))
    if done_at >= 5:
        run.stages.run("training", lambda: train(run, tracker))
        # What a live feed did not wait for is made now: the store ends whole.
        run.stages.run("generation", lambda: generate(run))
    if done_at >= 6:
        run.stages.run("evaluation", lambda: evaluate_models(run))


def inspect_data(run: Run) -> dict[str, Any]:
    """Decode every training image once; the corrupt ones are named and set aside."""
    corrupt = inspect(run.train, max_pixels=run.config.data.max_pixels)
    index = drop(run.train, corrupt)
    for item in corrupt:
        log.warning(
            "set aside %(image_id)s: %(error)s", item, extra={"sample_id": item["image_id"]}
        )
    require_every_class(index, "data.train, without its corrupt images,")
    return {"num_real": len(index), "counts": index.counts(), "corrupt": corrupt}


def measure_quality(run: Run) -> dict[str, Any]:
    """Thresholds of quality from real images' own scores, kept in `quality/`."""
    import ray

    checks, clip = run.config.generation.checks, run.config.meaning.clip
    if checks.policy == "off" or not checks.clip:
        return {"measured": False}
    folder = run.folder.child("quality")
    few = select(run.train, checks.real_images_per_class, run.config.seed)
    images: dict[int, list[bytes]] = {}
    for row in read_index(few):
        images.setdefault(row["class_index"], []).append(row["image"])
    meanings = dict(enumerate(run.folder.read_json("meanings.json")))
    per_class = max(1, len(PlanFile(run.folder)) // len(meanings))
    measure = ray.remote(num_cpus=clip.num_cpus, num_gpus=clip.num_gpus)(_measure_quality)
    ray.get(measure.remote(images, meanings, clip, checks, per_class, folder))
    return {"measured": True, "real_images": len(few)}


def _measure_quality(
    images: dict[int, list[bytes]],
    meanings: dict[int, dict[str, Any]],
    clip: ClipConfig,
    checks: QualityConfig,
    images_per_class: int,
    folder: Folder,
) -> None:
    """The task that measures, on a node that can hold the CLIP model."""
    from ray_synth.generation.thresholds import measure_reference, save_reference
    from ray_synth.meaning.candidates import with_article
    from ray_synth.meaning.clip import load_clip

    texts = {
        index: with_article(entry["choice"])
        if entry["choice"] == entry["class_name"]
        else entry["choice"]
        for index, entry in meanings.items()
    }
    reference = measure_reference(
        images,
        texts,
        load_clip(clip),
        clip_quantile=checks.clip_quantile,
        duplicate_quantile=checks.duplicate_quantile,
        images_per_class=images_per_class,
    )
    save_reference(folder, reference)


def generate(run: Run) -> dict[str, Any]:
    """Make what the store lacks of the plan."""
    from ray_synth.generation.cost import cost_note, store_facts
    from ray_synth.generation.stream import make_images, missing_chunks

    board = make_board()
    job = run.generation_job(board)
    chunks = missing_chunks(job)
    bars = {"images": Bar("generation", missing_rows(chunks), "images")} if chunks else {}
    with watch(board, bars, notes={"images": partial(cost_note, config=run.config)}):
        made = make_images(job, chunks)
    return {"made_in_this_stage": made, **store_facts(run.config, run.folder, run.store)}


def train(run: Run, tracker: Any) -> dict[str, Any]:
    """Train the real-only baseline and the mixed model; the latter while images are being made."""
    from ray_synth.generation.cost import cost_note
    from ray_synth.training.job import TrainJob, total_steps
    from ray_synth.training.trainer import run_training

    config, training = run.config, run.config.training
    steps = total_steps(training, len(run.train))
    num_synthetic = len(PlanFile(run.folder))
    seconds = {}
    for arm in (["real_only"] if training.baseline else []) + ["mixed"]:
        started = time.perf_counter()
        board = make_board()
        bars = {f"steps/{arm}": Bar(f"training {arm}", steps, "steps")}
        if arm == "mixed" and training.feed != "stored":
            bars["images"] = Bar("generation", num_synthetic, "images")
        job = TrainJob(
            arm=arm,
            config=training,
            steps=steps,
            class_names=run.train.class_names,
            seed=config.seed,
            folder=run.folder,
            real=run.train if len(run.train) <= training.cache_images else None,
            max_pixels=config.data.max_pixels,
            num_synthetic=num_synthetic if arm == "mixed" else 0,
            tracking=tracker.handle if tracker else None,
            board=board,
        )
        with watch(board, bars, notes={"images": partial(cost_note, config=config)}):
            run_training(
                job,
                run.generation_job(board),
                real=run.train,
                run_name=f"{arm}-{run.stages.digest('training')}",
            )
        seconds[arm] = time.perf_counter() - started
    return {"seconds": seconds, "steps": steps}


def evaluate_models(run: Run) -> dict[str, Any]:
    """Test all models on all test sets and write metrics.json."""
    from ray_synth.evaluation.predictor import evaluate

    config = run.config
    arms = (["real_only"] if config.training.baseline else []) + ["mixed"]
    board = make_board()
    total = sum(len(index) for index in run.tests.values())
    with watch(board, {"tested": Bar("evaluation", total, "images")}):
        results, corrupt = evaluate(
            run.tests,
            folder=run.folder,
            arms=arms,
            config=config.evaluation,
            class_names=run.train.class_names,
            max_pixels=config.data.max_pixels,
            board=board,
        )
    tree: dict[str, Any] = {}
    for (model, test_set), found in results.items():
        node = tree
        for part in model.split("."):
            node = node.setdefault(part, {})
        if test_set == "in_domain":
            node["in_domain"] = found
        else:
            node.setdefault("ood", {})[test_set] = found
    return {"results": tree, "corrupt": corrupt}


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
    if run.config.tracking.log_models:
        tracker.models()
    tracker.end()
