"""What may go wrong while images are made: afterwards each row is there once, with the same pixels."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from buckets import make_bucket, serving
from forwarder import Forwarder
from test_store import plan_rows
from tiny import embedded

from ray_synth.cli.explanation import explain
from ray_synth.config import GenerationConfig, PoolConfig, QualityConfig
from ray_synth.generation.maker import GenerationJob, ImageMaker
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import make_images
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanFile, PlanTable
from ray_synth.storage.folder import Folder

HERE = Path(__file__).parent
CONFIG = GenerationConfig(
    generator="painting:Painter",
    width=32,
    height=32,
    batch_size=4,
    image_format="png",
    num_cpus=0.5,
    checks=QualityConfig(policy="off"),
)


def table(count):
    return pa.Table.from_pylist(plan_rows(count), schema=PLAN_SCHEMA)


def slow(seconds, **settings):
    return CONFIG.model_copy(update={"generator_kwargs": {"seconds": seconds}, **settings})


def images(store):
    """(sample_id, bytes) of every row of every part, sorted."""
    return sorted(
        (row["sample_id"], row["image"])
        for name in store.parts()
        for row in store.read(name, ["sample_id", "image"]).to_pylist()
    )


def undisturbed(config, plan, folder):
    """The images as a maker makes them with no Ray and no trouble."""
    maker = ImageMaker(GenerationJob(config, PlanTable(plan), ImageStore(Folder(folder))))
    for start in range(0, plan.num_rows, config.batch_size):
        maker.chunk(start, min(start + config.batch_size, plan.num_rows), [])
    return images(maker.store)


def kill_until_done(run, config, kills, seconds, rng):
    """Start a driver, kill -9 it at a random moment, `kills` times; then let one end."""
    line = [sys.executable, str(HERE / "drive.py"), run, config.model_dump_json()]
    for number in range(kills):
        process = subprocess.Popen(line)
        time.sleep(rng.uniform(*seconds))
        if process.poll() is not None:
            assert process.returncode == 0, "the driver failed by itself"
            return number
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(line, check=True, timeout=300)
    return kills


@pytest.mark.slow
def test_a_driver_killed_twice_leaves_each_row_once(tmp_path):
    plan, rng = table(120), random.Random(7)
    Folder(tmp_path).write_table("plan.parquet", plan)
    config = slow(0.2)
    assert kill_until_done(str(tmp_path), config, kills=2, seconds=(7, 11), rng=rng) == 2
    made = images(ImageStore(Folder(tmp_path).child("images")))
    assert made == undisturbed(config, plan, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_driver_killed_20_times_leaves_what_an_undisturbed_run_leaves(tmp_path):
    """The real embedded model, in a pool of two."""
    plan, rng = table(800), random.Random(11)
    Folder(tmp_path).write_table("plan.parquet", plan)
    config = embedded(
        width=64,
        height=64,
        num_inference_steps=2,
        num_threads=1,
        pool=PoolConfig(min_size=1, max_size=2),
    )
    assert kill_until_done(str(tmp_path), config, kills=20, seconds=(5, 16), rng=rng) == 20
    made = images(ImageStore(Folder(tmp_path).child("images")))
    assert made == undisturbed(config, plan, tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, which can be made larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_same_call_continues(local_ray, small_disk, tmp_path):
    plan, store = table(600), ImageStore(Folder(small_disk / "images"))
    job = GenerationJob(CONFIG, PlanTable(plan), store)
    with pytest.raises(Exception, match="No space left") as error:
        make_images(job)
    assert "no space left on the disk" in (explain(error.value) or "")
    kept = images(store)
    assert 0 < len(kept) < 600
    grow = ["mount", "-o", "remount,size=64m", str(small_disk)]
    subprocess.run(grow, check=True)
    assert make_images(job) == 600 - len(kept)
    assert images(store) == undisturbed(CONFIG, plan, tmp_path / "undisturbed")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A run's folder on a real S3 server, and the way to it, which can be shut."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with serving("s3", tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        make_bucket(server)
        way = Forwarder(server.port)
        yield Folder(server.uri.replace(str(server.port), str(way.port))), way


def test_a_bucket_that_cannot_be_reached_for_a_while_is_waited_for(bucket, tmp_path):
    """The maker itself, as the actor calls it; the outage outlasts the S3 client's own retries."""
    folder, way = bucket
    plan = table(24)
    folder.write_table("plan.parquet", plan)
    maker = ImageMaker(GenerationJob(CONFIG, PlanFile(folder), ImageStore(folder.child("images"))))
    for start in range(0, 24, 4):
        if start == 8:
            way.shut()
            threading.Timer(8, way.open).start()
        maker.chunk(start, start + 4, [])
    assert images(maker.store) == undisturbed(CONFIG, plan, tmp_path / "undisturbed")


def test_a_stall_is_an_error_that_names_the_stage(tmp_path, local_ray):
    """No node has the GPU that the pool asks for: Ray alone would wait forever."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.execution_no_progress_timeout_s
    context.execution_no_progress_timeout_s = 6
    try:
        job = GenerationJob(
            slow(0, num_gpus=1.0), PlanTable(table(8)), ImageStore(Folder(tmp_path))
        )
        with pytest.raises(Exception, match="no progress") as error:
            make_images(job)
    finally:
        context.execution_no_progress_timeout_s = before
    message = explain(error.value) or ""
    assert message.startswith("generation stalled")
    assert "num_gpus" in message
