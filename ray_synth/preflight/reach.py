"""What the cluster has free, what others hold, and what it can add: nodes for the packing.

Free is what counts. Replicas that somebody keeps deployed, actors of another job and placement groups
hold what they hold for as long as they live, and Ray would wait for it in silence.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ray_synth.config import Config, ReachConfig
from ray_synth.errors import UserError
from ray_synth.preflight.demands import SERVE_CPUS
from ray_synth.preflight.packing import Nodes

GIB = 2**30


@dataclass(frozen=True)
class Reach:
    """Nodes with what is free on them, those that can be added among them.

    Attributes:
        most_added: nodes in all that can be added, if fewer than the sum of their counts.
        held_cpus, held_gpus: what others hold of the nodes that are there.
        holders: who they are, where they have names.
        local: whether this is a Ray of this machine alone, whose CPUs are a setting.
        object_store: bytes of it on the nodes that are there; 0 where it is not known.
    """

    nodes: tuple[Nodes, ...]
    most_added: int | None = None
    held_cpus: float = 0.0
    held_gpus: float = 0.0
    holders: tuple[str, ...] = ()
    local: bool = False
    object_store: int = 0

    @property
    def cpus(self) -> float:
        """CPUs that are free or can be added."""
        return sum(node.count * node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs that are free or can be added."""
        return sum(node.count * node.gpus for node in self.nodes)

    @property
    def count(self) -> int:
        """Nodes, those that can be added included."""
        return sum(node.count for node in self.nodes)

    def describe(self) -> str:
        """`1 node of 8 CPUs, 48 more of 8 CPUs and 1 GPU`."""
        return ", ".join(_describe(node) for node in self.nodes) or "no nodes"


def _describe(node: Nodes) -> str:
    gpus = f" and {node.gpus:g} {node.accelerator + ' ' if node.accelerator else ''}GPUs"
    return (
        f"{node.count}{' more' if node.added else ''} node{'s' if node.count > 1 else ''} with "
        f"{node.cpus:g} CPUs{gpus if node.gpus else ''}"
    )


def cluster_reach(config: Config) -> Reach:
    """What the connected cluster has free, and by `cluster.max_reach` can add.

    Raises:
        UserError: the cluster launcher's file cannot be read.
    """
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()  # Ray has no public call that tells this by node
    ours, holders = _replicas(config)
    here, sizes = [], []
    held_cpus = held_gpus = 0.0
    store = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        total = node["Resources"]
        left = free.get(node["NodeID"], total)
        cpus, gpus = (
            min(total.get(name, 0), left.get(name, 0) + ours.get((node["NodeID"], name), 0))
            for name in ("CPU", "GPU")
        )
        held_cpus += total.get("CPU", 0) - cpus
        held_gpus += total.get("GPU", 0) - gpus
        kinds = [key.split(":", 1)[1] for key in total if key.startswith("accelerator_type:")]
        store += int(total.get("object_store_memory", 0))
        memory = int(total.get("memory", 0) + total.get("object_store_memory", 0))
        here.append(Nodes(1, cpus, gpus, memory, kinds[0] if kinds else ""))
        sizes.append((total.get("CPU", 0), total.get("GPU", 0)))
    more, most = added_nodes(config.cluster.max_reach, sizes)
    return Reach(
        merged([*here, *more]),
        most,
        round(held_cpus, 4),
        round(held_gpus, 4),
        tuple(holders),
        local=is_local(config),
        object_store=store,
    )


def is_local(config: Config) -> bool:
    """Whether the run's Ray is one of this machine alone."""
    import os

    return not (config.cluster.address or os.environ.get("RAY_ADDRESS"))


