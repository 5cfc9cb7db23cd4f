"""Which feeds a training worker reads from, as its job says, and what they read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray_synth.data.dataset import read_index
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.training.decoder import Decoder, Row
from ray_synth.training.feed import (
    CachedFeed,
    Feed,
    IndexedImages,
    ShuffledFeed,
    derived_seed,
)
from ray_synth.training.job import TrainJob
from ray_synth.training.live_feed import LiveFeed, LockstepFeed
from ray_synth.training.replays import replayed
from ray_synth.training.stored_feed import StoredFeed


def open_feeds(
    job: TrainJob, decoder: Decoder, *, rank: int, world_size: int, first: int
) -> list[Feed]:
    """The real feed and, where there are synthetic images, theirs.

    Args:
        first: number of the first batch that will be asked for.
    """
    feeds = _WorkerFeeds(job, decoder, rank, world_size, first)
    return [feeds.real(), feeds.synthetic()] if job.mixed else [feeds.real()]


class _WorkerFeeds:
    def __init__(
        self, job: TrainJob, decoder: Decoder, rank: int, world_size: int, first: int
    ) -> None:
        self.job, self.config, self.decoder = job, job.config, decoder
        self.rank, self.world_size, self.first = rank, world_size, first

    def real(self) -> Feed:
        job, config = self.job, self.config
        options: dict[str, Any] = {
            "batch_size": config.num_real, "seed": job.seed,
            "rank": self.rank, "world_size": self.world_size,
            "balance": config.class_balance, "repeats": config.repeated_augmentation,
        }  # fmt: skip
        if job.holds_real:
            return CachedFeed(read_index(job.real), self.decoder, **options)
        return ShuffledFeed(IndexedImages(job.real), **options)

    def synthetic(self) -> Feed:
        job, config = self.job, self.config
        seed = derived_seed(job.seed + 1, job.segment) if job.segment else job.seed + 1
        options: dict[str, Any] = {
            "batch_size": config.num_synth, "seed": seed,
            "rank": self.rank, "world_size": self.world_size,
        }  # fmt: skip
        if job.reads_store:
            made = job.store.rows(job.read_plan(), ["image", "class_index", "accepted"])
            # The store lists parts in no meaningful order: sort, so that a seed names the batches.
            rows = sorted((r for r in made if r["accepted"]), key=lambda row: row["sample_id"])
            return CachedFeed(rows, self.decoder, **options)
        if job.stored is not None:
            return StoredFeed(job.stored, self.decoder, start_step=self.first, **options)
        return self._lockstep() if config.feed == "lockstep" else self._live()

    def _lockstep(self) -> LockstepFeed:
        return LockstepFeed(
            _rows(_shard("synthetic")),
            self.decoder,
            batch_size=self.config.num_synth,
            seed=derived_seed(self.job.seed, self.rank),
            start_step=self.first - self.job.begin * self.config.accumulate_steps,
            memory_bytes=self.config.memory_mb << 20,
        )

    def _live(self) -> LiveFeed:
        job, config = self.job, self.config
        share = max(1, (job.num_synthetic - job.fresh_from) // self.world_size)
        return LiveFeed(
            _rows(_shard("synthetic")),
            self.decoder,
            batch_size=config.num_synth,
            warmup=min(config.warmup_images or 2 * config.num_synth, share),
            seed=derived_seed(job.seed, self.rank, self.first),
            memory_bytes=config.memory_mb << 20,
            replays=replayed(
                job.store,
                PlanFile(job.source or job.folder),
                job.num_synthetic,
                derived_seed(job.seed, self.rank, self.first, 1),
            ),
            shared=self.world_size > 1,
            earlier=job.fresh_from > 0,
        )


def _shard(name: str) -> Any:
    """This worker's share of a dataset."""
    import ray.train

    return ray.train.get_dataset_shard(name)


def _rows(shard: Any) -> Iterator[Row]:
    """Rows of one pass over a Ray Data shard, block by block as they come."""
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from block.to_pylist()
