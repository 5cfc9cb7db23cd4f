"""One pool of makers for the plans of several runs: each actor loads the models once, not once per run.

A study makes dozens of small sets of images with one generator; to load it for each would take longer
than making them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pyarrow as pa

from ray_synth.config import QualityConfig
from ray_synth.generation.batch_size import RECORD, find_batch_size, recorded_batch_size
from ray_synth.generation.chunks import Chunk
from ray_synth.generation.maker import GenerationJob, ImageMaker, Models
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import chunk_blocks, settled, through_pool

MAKERS = 4  # of a process: jobs follow one another, two at most overlap


class SharedMaker:
    """Makes chunks of several jobs, each for its own store; what it passes on are counts.

    Args:
        jobs: settled, and of one `pool_key`.
    """

    def __init__(self, jobs: Sequence[GenerationJob]) -> None:
        self._jobs, self._models = jobs, Models()
        self._makers: dict[int, ImageMaker] = {}
        self._making = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows made or read of some chunks (columns job, start, stop, parts)."""
        chunks = batch.to_pylist()
        rows = [len(self._maker(chunk.pop("job")).chunk(**chunk)) for chunk in chunks]
        return pa.table({"rows": rows})

    def _maker(self, number: int) -> ImageMaker:
        with self._making:  # a call for each of two threads
            if number not in self._makers:
                if len(self._makers) == MAKERS:  # the oldest goes, with its reference of quality
                    del self._makers[next(iter(self._makers))]
                self._makers[number] = ImageMaker(self._jobs[number], self._models)
            return self._makers[number]


def pool_key(job: GenerationJob) -> str:
    """Equal for settled jobs that one pool can work on: all that the models are loaded by."""
    config = job.config.model_copy(update={"checks": QualityConfig()})
    return config.model_dump_json() + (job.clip.model_dump_json() if job.clip else "")


def share_batch_sizes(jobs: Sequence[GenerationJob]) -> None:
    """Have stores of one configuration take the batch size that was found for the first: one probe."""
    found: dict[str, ImageStore] = {}
    for job in sorted(jobs, key=lambda job: recorded_batch_size(job.config, job.store) is None):
        if job.config.batch_size != "auto":
            continue
        first = found.setdefault(job.config.model_dump_json(), job.store)
        if first is job.store:
            find_batch_size(job.config, job.store)
        elif not job.store.folder.exists(RECORD):
            job.store.folder.write_json(RECORD, first.folder.read_json(RECORD))


def make_together(work: Sequence[tuple[GenerationJob, list[Chunk]]], *, at_a_time: int = 1) -> None:
    """Make some chunks of several jobs, through one pool for each `pool_key`; nothing is packed.

    Args:
        work: jobs, and of each what `missing_chunks` gives. No learner steers them.
        at_a_time: the pool is as large as those of so many jobs.
    """
    groups: dict[str, list[tuple[GenerationJob, list[Chunk]]]] = {}
    for job, chunks in work:
        assert not job.steering
        if chunks:
            job = settled(job)
            groups.setdefault(pool_key(job), []).append((job, chunks))
    for group in groups.values():
        blocks = [
            block.append_column("job", pa.array([number] * len(block), pa.int64()))
            for number, (_, chunks) in enumerate(group)
            for block in chunk_blocks(chunks)
        ]
        jobs = [job for job, _ in group]
        config, many = jobs[0].config, min(at_a_time, len(jobs))
        sizes = {"min_size": many * config.pool.min_size, "max_size": many * config.pool.max_size}
        config = config.model_copy(update={"pool": config.pool.model_copy(update=sizes)})
        made = through_pool(blocks, SharedMaker, {"jobs": jobs}, config)
        for _ in made.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass
