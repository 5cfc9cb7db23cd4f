"""`ray-synth status`: a run's state as a table and a verdict, as JSON, or drawn again and again."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from ray_synth.errors import UserError, duration
from ray_synth.report.status import DONE, RUNNING, RunStatus, StageStatus, read_status
from ray_synth.storage.folder import Folder

COLOURS = {"done": "green", "under way": "cyan", "begun": "yellow", "waiting": "dim"}


def show_status(folder: Folder, *, as_json: bool = False, watch: float | None = None) -> int:
    """Print how a run stands; its exit code.

    Args:
        watch: draw it again every this many seconds, until the run ends.

    Raises:
        UserError: there is no run, or `watch` is not above 0.
    """
    if watch is not None and watch <= 0:
        raise UserError(f"--watch {watch:g}: give a number of seconds")
    status = read_status(folder)
    if as_json:
        while True:
            print(json.dumps(status.as_dict()), flush=True)
            if watch is None or status.exit_code != RUNNING:
                return status.exit_code
            time.sleep(watch)
            status = read_status(folder)
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110)
    if watch is None:
        console.print(drawn(status))
        return status.exit_code
    from rich.live import Live

    with Live(drawn(status), console=console, auto_refresh=False) as live:
        while status.exit_code == RUNNING:
            time.sleep(watch)
            status = read_status(folder)
            live.update(drawn(status), refresh=True)
    return status.exit_code


def drawn(status: RunStatus) -> Any:
    """The table and the verdict, for rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=status.run, title_justify="left")
    for name, justify in (("stage", "left"), ("", "left"), ("time", "right"), ("counted", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stage in status.stages:
        time_taken = "" if stage.seconds is None else duration(stage.seconds)
        colour = COLOURS[stage.state]
        table.add_row(stage.name, Text(stage.state, colour), time_taken, counted(stage))
    colour = {DONE: "green", RUNNING: "cyan"}.get(status.exit_code, "red")
    parts: list[Any] = [table]
    if status.rejected:
        found = ", ".join(f"{what} {count:,}" for what, count in status.rejected.items())
        parts.append(Text(f"of the newest {status.judged:,} images, {found}"))
    parts += [Text(line, "red") for line in status.damaged]
    parts.append(Text.assemble((status.verdict, f"bold {colour}"), f": {status.message}"))
    return Group(*parts)


def counted(stage: StageStatus) -> str:
    """`about 320 of 1,200 images, 48 s left`; `mixed 120 of 300 steps`."""
    text = "" if stage.done is None else f"{stage.done:,}"
    if stage.total is not None:
        text += f" of {stage.total:,}"
    if text and stage.unit:
        text += f" {stage.unit}"
    if stage.note:
        text = f"{stage.note} {text}".strip()
    return f"{text}, {duration(stage.left_s)} left" if stage.left_s is not None else text
