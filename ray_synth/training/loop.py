"""The Ray Train worker: real + synthetic batches in, a trained model and its curves out.

One job trains one arm: real and synthetic images, or the same recipe and the same number of real images
seen without synthetic ones. Rank 0 writes `models/<arm>*.safetensors` and `models/<arm>.json`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ray_synth import metrics
from ray_synth.cluster.preemption import Notices
from ray_synth.data.dataset import read_index
from ray_synth.errors import shortened
from ray_synth.monitoring import logs
from ray_synth.training.job import TrainJob


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The `train_loop_per_worker`; `settings` holds a TrainJob under `job`.

    Returns:
        `{"error": message}` where training had to stop for a reason that trying again would not
        mend (Ray Train would retry what is raised), else `{}`.
    """
    import ray.train
    import ray.train.torch

    from ray_synth.training.learner import Learner
    from ray_synth.training.meter import Meter
    from ray_synth.training.model_files import export_models
    from ray_synth.training.prefetch import Prefetcher

    job: TrainJob = settings["job"]
    metrics.join(job.folder.uri)
    logs.forward(job.board, stage="training", arm=job.arm)
    config, context = job.config, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    learner = Learner(job, ray.train.torch.get_device(), rank, world_size)
    history = _restore(learner)
    start = history["step"]
    feeds, decoder = _feeds(job, learner.transform, start)
    prefetcher = Prefetcher(
        feeds,
        start=start * config.accumulate_steps,
        finish=learner.finish,
        device=learner.device,
    )
    tracker = _tracker(job) if rank == 0 else None
    watch, notices = LossWatch(), Notices()
    meter = Meter(job, feeds, prefetcher, rank=rank, start=start)
    waited_before = loop_started = 0.0
    try:
        for step in range(start, job.steps):
            batches = [prefetcher.next() for _ in range(config.accumulate_steps)]
            if step == start:  # from here on, waiting is a stall
                loop_started, waited_before = time.perf_counter(), prefetcher.waited
                meter.begin()
            loss, sums = learner.step(step, batches)
            watch.add(step, loss, [name for batch in batches for name in batch.names])
            done = step + 1
            saves = (
                done == job.steps
                or done % config.checkpoint_every == 0
                or (done % config.log_every == 0 and notices.save_now())
            )
            if saves or done % config.log_every == 0:
                bad = watch.first_bad(world_size)
                if bad is not None:
                    return {"error": _diverged(job, history["step"], *bad)}
            if done % config.log_every == 0 or done == job.steps:
                point = _point(sums, learner.weight(step), world_size)
                history["curve"].append({"step": done, **point})
                meter.tell(done, point)
                if tracker:
                    tracker(point, done)
                if rank == 0 and job.board is not None:
                    job.board.put.remote(f"steps/{job.arm}", done)
            history["real_images_seen"] += config.num_real * world_size * config.accumulate_steps
            if saves:
                history["seconds"] += time.perf_counter() - loop_started
                history["stalled"] += prefetcher.waited - waited_before
                loop_started, waited_before = time.perf_counter(), prefetcher.waited
                history["step"] = done
                history["corrupt"] = sorted({*history["corrupt"], *decoder.corrupt})
                if rank == 0 and done == job.steps:
                    export_models(job, learner, history, feeds[-1])
                saving = time.perf_counter()
                _report(learner, history, rank)
                meter.checkpointed(time.perf_counter() - saving)
    finally:
        prefetcher.close()
        decoder.close()
        if tracker:
            tracker.close()
    return {}


class LossWatch:
    """The losses since the last look, on their device, and which images they were of.

    Looking waits for the device, so it is done where the loop waits for it anyhow.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any, list[str]]] = []

    def add(self, step: int, loss: Any, names: list[str]) -> None:
        self.seen.append((step, loss, names))

    def first_bad(self, world_size: int = 1) -> tuple[int, list[str]] | None:
        """The first step whose loss was not finite on some rank, and that batch's image ids.

        All ranks must call it at the same step; they all get the same answer.
        """
        import torch
        import torch.distributed as dist

        finite = torch.stack([loss for _, loss, _ in self.seen]).isfinite().tolist()
        mine = next(
            (
                (step, names)
                for (step, _, names), ok in zip(self.seen, finite, strict=True)
                if not ok
            ),
            None,
        )
        self.seen.clear()
        if world_size == 1:
            return mine
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, mine)
        bad = [item for item in found if item is not None]
        if not bad:
            return None
        first = min(step for step, _ in bad)
        return first, [name for step, names in bad if step == first for name in names]


def _diverged(job: TrainJob, kept: int, step: int, names: list[str]) -> str:
    rest = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was written yet"
    return (
        f"training of {job.arm} stopped: the loss of step {step + 1} is not a number, or infinite "
        f"(images {shortened(names, 8)}); {rest}. Lower training.optimizer.lr, clip gradients "
        "(training.optimizer.clip_grad_norm), or train in float32 (training.dtype)"
    )


def _point(sums: Any, weight: float, world_size: int) -> dict[str, float]:
    """A point of the curve: means over the step's images of all workers, exact for any split."""
    import torch.distributed as dist

    if world_size > 1:
        dist.all_reduce(sums)
    loss_real, hits_real, num_real, loss_synth, hits_synth, num_synth = sums.double().tolist()
    point = {
        "loss": loss_real / num_real,
        "loss_real": loss_real / num_real,
        "train_top1_real": hits_real / num_real,
    }
    if num_synth:
        point["loss_synth"] = loss_synth / num_synth
        point["train_top1_synth"] = hits_synth / num_synth
        point["loss"] += weight * point["loss_synth"]
    return point


def _restore(learner: Any) -> dict[str, Any]:
    """Load the newest checkpoint of this run, if there is one; the history so far."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {
            "step": 0, "curve": [], "seconds": 0.0, "stalled": 0.0, "corrupt": [],
            "real_images_seen": 0,
        }  # fmt: skip
    with checkpoint.as_directory() as folder:
        return learner.restore(Path(folder))


def _report(learner: Any, history: dict[str, Any], rank: int) -> None:
    """Report to Ray Train; every rank calls it, rank 0 brings the checkpoint."""
    import ray.train

    metrics = {"step": history["step"]}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        learner.save(Path(folder), history)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _feeds(job: TrainJob, transform: Any, start: int) -> tuple[list[Any], Any]:
    """The real feed and, where there are synthetic images, theirs."""
    import ray.train

    from ray_synth.training.decoder import Decoder
    from ray_synth.training.feed import (
        CachedFeed,
        LiveFeed,
        LockstepFeed,
        StreamedFeed,
        derived_seed,
    )

    config, context = job.config, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    decoder = Decoder(
        transform,
        job.max_pixels,
        num_classes=len(job.class_names),
        workers=config.decode_workers,
    )
    batches = start * config.accumulate_steps

    def cached(rows: Iterable[dict[str, Any]], batch_size: int, seed: int, **options: Any) -> Any:
        return CachedFeed(
            rows,
            decoder,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            **options,
        )

    def streamed(name: str, batch_size: int, seed: int, **options: Any) -> Any:
        shard = ray.train.get_dataset_shard(name)
        return StreamedFeed(
            lambda epoch: _rows_of(shard),
            decoder,
            batch_size=batch_size,
            seed=derived_seed(seed, rank, batches),
            buffer=20 * batch_size,
            **options,
        )

    repeats = config.repeated_augmentation
    if job.real is not None:
        real = cached(
            read_index(job.real),
            config.num_real,
            job.seed,
            balance=config.class_balance,
            repeats=repeats,
        )
    else:
        real = streamed("real", config.num_real, job.seed, repeats=repeats)
    if not job.mixed:
        return [real], decoder
    if job.reads_store:
        made = job.store.rows(job.read_plan(), ["image", "class_index", "accepted"])
        # The store lists parts in no meaningful order: sort, so that a seed names the batches.
        rows = sorted((r for r in made if r["accepted"]), key=lambda row: row["sample_id"])
        return [real, cached(rows, config.num_synth, job.seed + 1)], decoder
    if config.feed == "stored":
        return [real, streamed("synthetic", config.num_synth, job.seed + 1)], decoder
    stream = _rows_of(ray.train.get_dataset_shard("synthetic"))
    memory_bytes = config.memory_mb << 20
    if config.feed == "lockstep":
        feed: Any = LockstepFeed(
            stream,
            decoder,
            batch_size=config.num_synth,
            seed=derived_seed(job.seed, rank),
            start_step=batches,
            memory_bytes=memory_bytes,
        )
        return [real, feed], decoder
    share = max(1, job.num_synthetic // world_size)
    live = LiveFeed(
        stream,
        decoder,
        batch_size=config.num_synth,
        warmup=min(config.warmup_images or 2 * config.num_synth, share),
        seed=derived_seed(job.seed, rank, batches),
        memory_bytes=memory_bytes,
    )
    return [real, live], decoder


def _rows_of(shard: Any) -> Iterator[dict[str, Any]]:
    """Rows of one pass over a Ray Data shard, block by block as they come."""
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from block.to_pylist()


def _tracker(job: TrainJob) -> Any:
    """A function that logs a point of the curve to the pipeline's MLflow run."""
    if job.tracking is None:
        return None
    from ray_synth.monitoring.mlflow_run import MetricLogger

    return MetricLogger(job.tracking, prefix=job.arm)