def _replicas(config: Config) -> tuple[dict[tuple[str, str], float], list[str]]:
    """What apps that killed pipelines left behind hold, by node and resource, and all other Serve apps.

    A run takes the former down before it asks for anything: they are no one else's.
    """
    from ray._private.state import actors

    from ray_synth.service.apps import is_ours, other_jobs

    sizes = {
        "LLM": (config.meaning.llm.num_cpus, config.meaning.llm.num_gpus),
        "CLIP": (config.meaning.clip.num_cpus, config.meaning.clip.num_gpus),
        "Disambiguation": (SERVE_CPUS, 0.0),
    }
    ours: defaultdict[tuple[str, str], float] = defaultdict(float)
    others: set[str] = set()
    living = other_jobs()
    for actor in actors(actor_state_name="ALIVE").values():
        kind, _, rest = actor["Name"].partition("::")
        if kind != "SERVE_REPLICA":
            continue
        app, _, deployment = rest.partition("#")
        if is_ours(app, living):
            cpus, gpus = sizes.get(deployment.partition("#")[0], (0.0, 0.0))
            ours[actor["Address"]["NodeID"], "CPU"] += cpus
            ours[actor["Address"]["NodeID"], "GPU"] += gpus
        else:
            others.add(f"the Serve app {app!r}")
    return dict(ours), sorted(others)


def added_nodes(
    reach: ReachConfig | None, here: list[tuple[float, float]]
) -> tuple[list[Nodes], int | None]:
    """Nodes that can come besides those that run, and how many of them at most.

    Args:
        here: CPUs and GPUs of each node that runs, held ones included. One that is as large as a type
            of `reach` is one of its nodes.

    Raises:
        UserError: the cluster launcher's file is missing, or is not one.
    """
    if reach is None:
        return [], None
    if reach.file:
        types, most = nodes_of_cluster_yaml(_read(reach.file))
        head_runs = 1 if here else 0
        return _without(types, here), None if most is None else most - len(here) + head_runs
    types = [
        Nodes(t.count, t.num_cpus, t.num_gpus, int(t.memory_gb * GIB), t.accelerator, True)
        for t in reach.nodes
    ]
    return _without(types, here), None


def _read(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"cluster.max_reach: no such file {path!r}")
    return Path(path).read_text()


def _without(types: list[Nodes], here: list[tuple[float, float]]) -> list[Nodes]:
    """The types, less the nodes that run already."""
    running = Counter(here)
    left = []
    for kind in types:
        size = (kind.cpus, kind.gpus)
        taken = min(kind.count, running[size])
        running[size] -= taken
        left.append(replace(kind, count=kind.count - taken))
    return [kind for kind in left if kind.count]


def merged(nodes: list[Nodes]) -> tuple[Nodes, ...]:
    """Equal nodes as one entry."""
    counts: Counter[Nodes] = Counter()
    for node in nodes:
        counts[replace(node, count=0)] += node.count
    return tuple(replace(node, count=count) for node, count in counts.items())


def nodes_of_cluster_yaml(text: str) -> tuple[list[Nodes], int | None]:
    """Types of nodes of a cluster launcher's file, the head among them, and `max_workers`.

    Raises:
        UserError: it is not such a file.
    """
    try:
        spec = yaml.safe_load(text)
        types: dict[str, Any] = spec["available_node_types"]
        head = spec["head_node_type"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"cluster.max_reach: not a cluster launcher's file ({error!r})") from None
    nodes = []
    for name, kind in types.items():
        resources = kind.get("resources", {})
        count = 1 if name == head else kind.get("max_workers", 0)
        labels = [key.split(":", 1)[1] for key in resources if key.startswith("accelerator_type:")]
        nodes.append(
            Nodes(
                count,
                resources.get("CPU", 0),
                resources.get("GPU", 0),
                int(resources.get("memory", 0)),
                labels[0] if labels else "",
                added=True,
                name=name,
            )
        )
    return [node for node in nodes if node.count], spec.get("max_workers")


def reach_of_cluster_yaml(text: str) -> Reach:
    """An empty cluster of a launcher's file at its largest; the head counts as one of its nodes."""
    nodes, most = nodes_of_cluster_yaml(text)
    return Reach(merged(nodes), None if most is None else most + 1)
