"""Which device and precision a model runs in, where the config leaves it open."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

from ray_synth.errors import UserError


def pick_device(device: str) -> str:
    """A torch device; `auto` is cuda, else mps, else cpu. In Ray's workers it is cuda only where Ray gave
    a GPU: `num_gpus: 0` is the CPU.

    Raises:
        UserError: this process does not see the device.
    """
    import torch

    if device != "auto":
        kind, _, number = device.partition(":")
        count = torch.cuda.device_count() if kind == "cuda" else 0
        if (kind == "cuda" and int(number or 0) >= count) or (
            kind == "mps" and not torch.backends.mps.is_available()
        ):
            raise UserError(
                f"device {device!r}: there is no such device here ({count} CUDA GPUs); set `device: "
                "auto`, and num_gpus where Ray is to give one"
            )
        return device
    if torch.cuda.is_available() and ray_gave_gpu() is not False:
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def ray_gave_gpu() -> bool | None:
    """Whether Ray gave this task, actor or replica a GPU; None outside of Ray's workers.

    CUDA does not tell: without a GPU of its own a worker of Ray sees all of the node's, uncounted.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return bool(context.get_accelerator_ids().get("GPU"))


def pick_dtype(dtype: str, device: str, *, gpu: str = "bfloat16", overflows: bool = False) -> Any:
    """A torch dtype; `auto` is half precision where the device computes in it, else float32.

    GPUs without bfloat16 of their own (below compute capability 8: T4, V100) emulate it, many times
    slower than float16. CPUs without bfloat16 instructions run it about 4 times slower than float32
    (measured).

    Args:
        gpu: which of the two halves a GPU that has both is to compute in.
        overflows: activations leave float16's range, so that it is bfloat16 even where it is slow.
    """
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if overflows or (native and gpu == "bfloat16") else torch.float16
    if device == "mps":
        return torch.bfloat16 if overflows else torch.float16
    return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32


def usable_cpus(cgroup: str | Path = "/sys/fs/cgroup") -> int:
    """CPUs that this process may use: those it is bound to, within a container's share of time.

    `os.cpu_count` counts the machine's, which a pod or a job of a batch system has a few of.
    """
    bound = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(bound, math.ceil(_share_of_time(Path(cgroup)) or bound)))


def _share_of_time(cgroup: Path) -> float | None:
    """CPUs' worth of time that a container has (cgroup v2, else v1); None for no limit."""
    try:
        quota, _, period = (cgroup / "cpu.max").read_text().strip().partition(" ")
    except OSError:
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions (AVX512-BF16, AMX, or Arm's)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(on is True and "bf16" in name for name, on in capabilities.items())
