"""Preflight: what a run asks of the cluster, added up, against what the cluster has or can reach.

A Ray pipeline that lacks a CPU or a GPU does not fail, it waits in silence. So the sums are made before
anything starts, stage by stage, and a run that cannot fit is refused with its arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from ray_synth.config import Config

READ_CPUS = 1.0  # Ray Data needs room for one read task beside its actors
SERVE_CPUS = 0.1  # the ingress; Serve's controller and proxy take none


@dataclass(frozen=True)
class Demand:
    """`count` units that each need `cpus` and `gpus` on one node, at the same time."""

    what: str
    count: int
    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs in all, and of the largest node (or the largest that can be added)."""

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float


def demands(config: Config) -> dict[str, list[Demand]]:
    """For each stage, what must run at once. The pools count with their smallest size."""
    llm, clip = config.meaning.llm, config.meaning.clip
    generation, training, evaluation = config.generation, config.training, config.evaluation
    read = Demand("a read task", 1, READ_CPUS)
    pool = Demand(
        "generation.pool.min_size",
        generation.pool.min_size,
        generation.num_cpus,
        generation.num_gpus,
    )
    workers = Demand(
        "training.num_workers", training.min_workers, training.num_cpus, training.num_gpus
    )
    stages = {
        "meaning": [
            Demand("meaning.llm.replicas", fewest(llm.replicas), llm.num_cpus, llm.num_gpus),
            Demand("meaning.clip.replicas", fewest(clip.replicas), clip.num_cpus, clip.num_gpus),
            Demand("the Serve ingress", 1, SERVE_CPUS),
        ],
        "generation": [pool, read],
        "training": [workers, read],
        "evaluation": [
            Demand(
                "evaluation.num_actors",
                evaluation.num_actors,
                evaluation.num_cpus,
                evaluation.num_gpus,
            ),
            read,
        ],
    }
    if training.feed in ("live", "lockstep"):
        stages["training"] = [workers, pool, read]
    return stages


def fewest(count: int | tuple[int, int]) -> int:
    """The least that must run, of a number or of [fewest, most]."""
    return count if isinstance(count, int) else count[0]


def shortfalls(config: Config, capacity: Capacity) -> list[str]:
    """One line for each stage that cannot run, with the sum; none where all fit."""
    lines = []
    for stage, parts in demands(config).items():
        for name, cap, node in (
            ("CPUs", capacity.cpus, capacity.node_cpus),
            ("GPUs", capacity.gpus, capacity.node_gpus),
        ):
            each = [part.cpus if name == "CPUs" else part.gpus for part in parts]
            need = sum(part.count * size for part, size in zip(parts, each, strict=True))
            if need > cap + 1e-9:
                terms = " + ".join(
                    f"{part.what} {part.count} x {size:g}"
                    for part, size in zip(parts, each, strict=True)
                    if size
                )
                lines.append(
                    f"{stage} needs {need:g} {name} ({terms}), the cluster reaches {cap:g}: "
                    f"{need - cap:g} too few"
                )
            for part, size in zip(parts, each, strict=True):
                if size > node + 1e-9 and need <= cap + 1e-9:
                    lines.append(
                        f"{stage}: {part.what} asks for {size:g} {name} on one node, the largest "
                        f"has {node:g}"
                    )
    return lines


def check_budget(config: Config, capacity: Capacity) -> None:
    """Raises ValueError, with the arithmetic and the mend, where a stage cannot fit."""
    lines = shortfalls(config, capacity)
    if lines:
        raise ValueError(
            "this run does not fit the cluster:\n  "
            + "\n  ".join(lines)
            + "\nAsk for less (the settings named above; num_cpus may be a fraction), add nodes, or "
            "say in cluster.max_reach what autoscaling can add."
        )


def cluster_capacity(config: Config) -> Capacity:
    """What the connected Ray cluster has, or can reach by `cluster.max_reach`."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    reach = config.cluster.max_reach
    return Capacity(
        max(sum(n.get("CPU", 0) for n in nodes), reach.num_cpus if reach else 0),
        max(sum(n.get("GPU", 0) for n in nodes), reach.num_gpus if reach else 0),
        max([n.get("CPU", 0) for n in nodes] + [reach.node_cpus if reach else 0]),
        max([n.get("GPU", 0) for n in nodes] + [reach.node_gpus if reach else 0]),
    )


def capacity_of_cluster_yaml(text: str) -> Capacity:
    """What a cluster launcher file can grow to: every node type at its most, within max_workers."""
    spec = yaml.safe_load(text)
    types: dict[str, Any] = spec["available_node_types"]
    head = spec["head_node_type"]
    cpus = gpus = 0.0
    node_cpus = node_gpus = 0.0
    room = spec.get("max_workers", 0)
    # The largest nodes first, as many as max_workers admits.
    order = sorted(types, key=lambda name: -types[name].get("resources", {}).get("GPU", 0))
    for name in order:
        resources = types[name].get("resources", {})
        count = 1 if name == head else min(types[name].get("max_workers", 0), room)
        room -= 0 if name == head else count
        if not count:
            continue
        cpus += count * resources.get("CPU", 0)
        gpus += count * resources.get("GPU", 0)
        node_cpus = max(node_cpus, resources.get("CPU", 0))
        node_gpus = max(node_gpus, resources.get("GPU", 0))
    return Capacity(cpus, gpus, node_cpus, node_gpus)
