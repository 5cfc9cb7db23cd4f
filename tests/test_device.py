"""A device that is not there is named, with what to set; `auto` takes what Ray gave and no more."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ray_synth.config import ClipConfig, ClusterConfig, LlmConfig
from ray_synth.device import pick_device, pick_dtype, ray_gave_gpu
from ray_synth.errors import UserError

HERE = Path(__file__).parent


def device_of(given: str = "auto") -> tuple[str, bool | None]:
    """What a process of Ray picks where CUDA is there."""
    from unittest import mock

    with mock.patch("torch.cuda.is_available", return_value=True):
        return pick_device(given), ray_gave_gpu()


def check_processes_of_ray() -> None:
    """With a Ray that counts two GPUs, on a node where CUDA shows them to every process."""
    import ray
    import ray.data

    from ray_synth.cluster.connection import connect

    class Actor:
        def device(self) -> tuple[str, bool | None]:
            return device_of()

    class Predictor:
        def __call__(self, batch):
            return {"device": [device_of()[0]]}

    with connect(ClusterConfig(num_cpus=4, num_gpus=2)):
        for num_gpus, expected in ((0, "cpu"), (1, "cuda"), (0.25, "cuda")):
            options = {"num_cpus": 0.5, "num_gpus": num_gpus}
            gave = num_gpus > 0
            task = ray.remote(**options)(device_of)
            assert ray.get(task.remote()) == (expected, gave)
            actor = ray.remote(**options)(Actor).remote()
            assert ray.get(actor.device.remote()) == (expected, gave)
            ray.kill(actor)
        assert device_of() == ("cuda", None), "the driver is no worker: as without Ray"
        rows = ray.data.range(1).map_batches(
            Predictor, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5, num_gpus=0
        )
        assert rows.take_all() == [{"device": "cpu"}]


@pytest.mark.slow
def test_auto_is_the_gpu_that_ray_gave_and_else_the_cpu():
    """In a process of its own: the Ray of other tests has no GPUs."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE)))}
    env.pop("RAY_ADDRESS", None)
    code = "import test_device; test_device.check_processes_of_ray()"
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-4000:]


def test_every_device_setting_leaves_it_to_ray_by_default():
    assert LlmConfig().device == ClipConfig().device == "auto"
    assert device_of("cpu") == ("cpu", None)


def test_a_device_that_is_not_there_is_named():
    assert pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"device 'cuda:99': .*set `device: auto`"):
        pick_device("cuda:99")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 CUDA GPUs"):
            pick_device("cuda")


@pytest.mark.parametrize(
    ("major", "half", "of_clip", "overflows"),
    [
        (7, torch.float16, torch.float16, torch.bfloat16),  # T4, V100
        (8, torch.bfloat16, torch.float16, torch.bfloat16),  # A100, A10G, L4
        (9, torch.bfloat16, torch.float16, torch.bfloat16),  # H100
    ],
)
def test_half_precision_is_what_a_gpu_computes_in(monkeypatch, major, half, of_clip, overflows):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major)
    )
    assert pick_dtype("auto", "cuda") is half
    assert pick_dtype("auto", "cuda:1", gpu="float16") is of_clip
    assert pick_dtype("auto", "cuda", overflows=True) is overflows
    assert pick_dtype("float32", "cuda") is torch.float32
