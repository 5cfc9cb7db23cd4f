"""A local Ray on a busy machine: started again for as long as it may take, and nothing left over."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import services

from ray_synth.cluster import connection, startup
from ray_synth.cluster.startup import patient
from ray_synth.config import ClusterConfig
from ray_synth.errors import UserError

LATE = "The current node timed out during startup. This could happen because ..."


def starts(monkeypatch, failures: int) -> list[subprocess.Popen[bytes]]:
    """Let `ray.init` fail so often, each time with half a cluster left; its processes."""
    left: list[subprocess.Popen[bytes]] = []

    def init(**options):
        if len(left) < failures:
            left.append(subprocess.Popen(["bash", "-c", "exec -a raylet sleep 60"]))
            while not Path(f"/proc/{left[-1].pid}/cmdline").read_text().startswith("raylet"):
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
    with pytest.raises(UserError, match="did not start on this machine in 3 attempts"):
        connection._start({})
    assert [process.wait(10) for process in left] == [-9] * connection.STARTS


def test_another_error_is_passed_on(monkeypatch):
    def init(**options):
        raise RuntimeError("no such option")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RuntimeError, match="no such option"):
        connection._start({})


def busy(seconds):
    """A process that is called as Ray's own, and works for some seconds, then only waits."""
    code = f"import time; t=time.process_time; exec('while t() < {seconds}: pass'); time.sleep(60)"
    return subprocess.Popen(["bash", "-c", f'exec -a raylet {sys.executable} -c "{code}"'])


def asked(monkeypatch, known_after):
    """Let Ray's node be known so many seconds from now; times of asking."""
    times = []

    def get_node(*_):
        times.append(time.monotonic())
        if times[-1] - times[0] < known_after:
            raise RuntimeError("not known yet")
        return {"node": 1}

    monkeypatch.setattr(services, "get_node", get_node)
    return times


def test_a_start_that_makes_progress_is_waited_for(monkeypatch):
    monkeypatch.setattr(startup, "STILL_S", 1.5)
    times = asked(monkeypatch, known_after=2.5)  # longer than it may stand still
    with patient(set(psutil.Process().children(recursive=True))):
        process = busy(20)
        time.sleep(0.3)
        assert services.get_node("address", "id") == {"node": 1}
        assert os.environ[startup.PORT_WAIT] == "900"
    process.kill()
    assert len(times) > 3
    assert startup.PORT_WAIT not in os.environ


@pytest.mark.parametrize("works", [True, False])
def test_a_start_that_hangs_or_has_died_is_not(monkeypatch, works):
    monkeypatch.setattr(startup, "STILL_S", 0.7)
    asked(monkeypatch, known_after=60)
    with patient(set(psutil.Process().children(recursive=True))):
        process = busy(0)
        time.sleep(0.3)
        if not works:
            process.kill()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="not known yet"):
            services.get_node("address", "id")
        assert time.monotonic() - began < 5
    process.kill()


@pytest.mark.slow
def test_a_real_ray_that_takes_longer_than_its_own_limit_starts(monkeypatch):
    real, first = services.get_node, time.monotonic()

    def late(*arguments):
        if time.monotonic() - first < 40:
            raise RuntimeError("not known yet")
        return real(*arguments)

    monkeypatch.setattr(services, "get_node", late)
    with connection.connect(ClusterConfig(num_cpus=1)):
        assert ray.is_initialized()


SPOKEN = """
import logging, os, sys
logging.basicConfig()
logging.getLogger("other").addHandler(logging._StderrHandler())
from ray_synth.cluster.startup import quiet_terminal
head = "[2026-01-02 03:04:05,678 E 12 34] "
with quiet_terminal():
    logging.warning("a line of logging")
    os.write(2, (head + "task_manager.cc:1: Task ServeController.x failed. There are infinite retries "
        "remaining, so the task will be retried.\\n").encode())
    os.write(2, (head + "core_worker.cc:2: Actor 'a' has constructor arguments in the object store\\n")
        .encode())
    os.write(2, (head + "gcs_client.h:3: Failed to connect to GCS within 60 seconds\\n").encode())
    print("a word of Python", file=sys.stderr)
    os.write(2, b"There are infinite retries remaining, says a user\\n")
    CRASH
print("after", file=sys.stderr)
"""


@pytest.mark.parametrize("crash", ["pass", "os.abort()"])
def test_lines_of_ray_that_are_not_for_users_stay_out_of_the_terminal(crash):
    code = SPOKEN.replace("CRASH", crash)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = said.stderr.splitlines()
    assert "WARNING:root:a line of logging" in lines
    assert "a word of Python" in lines
    assert "There are infinite retries remaining, says a user" in lines
    assert any("Failed to connect to GCS" in line for line in lines)
    assert not any("ServeController" in line or "constructor arguments" in line for line in lines)
    assert ("after" in lines) is (crash == "pass")
