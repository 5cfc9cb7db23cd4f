"""A local Ray is waited for as long as it makes progress, and what it says to its makers is not shown."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

log = logging.getLogger("ray_synth")
STILL_S = 60.0  # without a moment of CPU time, its processes hang
MOST_S = 900.0
SAY_S = 30.0
PORT_WAIT = "RAY_gcs_server_port_wait_time_s"  # Ray's own setting, for the first of its processes
# Lines of Ray's C++ that name nothing a user could do: it tries again by itself, or reports to
# dashboards that there are not. They are in Ray's own log, `python-core-driver-*.log`.
NOT_FOR_USERS = (
    r"^\S*\[[-0-9]+ [0-9:,]+ [EW] [0-9]+ [0-9]+\].*"
    "(There are (infinite|[0-9]+) (oom )?retries remaining|retries remaining, so the task will be retried"
    "|constructor arguments in the object store|metrics exporter|[Mm]etrics agent|event aggregator)"
)


class Progress:
    """Whether the processes that were started since go on starting.

    Args:
        before: processes below this one that were there already.
    """

    def __init__(self, before: set[Any]) -> None:
        self.before = before
        self.started = self.changed = self.said = time.monotonic()
        self.used = 0.0

    def goes_on(self) -> bool:
        """False once the raylet has ended, its processes have used no CPU for `STILL_S`, or it has taken
        `MOST_S`."""
        import psutil

        used, alive, now = 0.0, False, time.monotonic()
        for process in set(psutil.Process().children(recursive=True)) - self.before:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE:
                    used += sum(process.cpu_times()[:2])
                    # One that is just ending has no command line.
                    alive = alive or any("raylet" in word for word in process.cmdline()[:1])
        if used > self.used:
            self.used, self.changed = used, now
        if now - self.said > SAY_S:
            self.said = now
            log.info("Ray is starting, after %d s: this machine is busy", now - self.started)
        return alive and now - self.changed < STILL_S and now - self.started < MOST_S


@contextmanager
def patient(before: set[Any]) -> Iterator[None]:
    """For a `ray.init` that starts Ray: wait for its node as long as it makes progress.

    Ray gives a node 30 s from its start to be known, by a constant of its own, and looks at the time
    only where it is not known yet: so what asks for the node does the waiting here.
    """
    from ray._private import services

    ask = services.get_node

    def get_node(*arguments: Any) -> Any:
        progress = Progress(before)
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:
                if not progress.goes_on():
                    raise
            time.sleep(0.5)

    own = PORT_WAIT not in os.environ
    os.environ.setdefault(PORT_WAIT, str(int(MOST_S)))
    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = ask
        if own:
            del os.environ[PORT_WAIT]


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """Keep Ray's C++ lines of `NOT_FOR_USERS` out of the terminal; Python's own stderr is not touched.

    They are written to file descriptor 2 by threads that no logging of Python's sees. A process beside
    passes the other lines on, so that the last words of a crash are not lost.
    """
    grep = shutil.which("grep")
    stderr = sys.__stderr__
    if grep is None or stderr is None or sys.stderr is not stderr or stderr.fileno() != 2:
        yield  # a notebook's or a test's own
        return
    stderr.flush()
    terminal = os.dup(2)
    direct = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    beside = subprocess.Popen(
        [grep, "--line-buffered", "-aEv", NOT_FOR_USERS],
        stdin=subprocess.PIPE, stdout=terminal, start_new_session=True,
    )  # fmt: skip
    assert beside.stdin is not None
    os.dup2(beside.stdin.fileno(), 2)
    beside.stdin.close()
    _point(sys.stderr, direct)
    before, sys.stderr = sys.stderr, direct
    try:
        yield
    finally:
        sys.stderr = before
        _point(direct, before)
        os.dup2(terminal, 2)
        os.close(terminal)
        with suppress(subprocess.TimeoutExpired):
            beside.wait(2)


def _point(old: Any, new: Any) -> None:
    """Have the handlers of all loggers that write to a stream write to another."""
    for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            follows = isinstance(
                getattr(type(handler), "stream", None), property
            )  # sys.stderr itself
            if isinstance(handler, logging.StreamHandler) and handler.stream is old and not follows:
                handler.setStream(new)
