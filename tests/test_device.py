"""A device that is not there is named, with what to set."""

import pytest
import torch

from ray_synth.device import pick_device
from ray_synth.errors import UserError


def test_a_device_that_is_not_there_is_named():
    assert pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"device 'cuda:99': .*set `device: auto`"):
        pick_device("cuda:99")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 CUDA GPUs"):
            pick_device("cuda")
