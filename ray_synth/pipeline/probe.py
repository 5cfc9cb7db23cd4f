"""A short probe of every stage on the connected cluster, through the code that the run will use.

A few classes are asked about, a few batches of images made, a few steps taken. What is measured is what
`estimate` multiplies. Nothing of the run is touched: the probe works in a folder of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pyarrow.fs import FileType

from ray_synth.config import Config, GenerationConfig, PoolConfig
from ray_synth.pipeline.estimate import Estimate, Measured, estimate, lines
from ray_synth.preflight.demands import asks_for_contexts, demands
from ray_synth.preflight.reach import Reach
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from ray_synth.generation.maker import GenerationJob

log = logging.getLogger("ray_synth")
CLASSES = 4  # asked about: enough to fill the language model's batches
BATCHES = 8  # of images
STEPS = 30
SETTLE = 3  # steps before any is timed: they find the batches that were prepared in advance
QUALITY_IMAGES = 500
# No probe measures these two; they are what quickstarts took.
TEST_START = 0.9  # of the time in which an actor is ready to make images
REPORT_S = 3.0  # what follows the last stage
Contexts = list[list[tuple[Any, str]]]  # of a few classes, as `ClassPrompts` takes them


def forecast(run: Any, until: str, *, shared: bool) -> Estimate:
    """Probe the cluster and estimate the stages of a run that are to do.

    Args:
        run: a `run.Run`; its directory is left alone.
        until: the last stage.
        shared: generation and training run on the same cores.

    Raises:
        ValueError: as the stages themselves do.
    """
    stages = run.todo(until)
    measured = probe(run, stages, shared=shared)
    found = estimate(run.config, run.sizes, measured, shared=shared, stages=stages)
    for line in lines(found):
        log.info("estimate: %s", line)
    return found


def share_cores(config: Config, reach: Reach) -> bool:
    """Whether generation and training run on the same cores: on one machine, without GPUs."""
    return reach.count == 1 and not (config.generation.num_gpus or config.training.num_gpus)


def probe(run: Any, stages: Collection[str], *, shared: bool) -> Measured:
    """Measure what the stages that are to do will need; the run's directory is left alone."""
    config: Config = run.config
    folder: Folder = run.runs.child(f".probe-{config.name}")
    asked = demands(config, run.sizes)
    seconds: dict[str, float] = {"around": REPORT_S}
    contexts: Contexts = []
    second: GenerationJob | None = None
    started = time.perf_counter()
    try:
        if any(asked[stage] and stage in stages for stage in ("meaning", "plan")):
            found, contexts = _words(run)
            seconds |= found
        if {"generation", "training"} & set(stages):
            first, second = _generation_jobs(run, folder, contexts)
            seconds |= _images(run, folder, first)
        if {"training", "evaluation"} & set(stages):
            beside = shared and config.training.feed != "stored" and "training" in stages
            seconds |= _training(run, folder, second if beside else None)
    finally:
        if folder.filesystem.get_file_info(folder.path()).type == FileType.Directory:
            folder.filesystem.delete_dir(folder.path())
    # An actor of Ray Data that loads models, as the one that makes images.
    seconds["test_start"] = TEST_START * seconds.get("make_start", 0.0)
    log.info("probe: %.1f s; %s", time.perf_counter() - started, seconds)
    return Measured(**seconds)


def _words(run: Any) -> tuple[dict[str, float], Contexts]:
    """The service: its start, and seconds per class of both kinds of question; and the answers."""
    from ray_synth.data.dataset import ImagesByClass, select
    from ray_synth.prompting.plan_settings import read_contexts
    from ray_synth.service.session import Service

    config: Config = run.config
    names = run.train.class_names[:CLASSES]
    few = run.train.take(np.flatnonzero(run.train.label < len(names)))
    few = select(few, config.meaning.num_images, config.seed)
    images = {names[label]: found for label, found in ImagesByClass(few).items()}
    found: dict[str, float] = {}
    contexts: Contexts = []
    with Service(config) as service:
        found["service_start"] = _timed(service.start)
        if config.meaning.enabled:
            ask = lambda: list(service.resolve_all(images.items(), seed=config.seed))  # noqa: E731
            found["meaning"] = _timed(ask) / len(names)
        if asks_for_contexts(config):
            same = {name: name for name in names}
            answers: dict[str, Any] = {}
            write = lambda: answers.update(service.write_contexts_all(same, seed=config.seed))  # noqa: E731
            found["contexts"] = _timed(write) / len(names)
            contexts = [read_contexts(answer) for answer in answers.values()]
        stopping = time.perf_counter()
    found["around"] = REPORT_S + time.perf_counter() - stopping
    return found, contexts


