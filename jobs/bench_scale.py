"""The verbs `scaling` and `plans` of `jobs/bench.py`: many actors, and long plans, without a model."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from ray_synth.config import ClusterConfig, GenerationConfig, PoolConfig, QualityConfig
from ray_synth.generators.protocol import plugin_size

PATIENCE = 40  # batches per actor that may pass while the last actors start


class Sleeper:
    """A generator that takes a fixed time per batch, whatever the machine."""

    def __init__(self, config: GenerationConfig) -> None:
        self.seconds = config.generator_kwargs["seconds"]
        self.image = Image.new("RGB", plugin_size(config), "gray")
        self.provenance = {"pid": os.getpid()}

    def generate(self, rows: list[dict[str, Any]]) -> list[Image.Image]:
        time.sleep(self.seconds)
        return [self.image] * len(rows)


def sleeper_config(seconds: float, actors: int = 1, batch_size: int = 16) -> GenerationConfig:
    return GenerationConfig(
        generator="bench_scale:Sleeper",
        generator_kwargs={"seconds": seconds},
        width=64,
        height=64,
        image_format="png",
        batch_size=batch_size,
        checks=QualityConfig(policy="off"),
        pool=PoolConfig(min_size=actors, max_size=actors),
        num_cpus=1,
    )


def plan_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Rows `first` and on of an endless plan, each with a prompt of its own."""
    subjects = ("a tree", "a house", "the number seven", "a boat", "a dog")
    return [
        {
            "sample_id": f"{i:08d}",
            "class_index": i % len(subjects),
            "class_name": subjects[i % len(subjects)],
            "meaning": "",
            "kind": "plain",
            "style": "",
            "prompt": f"a photo of {subjects[i % len(subjects)]}, in bright light, view {i}",
            "negative_prompt": "",
            "context_source": "none",
            "seed": i,
            "reference": "",
        }
        for i in range(first, first + count)
    ]


def scaling(actors: list[int], seconds: float, batches: int) -> dict[str, Any]:
    """Throughput against actors; the ideal is `actors / seconds` batches per second."""
    from ray_synth.cluster.connection import connect

    print(
        f"a generator that sleeps {seconds:g} s per batch; {batches} batches per actor, steady state"
    )
    print(f"{'actors':>8} {'batches/s':>10} {'ideal':>10} {'ratio':>8} {'ready after':>12}")
    ratios = {}
    with connect(ClusterConfig(num_cpus=max(actors) + 8)):
        for count in actors:
            rate, ready = _scaling_round(count, seconds, batches)
            ratios[count] = rate * seconds / count
            print(
                f"{count:>8} {rate:>10.3f} {count / seconds:>10.3f} {ratios[count]:>8.4f} "
                f"{ready:>10.1f} s",
                flush=True,
            )
    return {
        "seconds_a_batch": seconds,
        "of_ideal": {str(count): round(ratio, 4) for count, ratio in ratios.items()},
        "of_ideal_at_most_actors": round(ratios[max(actors)], 4),
    }


