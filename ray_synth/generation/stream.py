"""Plan in, image rows out, through Ray Data: an autoscaling pool of actors, each one pipeline.

The stream gives every row of the plan it is handed, in plan order if asked; what the store already
holds is read from it, so that running a stream again makes nothing twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_synth.config import GenerationConfig
from ray_synth.generation.generator import Generator
from ray_synth.generation.store import IMAGE_SCHEMA, ImageStore, part_name

if TYPE_CHECKING:
    import ray.data

MAX_BLOCKS = 20_000


class ImageMaker:
    """The actor of the pool: makes what the store lacks of each batch, and writes it."""

    def __init__(self, config: GenerationConfig, store: ImageStore, board: Any = None) -> None:
        self.store, self.board, self.config = store, board, config
        self.made = store.locate()
        self.generator: Generator | None = None  # loaded by the first batch that needs it

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        missing = [row for row in rows if row["sample_id"] not in self.made]
        if missing and self.store.folder.exists(part_name([row["sample_id"] for row in missing])):
            self.made = self.store.locate(self.made)  # this task died after its write: retried
            missing = []
        done = self._stored([row for row in rows if row["sample_id"] in self.made])
        if missing:
            if self.generator is None:
                self.generator = Generator(self.config)
            new = self.generator.generate(missing)
            self.store.write(new)
            done.update({row["sample_id"]: row for row in new})
        if self.board is not None:
            self.board.add.remote("images", len(rows))
            self.board.add.remote(
                "rejected", sum(not done[r["sample_id"]]["accepted"] for r in rows)
            )
        return pa.Table.from_pylist([done[row["sample_id"]] for row in rows], schema=IMAGE_SCHEMA)

    def _stored(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        wanted = {row["sample_id"] for row in rows}
        found: dict[str, dict[str, Any]] = {}
        for name in sorted({self.made[sample_id] for sample_id in wanted}):
            for row in self.store.read(name).to_pylist():
                if row["sample_id"] in wanted:
                    found[row["sample_id"]] = row
        return found


def image_stream(
    plan: pa.Table,
    config: GenerationConfig,
    store: ImageStore,
    *,
    board: Any = None,
    columns: list[str] | None = None,
) -> ray.data.Dataset:
    """A lazily executed Ray Dataset of the plan's image rows.

    One block a generator batch, so that each batch reaches its consumer as soon as it is made.

    Args:
        plan: rows of the plan contract.
        columns: pass on only these columns; the store keeps all.
    """
    import ray.data

    rows_per_block = config.batch_size * max(1, plan.num_rows // config.batch_size // MAX_BLOCKS)
    blocks = [plan.slice(at, rows_per_block) for at in range(0, plan.num_rows, rows_per_block)]
    made = ray.data.from_arrow(blocks).map_batches(
        ImageMaker,
        fn_constructor_kwargs={"config": config, "store": store, "board": board},
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=config.pool.min_size,
            max_size=config.pool.max_size,
            max_tasks_in_flight_per_actor=2,
        ),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
    )
    return made.select_columns(columns) if columns else made


def make_images(
    plan: pa.Table,
    config: GenerationConfig,
    store: ImageStore,
    *,
    board: Any = None,
) -> int:
    """Make every image of the plan that the store lacks; how many that was."""
    missing = store.missing(plan)
    if missing.num_rows:
        stream = image_stream(missing, config, store, board=board, columns=["sample_id"])
        for _ in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass
    return missing.num_rows
