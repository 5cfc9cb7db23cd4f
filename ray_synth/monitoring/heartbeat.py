"""The driver's sign of life: `progress.json` in the run directory, and what is under way as metrics.

`ray-synth status` reads it from anywhere. A heartbeat that cannot be written ends nothing.
"""

from __future__ import annotations

import contextvars
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from ray_synth import metrics
from ray_synth.monitoring import logs, progress
from ray_synth.storage.folder import Folder
from ray_synth.storage.secrets import redact

log = logging.getLogger("ray_synth")
PROGRESS = "progress.json"
LOCAL_S, REMOTE_S = 10.0, 30.0


class Heartbeat:
    """Writes `progress.json` every few seconds until the block ends, and then how it ended.

    Args:
        folder: the run directory.
        until: the last stage that was asked for.
        run_log: saved at each beat.
    """

    def __init__(self, folder: Folder, until: str, run_log: logs.RunLog | None = None) -> None:
        self.folder, self.run_log = folder, run_log
        self.every_s = LOCAL_S if folder.is_local else REMOTE_S
        process = psutil.Process()
        self.facts = {
            "until": until,
            "started": time.time(),
            "every_s": self.every_s,
            "host": socket.gethostname(),
            "pid": process.pid,
            "pid_started": process.create_time(),
        }
        self.moved, self._before = time.time(), ""
        self._stop = threading.Event()
        self._failed = False

    def __enter__(self) -> Heartbeat:
        self.beat("running")
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        # Gauges must be set again every 20 s, or Ray's agent forgets them.
        written = time.monotonic()
        while not self._stop.wait(LOCAL_S):
            self._gauges()
            if time.monotonic() - written >= self.every_s - 1:
                written = time.monotonic()
                self.beat("running")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=60)
        if error is None:
            self.beat("ended")
        elif isinstance(error, KeyboardInterrupt):
            self.beat("stopped")
        else:
            lines = redact(str(error)).strip().splitlines()
            self.beat("failed", error=f"{type(error).__name__}: {lines[0][:500] if lines else ''}")

    def beat(self, state: str, **more: Any) -> None:
        """Write what is under way now."""
        stages = progress.stages_under_way()
        bars = [bar.as_dict() for bar in progress.open_bars()]
        now = repr([(bar["name"], bar["done"]) for bar in bars]) + repr(sorted(stages))
        if now != self._before:
            self._before, self.moved = now, time.time()
        under_way = [
            {"stage": stage, "since": since} for (_, stage), since in sorted(stages.items())
        ]
        value = {
            "state": state, "time": time.time(), "moved": self.moved, **self.facts, **more,
            "stages": under_way, "bars": bars,
        }  # fmt: skip
        try:
            self.folder.write_json(PROGRESS, value)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s (%s); the run goes on", PROGRESS, error)
            self._failed = True
        if self.run_log is not None:
            self.run_log.save()

    def _gauges(self) -> None:
        now = time.time()
        for (uri, stage), since in progress.stages_under_way().items():
            metrics.record("stage_seconds", now - since, run=metrics.run_name(uri), stage=stage)
        for bar in progress.open_bars():
            if bar.name == "generation":
                run = metrics.run_name(self.folder.uri)
                metrics.record("images_left", bar.total - bar.done, run=run)


@contextmanager
def watched(folder: Folder, until: str) -> Iterator[None]:
    """Keep a run's log and its sign of life for the length of the block."""
    run = metrics.run_name(folder.uri)
    metrics.join(folder.uri)
    with (
        logs.where(run=run),
        logs.RunLog(folder, run=run) as run_log,
        Heartbeat(folder, until, run_log),
    ):
        yield


def process_lives(facts: dict[str, Any]) -> bool | None:
    """Whether the process that wrote a heartbeat is there; None where it is another machine's."""
    if facts.get("host") != socket.gethostname():
        return None
    try:
        started = psutil.Process(facts["pid"]).create_time()
    except psutil.Error:
        return False
    return abs(started - facts["pid_started"]) < 2
