"""A whole run whose directory is a bucket, killed in three places and resumed; and its use."""

import io
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from buckets import make_bucket, serving
from PIL import Image
from service import free_port
from small_runs import QUICKSTART, ROOT

from ray_synth.generation.store import ImageStore
from ray_synth.storage.folder import Folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
# The quickstart with fewer images and steps; every class, model and stage is there.
SETTINGS = [
    "runs_dir=s3://bucket/runs",
    "prompting.multiplier=6",
    "training.warmup_images=128",
    "training.steps=80",
    "training.checkpoint_every=10",
]
LEFT = {"config.yaml", "plan.parquet", "meanings.json", "metrics.json", "mlflow.db", "s3:"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty machine: home, temporary and working folder; and a bucket that the environment names."""
    tmp = tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as patch, serving("s3", tmp) as server:
        for name in ("home", "temporary", "work", "mlflow"):
            (tmp / name).mkdir()
        settings = {
            **server.environment,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "COLUMNS": "160",
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        make_bucket(server)
        yield tmp


@pytest.fixture(scope="module")
def mlflow_server(place):
    """An MLflow server that keeps its artifacts in the same bucket."""
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}",
            f"--backend-store-uri=sqlite:///{place}/mlflow/mlflow.db", "--workers=1",
            "--artifacts-destination=s3://bucket/mlflow",
        ],
        cwd=place / "mlflow", env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "MLflow did not come up"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start(place: Path, *arguments: str) -> subprocess.Popen:
    """A command as a user on that machine starts it."""
    away = {"HOME": str(place / "home"), "TMPDIR": str(place / "temporary"), "RAY_TMPDIR": "/tmp"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=place / "work", env={**os.environ, **away}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, text[-4000:]
    return text


def kill_when(process: subprocess.Popen, ready) -> None:
    """Kill -9 the driver when `ready()` holds; its actors end later, as on a cluster."""
    deadline = time.monotonic() + 1500
    try:
        while not ready():
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < deadline, "it never came to where it should be killed"
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()


def ray_synth(place: Path, *arguments: str) -> str:
    return finish(start(place, "-m", "ray_synth.cli", *arguments))


@pytest.fixture(scope="module")
def finished(place, mlflow_server):
    """The run, ended at last; its folder, and what it printed."""
    folder = Folder("s3://bucket/runs/quickstart")
    line = [str(ROOT / "jobs" / "run.py"), "--config", str(QUICKSTART)]
    for setting in [*SETTINGS, f"tracking.uri={mlflow_server}"]:
        line += ["--set", setting]
    store = ImageStore(folder.child("images"))

    def checkpoints(arm: str) -> int:
        """Checkpoints that Ray Train has on record."""
        arms = [n for n in folders(folder.child("checkpoints")) if n.startswith(arm)]
        record = "checkpoint_manager_snapshot.json"
        places = [folder.child(f"checkpoints/{name}") for name in arms]
        return sum(
            len(p.read_json(record)["checkpoint_results"]) for p in places if p.exists(record)
        )

    kill_when(start(place, *line), lambda: checkpoints("real_only"))
    assert not store.parts()
    identity = folder.read_json("mlflow.json")
    kill_when(start(place, *line), lambda: checkpoints("mixed") and len(store.parts()) >= 5)
    assert not folder.exists("models/mixed.json")
    kill_when(start(place, *line), lambda: folder.exists("stages/generation.json"))
    assert not folder.exists("stages/evaluation.json")
    said = finish(start(place, *line))
    assert folder.read_json("mlflow.json").items() >= identity.items(), "it joined its MLflow run"
    return folder, said, line


def folders(folder: Folder) -> list[str]:
    from pyarrow.fs import FileSelector

    found = folder.filesystem.get_file_info(FileSelector(folder.path(), allow_not_found=True))
    return [info.base_name for info in found if not info.is_file]


def test_a_run_in_a_bucket_killed_three_times_is_whole(finished):
    folder, said, _ = finished
    metrics = folder.read_json("metrics.json")
    assert (metrics["num_real"], metrics["num_synthetic"] + metrics["rejected"]) == (50, 300)
    for model in (metrics["real_only"], metrics["mixed"]["main"], metrics["mixed"]["aux"]):
        assert model["in_domain"]["images"] == 2500
    assert "s3://bucket/runs/quickstart/report/index.html" in said
    page = folder.read_bytes("report/index.html").decode()
    assert page.count("data:image/") > 20, "its pictures are in it"
    assert Image.open(io.BytesIO(folder.read_bytes("report/contact_sheet.png"))).size[0] > 100
    assert not [name for name in folder.names() if name.endswith(".tmp")]


def test_each_planned_image_is_in_the_bucket_once(finished):
    folder = finished[0]
    store = ImageStore(folder.child("images"))
    made = Counter(
        i
        for name in store.parts()
        for i in store.read(name, ["sample_id"])["sample_id"].to_pylist()
    )
    planned = folder.read_table("plan.parquet")["sample_id"].to_pylist()
    assert len(planned) == 300
    assert made == Counter(planned)


def test_training_went_on_from_its_checkpoints_and_the_models_load_in_plain_timm(finished):
    import timm
    from safetensors.torch import load

    folder = finished[0]
    for arm in ("real_only", "mixed"):
        card = folder.read_json(f"models/{arm}.json")
        assert [point["step"] for point in card["curve"]] == list(range(10, 81, 10))
        model = timm.create_model(card["model"], num_classes=10, **card["model_kwargs"])
        for bn in card["bns"]:
            model.load_state_dict(load(folder.read_bytes(f"models/{arm}.{bn}.safetensors")))


def test_mlflow_has_one_run_that_is_finished(finished, mlflow_server):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_server)
    experiment = client.get_experiment_by_name("ray-synth")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_id == finished[0].read_json("mlflow.json")["run_id"]
    for arm in ("real_only", "mixed"):
        steps = [m.step for m in client.get_metric_history(found.info.run_id, f"{arm}.loss")]
        assert len(steps) == len(set(steps)), "no step is logged twice"
        assert set(steps) <= set(range(10, 81, 10))
        assert max(steps) == 80  # one that was on its way at a kill may be missing before
    names = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "metrics.json", "index.html"} <= names
    assert folders(Folder("s3://bucket/mlflow")), "its artifacts are in the bucket too"


def test_nothing_of_the_run_lies_on_the_machine(finished, place):
    """A worker that was killed may leave scratch: a checkpoint that was not uploaded yet."""
    assert not list((place / "work").iterdir())
    found = [
        path
        for name in ("home", "temporary")
        for path in (place / name).rglob("*")
        if path.name in LEFT or path.name.startswith("part-") or "quickstart" in path.name
    ]
    assert not found


def test_run_again_it_makes_nothing(finished, place):
    folder, _, line = finished
    images = folder.child("images")
    before = {i.path: i.mtime_ns for i in images._infos()}
    assert "Real + synthetic" in finish(start(place, *line))
    assert {i.path: i.mtime_ns for i in images._infos()} == before


def test_its_images_are_shown_made_again_and_exported(finished, place):
    import datasets

    folder = finished[0]
    run = ["--run", folder.uri]
    sheet, again = place / "sheet.png", place / "again.png"
    ray_synth(place, "show", *run, "--class", "seven", "--out", str(sheet))
    assert Image.open(sheet).size[0] > 100
    store = ImageStore(folder.child("images"))
    sample_id = store.read(store.parts()[0], ["sample_id"])["sample_id"][0].as_py()
    said = ray_synth(place, "regenerate", sample_id, *run, "--out", str(again))
    assert "the same pixels as in the store" in said
    to = "s3://bucket/exports/digits"
    said = ray_synth(place, "export", to, *run, "--layout", "huggingface", "--rejected")
    assert f"wrote 300 images of 10 classes to {to}" in said
    exported = Folder(to)
    assert exported.exists("README.md")
    (name,) = exported.child("data").names()
    local = place / "export.parquet"
    local.write_bytes(exported.child("data").read_bytes(name))
    rows = datasets.Dataset.from_parquet(str(local), cache_dir=str(place / "cache"))
    assert rows[0]["image"].size == (64, 64)
    assert len(rows) == 300
