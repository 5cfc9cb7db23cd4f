"""The Ray Train worker: real + synthetic batches in, a trained model and its curves out.

One job trains one arm: `mixed` (real and synthetic) or `real_only` (the same recipe, the same number
of real images seen, no synthetic ones). Rank 0 writes `models/<arm>*.safetensors` and
`models/<arm>.json` in the run directory.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_synth.config import TrainingConfig
from ray_synth.data.dataset import Index, read_index
from ray_synth.generation.store import ImageStore
from ray_synth.storage import Folder

if TYPE_CHECKING:
    import pyarrow as pa

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class TrainJob:
    """All that a worker needs, by value.

    Attributes:
        arm: `mixed` or `real_only`.
        steps: optimizer steps; each sees num_real real images a worker, in both arms.
        real: the index of real training images, or None where they are streamed by Ray Data.
        num_synthetic: rows of the run's plan; 0 in `real_only`.
        tracking: MLflow's uri and run id, or None.
        board: the progress board's handle.
    """

    arm: str
    config: TrainingConfig
    steps: int
    class_names: tuple[str, ...]
    seed: int
    folder: Folder
    real: Index | None
    max_pixels: int
    num_synthetic: int = 0
    tracking: dict[str, str] | None = None
    board: Any = None

    @property
    def store(self) -> ImageStore:
        return ImageStore(self.folder.child("images"))

    def read_plan(self) -> pa.Table:
        return self.folder.read_table("plan.parquet")

    @property
    def reads_store(self) -> bool:
        """Whether each worker loads the finished store itself, small as it is."""
        return self.config.feed == "stored" and self.num_synthetic <= self.config.cache_images


def total_steps(config: TrainingConfig, num_real_images: int) -> int:
    """Steps of a run: given, or the real epochs' (at least one each)."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    per_epoch = max(1, num_real_images // (config.num_real * config.max_workers))
    return config.epochs * per_epoch


