"""Plan in, image rows out, through Ray Data: an autoscaling pool of makers.

The stream gives every row of the plan, in plan order if asked; what the store already holds is read from
it, so that running a stream again makes nothing twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from ray_synth.generation.chunks import Chunk, cut, missing_rows
from ray_synth.generation.maker import GenerationJob, ImageMaker

if TYPE_CHECKING:
    import ray.data

# A block takes Ray 3 ms and 40 kB of the driver (measured): long plans have several chunks per block,
# which are one task. Not too many: a task that gives nothing for minutes looks like a stall.
# Batches that an actor is given at a time: one is encoded and written beside the next.
CALLS_AT_ONCE = 2
BLOCKS = 2_000
MOST_CHUNKS_A_BLOCK = 32
# Chunks of one task go on in pieces of about this size, not when all are made.
OUTPUT_BLOCK_BYTES = 1 << 20
CHUNK_SCHEMA = pa.schema(
    [("start", pa.int64()), ("stop", pa.int64()), ("parts", pa.list_(pa.string()))]
)


def image_stream(
    job: GenerationJob, *, chunks: list[Chunk] | None = None, columns: list[str] | None = None
) -> ray.data.Dataset:
    """A lazily executed Ray Dataset of a plan's image rows.

    Args:
        chunks: only these; default: all of the plan.
        columns: pass on only these columns; the store keeps all.
    """
    import ray.data

    job = settled(job)
    config = job.config
    if chunks is None:
        chunks = _cut(job)
    made = ray.data.from_arrow(chunk_blocks(chunks)).map_batches(
        ImageMaker,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=config.pool.min_size,
            max_size=config.pool.max_size,
            # Two tasks per call: the pool grows when more than 1.75 are waiting for each.
            max_tasks_in_flight_per_actor=2 * CALLS_AT_ONCE,
            max_concurrent_calls_per_actor=CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
    )
    made.context.target_max_block_size = OUTPUT_BLOCK_BYTES
    return made.select_columns(columns) if columns else made


def make_images(job: GenerationJob, chunks: list[Chunk] | None = None) -> int:
    """Make every image of the plan that the store lacks; how many that was.

    Args:
        chunks: what `missing_chunks` found, where the caller has asked.
    """
    chunks = missing_chunks(job) if chunks is None else chunks
    if chunks:
        stream = image_stream(job, chunks=chunks, columns=["sample_id"])
        for _ in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass
    return missing_rows(chunks)


def missing_chunks(job: GenerationJob) -> list[Chunk]:
    """The chunks of the plan that the store does not hold whole."""
    return [chunk for chunk in _cut(settled(job)) if chunk.missing]


def planned_parts(job: GenerationJob, num_rows: int) -> list[str]:
    """Names of the parts that hold the plan's first rows, and up to a batch of rows more."""
    chunks = (chunk for chunk in _cut(settled(job)) if chunk.start < num_rows)
    return sorted({name for chunk in chunks for name in chunk.parts})


def _cut(job: GenerationJob) -> list[Chunk]:
    assert isinstance(job.config.batch_size, int)
    return cut(job.plan, job.store, job.config.batch_size)


def chunk_blocks(chunks: list[Chunk]) -> list[pa.Table]:
    """The chunks as tables, one per task."""
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


def settled(job: GenerationJob) -> GenerationJob:
    """The job with `batch_size` and `compile` settled where they are "auto".

    By the whole plan and once for a store: what is left after an interruption is made as the rest was.
    """
    from ray_synth.generation.batch_size import find_batch_size
    from ray_synth.generators.compilation import wants_compile

    config = job.config
    changes = {
        "batch_size": find_batch_size(config, job.store),
        "compile": wants_compile(
            config,
            num_images=len(job.plan) // config.pool.max_size,
            on_gpu=config.num_gpus > 0,
        ),
    }
    return replace(job, config=config.model_copy(update=changes))
