"""The mode `--storing` of `jobs/bench.py generation`: all that an actor does besides generating."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
from bench_scale import plan_rows
from PIL import Image

from ray_synth.config import ClusterConfig, GenerationConfig, PoolConfig, QualityConfig
from ray_synth.generators.protocol import plugin_size


class Ready:
    """A generator that costs nothing: parts of two photographs, cut out before."""

    def __init__(self, config: GenerationConfig) -> None:
        from sklearn.datasets import load_sample_images

        size = plugin_size(config)
        rng = np.random.default_rng(0)
        self.images = []
        for at in range(32):
            photo = Image.fromarray(load_sample_images().images[at % 2])
            side = int(rng.integers(300, 427))
            left = int(rng.integers(photo.width - side + 1))
            top = int(rng.integers(photo.height - side + 1))
            box = (left, top, left + side, top + side)
            self.images.append(photo.resize(size, Image.Resampling.LANCZOS, box))
        self.provenance = {"model": "photographs"}

    def generate(self, rows: list[dict[str, Any]]) -> list[Image.Image]:
        return [self.images[row["seed"] % len(self.images)] for row in rows]


def storing(image_format: str, size: int, cores: int, images: int) -> dict[str, Any]:
    """Images that one actor encodes and stores per second, and the share of its cores' time that its
    threads were encoding."""
    import pyarrow as pa
    import ray

    from ray_synth.cluster.connection import connect
    from ray_synth.generation.maker import GenerationJob
    from ray_synth.generation.store import ImageStore
    from ray_synth.generation.stream import image_stream
    from ray_synth.monitoring.progress import make_board
    from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
    from ray_synth.storage.folder import Folder

    made = GenerationConfig(
        generator="bench_storing:Ready",
        width=size,
        height=size,
        image_format=image_format,
        batch_size=16,
        checks=QualityConfig(policy="off"),
        pool=PoolConfig(min_size=1, max_size=1),
        num_cpus=cores,
    )
    plan = PlanTable(pa.Table.from_pylist(plan_rows(images), schema=PLAN_SCHEMA))
    arrivals, counts = [], []
    with (
        connect(ClusterConfig(num_cpus=cores + 2)),
        tempfile.TemporaryDirectory() as folder,
    ):
        board = make_board()
        store = ImageStore(Folder(folder))
        stream = image_stream(GenerationJob(made, plan, store, board=board), columns=["sample_id"])
        for block in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            arrivals.append(time.perf_counter())
            counts.append(len(block))
        encoding = ray.get(board.counts.remote())["encode_seconds"]
        bytes_each = sum(
            store.folder.filesystem.get_file_info(store.folder.path(name)).size
            for name in store.parts()
        )
    rate = sum(counts[2:]) / (arrivals[-1] - arrivals[1])
    return {
        "format": made.encoding["image_format"],
        "size": size,
        "cores": cores,
        "stored_images_per_second": round(rate, 1),
        "stored_images_per_second_and_core": round(rate / cores, 1),
        "encode_share": round(encoding / images * rate / cores, 3),
        "kilobytes_per_image": round(bytes_each / images / 1e3, 1),
    }
