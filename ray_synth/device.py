"""Which device and precision a model runs in, where the config leaves it open."""

from __future__ import annotations

from typing import Any


def pick_device(device: str) -> str:
    """A torch device; `auto` is cuda, else mps, else cpu."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> Any:
    """A torch dtype; `auto` is half precision where the device computes in it, else float32.

    CPUs without bfloat16 instructions run it about 4 times slower than float32 (measured).
    """
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device == "mps":
        return torch.float16
    return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions (AVX512-BF16, AMX, or Arm's)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(on is True and "bf16" in name for name, on in capabilities.items())
