"""Clusters of several fake nodes on one machine, and a generator that tells when and where it painted.

Everything that is started runs in a session of its own, and is ended by that session's id.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from painting import Painter

if TYPE_CHECKING:
    from ray_synth.generation.maker import GenerationJob

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = [
    ROOT,
    *(ROOT / "tests" / name for name in ("", "generation", "cluster", "service", "training")),
]
OBJECT_STORE = 100 * 2**20  # bytes per node


class Recorder(Painter):
    """Paints row by row, and appends to `folder/log` when, on which node, and which row.

    A row takes `seconds` until the file `folder/enough` is there, and then none. Rows from `last` on
    wait for the file `folder/alone` instead, `patience` seconds each at most.
    """

    def __init__(self, config):
        super().__init__(config)
        import ray

        self.folder = Path(self.kwargs["folder"])
        ours = ray.is_initialized()
        self.node = ray.get_runtime_context().get_node_id() if ours else ""

    def generate(self, rows):
        return [self._record(row) for row in rows]

    def _record(self, row):
        if row["sample_id"] >= self.kwargs.get("last", "~"):
            wait_for((self.folder / "alone").exists, self.kwargs["patience"])
        elif not (self.folder / "enough").exists():
            time.sleep(self.kwargs["seconds"])
        image = self._paint(row)
        line = json.dumps([time.time(), self.node, row["sample_id"]]) + "\n"
        with open(self.folder / "log", "ab", buffering=0) as file:  # O_APPEND: lines stay whole
            file.write(line.encode())
        return image


def painting_job(
    folder: Path, images: int, *, pool: dict[str, int], pace: dict[str, Any], **settings: Any
) -> GenerationJob:
    """A job of Recorders at a pace (seconds, last, patience); its store is `folder/images`."""
    import pyarrow as pa
    from test_store import plan_rows

    from ray_synth.config import GenerationConfig
    from ray_synth.generation.maker import GenerationJob
    from ray_synth.generation.store import ImageStore
    from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanTable
    from ray_synth.storage.folder import Folder

    config = GenerationConfig(
        generator="fake_cluster:Recorder",
        generator_kwargs={"folder": str(folder), **pace},
        width=16,
        height=16,
        image_format="png",
        checks={"policy": "off"},
        pool=pool,
        **settings,
    )
    plan = pa.Table.from_pylist(plan_rows(images), schema=PLAN_SCHEMA)
    return GenerationJob(config, PlanTable(plan), ImageStore(Folder(folder / "images")))


def painted(folder: Path) -> list[tuple[float, str, str]]:
    """What Recorders logged: time, node id and sample id of each row, in order of time."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return sorted((at, node, sample) for at, node, sample in map(json.loads, lines))


def wait_for(condition: Callable[[], Any], seconds: float, *, every_s: float = 0.1) -> bool:
    """Wait until something is so; whether it came to be in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every_s)
    return True


def environment(temporary: str) -> dict[str, str]:
    """For a cluster and its drivers: our modules, its own token and folder, nobody's address."""
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {
        **kept,
        "PYTHONPATH": ":".join(map(str, IMPORTS)),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": temporary,
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def short_folder() -> Iterator[str]:
    """A temporary folder with a short name: Ray puts socket paths under it."""
    path = tempfile.mkdtemp(prefix="r")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def session(
    command: list[str], env: dict[str, str], output: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; all that it started is ended with it."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        while alive := _session_processes(process.pid):
            for other in alive:
                with suppress(psutil.NoSuchProcess):
                    other.kill()
            psutil.wait_procs(alive, timeout=0.2)
        process.wait()


def _session_processes(session_id: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            ours = os.getsid(process.pid) == session_id
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run_driver(call: str, env: dict[str, str], folder: Path, seconds: float) -> None:
    """Run a function of a test module, given as `module.function(...)`, in a process of its own.

    Raises:
        AssertionError: with what it wrote, if it failed or took longer than `seconds`.
    """
    code = f"import {call.partition('.')[0]} as m; m.{call.partition('.')[2]}"
    output = folder / "driver.log"
    with session([sys.executable, "-c", code], env, output) as driver:
        ended = wait_for(lambda: driver.poll() is not None, seconds)
        tail = output.read_text()[-6000:]
        assert ended, f"the driver is not done after {seconds} s:\n{tail}"
        assert driver.returncode == 0, tail


@contextmanager
def autoscaling_cluster(
    folder: Path, *, max_workers: int, idle_seconds: float
) -> Iterator[tuple[str, dict[str, str]]]:
    """A head without CPUs that starts and ends nodes of one fake GPU each; (address, environment)."""
    with short_folder() as temporary:
        port = free_port()
        address = f"127.0.0.1:{port}"
        config = Path(temporary) / "autoscaler.json"
        config.write_text(json.dumps(_autoscaler(address, max_workers, idle_seconds)))
        env = environment(temporary)
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={temporary}",
            "--num-cpus=0", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE}",
            "--include-dashboard=false", f"--ray-client-server-port={free_port()}",
            f"--autoscaling-config={config}",
        ]  # fmt: skip
        head_env = {**env, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        log = folder / "head.log"
        with session(command, head_env, log) as head:
            wait_for(lambda: head.poll() or "Ray runtime started" in log.read_text(), 60)
            assert "Ray runtime started" in log.read_text(), log.read_text()
            yield address, env


def node_provider(provider_config: dict[str, Any], cluster_name: str) -> Any:
    """Ray's provider of fake nodes, which have the memory that their type declares.

    Ray's own takes what is free at the moment: nodes of one type would then differ, and a request for
    one more of the same could not be met.
    """
    from ray._private import parameter
    from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

    make = parameter.RayParams

    def with_memory(*, resources: dict[str, float], **others: Any) -> Any:
        return make(memory=resources.pop("memory"), resources=resources, **others)

    vars(parameter)["RayParams"] = with_memory
    return FakeMultiNodeProvider(provider_config, cluster_name)


def _autoscaler(address: str, max_workers: int, idle_seconds: float) -> dict[str, Any]:
    node = {"CPU": 1, "GPU": 1, "memory": 2**30, "object_store_memory": OBJECT_STORE}
    no_commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": idle_seconds / 60,
        "provider": {
            "type": "external",
            "module": "fake_cluster.node_provider",
            "gcs_address": address,
            # Nodes are known by their ids, as all have one address, and need no set-up over ssh.
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": node,
                "node_config": {},
                "min_workers": 1,
                "max_workers": max_workers,
            },
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in (*no_commands, "worker_start_ray")},
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