def train_worker(settings: dict[str, Any]) -> None:
    """The `train_loop_per_worker`; `settings` holds a TrainJob under `job`."""
    import ray.train
    import ray.train.torch
    import torch

    from ray_synth.device import pick_dtype
    from ray_synth.training import recipe
    from ray_synth.training.dual_bn import convert_dual_bn, domain_split
    from ray_synth.training.feed import Prefetcher

    job: TrainJob = settings["job"]
    config = job.config
    context = ray.train.get_context()
    rank, mixed = context.get_world_rank(), job.arm == "mixed"
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or os.cpu_count() or 1)
    torch.manual_seed(job.seed)
    model = recipe.build_model(
        config.model,
        num_classes=len(job.class_names),
        pretrained=config.pretrained,
        checkpoint=config.checkpoint,
        model_kwargs=config.model_kwargs,
    )
    if mixed and config.dual_bn:
        convert_dual_bn(model)
    model = model.to(device)
    ema = recipe.build_ema(model, config.ema_decay) if config.ema_decay else None
    optimizer = recipe.build_optimizer(
        model, config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay
    )
    schedule = recipe.build_schedule(
        optimizer,
        steps=job.steps,
        warmup_steps=min(int(job.steps * config.optimizer.warmup_fraction), job.steps - 1),
        min_lr=config.optimizer.lr * config.optimizer.min_lr_fraction,
    )
    state = _State(model, optimizer, ema)
    history = state.restore()
    start = history["step"]
    transform = recipe.train_transform(config.image_size, config.augment)
    torch.manual_seed((job.seed + 1) * 1_000_003 + start * 1009 + rank)
    wrapped = ray.train.torch.prepare_model(model, move_to_device=False)
    num_real, num_synth = config.num_real, config.num_synth if mixed else 0
    dtype = pick_dtype(config.dtype, device.type) if device.type == "cuda" else torch.float32
    feeds, decoder = _feeds(job, transform, start)
    prefetcher = Prefetcher(feeds, start=start)
    tracker = _tracker(job) if rank == 0 else None
    waited_before = loop_started = 0.0
    model.train()
    try:
        for step in range(start, job.steps):
            images, labels = prefetcher.next()
            if step == start:  # from here on, waiting is a stall
                loop_started, waited_before = time.perf_counter(), prefetcher.waited
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with (
                torch.autocast(device.type, dtype, enabled=dtype is not torch.float32),
                domain_split(model, num_real, num_synth),
            ):
                logits = wrapped(transform.batch(images))
            loss, loss_real, loss_synth = recipe.mixed_loss(
                logits.float(), labels, num_real, config.lambda_synth, config.label_smoothing
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.optimizer.clip_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
            optimizer.step()
            schedule.step_update(step + 1)
            if ema:
                ema.update(model, step)
            done = step + 1
            if done % config.log_every == 0 or done == job.steps:
                hits = (logits.argmax(1) == labels).float()
                point = {
                    "loss": loss.item(),
                    "loss_real": loss_real.item(),
                    "train_top1_real": hits[:num_real].mean().item(),
                }
                if mixed:
                    point["loss_synth"] = loss_synth.item()
                    point["train_top1_synth"] = hits[num_real:].mean().item()
                history["curve"].append({"step": done, **point})
                if tracker:
                    tracker(point, done)
                if rank == 0 and job.board is not None:
                    job.board.put.remote(f"steps/{job.arm}", done)
            if done == job.steps or done % config.checkpoint_every == 0:
                seconds = time.perf_counter() - loop_started
                history["seconds"] += seconds
                history["stalled"] += prefetcher.waited - waited_before
                loop_started, waited_before = time.perf_counter(), prefetcher.waited
                history["step"] = done
                history["corrupt"] = sorted({*history["corrupt"], *decoder.corrupt})
                if rank == 0 and done == job.steps:
                    _export(job, ema.module if ema else model, history, feeds[-1])
                _report(state, history, rank)
    finally:
        prefetcher.close()


class _State:
    """What a checkpoint holds, and how it is put back."""

    def __init__(self, model: Any, optimizer: Any, ema: Any) -> None:
        self.parts = {"model": model, "optimizer": optimizer}
        if ema:
            self.parts["ema"] = ema

    def save(self, folder: Path, history: dict[str, Any]) -> None:
        import torch

        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({**state, "history": history}, folder / STATE_FILE)

    def restore(self) -> dict[str, Any]:
        """Load the newest checkpoint of this run, if there is one; the history so far."""
        import ray.train
        import torch

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return {"step": 0, "curve": [], "seconds": 0.0, "stalled": 0.0, "corrupt": []}
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["history"]


def _report(state: _State, history: dict[str, Any], rank: int) -> None:
    """Report to Ray Train; every rank calls it, rank 0 brings the checkpoint."""
    import ray.train

    metrics = {"step": history["step"]}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder), history)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _feeds(job: TrainJob, transform: Any, start: int) -> tuple[list[Any], Any]:
    """The real feed and, in the mixed arm, the synthetic one."""
    import ray.train

    from ray_synth.training.feed import CachedFeed, Decoder, LiveFeed, LockstepFeed, StreamedFeed

    config, context = job.config, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    decoder = Decoder(transform, job.max_pixels)

    def cached(rows: Iterable[dict[str, Any]], batch_size: int, seed: int) -> Any:
        return CachedFeed(
            rows, decoder, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
        )

    def streamed(name: str, batch_size: int, seed: int) -> Any:
        shard = ray.train.get_dataset_shard(name)
        return StreamedFeed(
            lambda epoch: _rows_of(shard),
            decoder,
            batch_size=batch_size,
            seed=seed + rank,
            buffer=min(config.cache_images, 20 * batch_size),
        )

    if job.real is not None:
        real = cached(read_index(job.real), config.num_real, job.seed)
    else:
        real = streamed("real", config.num_real, job.seed)
    if job.arm != "mixed":
        return [real], decoder
    if job.reads_store:
        made = job.store.rows(job.read_plan(), ["image", "class_index", "accepted"])
        # The store lists parts in no meaningful order: sort, so that a seed names the batches.
        rows = sorted((r for r in made if r["accepted"]), key=lambda row: row["sample_id"])
        return [real, cached(rows, config.num_synth, job.seed + 1)], decoder
    if config.feed == "stored":
        return [real, streamed("synthetic", config.num_synth, job.seed + 1)], decoder
    stream = _rows_of(ray.train.get_dataset_shard("synthetic"))
    if config.feed == "lockstep":
        feed: Any = LockstepFeed(stream, decoder, batch_size=config.num_synth, start_step=start)
        return [real, feed], decoder
    share = max(1, job.num_synthetic // world_size)
    live = LiveFeed(
        stream,
        decoder,
        batch_size=config.num_synth,
        warmup=min(config.warmup_images or 2 * config.num_synth, share),
        capacity=config.reservoir_images,
        seed=job.seed + rank,
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
    from ray_synth.tracking import metric_logger

    return metric_logger(job.tracking, prefix=job.arm)


def _export(job: TrainJob, model: Any, history: dict[str, Any], synthetic: Any) -> None:
    """Write the model as plain timm state dicts, and what there is to say about its training."""
    from safetensors.torch import save

    from ray_synth.training.dual_bn import export_aux, export_main, has_dual_bn

    def write(name: str, weights: dict[str, Any]) -> None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        job.folder.write_bytes(f"models/{name}.safetensors", save(tensors, {"format": "pt"}))

    if has_dual_bn(model):
        write(f"{job.arm}.main", export_main(model))
        write(f"{job.arm}.aux", export_aux(model))
        bns = ["main", "aux"]
    else:
        write(f"{job.arm}.main", model.state_dict())
        bns = ["main"]
    config = job.config
    seconds = history["seconds"]
    summary = {
        "arm": job.arm,
        "model": config.model,
        "model_kwargs": config.model_kwargs,
        "class_names": list(job.class_names),
        "image_size": config.image_size,
        "bns": bns,
        "steps": job.steps,
        "real_images_seen": job.steps * config.num_real * config.max_workers,
        "seconds": seconds,
        "stall_fraction": history["stalled"] / seconds if seconds else 0.0,
        "corrupt": history["corrupt"],
        "curve": history["curve"],
    }
    if hasattr(synthetic, "replayed"):
        summary["synthetic_arrived"] = synthetic.arrived
        summary["synthetic_replayed"] = synthetic.replayed
    job.folder.write_json(f"models/{job.arm}.json", summary)
