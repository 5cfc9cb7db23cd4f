"""One driver at a time works on a run directory: the second says so, and stops.

On a mounted folder the operating system's lock on a file, which dies with its process. On an object
store, and where a mount knows no locks, a lease: a small file that its owner writes anew every few
seconds. Who finds one watches it, by nobody's clock: a lease that changes has an owner, another has none.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from ray_synth.errors import UserError
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.folder import Folder

log = logging.getLogger("ray_synth")
LOCK = ".driver.lock"
LEASE = "driver.json"
BEAT_S = 10.0  # between two beats of a lease
DEAD_S = 60.0  # a lease that stays as it is for so long has no owner
SETTLE_S = 2.0  # between a claim and the look whether another one came after it
ENDING_S = 10.0  # for what a driver that was killed had just forked, to let go of its lock
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_held: set[int] = set()  # open files of locks


def _let_go_in_child() -> None:
    """A forked child would hold the lock on, also when its driver is killed."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def sole_driver(folder: Folder) -> Iterator[None]:
    """A block in which no other driver works on this run directory.

    Raises:
        UserError: one does; says which.
    """
    handle = _lock(folder) if folder.is_local else None
    if handle is not None:
        try:
            yield
        finally:
            _unlock(folder, handle)
        return
    lease = Lease(folder)
    lease.take()
    try:
        yield
    finally:
        lease.leave()


def _lock(folder: Folder) -> int | None:
    """The open file of our lock; None where the mount knows no locks."""
    import fcntl

    path = folder.path(LOCK)
    until = time.monotonic() + ENDING_S
    while True:
        try:
            os.makedirs(folder.path(), exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder.address()}: {error}; give another runs_dir, or the right to "
                "write there"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            facts = _read(os.pread(handle, 4096, 0))
            os.close(handle)
            if error.errno in NO_LOCKS:
                return None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if _is_dead(facts) and time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise _taken(folder, facts) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_facts()).encode(), 0)
                _held.add(handle)
                return handle
        os.close(handle)  # its last owner has just removed it


def _unlock(folder: Folder, handle: int) -> None:
    """Let go; where nothing was begun, nothing is left either."""
    with suppress(OSError):
        if os.listdir(folder.path()) == [LOCK]:
            os.unlink(folder.path(LOCK))
            folder.remove_empty()
    _held.discard(handle)
    os.close(handle)


def _facts() -> dict[str, Any]:
    """Who we are: the machine, and the process on it."""
    process = psutil.Process()
    return {
        "host": socket.gethostname(), "machine": _machine(), "pid": process.pid,
        "pid_started": process.create_time(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def _machine() -> str:
    """What tells apart machines and containers by the same host name: process numbers are theirs."""
    found = [socket.gethostname()]
    with suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            found.append(file.read().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _is_dead(facts: dict[str, Any]) -> bool:
    """Whether the process is known to be gone: it was one of this machine."""
    if facts.get("machine") != _machine():
        return False
    try:
        process = psutil.Process(int(facts["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return abs(process.create_time() - float(facts["pid_started"])) >= 2
    except (psutil.Error, KeyError, TypeError, ValueError):
        return True


def _read(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _taken(folder: Folder, facts: dict[str, Any]) -> UserError:
    who = "another driver"
    if facts.get("host") and facts.get("pid"):
        who += (
            f" (process {facts['pid']} on {facts['host']}, since {facts.get('since', 'unknown')})"
        )
    return UserError(
        f"{folder.address()} is in use: {who} works on this run. Wait for its end (`ray-synth status "
        f"{folder.address()}`), stop it, or give this run another name"
    )


class Lease:
    """The lease of a run directory on an object store."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.owner = folder, uuid.uuid4().hex
        self._facts = _facts()
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def take(self) -> None:
        """Become the owner, and go on saying so in the background. Raises UserError as `sole_driver`."""
        self._await_no_owner()
        self._write()
        time.sleep(SETTLE_S)  # of two who claim at once, the later one's claim is there now
        found = self._found()
        if found.get("owner") != self.owner:
            raise _taken(self.folder, found)
        self._thread.start()

    def leave(self) -> None:
        """Give the lease back, where it is still ours."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)
        with suppress(OSError):
            if self._found().get("owner") == self.owner:
                self.folder.delete(LEASE)

    def _await_no_owner(self) -> None:
        first = self._found()
        if not first or _is_dead(first):
            return
        log.info(
            "%s may be in use (process %s on %s): watching its lease for up to %.0f s",
            self.folder.address(), first.get("pid"), first.get("host"), DEAD_S,
        )  # fmt: skip
        until = time.monotonic() + DEAD_S
        while time.monotonic() < until:
            time.sleep(min(BEAT_S / 2, max(0.0, until - time.monotonic())))
            found = self._found()
            if not found:
                return
            if found != first:
                raise _taken(self.folder, found)
        log.info("its owner is gone")

    def _found(self) -> dict[str, Any]:
        try:
            found = self.folder.read_json(LEASE)
        except (FileNotFoundError, DamagedFile):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._beats += 1
        value = {"owner": self.owner, "beats": self._beats, **self._facts}
        self.folder.write_json(LEASE, value)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                found = self._found()
                if found and found.get("owner") != self.owner:
                    log.error("%s", _taken(self.folder, found))
                    interrupt()
                    return
                self._write()
            except OSError as error:
                log.debug("the lease cannot be written: %s", error)


def interrupt() -> None:
    """End this driver as Ctrl-C does: another one has taken its run over."""
    import _thread

    _thread.interrupt_main()
