"""Fake nodes with logical GPUs on this machine, and what all processes of a run hold."""

from __future__ import annotations

import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

GPUS_PER_NODE = 8
CPUS_PER_NODE = 4  # Ray starts a process for each: more than the machine has are of no use
OBJECT_STORE = 200 << 20  # bytes per node
ROLES = {
    "RayTrainWorker": "training worker",
    "ImageMaker": "generator",
    "ServeReplica": "service",
    "raylet": "Ray",
    "gcs_server": "Ray",
}


@contextmanager
def fake_cluster(nodes: int) -> Iterator[str]:
    """A head without GPUs and some nodes of 8 logical GPUs each; the address."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": CPUS_PER_NODE,
            "num_gpus": 0,
            "object_store_memory": 2 * OBJECT_STORE,
        },
    )
    try:
        for _ in range(nodes):
            cluster.add_node(
                num_cpus=CPUS_PER_NODE,
                num_gpus=GPUS_PER_NODE,
                object_store_memory=OBJECT_STORE,
            )
        yield cluster.address
    finally:
        cluster.shutdown()


class Memory:
    """Peak resident memory by role, sampled in a thread: MB of the largest process, and of all."""

    def __init__(self, every_s: float = 3.0) -> None:
        self.driver = 0
        self.peaks: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        self.stage = "start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(every_s,), daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, every_s: float) -> None:
        while not self._stop.wait(every_s):
            seen: dict[str, list[float]] = defaultdict(list)
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    role = self._role(process)
                    if role:
                        seen[role].append(process.memory_info().rss / 2**20)
            peaks = self.peaks[self.stage]
            for role, sizes in seen.items():
                largest, total = peaks.get(role, (0.0, 0.0))
                peaks[role] = (max(largest, *sizes), max(total, sum(sizes)))

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self.driver:
            return "driver"
        words = process.cmdline()
        name = words[0] if words else ""
        if name.startswith("ray::"):
            return next((role for part, role in ROLES.items() if part in name), "other Ray workers")
        return next((role for part, role in ROLES.items() if name.endswith(part)), "")