def _generation_jobs(
    run: Any, folder: Folder, contexts: Contexts
) -> tuple[GenerationJob, GenerationJob]:
    """What one actor makes alone, and what beside training."""
    from ray_synth.generation.maker import GenerationJob
    from ray_synth.generation.store import ImageStore
    from ray_synth.generation.stream import settled
    from ray_synth.generators.compilation import wants_compile
    from ray_synth.prompting.plan_file import PlanTable

    config: Config = run.config
    generation = config.generation
    share = (run.sizes.synthetic(config) or 0) // generation.pool.max_size
    compiled = wants_compile(generation, num_images=share, on_gpu=generation.num_gpus > 0)
    # An IP-Adapter costs a look at each real image, and a little in each step: left out here.
    beside = [item for item in generation.adapters if item.kind != "ip_adapter"]
    one = {"reference": None, "adapters": beside, "pool": PoolConfig(), "compile": False}
    job = settled(
        GenerationJob(
            generation.model_copy(update=one),
            PlanTable(_plan(run, 1, contexts)),
            ImageStore(folder.child("images")),
            folder,
            config.meaning.clip,
        )
    )
    job = replace(job, config=job.config.model_copy(update={"compile": compiled}))
    rows = BATCHES * int(job.config.batch_size)
    plan = _plan(run, 2 * rows, contexts)
    halves = [PlanTable(plan.slice(at, rows)) for at in (0, rows)]
    return replace(job, plan=halves[0]), replace(job, plan=halves[1])


def _images(run: Any, folder: Folder, job: GenerationJob) -> dict[str, float]:
    """The quality task, and a few batches of images: when the first came, and the pace after it."""
    from ray_synth.generation.stream import CALLS_AT_ONCE, image_stream
    from ray_synth.prompting.plan_file import PlanTable

    generation: GenerationConfig = run.config.generation
    assert isinstance(job.plan, PlanTable)
    folder.write_table("plan.parquet", job.plan.table)
    found = {"quality": _quality(run, folder)}
    seen: list[tuple[float, int]] = []
    for _ in _arriving(image_stream(job, columns=["sample_id"]), seen):
        pass
    make = pace(seen, CALLS_AT_ONCE)
    first, some = seen[0]
    if generation.reference is not None and generation.ip_adapter is None:
        make *= generation.reference.strength
    return {**found, "make": make, "make_start": max(0.0, first - some * make)}


def pace(seen: list[tuple[float, int]], calls: int) -> float:
    """Seconds per image.

    Args:
        seen: when each batch came, in seconds from the start, and how many images it had.
        calls: batches that an actor is given at a time: the first so many come together.
    """
    at = min(calls, len(seen)) - 1
    rest = sum(rows for _, rows in seen[at + 1 :])
    if not rest:
        return seen[-1][0] / sum(rows for _, rows in seen)
    return (seen[-1][0] - seen[at][0]) / rest


