"""Models of a hub, fetched once by every node before the actors that load them start.

Eight actors of a node would otherwise ask for the same files at once, and a pool in which nothing moves
while they are fetched looks like one that hangs (`cluster.no_progress_timeout_s`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from ray_synth.errors import UserError, duration
from ray_synth.storage.hub import Repo, fetch, fetched_bytes

log = logging.getLogger("ray_synth")
QUIET_S = 5.0  # what is in the cache is found in less, and not worth a line
LINE_EVERY_S = 30.0


class Downloader:
    """On one node; `fetched` is answered while `fetch` is at work."""

    def fetch(self, repos: Sequence[Repo]) -> str | None:
        """What is wrong, or None."""
        try:
            for repo in repos:
                fetch(repo)
        except UserError as error:
            return str(error)
        return None

    def fetched(self, repos: Sequence[Repo]) -> int:
        """Bytes in this node's cache."""
        return sum(fetched_bytes(repo) for repo in repos)


def fetch_on_nodes(repos: Sequence[Repo], *, num_cpus: float, num_gpus: float) -> None:
    """Fetch on every node that has such a share of CPUs and GPUs.

    Where there is none yet, one is asked for: the autoscaler brings it. Nodes that join later fetch when
    their actors start, while the others are at work.

    Raises:
        UserError: a node cannot fetch one of them; says which and why.
    """
    if not repos:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    make = ray.remote(Downloader)
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= num_cpus
        and node["Resources"].get("GPU", 0) >= num_gpus
    }
    actors: dict[Any, str] = {}
    for node, address in nodes.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = make.options(max_concurrency=2, num_cpus=0, scheduling_strategy=there).remote()
        actors[actor] = address
    if not nodes:
        new = make.options(max_concurrency=2, num_cpus=num_cpus, num_gpus=num_gpus).remote()
        actors[new] = "a new node"
    try:
        _wait({actor.fetch.remote(repos): actor for actor in actors}, actors, repos)
    finally:
        for actor in actors:
            ray.kill(actor)


def _wait(running: dict[Any, Any], where: dict[Any, str], repos: Sequence[Repo]) -> None:
    """Until all have fetched, with a line now and then; a node that goes away is not waited for."""
    import ray
    from ray.exceptions import RayActorError

    started, names = time.monotonic(), ", ".join(repo.id for repo in repos)
    told = False
    while running:
        done, _ = ray.wait(list(running), timeout=LINE_EVERY_S if told else QUIET_S)
        for future in done:
            actor = running.pop(future)
            try:
                problem = ray.get(future)
            except RayActorError:
                log.warning("node %s went away while it fetched %s", where[actor], names)
                continue
            if problem:
                raise UserError(f"on node {where[actor]}: {problem}")
        seconds = time.monotonic() - started
        if running and seconds >= QUIET_S:
            told = True
            log.info(
                "fetching %s: %s, %d of %d nodes are ready, %s", names, _amount(running, repos),
                len(where) - len(running), len(where), duration(seconds),
            )  # fmt: skip
    if told:
        log.info("fetched %s in %s", names, duration(time.monotonic() - started))


def _amount(running: dict[Any, Any], repos: Sequence[Repo]) -> str:
    """`4.2 GB so far` of the node that has least."""
    import ray

    asked = [actor.fetched.remote(repos) for actor in running.values()]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=5)
    sizes = []
    for future in answered:
        try:
            sizes.append(ray.get(future))
        except ray.exceptions.RayActorError:  # told when its fetch is looked at
            continue
    return f"{min(sizes) / 1e9:.1f} GB so far" if sizes else "starting"
