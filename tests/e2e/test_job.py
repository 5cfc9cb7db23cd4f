"""`ray job submit` against `ray start --head`, as on a cluster."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from runs import NO_LLM, ROOT, SMALL

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture
def cluster():
    """A head node of its own, with token authentication; its environment. Stopped by pid."""
    from service import free_port

    temporary = tempfile.mkdtemp(prefix="r")  # short: Ray puts socket paths under it
    port, dashboard = free_port(), free_port()
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # an activated environment
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    before = {p.pid for p in psutil.process_iter()}
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
            f"--dashboard-port={dashboard}", f"--temp-dir={temporary}",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert head.stdout
    seen = []
    for line in head.stdout:
        seen.append(line)
        if "Ray runtime started" in line:
            break
    else:
        raise AssertionError("ray start failed:\n" + "".join(seen))
    yield {**env, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    ours = [p for p in psutil.Process(head.pid).children(recursive=True) if p.pid not in before]
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(head.pid), *ours], timeout=20)
    for process in alive:
        process.kill()


def submit(env, *arguments):
    line = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "jobs/run.py", *arguments]
    for _ in range(20):
        result = subprocess.run(
            line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False
        )
        if "No available agent to submit job" not in result.stdout + result.stderr:
            break
        time.sleep(3)  # the head is up before its job agent is
    return result


def test_a_submitted_job_ends_with_its_exit_code(cluster, tmp_path):
    settings = [f"runs_dir={tmp_path}", *SMALL, *NO_LLM, "training.baseline=false"]
    arguments = [item for setting in settings for item in ("--set", setting)]
    config = "jobs/configs/quickstart.yaml"
    result = submit(cluster, "--config", config, *arguments)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert (tmp_path / "quickstart" / "metrics.json").exists()
    assert "Real + synthetic" in result.stdout
    failed = submit(cluster, "--config", config, "--set", "training.stpes=1")
    assert failed.returncode == 1
    assert "did you mean 'steps'" in failed.stdout + failed.stderr
