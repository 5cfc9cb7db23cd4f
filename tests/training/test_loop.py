"""Ray Train over the real generation stream: order, several workers, stored and lockstep feeds."""

import pyarrow as pa
import pytest
from test_store import plan_rows
from tiny import embedded

from ray_synth.config import SourceConfig, TrainingConfig
from ray_synth.data.dataset import load_index, select
from ray_synth.generation.chunks import PlanFile
from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.store import PLAN_SCHEMA, ImageStore
from ray_synth.generation.stream import make_images
from ray_synth.storage import Folder
from ray_synth.training.loop import TrainJob, total_steps
from ray_synth.training.trainer import run_training

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GENERATION = embedded(batch_size=8)


def train(folder: Folder, name: str, **settings) -> dict:
    config = TrainingConfig(
        model="test_resnet",
        image_size=32,
        augment="digits",
        steps=8,
        batch_size=8,
        num_cpus=0.5,
        log_every=1,
        **settings,
    )
    index = select(load_index(SourceConfig(format="digits", split="train"), NAMES), 3, seed=0)
    plan = pa.Table.from_pylist(plan_rows(32), schema=PLAN_SCHEMA)
    folder.write_table("plan.parquet", plan)
    made = GenerationJob(GENERATION, PlanFile(folder), ImageStore(folder.child("images")))
    if config.feed == "stored":
        make_images(made)
    job = TrainJob("mixed", config, 8, NAMES, 0, folder, index, 10**6, num_synthetic=32)
    run_training(job, made, real=index, run_name=name)
    return folder.read_json("models/mixed.json")


@pytest.mark.slow
def test_stored_feed_trains_on_two_workers_in_step(local_ray, tmp_path):
    card = train(Folder(tmp_path), "two", feed="stored", num_workers=2)
    assert [point["step"] for point in card["curve"]] == list(range(1, 9))
    assert card["real_images_seen"] == 8 * 4 * 2
    assert card["bns"] == ["main", "aux"]


@pytest.mark.slow
def test_lockstep_gives_the_same_model_again(local_ray, tmp_path):
    first = train(Folder(tmp_path / "a"), "a", feed="lockstep", num_threads=1)
    second = train(Folder(tmp_path / "b"), "b", feed="lockstep", num_threads=1)
    assert first["curve"] == second["curve"]
    weights = [(tmp_path / x / "models" / "mixed.main.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]


def test_epochs_are_counted_over_all_workers():
    config = TrainingConfig(epochs=3, batch_size=8, num_workers=2)
    assert total_steps(config, 80) == 3 * 80 // 8
    assert total_steps(config, 1) == 3
