"""Live progress of a run: a bar in a terminal, a line now and then in a log.

Actors on other machines count through a small Ray actor, the `Board`; the driver draws it.
"""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray_synth.monitoring import logs

LOG_SECONDS = 10.0
MOST_LINES = 500  # that workers said, until the driver reads them
log = logging.getLogger("ray_synth")
# What is under way in this process, for its heartbeat.
_bars: list[Bar] = []
_stages: dict[tuple[str, str], float] = {}


def open_bars() -> list[Bar]:
    return list(_bars)


def stages_under_way() -> dict[tuple[str, str], float]:
    """(the run directory's URI, stage) -> when it began, seconds since 1970."""
    return dict(_stages)


@contextmanager
def under_way(uri: str, stage: str) -> Iterator[None]:
    """A stage of a run, for the length of the block; lines that are logged say its name."""
    _stages[uri, stage] = time.time()
    try:
        with logs.where(stage=stage):
            yield
    finally:
        _stages.pop((uri, stage), None)


class Bar:
    """One counted stage: drawn by rich in a terminal, else logged every few seconds."""

    def __init__(self, name: str, total: int, unit: str, *, done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.first = done
        self.started = self.logged = time.monotonic()
        self.note = ""
        self._task: Any = None

    def update(self, done: int, note: str = "") -> None:
        """Set the count, and at intervals say so."""
        self.done, self.note = done, note
        if self._task is not None:
            _Screen.progress.update(self._task, completed=done, note=note)
        elif time.monotonic() - self.logged >= LOG_SECONDS:
            self.logged = time.monotonic()
            log.info(self.line(note))

    def advance(self) -> None:
        self.update(self.done + 1)

    @property
    def rate(self) -> float:
        """Counted per second since the bar began."""
        seconds = time.monotonic() - self.started
        return (self.done - self.first) / seconds if seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the heartbeat."""
        names = ("name", "unit", "done", "total", "rate", "note")
        return {name: getattr(self, name) for name in names}

    def line(self, note: str = "") -> str:
        """`generation 320/1200 images, 18.4 images/s, 48 s left`."""
        rate = self.rate
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
        text = (
            f"{self.name} {self.done:,}/{self.total:,} {self.unit}, {rate:.1f} {self.unit}/s{left}"
        )
        return f"{text}, {note}" if note else text

    def __enter__(self) -> Bar:
        _bars.append(self)
        if sys.stderr.isatty() and not (logs.is_json() or logs.is_quiet()):
            self._task = _Screen.enter().add_task(
                self.name, total=self.total, completed=self.done, unit=self.unit, note=""
            )
        return self

    def __exit__(self, *exception: object) -> None:
        _bars.remove(self)
        if self._task is not None:
            _Screen.leave()
        elif exception[0] is None:
            log.info(self.line(self.note))


class _Screen:
    """The one live display that rich allows, shared by all bars that are open."""

    progress: Any = None
    users = 0

    @classmethod
    def enter(cls) -> Any:
        if cls.users == 0:
            cls.progress = _rich_progress()
            cls.progress.start()
        cls.users += 1
        return cls.progress

    @classmethod
    def leave(cls) -> None:
        cls.users -= 1
        if cls.users == 0:
            cls.progress.stop()


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:.1f} {task.fields['unit']}/s")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


class Board:
    """Counts that any actor may raise, and what actors say (a Ray actor once wrapped by `make_board`)."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._lines: deque[dict[str, Any]] = deque(maxlen=MOST_LINES)

    def add(self, name: str, count: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + count

    def add_all(self, counts: dict[str, float]) -> None:
        for name, count in counts.items():
            self.add(name, count)

    def put(self, name: str, value: float) -> None:
        self._counts[name] = value

    def counts(self) -> dict[str, float]:
        return dict(self._counts)

    def say(self, line: dict[str, Any]) -> None:
        """Keep a log line (see `logs.Forwarder`) until the driver reads it."""
        self._lines.append(line)

    def read(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The counts, and what was said since the last time."""
        lines = list(self._lines)
        self._lines.clear()
        return self.counts(), lines


def make_board() -> Any:
    """Start a board beside the driver, where no lost node takes it away; it takes no CPU."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


@contextmanager
def watch(
    board: Any,
    bars: dict[str, Bar],
    *,
    notes: dict[str, Callable[[dict[str, float]], str]] | None = None,
) -> Iterator[None]:
    """Draw a board's counts in `bars` (count name -> bar) until the block ends, and log what was said.

    Args:
        notes: count name -> what to say beside its bar, from all counts.
    """
    import ray

    stop = threading.Event()

    def draw(counts: dict[str, float], lines: list[dict[str, Any]]) -> None:
        logs.repeat(lines)
        for name, bar in bars.items():
            if name in counts:
                note = notes[name](counts) if notes and name in notes else ""
                bar.update(int(counts[name]), note)

    def poll() -> None:
        while not stop.wait(1.0):
            try:
                found = ray.get(board.read.remote(), timeout=5)
            except Exception:
                continue  # a slow or lost board must not end the run
            draw(*found)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(poll,), daemon=True)
    for bar in bars.values():
        bar.__enter__()
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        with_error = sys.exc_info()
        try:
            found = ray.get(board.read.remote(), timeout=5)
        except Exception:
            found = {}, []
        draw(*found)
        for bar in bars.values():
            bar.__exit__(*with_error)
