"""Live progress of a run: a bar in a terminal, a line now and then in a log.

Actors on other machines count through a small Ray actor, the `Board`; the driver draws it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOG_SECONDS = 10.0
log = logging.getLogger("ray_synth")


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

    def advance(self, count: int = 1) -> None:
        self.update(self.done + count)

    def line(self, note: str = "") -> str:
        """`generation 320/1200 images, 18.4 images/s, 48 s left`."""
        seconds = time.monotonic() - self.started
        rate = (self.done - self.first) / seconds if seconds > 0 else 0.0
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
        text = (
            f"{self.name} {self.done:,}/{self.total:,} {self.unit}, {rate:.1f} {self.unit}/s{left}"
        )
        return f"{text}, {note}" if note else text

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            self._task = _Screen.enter().add_task(
                self.name, total=self.total, completed=self.done, unit=self.unit, note=""
            )
        return self

    def __exit__(self, *exception: object) -> None:
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
    """Counts that any actor may raise (a Ray actor once wrapped by `make_board`)."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}

    def add(self, name: str, count: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + count

    def add_all(self, counts: dict[str, float]) -> None:
        for name, count in counts.items():
            self.add(name, count)

    def put(self, name: str, value: float) -> None:
        self._counts[name] = value

    def counts(self) -> dict[str, float]:
        return dict(self._counts)


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
    seconds: float = 1.0,
) -> Iterator[None]:
    """Draw a board's counts in `bars` (count name -> bar) until the block ends.

    Args:
        notes: count name -> what to say beside its bar, from all counts.
    """
    import ray

    stop = threading.Event()

    def draw(counts: dict[str, float]) -> None:
        for name, bar in bars.items():
            if name in counts:
                note = notes[name](counts) if notes and name in notes else ""
                bar.update(int(counts[name]), note)

    def poll() -> None:
        while not stop.wait(seconds):
            try:
                counts = ray.get(board.counts.remote(), timeout=5)
            except Exception:
                continue  # a slow or lost board must not end the run
            draw(counts)

    thread = threading.Thread(target=poll, daemon=True)
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
            counts = ray.get(board.counts.remote(), timeout=5)
        except Exception:
            counts = {}
        draw(counts)
        for bar in bars.values():
            bar.__exit__(*with_error)