def _quality(run: Any, folder: Folder) -> float:
    """Seconds of the quality task, for as many images as it will have; of many it sees some."""
    from ray_synth.generation.thresholds import REAL_PER_CLASS
    from ray_synth.pipeline.steps import measure_quality

    names = run.train.class_names
    folder.write_json("meanings.json", [{"class_name": n, "choice": n} for n in names])
    few = max(1, min(REAL_PER_CLASS, QUALITY_IMAGES // len(names)))
    seconds = _timed(lambda: measure_quality(replace(run, folder=folder), per_class=few))
    return seconds * min(REAL_PER_CLASS / few, max(1.0, len(run.train) / (few * len(names))))


def _plan(run: Any, rows: int, contexts: Contexts) -> Any:
    """The run's first rows where it has them; else rows like its own, of a few classes' contexts."""
    from ray_synth.prompting.plan import ClassPrompts, make_plan
    from ray_synth.prompting.plan_settings import plan_settings

    config: Config = run.config
    if run.records.record("plan"):
        plan = run.folder.read_rows("plan.parquet", 0, rows)
        if len(plan) == rows and config.generation.reference is None:
            return plan
    names = enumerate(run.train.class_names)
    found = contexts or [[]]
    return make_plan(
        [ClassPrompts(index, name, name, found[index % len(found)]) for index, name in names],
        num_images=rows,
        **plan_settings(config),
    )


def _training(run: Any, folder: Folder, generation: GenerationJob | None) -> dict[str, float]:
    """One Ray Train worker that takes some steps of both arms, saves, and tests a batch.

    Args:
        generation: what is made while it takes some more.
    """
    import ray.train
    import ray.train.torch

    from ray_synth.data.dataset import select
    from ray_synth.generation.stream import CALLS_AT_ONCE, image_stream
    from ray_synth.training.trainer import _resources

    config: Config = run.config
    few = select(run.train, max(1, 2_000 // len(run.train.class_names)), config.seed)
    one_worker = config.training.model_copy(update={"num_workers": 1})
    job = run.train_job(
        "probe", num_synthetic=0, config=one_worker, steps=STEPS, folder=folder, real=few
    )
    trainer = ray.train.torch.TorchTrainer(
        probe_worker,  # type: ignore[arg-type]  # Ray 2.60 takes a return value
        train_loop_config={
            "job": job,
            "test_batch": config.evaluation.batch_size,
            "calls": CALLS_AT_ONCE if generation else 0,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=1,
            use_gpu=config.training.num_gpus > 0,
            resources_per_worker=_resources(config.training.num_cpus, config.training.num_gpus),
        ),
        run_config=ray.train.RunConfig(name="probe", storage_path=folder.child("checkpoints").uri),
        # Without `accepted`: what the judge rejects takes as long, and is trained on here.
        datasets={
            "synthetic": lambda: image_stream(
                generation, columns=["sample_id", "image", "class_index"]
            )
        }
        if generation
        else {},
    )
    started = time.time()
    seen = getattr(trainer.fit(), "return_value", None) or {}
    return {
        "train_start": seen.pop("first") - started,
        "train_end": time.time() - seen.pop("ended"),
        **seen,
    }


def probe_worker(settings: dict[str, Any]) -> dict[str, float]:
    """In the worker: seconds per step and per save, and the times of the first step and of the end."""
    import tempfile
    from pathlib import Path

    import ray.train
    import ray.train.torch
    import torch

    from ray_synth.data.dataset import read_index
    from ray_synth.training.decoder import Decoder
    from ray_synth.training.feed import CachedFeed
    from ray_synth.training.learner import Learner
    from ray_synth.training.live_feed import LiveFeed

    job, calls = settings["job"], settings["calls"]
    config, device = job.config, ray.train.torch.get_device()
    found: dict[str, float] = {}
    learner = Learner(job, device, 0, 1)
    decoder = Decoder(
        learner.transform,
        job.max_pixels,
        workers=config.decoders,
        on_cluster=config.decode_on == "cluster",
    )
    rows = list(read_index(job.real))
    real = CachedFeed(rows, decoder, batch_size=config.num_real, seed=0)
    few = lambda step: step < STEPS  # noqa: E731
    first, found["step_real"] = _steps(learner, [real], decoder, few)
    found["first"] = first - found["step_real"]
    learner = Learner(replace(job, num_synthetic=1), device, 0, 1)
    others = CachedFeed(rows, decoder, batch_size=config.num_synth, seed=1)
    _, found["step_mixed"] = _steps(learner, [real, others], decoder, few)
    if calls:
        seen: list[tuple[float, int]] = []
        blocks = _arriving(ray.train.get_dataset_shard("synthetic"), seen)
        live = LiveFeed(
            (row for block in blocks for row in block.to_pylist()),
            decoder,
            batch_size=config.num_synth,
            warmup=1,
            seed=0,
        )
        on = lambda step: step < SETTLE + 1 or not live.ended  # noqa: E731
        _, found["step_beside"] = _steps(learner, [real, live], decoder, on)
        found["make_beside"] = pace(seen, calls)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        learner.save(Path(place), {})
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(place))
    found["save"] = time.perf_counter() - started
    size = job.config.image_size
    images = torch.rand(settings["test_batch"], 3, size, size, device=device)
    model = learner.model.eval()
    with torch.inference_mode():
        model(images)
        found["test"] = _timed(lambda: model(images).cpu()) / len(images)
    return {**found, "ended": time.time()}


def _steps(
    learner: Any, feeds: list[Any], decoder: Any, on: Callable[[int], bool]
) -> tuple[float, float]:
    """When the first step was done, and seconds of each once the prefetcher holds none from before."""
    from ray_synth.training.prefetch import Prefetcher

    prefetcher = Prefetcher(feeds, decoder, start=0, finish=learner.finish, device=learner.device)
    step = 0
    try:
        while on(step):
            learner.step(step, [prefetcher.next()])[0].item()
            step += 1
            if step == 1:
                first = time.time()
            if step == SETTLE:
                started = time.perf_counter()
        return first, (time.perf_counter() - started) / (step - SETTLE)
    finally:
        prefetcher.close()


def _arriving(stream: Any, seen: list[tuple[float, int]]) -> Iterator[Any]:
    """Blocks of a stream as they come; `seen` gets when each did, from the start, and its rows."""
    started = time.perf_counter()
    for block in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
        seen.append((time.perf_counter() - started, len(block)))
        yield block


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
