"""A head node with token authentication, as `ray start` makes it, and `ray-synth` against it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from service import free_port
from small_runs import ROOT, line

BIN = Path(sys.executable).parent
RAY_DATAS_OWN = {"_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker"}
QUICKSTART = "jobs/configs/quickstart.yaml"


class Head(NamedTuple):
    """A head node: `env` of those who may use it, its GCS's address, and Ray's folder."""

    env: dict[str, str]
    address: str
    folder: Path


@contextmanager
def start_head(*, num_cpus: int = 2, **variables: str) -> Iterator[Head]:
    """Start a head node, with more variables in its environment. Ended by pid."""
    temporary = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: Ray puts socket paths under it
    port, dashboard = free_port(), free_port()
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",  # an activated environment
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "COLUMNS": "160",
        **variables,
    }
    env.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(
        [
            BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--num-cpus={num_cpus}",
            f"--dashboard-port={dashboard}", f"--temp-dir={temporary}",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert head.stdout
        seen = []
        for line in head.stdout:
            seen.append(line)
            if "Ray runtime started" in line:
                break
        else:
            raise AssertionError("ray start failed:\n" + "".join(seen))
        users = {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        yield Head(users, f"127.0.0.1:{port}", Path(temporary))
    finally:
        end_tree(head.pid)
        head.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def end_tree(pid: int) -> None:
    """End a process and its descendants, the head's workers among them."""
    try:
        root = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    ours = root.children(recursive=True)
    root.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([root, *ours], timeout=20)
    for process in alive:
        process.kill()


def ray_synth(
    env: dict[str, str], *arguments: str, cwd: Path = ROOT, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        line(*arguments), cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def living_actors(env: dict[str, str]) -> list[str]:
    """Classes of the actors that the cluster has or will start, by its state API, without Ray Data's
    detached helpers, which live as long as the cluster."""
    answer = httpx.get(
        f"{env['RAY_API_SERVER_ADDRESS']}/api/v0/actors",
        params={"detail": "1", "limit": "1000"},
        headers={"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"},
        timeout=60,
    )
    actors = answer.raise_for_status().json()["data"]["result"]["result"]
    found = [actor["class_name"] for actor in actors if actor["state"] != "DEAD"]
    return sorted(set(found) - RAY_DATAS_OWN)


def wait_for(what: Callable[[], Any], *, seconds: float = 240) -> Any:
    """The first true value of a condition, asked twice a second."""
    deadline = time.monotonic() + seconds
    while True:
        if value := what():
            return value
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.5)
