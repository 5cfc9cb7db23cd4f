"""Plan in, image rows out, through Ray Data: an autoscaling pool of makers.

The stream gives every row of the plan, in plan order if asked; what the store already holds is read from
it, so that running a stream again makes nothing twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_synth.config import GenerationConfig
from ray_synth.errors import UserError
from ray_synth.generation import packs
from ray_synth.generation.checking import good_parts
from ray_synth.generation.chunks import ATTEMPTS, Chunk, cut, holdings, missing_rows
from ray_synth.generation.maker import GenerationJob, ImageMaker
from ray_synth.generation.stored import StoredRows
from ray_synth.generation.usefulness import check_selection
from ray_synth.generators.registry import check_guidance

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

    Raises:
        UserError: as `check_steering`.
    """
    check_steering(job)
    job = settled(job)
    config = job.config
    if chunks is None:
        chunks = _cut(job)
    job = replace(job, packer=_packer(job, chunks))
    made = through_pool(chunk_blocks(chunks), ImageMaker, {"job": job}, config)
    return made.select_columns(columns) if columns else made


def through_pool(
    blocks: list[pa.Table], maker: type, arguments: dict[str, Any], config: GenerationConfig
) -> ray.data.Dataset:
    """What an autoscaling pool of makers makes of blocks of chunks, lazily executed.

    Args:
        blocks: one per task; see `chunk_blocks`.
        maker: the class of the pool's actors, called with rows of the blocks.
        arguments: of its constructor.
        config: the size of the pool, and the CPUs and GPUs of an actor.
    """
    import ray.data

    made = ray.data.from_arrow(blocks).map_batches(
        maker,
        fn_constructor_kwargs=arguments,
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
    return made


def make_images(job: GenerationJob, chunks: list[Chunk] | None = None) -> int:
    """Make every image of the plan that the store lacks, and pack what is small; how many were made.

    Args:
        chunks: what `missing_chunks` found, where the caller has asked.
    """
    chunks = missing_chunks(job) if chunks is None else chunks
    made = 0
    for _ in range(ATTEMPTS):
        aside = job.store.set_aside()
        if chunks:
            stream = image_stream(job, chunks=chunks, columns=["sample_id"])
            for _ in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
                pass
        pack_all(job)
        made += missing_rows(chunks)
        if job.store.set_aside() == aside:
            return made
        chunks = missing_chunks(job)  # what was found damaged while it was packed
    raise UserError(
        f"parts of {job.store.folder.address()} are found damaged again and again, {ATTEMPTS} times: "
        "check the disk or the mount, then run the same command again"
    )


def pack_all(job: GenerationJob) -> int:
    """Pack all whole ranges that are not, and delete parts that others hold as well; how many packs."""
    job = settled(job)
    batch, rows = job.config.batch_size, job.pack_rows
    assert isinstance(batch, int)
    assert rows is not None
    if len(job.plan) < rows:
        return 0
    written = 0
    while True:
        held = holdings(job.plan, job.store, batch)
        job.store.delete(held.stale)
        tasks = packs.packs_to_write(job.plan, job.store, held, rows, packs.group_rows(job.config))
        found = packs.write_packs(tasks)
        written += found
        # A batch that lies in two ranges is stale once both are packed.
        if not found or not rows % batch:
            good_parts(job.store)  # what is remembered is what is left
            return written


def missing_chunks(job: GenerationJob) -> list[Chunk]:
    """The chunks of the plan that the store does not hold whole."""
    return [chunk for chunk in _cut(settled(job)) if chunk.missing]


def chunks_from(job: GenerationJob, row: int, *, others: bool) -> list[Chunk]:
    """The plan's chunks from a row on; with `others`, those before it follow."""
    chunks = _cut(settled(job))
    late = [chunk for chunk in chunks if chunk.stop > row]
    return late + chunks[: len(chunks) - len(late)] if others else late


def stored_rows(job: GenerationJob, num_rows: int) -> StoredRows:
    """Where each of the plan's first rows lies in the store."""
    job = settled(job)
    assert isinstance(job.config.batch_size, int)
    held = holdings(job.plan, job.store, job.config.batch_size)
    return StoredRows.of(held, job.store, num_rows, packs.group_rows(job.config))


def _packer(job: GenerationJob, chunks: list[Chunk]) -> Any:
    """The actor that packs beside the makers of these chunks; None where they complete no range."""
    batch, rows = job.config.batch_size, job.pack_rows
    starts = [chunk.start for chunk in chunks if chunk.missing]
    assert isinstance(batch, int)
    assert rows is not None
    if not starts or len(job.plan) < rows or rows % batch:
        return None
    import ray

    actor: Any = ray.remote(num_cpus=0)(packs.Packer)
    return actor.remote(job.plan, job.store, starts, batch, rows, packs.group_rows(job.config))


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


def check_steering(job: GenerationJob) -> None:
    """Look at what a learner is to steer, before anything is made.

    Raises:
        UserError: there is no such learner, its sampler cannot be guided, or nothing says which of its
            candidates are right.
    """
    for _, steering in job.steering:
        assert steering.card  # read: it is there
        if steering.guidance is not None:
            check_guidance(job.config)
        if steering.select is not None:
            check_selection(job.config)


def settled(job: GenerationJob) -> GenerationJob:
    """The job with `batch_size`, `compile` and `pack_rows` settled where they are open.

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
    return replace(
        job,
        config=config.model_copy(update=changes),
        pack_rows=job.pack_rows or packs.pack_rows(config),
    )
