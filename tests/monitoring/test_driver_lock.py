"""One driver at a time on a run directory, and a dead one holds nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ray_synth.errors import UserError
from ray_synth.monitoring import driver_lock
from ray_synth.monitoring.driver_lock import LEASE, LOCK, Lease, sole_driver
from ray_synth.storage.folder import Folder

HOLD = (
    "import multiprocessing, sys, time\n"
    "from ray_synth.monitoring.driver_lock import sole_driver\n"
    "from ray_synth.storage.folder import Folder\n"
    "with sole_driver(Folder(sys.argv[1])):\n"
    "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(20,))\n"
    "    child.start()\n"  # it outlives its parent, and must not hold the lock on
    "    print('held', flush=True)\n"
    "    time.sleep(300)"
)


def holder(path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_second_driver_says_so_and_a_dead_one_holds_nothing(tmp_path, how):
    process = holder(tmp_path / "run")
    try:
        with (
            pytest.raises(UserError, match=f"in use: .*process {process.pid} on .*another name"),
            sole_driver(Folder(tmp_path / "run")),
        ):
            pass
    finally:
        os.kill(process.pid, how)
        process.wait()
    with sole_driver(Folder(tmp_path / "run")):
        pass


def test_what_a_killed_driver_was_just_forking_is_waited_for(tmp_path, monkeypatch):
    """Such a child holds the lock on until it comes to let go of it."""
    import fcntl

    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(
        os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT
    )  # ended, and its parent has not looked yet
    with open(tmp_path / LOCK, "w+") as child:
        child.write(json.dumps({**driver_lock._facts(), "pid": dead.pid}))
        child.flush()
        fcntl.flock(child, fcntl.LOCK_EX)
        monkeypatch.setattr(driver_lock, "ENDING_S", 0.2)
        with pytest.raises(UserError, match="in use"), sole_driver(Folder(tmp_path)):
            pass
        monkeypatch.setattr(driver_lock, "ENDING_S", 30)
        threading.Timer(0.3, fcntl.flock, (child, fcntl.LOCK_UN)).start()
        with sole_driver(Folder(tmp_path)):
            pass
    dead.wait()


def test_it_goes_with_a_run_that_began_nothing_and_stays_with_one_that_did(tmp_path):
    with sole_driver(Folder(tmp_path / "none")):
        assert (tmp_path / "none" / LOCK).exists()
    assert not (tmp_path / "none").exists()
    folder = Folder(tmp_path / "run")
    for _ in range(2):
        with sole_driver(folder):
            folder.write_bytes("config.yaml", b"")
            assert folder.names() == ["config.yaml"]


def test_of_many_at_once_one_gets_it(tmp_path):
    folder, start, won, lost = Folder(tmp_path / "run"), threading.Barrier(8), [], []

    def work():
        start.wait()
        try:
            with sole_driver(folder):
                won.append(1)
                time.sleep(0.5)
        except UserError:
            lost.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


@pytest.fixture
def remote(monkeypatch, request) -> Folder:
    """A folder of a storage that knows no locks, and leases that are quick."""
    for name, value in (("BEAT_S", 0.1), ("DEAD_S", 0.6), ("SETTLE_S", 0.2)):
        monkeypatch.setattr(driver_lock, name, value)
    return Folder(f"memory://box/{request.node.name}")


def test_a_lease_that_changes_has_an_owner(remote):
    with sole_driver(remote):
        started = time.monotonic()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), sole_driver(remote):
            pass
        assert time.monotonic() - started < 0.6, "nobody waits for one that is alive"
    assert not remote.exists(LEASE)
    with sole_driver(remote):
        pass


def test_a_lease_that_stays_as_it_is_has_none_whatever_its_clock_says(remote):
    facts = {
        "owner": "x",
        "beats": 7,
        "host": "elsewhere",
        "pid": 1,
        "since": "2999-01-01 00:00:00",
    }
    remote.write_json(LEASE, facts)
    started = time.monotonic()
    with sole_driver(remote):
        assert time.monotonic() - started >= 0.6
        assert remote.read_json(LEASE)["owner"] != "x"


def test_a_driver_killed_on_this_machine_is_not_waited_for(remote):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    facts = {**driver_lock._facts(), "pid": process.pid, "owner": "x", "beats": 1}
    remote.write_json(LEASE, facts)
    started = time.monotonic()
    with sole_driver(remote):
        assert time.monotonic() - started < 0.5


def test_of_two_who_claim_at_once_one_stops(remote):
    outcomes, start = [], threading.Barrier(2)

    def work():
        lease = Lease(remote)
        start.wait()
        try:
            lease.take()
            outcomes.append("mine")
            time.sleep(0.5)
            lease.leave()
        except UserError:
            outcomes.append("in use")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in use", "mine"]


def test_a_driver_whose_lease_another_took_over_ends(remote, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(driver_lock, "interrupt", ended.set)
    with sole_driver(remote):
        remote.write_json(LEASE, {"owner": "another", "beats": 1})
        assert ended.wait(5)
    assert remote.read_json(LEASE)["owner"] == "another", "it is not ours to delete"


def test_a_mount_without_locks_takes_a_lease(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(driver_lock, "SETTLE_S", 0.1)
    folder = Folder(tmp_path / "run")
    with sole_driver(folder):
        assert folder.exists(LEASE)
    assert not folder.exists(LEASE)
