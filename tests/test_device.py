"""A device that is not there is named, with what to set; `auto` takes what Ray gave and no more."""

from types import SimpleNamespace

import pytest
import torch

from ray_synth.config import ClipConfig, ClusterConfig, LlmConfig
from ray_synth.device import pick_device, pick_dtype, ray_gave_gpu
from ray_synth.errors import UserError


@pytest.fixture(scope="module")
def two_gpus():
    """A Ray that counts two GPUs, on a node where CUDA shows them to every process."""
    import ray

    from ray_synth.cluster.connection import connect

    with connect(ClusterConfig(num_cpus=4, num_gpus=2)):
        yield ray


def device_of(given: str = "auto") -> tuple[str, bool | None]:
    """What a process of Ray picks where CUDA is there."""
    from unittest import mock

    with mock.patch("torch.cuda.is_available", return_value=True):
        return pick_device(given), ray_gave_gpu()


def test_auto_is_the_gpu_that_ray_gave_and_else_the_cpu(two_gpus):
    class Actor:
        def device(self) -> tuple[str, bool | None]:
            return device_of()

    for num_gpus, expected in ((0, "cpu"), (1, "cuda"), (0.25, "cuda")):
        options = {"num_cpus": 0.5, "num_gpus": num_gpus}
        gave = num_gpus > 0
        task = two_gpus.remote(**options)(device_of)
        assert two_gpus.get(task.remote()) == (expected, gave)
        actor = two_gpus.remote(**options)(Actor).remote()
        assert two_gpus.get(actor.device.remote()) == (expected, gave)
    assert device_of() == ("cuda", None), "the driver is no worker: as without Ray"


def test_pools_of_ray_data_ask_ray_too(two_gpus):
    import ray.data

    class Predictor:
        def __call__(self, batch):
            return {"device": [device_of()[0]]}

    rows = ray.data.range(1).map_batches(
        Predictor, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5, num_gpus=0
    )
    assert rows.take_all() == [{"device": "cpu"}]


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
