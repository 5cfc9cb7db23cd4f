"""A device that is not there is named, with what to set."""

from types import SimpleNamespace

import pytest
import torch

from ray_synth.device import pick_device, pick_dtype
from ray_synth.errors import UserError


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
