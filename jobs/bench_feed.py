"""The feed part of the verb `training` of `jobs/bench.py`: a live feed against images held in memory."""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

from bench_scale import plan_rows, sleeper_config

from ray_synth.config import ClusterConfig, SourceConfig, TrainingConfig
from ray_synth.data.digits import CLASS_NAMES as DIGITS


def live(
    *, slower: float = 100.0, steps: int = 150, rounds: int = 2, batch_size: int = 64
) -> dict[str, Any]:
    """Train from memory, then the same live beside a generator `slower` times slower than training.

    Both are whole Ray Train runs of the same model and images; a rate is steps over the seconds from
    the first batch to the end, what the training thread waited included.
    """
    from ray_synth.cluster.connection import connect

    found: dict[str, list[float]] = {"from memory": [], "live": [], "stall": []}
    with connect(ClusterConfig(num_cpus=4)):
        for _ in range(rounds):
            memory = _train("stored", 0.0, steps, batch_size)
            a_step = memory["seconds"] / steps
            # Images per second that training uses, over `slower`: seconds for a batch of 16.
            seconds = 16 * slower * a_step / (batch_size // 2)
            fed = _train("live", seconds, steps, batch_size)
            found["from memory"].append(steps / memory["seconds"])
            found["live"].append(steps / fed["seconds"])
            found["stall"].append(fed["stall_fraction"])
            print(
                f"from memory {found['from memory'][-1]:.2f} steps/s; live "
                f"{found['live'][-1]:.2f} steps/s, a generator of {16 / seconds:.2f} images/s, "
                f"{fed['synthetic_arrived']} images came and {fed['synthetic_replayed']} were drawn "
                f"again, waited {100 * fed['stall_fraction']:.2f}% of the time"
            )
    ratios = [a / b for a, b in zip(found["live"], found["from memory"], strict=True)]
    return {
        "live_over_ram": round(statistics.median(ratios), 4),
        "live_stall_fraction": round(statistics.median(found["stall"]), 5),
        "live_slower": slower,
    }


def _train(feed: str, seconds: float, steps: int, batch_size: int) -> dict[str, Any]:
    """One arm over a plan of 512 rows; its card."""
    import pyarrow as pa

    from ray_synth.data.dataset import load_index, select
    from ray_synth.generation.maker import GenerationJob
    from ray_synth.generation.store import ImageStore
    from ray_synth.generation.stream import make_images
    from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanFile
    from ray_synth.storage.folder import Folder
    from ray_synth.training.job import TrainJob
    from ray_synth.training.trainer import run_training

    config = TrainingConfig(
        model="resnet18",
        image_size=64,
        augment="none",
        feed=feed,
        steps=steps,
        batch_size=batch_size,
        warmup_images=batch_size // 2,
        checkpoint_every=10**6,
        num_cpus=1,
        dtype="float32",
    )
    rows = plan_rows(512)
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(path)
        folder.write_table("plan.parquet", pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
        generation = GenerationJob(
            sleeper_config(seconds), PlanFile(folder), ImageStore(folder.child("images"))
        )
        if feed == "stored":
            make_images(generation)
        index = load_index(SourceConfig(format="digits", split="train"), class_names=DIGITS)
        job = TrainJob(
            arm=feed,
            config=config,
            steps=steps,
            class_names=DIGITS,
            seed=0,
            folder=folder,
            real=select(index, 50, seed=0),
            max_pixels=10**6,
            num_synthetic=len(rows),
        )
        run_training(job, generation, run_name=feed)
        return folder.read_json(f"models/{feed}.json")
