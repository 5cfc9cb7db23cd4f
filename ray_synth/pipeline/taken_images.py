"""The images of a run that goes on from an earlier one: what is new is made, and all are gathered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ray_synth.generation import packs
from ray_synth.generation.chunks import holdings
from ray_synth.generation.gathering import Sources, gather_tasks, missing_rows_of
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import settled
from ray_synth.generators.registry import check_plan
from ray_synth.prompting.plan_file import PLAN_FILE, PLAN_SCHEMA, PlanFile
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
MISSING = "missing"  # the folder of the plan of what no earlier image is of


def take_images(run: Any, make: Callable[[PlanFile], int]) -> dict[str, int]:
    """Make the rows that no earlier image is of, and gather all in the run's store; how many of each.

    Rows that are made lie far apart in the plan: they are made as a plan of their own, in full
    batches. May be killed at any time: what was made or gathered is found again.

    Args:
        make: makes what the store lacks of a plan.
    """
    earlier, plan, store = Folder(run.config.take_over.run), PlanFile(run.folder), run.store
    images = ImageStore(earlier.child("images"))
    sources = Sources.of(plan, images, store)
    counts = {"taken": sources.taken, "made": len(plan) - sources.taken}
    log.info(
        "%d of %d images are those of %s; %d are to be made",
        sources.taken, len(plan), earlier.address(), sources.missing,
    )  # fmt: skip
    if not sources.taken:
        log.warning("no image can be taken over: generator, its settings, seed or prompts differ")
    if sources.missing:
        check_plan(run.config.generation, sources.missing)
        part = run.folder.child(MISSING)
        part.write_tables(PLAN_FILE, PLAN_SCHEMA, missing_rows_of(plan, sources))
        make(PlanFile(part))
        sources = Sources.of(plan, images, store)
    job = settled(run.generation_job())
    batch, rows = job.config.batch_size, job.pack_rows
    assert isinstance(batch, int)
    assert rows is not None
    group = packs.group_rows(job.config)
    packs.write_packs(gather_tasks(plan, store, sources, rows=rows, group=group, batch=batch))
    store.delete(holdings(plan, store, batch).stale)
    run.folder.child(MISSING).delete(PLAN_FILE)
    run.folder.child(MISSING).remove_empty()
    return counts
