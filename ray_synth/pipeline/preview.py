"""A look before spending: a few images of each class and kind, and what the whole would take.

They are the first rows of the run's own plan, so `run` goes on from them: nothing is made twice.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import pyarrow.compute as pc

from ray_synth.cluster.connection import connect
from ray_synth.config import Config
from ray_synth.generation.acceptance import NEEDED, Acceptance
from ray_synth.generation.cost import cost_note, hours_and_cost
from ray_synth.generation.stream import image_stream, missing_chunks
from ray_synth.monitoring.progress import Bar, make_board, watch
from ray_synth.pipeline.commits import fetch_generator
from ray_synth.pipeline.run import Run
from ray_synth.pipeline.runner import opened, start
from ray_synth.pipeline.steps import run_stages
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.prompting.plan_index import PlanIndex
from ray_synth.report.page import PREVIEW, write_report

PER_KIND = 2  # images of each class and kind
MOST = 240  # in all: a minute or two on one device


def preview(
    config: Config, *, images: int | None = None, force_stage: str | None = None
) -> dict[str, Any]:
    """Draw the first images of a run's plan, and write its page; see `figures`.

    Args:
        images: how many; default: `PER_KIND` of each class and kind, `MOST` at most.

    Raises:
        UserError: as `run_pipeline`.
    """
    with opened(config, force_stage) as run:
        with connect(run.config.cluster), ExitStack() as watching:
            start(run, "generation", force_stage, watching)
            run_stages(run, "quality")
            count = min(images or _usual(run), len(PlanFile(run.folder)))
            _draw(run, count)
        found = figures(run, count)
        run.folder.write_json(PREVIEW, found)
        return {**found, "page": write_report(run.folder)}


def _usual(run: Run) -> int:
    kinds = sum(share > 0 for share in run.config.prompting.mix.values())
    return min(PER_KIND * kinds * len(run.train.class_names), MOST)


def _draw(run: Run, count: int) -> None:
    """Make what the store lacks of the plan's first rows, in whole chunks."""
    board = make_board()
    job = run.generation_job(board)
    chunks = [chunk for chunk in missing_chunks(job) if chunk.start < count]
    if not chunks:
        return
    fetch_generator(run.config)
    bars = {"made": Bar("generation", sum(chunk.missing for chunk in chunks), "images")}
    with watch(board, bars, notes={"made": partial(cost_note, config=run.config)}):
        for _ in image_stream(job, chunks=chunks, columns=["sample_id"]).iter_batches(
            batch_size=None
        ):
            pass


def figures(run: Run, count: int) -> dict[str, Any]:
    """What the first rows say of the whole.

    Returns:
        `images` and how many `passed` the checks, `planned`, `seconds_per_image` of one actor, and
        for the whole `hours` of generation by a pool of full size, `gpu_hours`, `cpu_hours`, `cost`.
    """
    ids = PlanFile(run.folder).ids_of(0, count)
    acceptance = Acceptance()
    seconds, passed, made = 0.0, 0, 0
    columns = ["gpu_seconds", *NEEDED]
    for _, table in run.store.planned(PlanIndex([ids]), columns):
        acceptance.add(table)
        made += table.num_rows
        passed += pc.sum(pc.equal(table["reject_reason"], "")).as_py() or 0
        seconds += pc.sum(table["gpu_seconds"]).as_py() or 0.0
    if run.config.generation.checks.policy != "off":
        acceptance.save(run.folder)
    planned = len(PlanFile(run.folder))
    if run.config.prompting.practice:  # which is round 0 of it as yet
        planned = run.sizes.synthetic(run.config) or planned
    each = seconds / max(made, 1)
    return {
        "images": made,
        "passed": passed,
        "planned": planned,
        "seconds_per_image": each,
        "hours": planned * each / run.config.generation.pool.max_size / 3600,
        **hours_and_cost(run.config, planned * each),
    }
