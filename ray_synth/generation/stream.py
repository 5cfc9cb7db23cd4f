"""Plan in, image rows out, through Ray Data: an autoscaling pool of makers.

The stream gives every row of the plan, in plan order if asked; what the store already holds is read from
it, so that running a stream again makes nothing twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_synth.config import GenerationConfig
from ray_synth.generation.chunks import Chunk, cut, missing_rows
from ray_synth.generation.maker import GenerationJob, ImageMaker

if TYPE_CHECKING:
    import ray.data

# A block takes Ray 3 ms and 40 kB of the driver (measured): long plans have several chunks a block, which
# are one task. Not too many: a task that gives nothing for minutes looks like a stall.
BLOCKS = 2_000
MOST_CHUNKS_A_BLOCK = 32
# Chunks of one task go on in pieces of about this size, not when all are made.
OUTPUT_BLOCK_BYTES = 1 << 20
CHUNK_SCHEMA = pa.schema(
    [("start", pa.int64()), ("stop", pa.int64()), ("parts", pa.list_(pa.string()))]
)


def image_stream(
    job: GenerationJob, *, columns: list[str] | None = None, missing_only: bool = False
) -> ray.data.Dataset:
    """A lazily executed Ray Dataset of the plan's image rows.

    Args:
        columns: pass on only these columns; the store keeps all.
        missing_only: leave out the chunks that the store holds whole.
    """
    job = _resolved(job)
    chunks = cut(job.plan, job.store, _batch_size(job))
    return _stream(job, [c for c in chunks if c.missing or not missing_only], columns)


def make_images(job: GenerationJob) -> int:
    """Make every image of the plan that the store lacks; how many that was."""
    missing = missing_images(job)
    if missing:
        stream = image_stream(job, columns=["sample_id"], missing_only=True)
        for _ in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass
    return missing


def missing_images(job: GenerationJob) -> int:
    """How many images of the plan the store lacks."""
    from ray_synth.generation.probe import recorded_batch_size

    size = recorded_batch_size(job.config, job.store)
    return len(job.plan) if size is None else missing_rows(cut(job.plan, job.store, size))


def _stream(job: GenerationJob, chunks: list[Chunk], columns: list[str] | None) -> ray.data.Dataset:
    import ray.data

    config = job.config
    calls = 2 if config.overlap else 1
    made = ray.data.from_arrow(chunk_blocks(chunks)).map_batches(
        ImageMaker,
        fn_constructor_kwargs={"job": _with_compile(job)},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=config.pool.min_size,
            max_size=config.pool.max_size,
            # Two tasks a call: the pool grows when more than 1.75 are waiting for each.
            max_tasks_in_flight_per_actor=2 * calls,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=True,
        ),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
    )
    made.context.target_max_block_size = OUTPUT_BLOCK_BYTES
    return made.select_columns(columns) if columns else made


def chunk_blocks(chunks: list[Chunk]) -> list[pa.Table]:
    """The chunks as tables, one a task."""
    table = pa.table(
        {
            "start": [chunk.start for chunk in chunks],
            "stop": [chunk.stop for chunk in chunks],
            "parts": [list(chunk.parts) for chunk in chunks],
        },
        schema=CHUNK_SCHEMA,
    )
    rows = min(MOST_CHUNKS_A_BLOCK, max(1, -(-len(chunks) // BLOCKS)))
    return [table.slice(at, rows) for at in range(0, max(1, len(chunks)), rows)]


def _resolved(job: GenerationJob) -> GenerationJob:
    """The job with a batch size that is a number."""
    if job.config.batch_size != "auto":
        return job
    from ray_synth.generation.probe import find_batch_size

    size = find_batch_size(job.config, job.store)
    return replace(job, config=_with(job.config, batch_size=size))


def _with_compile(job: GenerationJob) -> GenerationJob:
    """`compile: auto` resolved, by the images of the whole plan that each actor of the pool makes:
    what is left after an interruption is made as the rest was."""
    from ray_synth.generation.diffusion import wants_compile

    images = len(job.plan) // job.config.pool.max_size
    wanted = wants_compile(job.config, num_images=images, on_gpu=job.config.num_gpus > 0)
    return replace(job, config=_with(job.config, compile=wanted))


def _with(config: GenerationConfig, **changes: Any) -> GenerationConfig:
    return config.model_copy(update=changes)


def _batch_size(job: GenerationJob) -> int:
    assert isinstance(job.config.batch_size, int)
    return job.config.batch_size
