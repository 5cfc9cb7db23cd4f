"""The Ray Train worker: real + synthetic batches in, a trained model and its curves out.

One job trains one arm: real and synthetic images, or the same recipe and the same number of real images
seen without synthetic ones. Rank 0 writes `models/<arm>*.safetensors` and `models/<arm>.json`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_synth import metrics
from ray_synth.cluster.preemption import Notices
from ray_synth.monitoring import logs
from ray_synth.training.job import TrainJob

if TYPE_CHECKING:
    from ray_synth.config import TrainingConfig
    from ray_synth.training.decoder import Decoder
    from ray_synth.training.feed import Feed
    from ray_synth.training.learner import Learner
    from ray_synth.training.meter import Meter
    from ray_synth.training.prefetch import Prefetcher


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The `train_loop_per_worker`; `settings` holds the reference of a TrainJob under `job`.

    Returns:
        `{"error": message}` where training had to stop for a reason that trying again would not
        fix (Ray Train would retry what is raised), else `{}`.
    """
    import ray
    import ray.train
    import ray.train.torch

    from ray_synth.training.decoder import Decoder
    from ray_synth.training.learner import Learner
    from ray_synth.training.meter import Meter
    from ray_synth.training.prefetch import Prefetcher
    from ray_synth.training.worker_feeds import open_feeds

    job: TrainJob = ray.get(settings["job"])
    metrics.join(job.folder.uri)
    logs.forward(job.board, stage="training", arm=job.arm)
    config, context = job.config, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    learner = Learner(job, ray.train.torch.get_device(), rank, world_size)
    history = _restore(learner)
    decoder = Decoder(
        learner.transform,
        job.max_pixels,
        num_classes=len(job.class_names),
        workers=config.decoders,
        on_cluster=config.decode_on == "cluster",
    )
    first = history["step"] * config.accumulate_steps
    feeds = open_feeds(job, decoder, rank=rank, world_size=world_size, first=first)
    prefetcher = Prefetcher(
        feeds, decoder, start=first, finish=learner.finish, device=learner.device
    )
    meter = Meter(job, feeds, prefetcher, rank=rank, start=history["step"])
    try:
        error = _train(learner, history, decoder, prefetcher, meter)
        if error is None:
            _let_stream_end(config, feeds[-1])
    finally:
        prefetcher.close()
        meter.close()
    return {} if error is None else {"error": error}


def _train(
    learner: Learner,
    history: dict[str, Any],
    decoder: Decoder,
    prefetcher: Prefetcher,
    meter: Meter,
) -> str | None:
    """Step, log and save to the job's last step; None, or why training stopped before it."""
    from ray_synth.training.curve import LossWatch, curve_point, diverged
    from ray_synth.training.meter import Stopwatch
    from ray_synth.training.model_files import export_models

    job, config, world_size = learner.job, learner.config, learner.world_size
    watch, notices, stopwatch = LossWatch(), Notices(), Stopwatch(prefetcher)
    start = history["step"]
    for step in range(start, job.end):
        batches = [prefetcher.next() for _ in range(config.accumulate_steps)]
        if step == start:  # from here on, waiting is a stall
            stopwatch.lap()
            meter.begin()
        loss, sums = learner.step(step, batches)
        watch.add(step, loss, [name for batch in batches for name in batch.names])
        history["real_images_seen"] += config.num_real * world_size * config.accumulate_steps

        done = step + 1
        last, to_log = done == job.end, done % config.log_every == 0
        to_save = last or done % config.checkpoint_every == 0 or (to_log and notices.save_now())
        if to_log or to_save:
            bad = watch.first_bad(world_size)
            if bad is not None:
                return diverged(job, history["step"], *bad)
        if to_log or last:
            point = curve_point(sums, learner.weight(step), world_size)
            history["curve"].append({"step": done, **point})
            meter.tell(done, point)
        if to_save:
            seconds, waited = stopwatch.lap()
            history["seconds"] += seconds
            history["stalled"] += waited
            history["step"] = done
            history["corrupt"] = sorted({*history["corrupt"], *decoder.corrupt})
            if last and learner.rank == 0:
                export_models(job, learner, history, prefetcher.feeds[-1])
                if job.keep_state:
                    learner.leave(job.publish or job.folder, history)
            saving = time.perf_counter()
            _report(learner, history)
            meter.checkpointed(time.perf_counter() - saving)
    return None


def _let_stream_end(config: TrainingConfig, feed: Feed) -> None:
    """Keep the generators that fed a live feed at work to the plan's end, now that training is saved.

    Without that they end with the training, and others are started for the rest. GPUs are not held idle
    for longer than others took to their first image.
    """
    from ray_synth.training.live_feed import LiveFeed

    if isinstance(feed, LiveFeed):
        feed.finish(feed.first_after or 0.0 if config.num_gpus else None)


def _restore(learner: Learner) -> dict[str, Any]:
    """Load the newest checkpoint of this run, or what the part before has left, if there is one; the
    history so far."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and learner.job.resume is not None:
        return learner.take(learner.job.resume)
    if checkpoint is None:
        return {
            "step": 0, "curve": [], "seconds": 0.0, "stalled": 0.0, "corrupt": [],
            "real_images_seen": 0,
        }  # fmt: skip
    with checkpoint.as_directory() as folder:
        return learner.restore(Path(folder))


def _report(learner: Learner, history: dict[str, Any]) -> None:
    """Report to Ray Train; every rank calls it, rank 0 brings the checkpoint."""
    import ray.train

    metrics = {"step": history["step"]}
    if learner.rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        learner.save(Path(folder), history)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
