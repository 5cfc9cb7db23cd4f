"""metrics.json: a run's results, rates and times, gathered from what its stages left."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ray_synth.errors import UserError
from ray_synth.evaluation.accuracy import add_shots
from ray_synth.pipeline.take_over import taken_counts
from ray_synth.report.page import write_report as write_page
from ray_synth.report.sheet import write_contact_sheet

if TYPE_CHECKING:
    from ray_synth.pipeline.run import Run

log = logging.getLogger("ray_synth")


def write_report(run: Run, seconds: float) -> dict[str, Any]:
    """metrics.json and the page, from what the stages left."""
    started = time.perf_counter()
    records = {stage: run.records.record(stage) or {} for stage in run.records.inputs}
    results = {stage: record.get("result", {}) for stage, record in records.items()}
    evaluation, generation = results["evaluation"], results["generation"]
    if not evaluation["results"]:
        raise UserError(
            f"{run.folder.address()}: the evaluation has no results, since not one test image could be "
            "used: fix data.test and test again with --force-stage evaluation"
        )
    arms = results["training"].get("seconds", {})
    add_shots(evaluation["results"], results["data"]["counts"])
    before = run.folder.read_json("metrics.json") if run.folder.exists("metrics.json") else {}
    metrics = {
        "run": run.config.name,
        "num_real": results["data"]["num_real"],
        "num_synthetic": generation["num_synthetic"],
        **evaluation["results"],
        "images_per_second": {
            "generation": generation["images_per_actor_second"]
            * run.config.generation.pool.max_size
        },
        "stall_fraction": run.folder.read_json("models/mixed.json")["stall_fraction"],
        "seconds": {
            **run.records.seconds(),
            **{f"training_{arm}": value for arm, value in arms.items()},
        },
        "corrupt": {"train": results["data"]["corrupt"], "test": evaluation["corrupt"]},
        "left_out": run.left_out,
        "rejected": generation["rejected"],
        "reject_reasons": generation["reject_reasons"],
        "generation": generation["facts"],
        "contexts": results["plan"]["context_sources"],
        "shortened": results["plan"].get("shortened", {}),
    }
    if practice := results["training"].get("practice"):
        metrics["practice"] = {**practice, **saved(practice, generation["facts"])}
    if taken := taken_counts(run, generation.get("taken_over") or {}):
        metrics["taken_over"] = taken
    metrics["seconds"]["total"] = before.get("seconds", {}).get("total", seconds)
    run.folder.write_json("metrics.json", metrics)
    write_contact_sheet(run.folder)
    write_page(run.folder)
    log.info("report: %.1f s", time.perf_counter() - started)
    return metrics


def saved(practice: dict[str, Any], facts: dict[str, Any]) -> dict[str, float]:
    """`gpu_hours_saved`, `cpu_hours_saved` and `cost_saved` by rounds that were not made, at what the
    images of the others took."""
    share = practice["images_saved"] / practice["images"]
    names = ("gpu_hours", "cpu_hours", "cost")
    return {f"{name}_saved": share * facts.get(name, 0.0) for name in names}
