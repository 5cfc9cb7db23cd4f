"""A local Ray on a busy machine: started again for as long as it may take, and nothing left over."""

import subprocess
from pathlib import Path

import pytest
import ray

from ray_synth.cluster import connection
from ray_synth.errors import UserError

LATE = "The current node timed out during startup. This could happen because ..."


def starts(monkeypatch, failures: int) -> list[subprocess.Popen[bytes]]:
    """Let `ray.init` fail so often, each time with half a cluster left; its processes."""
    left: list[subprocess.Popen[bytes]] = []

    def init(**options):
        if len(left) < failures:
            left.append(subprocess.Popen(["bash", "-c", "exec -a raylet sleep 60"]))
            while "raylet" not in Path(f"/proc/{left[-1].pid}/cmdline").read_text():
                pass
            raise Exception(LATE)

    monkeypatch.setattr(ray, "init", init)
    return left


def test_a_late_ray_is_started_again_and_nothing_of_it_is_left(monkeypatch):
    other = subprocess.Popen(["sleep", "60"])
    left = starts(monkeypatch, 2)
    connection._start({})
    assert [process.wait(10) for process in left] == [-9, -9]
    assert other.poll() is None
    other.kill()


def test_a_ray_that_never_comes_is_said_to_be_late(monkeypatch):
    left = starts(monkeypatch, 99)
    with pytest.raises(UserError, match="did not start on this machine in 180 s"):
        connection._start({})
    assert [process.wait(10) for process in left] == [-9] * connection.STARTS


def test_another_error_is_passed_on(monkeypatch):
    def init(**options):
        raise RuntimeError("no such option")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="no such option"):
        connection._start({})