def _scaling_round(actors: int, seconds: float, batches: int) -> tuple[float, float]:
    """(batches per second, seconds until all actors worked), counted while all of them work."""
    import pyarrow as pa

    from ray_synth.generation.maker import GenerationJob
    from ray_synth.generation.store import ImageStore
    from ray_synth.generation.stream import image_stream
    from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
    from ray_synth.storage.folder import Folder

    config = sleeper_config(seconds, actors)
    size = config.batch_size
    assert isinstance(size, int)
    rows = plan_rows(actors * (batches + PATIENCE) * size)
    by_actor: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = PlanTable(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
        stream = image_stream(
            GenerationJob(config, plan, ImageStore(Folder(folder))), columns=["generator"]
        )
        started = time.perf_counter()
        for block in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in pa.table(block)["generator"].to_pylist()[::size]:
                times = by_actor.setdefault(json.loads(row)["pid"], [])
                times.append(time.perf_counter())
            ready = max(times[0] for times in by_actor.values())
            after = [sum(at > ready for at in times) for times in by_actor.values()]
            if len(by_actor) == actors and min(after) > batches:
                break
    assert len(by_actor) == actors, f"only {len(by_actor)} of {actors} actors came to work"
    # The sum of each actor's own pace while all of them work.
    rate = 0.0
    for times in by_actor.values():
        steady = [at for at in times if at > ready]
        rate += (len(steady) - 1) / (steady[-1] - steady[0])
    return rate, ready - started


def plans(sizes: list[int], batch_size: int = 32) -> dict[str, Any]:
    """Start-up, memory and listing for plans of many rows, half of which are made."""
    print(
        f"{'rows':>12} {'plan, MB':>9} {'write, s':>9} {'list, s':>8} {'cut, s':>8} "
        f"{'first image, s':>15} {'driver, MB':>11}"
    )
    context = multiprocessing.get_context("spawn")
    figures: dict[str, dict[str, float]] = {}
    for size in sizes:
        with context.Pool(1) as pool:  # a process of its own: its peak memory is its own
            found = pool.apply(_plan_round, (size, batch_size))
        figures[str(size)] = {key: round(value, 3) for key, value in found.items()}
        print(
            f"{size:>12,} {found['plan_mb']:>9.1f} {found['write_s']:>9.1f} {found['list_s']:>8.2f} "
            f"{found['cut_s']:>8.2f} {found['first_image_s']:>15.1f} {found['driver_mb']:>11.0f}",
            flush=True,
        )
    return {"batch_size": batch_size, "plans": figures}


def _plan_round(size: int, batch_size: int) -> dict[str, float]:
    from ray_synth.cluster.connection import connect
    from ray_synth.generation.chunks import cut
    from ray_synth.generation.maker import GenerationJob
    from ray_synth.generation.store import ImageStore, part_name
    from ray_synth.generation.stream import image_stream, missing_chunks
    from ray_synth.prompting.plan_file import PlanFile
    from ray_synth.storage.folder import Folder

    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as temporary:
        run = Folder(temporary)
        started = time.perf_counter()
        write_plan(run, size)
        written = time.perf_counter() - started
        plan, store = PlanFile(run), ImageStore(run.child("images"))
        os.makedirs(store.folder.path())
        # Every second chunk is made. Its part is empty here: a finished chunk is never opened.
        for number, ids in enumerate(plan.ids(batch_size)):
            if number % 2:
                Path(store.folder.path(part_name(ids))).touch()
        started = time.perf_counter()
        store.parts()
        listed = time.perf_counter() - started
        started = time.perf_counter()
        cut(plan, store, batch_size)
        cut_s = time.perf_counter() - started
        job = GenerationJob(sleeper_config(0.05, batch_size=batch_size), plan, store)
        with connect(ClusterConfig(num_cpus=4)):
            started = time.perf_counter()
            stream = image_stream(job, chunks=missing_chunks(job), columns=["sample_id"])
            next(iter(stream.iter_batches(batch_size=None, batch_format="pyarrow")))
            first = time.perf_counter() - started
        return {
            "plan_mb": Path(run.path("plan.parquet")).stat().st_size / 1e6,
            "write_s": written,
            "list_s": listed,
            "cut_s": cut_s,
            "first_image_s": first,
            "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def write_plan(run: Any, size: int) -> None:
    """A plan as the pipeline writes it: 1,000 classes, contexts and styles."""
    from ray_synth.prompting.contexts import Context
    from ray_synth.prompting.plan import ClassPrompts, plan_tables
    from ray_synth.prompting.plan_file import PLAN_SCHEMA
    from ray_synth.prompting.styles import load_styles

    contexts = [
        (Context(foreground="on a table", background="in a room", lighting=f"light {i}"), "llm")
        for i in range(50)
    ]
    classes = [ClassPrompts(i, f"class {i}", f"meaning {i}", contexts) for i in range(1000)]
    run.write_tables(
        "plan.parquet",
        PLAN_SCHEMA,
        plan_tables(
            classes,
            num_images=size,
            mix={"contextual": 1, "stylized": 1},
            styles=load_styles(None),
            negative_prompt="",
            fingerprint="0" * 16,
            seed=0,
            count_tokens=lambda text: len(text.split()),
            max_tokens=77,
        ),
    )
