"""A training of its own process for tests: `python digits.py FOLDER SETTINGS_JSON`.

Real digits and painted synthetic ones, in a plan of 400 rows.
"""

import json
import sys
from dataclasses import replace

import pyarrow as pa
from test_store import plan_rows

from ray_synth.config import (
    ClusterConfig,
    GenerationConfig,
    QualityConfig,
    SourceConfig,
    TrainingConfig,
)
from ray_synth.data.dataset import load_index, select
from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import make_images
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanFile
from ray_synth.storage.folder import Folder
from ray_synth.training.job import TrainJob
from ray_synth.training.trainer import run_training

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def train_digits(
    folder: Folder,
    seconds: float = 0.0,
    rows: int = 32,
    board: object = None,
    in_process: bool = False,
    part: dict | None = None,
    **settings,
) -> dict:
    """Train one arm, or a part of it, in the Ray that is running; its card."""
    values = {
        "model": "test_resnet",
        "image_size": 32,
        "augment": "digits",
        "steps": 8,
        "batch_size": 8,
        "num_cpus": 0.5,
        "log_every": 1,
        **settings,
    }
    config = TrainingConfig(**values)
    index = select(load_index(SourceConfig(format="digits", split="train"), NAMES), 3, seed=0)
    if not folder.exists("plan.parquet"):
        plan = pa.Table.from_pylist(plan_rows(rows), schema=PLAN_SCHEMA)
        folder.write_table("plan.parquet", plan)
    made = GenerationJob(
        GenerationConfig(
            generator="painting:Painter",
            generator_kwargs={"seconds": seconds},
            width=32,
            height=32,
            batch_size=8,
            num_cpus=0.5,
            checks=QualityConfig(policy="off"),
        ),
        PlanFile(folder),
        ImageStore(folder.child("images")),
    )
    if config.feed == "stored":
        make_images(made)
    assert config.steps is not None
    job = TrainJob(
        "mixed",
        config,
        config.steps,
        NAMES,
        0,
        folder,
        index,
        10**6,
        rows,
        board=board,
        num_threads=1,
    )
    job = replace(job, **(part or {}))
    run_training(job, made, run_name="run", in_process=in_process)
    return (job.publish or folder).read_json("models/mixed.json")


if __name__ == "__main__":
    from ray_synth.cluster.connection import connect

    with connect(ClusterConfig(num_cpus=6)):
        train_digits(Folder(sys.argv[1]), **json.loads(sys.argv[2]))
