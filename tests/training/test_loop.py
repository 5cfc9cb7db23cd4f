"""Ray Train over the real generation stream: order, several workers, lost ones, and bad numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from digits import train_digits

from ray_synth.config import TrainingConfig
from ray_synth.generation.store import ImageStore
from ray_synth.storage.folder import Folder
from ray_synth.training.curve import LossWatch, curve_point
from ray_synth.training.job import total_steps

HERE = Path(__file__).parent


@pytest.mark.slow
def test_two_workers_train_in_step_from_a_store(local_ray, tmp_path):
    card = train_digits(Folder(tmp_path), feed="stored", num_workers=2, accumulate_steps=2)
    assert [point["step"] for point in card["curve"]] == list(range(1, 9))
    assert card["real_images_seen"] == 8 * 4 * 2 * 2
    assert card["bns"] == ["main", "aux", "average"]


@pytest.mark.slow
def test_a_store_that_memory_does_not_hold_trains_the_same_again(local_ray, tmp_path):
    """Two workers read it as they draw, 400 images of 3 kB beside a limit of 1 MB."""
    settings = {"feed": "stored", "memory_mb": 1, "num_workers": 2, "rows": 400}
    first, again = (train_digits(Folder(tmp_path / name), **settings) for name in ("a", "b"))
    assert [point["step"] for point in first["curve"]] == list(range(1, 9))
    assert first["curve"] == again["curve"]


@pytest.mark.slow
def test_a_live_feed_reads_the_store_again_where_memory_is_short(local_ray, tmp_path):
    card = train_digits(
        Folder(tmp_path), feed="live", memory_mb=1, num_workers=2, rows=800, steps=150,
        log_every=50, seconds=0.05,
    )  # fmt: skip
    assert card["curve"][-1]["step"] == 150
    assert card["synthetic_replayed"] > 0


@pytest.mark.slow
def test_the_generators_that_fed_training_make_the_whole_plan(local_ray, tmp_path):
    """Training is over after 8 steps of 4 images; the plan's other images are made by the same pool."""
    folder = Folder(tmp_path)
    train_digits(folder, feed="live", rows=400, seconds=0.2)
    assert sum(len(table) for _, table in ImageStore(folder.child("images")).every(["seed"])) == 400


@pytest.mark.slow
def test_training_in_process_gives_the_same_weights(local_ray, tmp_path):
    """As the studies do it: in a task, with the same thread count as a worker of Ray Train's."""
    folders = [Folder(tmp_path / name) for name in ("worker", "task")]
    cards = [
        local_ray.get(
            local_ray.remote(num_cpus=0.5)(train_digits).remote(
                folder, feed="stored", in_process=place == 1
            )
        )
        for place, folder in enumerate(folders)
    ]
    assert cards[0]["curve"] == cards[1]["curve"]
    for bn in cards[0]["bns"]:
        one, other = (folder.read_bytes(f"models/mixed.{bn}.safetensors") for folder in folders)
        assert one == other


@pytest.mark.slow
def test_parts_in_process_go_on_from_each_others_state_as_others_do_from_checkpoints(
    local_ray, tmp_path
):
    def trained(folder: Folder, *, brief: bool) -> tuple[list, bytes]:
        train, first = local_ray.remote(num_cpus=0.5)(train_digits), folder.child("part-0")
        parts = [
            {"stop": 4, "publish": first, "keep_state": brief},
            {"begin": 4, "segment": 1, "resume": first if brief else None},
        ]
        for part in parts:
            card = local_ray.get(train.remote(folder, feed="stored", in_process=brief, part=part))
        return card["curve"], folder.read_bytes("models/mixed.main.safetensors")

    kept, left = (trained(Folder(tmp_path / str(brief)), brief=brief) for brief in (False, True))
    assert [point["step"] for point in left[0]] == list(range(1, 9))
    assert left == kept
    assert not (tmp_path / "True/state.pt").exists(), "the last part leaves none"


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_training_and_keeps_the_last_checkpoint(local_ray, tmp_path):
    optimizer = {"name": "sgd", "lr": 1e30, "clip_grad_norm": None, "warmup_fraction": 0.9}
    with pytest.raises(ValueError, match=r"the loss of step (\d+) is not a number") as error:
        train_digits(
            Folder(tmp_path), feed="stored", steps=40, checkpoint_every=1, optimizer=optimizer
        )
    text = str(error.value)
    assert "images " in text and "optimizer.lr" in text
    step = int(text.split("loss of step ")[1].split(maxsplit=1)[0])
    assert f"the checkpoint of step {step - 1} is kept" in text or step == 1
    states = sorted(tmp_path.glob("checkpoints/run/checkpoint_*/state.pt"))
    kept = torch.load(states[-1], weights_only=True)
    assert kept["history"]["step"] == step - 1
    assert all(value.isfinite().all() for value in kept["model"].values())


