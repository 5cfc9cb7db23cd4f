"""MLflow: one run over restarts, no step twice, and a server that is gone costs nothing else."""

import logging

import mlflow
import numpy as np
import pytest
import timm
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import save
from samples import draw

from ray_synth.config import SourceConfig, parse_config
from ray_synth.data.dataset import load_index, select
from ray_synth.monitoring.mlflow_run import MetricLogger, Tracker, digest, tracking_uri
from ray_synth.storage.folder import Folder


def config(**tracking):
    digits = {"format": "digits"}
    return parse_config(
        {
            "name": "run",
            "data": {"train": digits, "test": digits},
            "training": {"steps": 1},
            "tracking": tracking,
        }
    )


def tracker(path, **tracking) -> Tracker:
    return Tracker(config(**tracking), Folder(path), Folder(path / "run"))


def test_a_restart_joins_the_run_and_logs_no_step_twice(tmp_path):
    first = tracker(tmp_path)
    log = MetricLogger(first.handle, prefix="mixed")
    for step in range(1, 8):
        log({"loss": float(step), "top1": 0.5}, step)
    log.close()
    first.end("FAILED")  # killed at step 7, its last checkpoint was of step 4
    second = tracker(tmp_path)
    assert second.run_id == first.run_id
    assert second.client.get_run(second.run_id).info.status == "RUNNING"
    again = MetricLogger(second.handle, prefix="mixed")
    for step in range(5, 11):
        again({"loss": float(step), "top1": 0.5}, step)
    again.close()
    for key in ("loss", "top1"):
        history = second.client.get_metric_history(second.run_id, f"mixed.{key}")
        assert sorted(metric.step for metric in history) == list(range(1, 11))
    other = MetricLogger(second.handle, prefix="real_only")
    other({"loss": 1.0}, 1)
    other.close()
    assert len(second.client.get_metric_history(second.run_id, "real_only.loss")) == 1
    second.end()
    assert second.client.get_run(second.run_id).info.status == "FINISHED"


def test_datasets_are_logged_once_with_digests_that_know_them_apart(tmp_path):
    index = load_index(SourceConfig(format="digits", split="train"))
    few = select(index, 3, seed=0)
    assert digest(few) == digest(select(index, 3, seed=0))
    assert len({digest(few), digest(select(index, 3, seed=1)), digest(index)}) == 3
    one = tracker(tmp_path)
    for _ in range(2):
        one.datasets({"training": few, "in_domain": index})
    inputs = one.client.get_run(one.run_id).inputs.dataset_inputs
    assert {entry.dataset.name: entry.dataset.digest for entry in inputs} == {
        "training": digest(few),
        "in_domain": digest(index),
    }
    assert len(inputs) == 2


def test_the_model_is_logged_once_and_predicts_as_timm_does(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    one = tracker(tmp_path)
    card = {
        "model": "test_resnet",
        "model_kwargs": {},
        "class_names": ["cat", "dog", "crane"],
        "image_size": 64,
        "crop_pct": 0.9,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "bns": ["main", "aux", "average"],
        "curve": [{"step": 1, "loss": 1.0}],
    }
    one.folder.write_json("models/mixed.json", card)
    one.folder.write_bytes("models/mixed.main.safetensors", save(model.state_dict()))
    one.models()
    uri = one.folder.read_json("mlflow.json")["models"]["mixed"]
    one.models()
    assert one.folder.read_json("mlflow.json")["models"] == {"mixed": uri}
    mlflow.set_tracking_uri(one.uri)
    loaded = mlflow.pyfunc.load_model(uri)
    images = np.stack([np.array(draw(seed, (80, 70))) for seed in range(4)])
    found = loaded.predict(images)
    from ray_synth.training.augmentation import eval_transform

    transform = eval_transform(
        64, crop_pct=0.9, mean=card["mean"], std=card["std"], interpolation="bicubic"
    )
    pixels = [transform.prepare(torch.from_numpy(image).permute(2, 0, 1)) for image in images]
    with torch.no_grad():
        expected = model(transform.batch(torch.stack(pixels))).softmax(1)
    assert found["class_name"].tolist() == [
        card["class_names"][at] for at in expected.argmax(1).tolist()
    ]
    # The two resize in uint8 and in float: equal but for rounding.
    assert found["probability"].to_numpy() == pytest.approx(expected.amax(1).numpy(), abs=0.01)
    with pytest.raises(Exception, match="shape"):
        loaded.predict(images[..., :2])


def test_artifacts_of_the_run_are_kept(tmp_path):
    one = tracker(tmp_path)
    one.folder.write_json("metrics.json", {"a": 1})
    one.folder.write_bytes("report/index.html", b"<html></html>")
    one.artifacts()
    names = {item.path for item in one.client.list_artifacts(one.run_id)}
    assert names == {"metrics.json", "index.html"}


def test_system_metrics_are_logged_while_the_run_lasts(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    one = tracker(tmp_path)
    import time

    time.sleep(1.5)
    one.end()
    keys = MlflowClient(one.uri).get_run(one.run_id).data.metrics
    assert "system/cpu_utilization_percentage" in keys


def test_a_server_that_is_gone_is_said_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    one = tracker(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    gone = {"uri": "http://127.0.0.1:9", "run_id": one.run_id}
    with caplog.at_level(logging.WARNING, logger="ray_synth"):
        log = MetricLogger(gone, prefix="mixed")
        for step in range(1, 4):
            log({"loss": 1.0}, step)
        log.close()
    assert caplog.text.count("MLflow does not accept metrics") == 1
    with pytest.raises(ValueError, match="no MLflow server available at http://127.0.0.1:9"):
        Tracker(config(uri="http://127.0.0.1:9"), Folder(tmp_path), Folder(tmp_path / "other"))


def test_a_password_in_the_uri_is_refused(tmp_path):
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        tracking_uri(config(uri="https://me:secret@host:5000"), Folder(tmp_path))
