"""The verb `store` of `jobs/bench.py`: a finished store of many rows, as driver and trainers see it.

The rows are real ones of a real plan, with tiny pictures; they are written as packs at once, except for
a part of them that is packed from small parts here.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from bench_scale import write_plan

RANKS = 8
PACKED_HERE = 65_536  # rows that are packed from small parts
BATCH = 16
PACK, GROUP = 16_384, 512  # rows, as of pictures of 64 px


def stores(sizes: list[int]) -> dict[str, Any]:
    """Listing, looking up, counting and an epoch of training's reading, for each number of rows."""
    print(
        f"{'rows':>10} {'files':>6} {'list, s':>8} {'look up, s':>10} {'where, s':>8} {'facts, s':>8} "
        f"{'driver, MB':>10} {'epoch, s':>8} {'rows/s':>8} {'resume, s':>9} {'worker, MB':>10}"
    )
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            figures = _apart(_fill, folder, size)
            figures |= _apart(_look, folder, size)
            figures |= _apart(_train, folder, size)
        found[str(size)] = {key: round(value, 3) for key, value in figures.items()}
        print(
            f"{size:>10,} {figures['files']:>6.0f} {figures['list_s']:>8.2f} "
            f"{figures['look_up_s']:>10.1f} {figures['where_s']:>8.1f} {figures['facts_s']:>8.1f} "
            f"{figures['driver_mb']:>10.0f} {figures['epoch_s']:>8.1f} "
            f"{figures['epoch_rows_per_second']:>8.0f} {figures['resume_s']:>9.2f} "
            f"{figures['worker_mb']:>10.0f}",
            flush=True,
        )
    return {"stores": found}


def _apart(work: Any, folder: str, size: int) -> dict[str, float]:
    """In a process of its own: its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (folder, size))


def _open(folder: str) -> tuple[Any, Any, Any]:
    from ray_synth.generation.store import ImageStore
    from ray_synth.prompting.plan_file import PlanFile
    from ray_synth.storage.folder import Folder

    run = Folder(folder)
    return run, PlanFile(run), ImageStore(run.child("images"))


def _fill(folder: str, size: int) -> dict[str, float]:
    """Write the plan and its images; how fast small parts are packed."""
    from ray_synth.generation.chunks import holdings
    from ray_synth.generation.packs import packs_to_write
    from ray_synth.generation.store import pack_name, part_name

    run, plan, store = _open(folder)
    started = time.perf_counter()
    write_plan(run, size)
    planned = time.perf_counter() - started
    Path(store.folder.path()).mkdir()
    small = min(PACKED_HERE, size // PACK * PACK)
    for start in range(0, size, PACK):
        table = _made(run.read_rows("plan.parquet", start, start + PACK))
        if start < small or len(table) < PACK:
            for at in range(0, len(table), BATCH):
                part = table.slice(at, BATCH)
                store.folder.write_table(part_name(part["sample_id"].to_pylist()), part)
        else:
            groups = (table.slice(at, GROUP) for at in range(0, PACK, GROUP))
            store.write_pack(pack_name(table["sample_id"].to_pylist(), start), groups)
    started = time.perf_counter()
    for task in packs_to_write(plan, store, holdings(plan, store, BATCH), PACK, GROUP):
        task.run()
    packing = time.perf_counter() - started
    return {"plan_s": planned, "packed_rows_per_second": small / packing if small else 0.0}


def _made(rows: pa.Table) -> pa.Table:
    """Image rows of plan rows; one in a hundred is rejected."""
    from ray_synth.data.images import encode_array
    from ray_synth.generation.store import IMAGE_SCHEMA

    picture = encode_array(np.zeros((8, 8, 3), np.uint8))
    seed = rows["seed"].to_numpy()
    same: dict[str, Any] = {
        "image": picture, "width": 8, "height": 8, "clip_score": 0.3, "embedding": None,
        "reject_reason": "", "attempt": 0, "generator": "{}", "gpu_seconds": 0.1,
    }  # fmt: skip
    for field in IMAGE_SCHEMA:
        if field.name in same:
            column = pa.repeat(pa.scalar(same[field.name], field.type), len(rows))
        elif field.name == "accepted":
            column = pa.array(seed % 100 != 0)
        else:
            continue
        rows = rows.append_column(field, column)
    return rows.select(IMAGE_SCHEMA.names).cast(IMAGE_SCHEMA).combine_chunks()


def _look(folder: str, size: int) -> dict[str, float]:
    """What a driver does that goes on with a run, and at the end of generation."""
    import os

    from ray_synth.config import parse_config
    from ray_synth.generation.chunks import chunks_of, holdings
    from ray_synth.generation.cost import store_facts
    from ray_synth.generation.stored import StoredRows

    source = {"format": "digits"}
    config = parse_config(
        {"name": "x", "data": {"train": source, "test": source}, "training": {"steps": 1}}
    )
    run, plan, store = _open(folder)
    parts, list_s = _timed(store.parts)
    held, look_up_s = _timed(lambda: holdings(plan, store, BATCH))
    chunks = chunks_of(held, BATCH)
    assert not any(chunk.missing for chunk in chunks)
    _, where_s = _timed(lambda: StoredRows.of(held, store, size, GROUP))
    before = _peak_mb()
    facts, facts_s = _timed(lambda: store_facts(config, run, store))
    assert facts["num_synthetic"] + facts["rejected"] == size
    bytes_all = sum(os.path.getsize(store.folder.path(name)) for name in parts)
    return {
        "files": len(parts), "megabytes": bytes_all / 1e6, "list_s": list_s,
        "look_up_s": look_up_s, "where_s": where_s, "facts_s": facts_s,
        "driver_before_facts_mb": before, "driver_mb": _peak_mb(),
    }  # fmt: skip


def _train(folder: str, size: int) -> dict[str, float]:
    """An epoch in stored order of each of the ranks, one after the other; and a start in its middle."""
    from ray_synth.generation.chunks import holdings
    from ray_synth.generation.stored import StoredRows
    from ray_synth.training.decoder import Item
    from ray_synth.training.stored_feed import StoredFeed

    class Keeps:
        def keep(self, row: dict[str, Any]) -> Item:
            return Item(row["image"], row["class_index"], row["sample_id"])

    _, plan, store = _open(folder)
    rows = StoredRows.of(holdings(plan, store, BATCH), store, size, GROUP)
    seen: list[np.ndarray] = []
    epoch_s = resume_s = 0.0
    for rank in range(RANKS):
        options: dict[str, Any] = {"rank": rank, "world_size": RANKS, "seed": 0, "batch_size": 128}
        feed = StoredFeed(rows, Keeps(), **options)  # type: ignore[arg-type]
        steps = int(feed.counts[feed.blocks(0)].sum()) // 128
        started = time.perf_counter()
        for step in range(steps):
            seen.append(np.array([hash(item.name) for item in feed.draw(step).items]))
        epoch_s += time.perf_counter() - started
        again = StoredFeed(rows, Keeps(), **options, start_step=steps // 2)  # type: ignore[arg-type]
        _, took = _timed(lambda: again.draw(steps // 2))  # noqa: B023
        resume_s = max(resume_s, took)
        feed.close()
        again.close()
    accepted = int(rows.counts(GROUP).sum())
    drawn = len(np.unique(np.concatenate(seen)))
    assert accepted - RANKS * 128 <= drawn <= accepted, f"{drawn} of {accepted}"
    return {
        "epoch_s": epoch_s, "epoch_rows_per_second": drawn / epoch_s, "resume_s": resume_s,
        "worker_mb": _peak_mb(),
    }  # fmt: skip


def _timed(work: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