@pytest.mark.slow
def test_the_settings_of_large_runs_train_together(local_ray, tmp_path):
    """Elastic workers, decoding processes, torch.compile, mixing, EMA, layer decay, a schedule."""
    card = train_digits(
        Folder(tmp_path),
        feed="live",
        num_workers=[1, 2],
        decode_workers=1,
        compile=True,
        augment="imagenet_strong",
        mixup=0.2,
        cutmix=1.0,
        ema_decay=0.9,
        repeated_augmentation=2,
        class_balance=1.0,
        lambda_end=0.0,
        optimizer={"name": "lamb", "layer_decay": 0.8, "schedule": "poly"},
    )
    assert [point["step"] for point in card["curve"]] == list(range(1, 9))
    assert card["real_images_seen"] in (8 * 4, 8 * 4 * 2)
    assert card["crop_pct"] < 1
    last = card["curve"][-1]  # lambda has come down to 0
    assert last["loss"] == pytest.approx(last["loss_real"])


def training_processes(parent: int, name: str = "RayTrainWorker") -> list[psutil.Process]:
    """The training workers, or others, that a driver's own Ray has started."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(ready, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came to where it should be killed"
        time.sleep(0.02)


@pytest.mark.slow
def test_lockstep_gives_the_same_curve_after_a_lost_worker_controller_and_driver(tmp_path):
    """2 workers: one is killed in mid-epoch, then what controls them, later the driver; then the same
    command ends it."""
    settings = {
        "feed": "lockstep",
        "num_workers": 2,
        "steps": 30,
        "rows": 200,
        "checkpoint_every": 5,
        "seconds": 0.4,
    }

    def line(name: str) -> list[str]:
        return [sys.executable, str(HERE / "digits.py"), str(tmp_path / name), json.dumps(settings)]

    def checkpoints() -> int:
        return len(list((tmp_path / "disturbed").glob("checkpoints/run/checkpoint_*/state.pt")))

    subprocess.run(line("whole"), check=True, timeout=200)
    driver = subprocess.Popen(line("disturbed"))
    try:
        wait_until(lambda: checkpoints() >= 1, driver)
        for name in ("RayTrainWorker", "TrainController"):
            before = {p.pid for p in training_processes(driver.pid)}
            training_processes(driver.pid, name)[-1].kill()
            wait_until(
                lambda known=before: (
                    len({p.pid for p in training_processes(driver.pid)} - known) >= 2
                ),
                driver,
            )
        wait_until(lambda: checkpoints() >= 2, driver)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (tmp_path / "disturbed" / "models" / "mixed.json").exists()
    subprocess.run(line("disturbed"), check=True, timeout=200)
    cards = [
        Folder(tmp_path / name).read_json("models/mixed.json") for name in ("whole", "disturbed")
    ]
    assert len(cards[0]["curve"]) == 30
    assert cards[0]["curve"] == cards[1]["curve"]
    weights = [
        (tmp_path / name / "models" / "mixed.main.safetensors").read_bytes()
        for name in ("whole", "disturbed")
    ]
    assert weights[0] == weights[1]


def test_the_first_loss_that_is_not_finite_is_found_and_the_watch_starts_anew():
    watch = LossWatch()
    for step, loss in enumerate([1.0, 2.0, float("inf"), float("nan")]):
        watch.add(step, torch.tensor(loss), [f"image{step}"])
    assert watch.first_bad() == (2, ["image2"])
    watch.add(4, torch.tensor(1.0), [])
    assert watch.first_bad() is None


def test_a_point_of_the_curve_is_a_mean_over_images():
    point = curve_point(torch.tensor([6.0, 1.0, 4.0, 20.0, 8.0, 10.0]), 0.5, world_size=1)
    assert point == {
        "loss_real": 1.5,
        "train_top1_real": 0.25,
        "loss_synth": 2.0,
        "train_top1_synth": 0.8,
        "loss": 2.5,
    }
    assert "loss_synth" not in curve_point(torch.tensor([6.0, 1, 4, 0, 0, 0]), 0.5, world_size=1)


def test_epochs_are_counted_over_all_workers():
    config = TrainingConfig(epochs=3, batch_size=8, num_workers=2)
    assert total_steps(config, 80) == 3 * 80 // 8
    assert total_steps(config, 1) == 3
    assert total_steps(config.model_copy(update={"accumulate_steps": 2}), 80) == 3 * 5
