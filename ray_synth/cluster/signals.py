"""SIGTERM (docker stop, Kubernetes, a Ray job that is stopped) ends a run as Ctrl-C does: cleanly.

It becomes a KeyboardInterrupt, which Ray passes on from wherever the driver waits; a SystemExit would
come out of `ray.get` with another code, and an exception of our own not at all.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED, TERMINATED = 130, 143  # exit codes, as shells give them for SIGINT and SIGTERM
_received: list[int] = []


def stop_on_sigterm() -> None:
    """Raise KeyboardInterrupt at the first SIGTERM; later ones do not cut the clean-up short."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(signal.SIGTERM, stop)


def exit_code() -> int:
    """Of a process that was stopped, by Ctrl-C or by SIGTERM."""
    return TERMINATED if _received else INTERRUPTED


@contextmanager
def own_handlers() -> Iterator[None]:
    """A block after which SIGINT and SIGTERM are handled as before.

    `ray.init` puts its own handler of SIGTERM in place, and Ray Train one of SIGINT which stays when
    training is over and then does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # One that came meanwhile has made later ones be ignored: leave that.
            if callable(handler) and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)
