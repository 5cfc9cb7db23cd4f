"""What the benchmarks say of a device, and how they wait for it."""

from __future__ import annotations

from typing import Any


def dtype_name(dtype: Any) -> str:
    """A torch dtype's bare name: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def device_name(device: str) -> str:
    """The product's name of a GPU; other devices as torch names them."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else device


def wait_for(device: str) -> None:
    """Until a GPU has done what it was given; a CPU has, when a call returns."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
