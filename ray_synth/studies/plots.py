"""A study's plot: gains by arm as bars, or top-1 over what the study varies as lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ray_synth.studies.design import Study
from ray_synth.studies.results import IN_DOMAIN, Row

COLOURS = ("#2557d6", "#c2620a", "#0f9d76", "#8b5cf6", "#6b7280", "#b3261e")
MARKERS = "os^vDP"


def draw(study: Study, rows: Sequence[Row]) -> Any:
    """The figure of a study, one panel per test set."""
    from matplotlib.figure import Figure

    test_sets = list(dict.fromkeys(row.test_set for row in rows))
    if study.plot == "lines" and any(row.arm.x is not None for row in rows):
        figure = Figure(figsize=(4.6 * len(test_sets), 3.8), layout="constrained")
        panels = figure.subplots(1, len(test_sets), squeeze=False)[0]
        # The auxiliary BN alone can be so far below that all else would lie on one line.
        shown = [row for row in rows if row.bn != "aux"]
        for panel, test_set in zip(panels, test_sets, strict=True):
            _lines(panel, study, [row for row in shown if row.test_set == test_set])
        panels[0].legend(fontsize=8)
    else:
        shown = [row for row in rows if row.change or row.gain]
        bars = max(1, len({(row.arm.name, row.bn) for row in shown}))
        figure = Figure(figsize=(3 + 3.4 * len(test_sets), 1.2 + 0.28 * bars), layout="constrained")
        panels = figure.subplots(1, len(test_sets), squeeze=False, sharey=True)[0]
        for panel, test_set in zip(panels, test_sets, strict=True):
            _bars(panel, [row for row in shown if row.test_set == test_set])
    for panel, test_set in zip(panels, test_sets, strict=True):
        panel.set_title("in domain" if test_set == IN_DOMAIN else test_set.replace("_", " "))
    return figure


def save(figure: Any, kind: str) -> bytes:
    """The figure as png or svg."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _bars(panel: Any, rows: Sequence[Row]) -> None:
    """Gains over real images alone (else over the arm compared with), one dot per seed."""
    several = len({row.bn for row in rows}) > 1
    names = [f"{row.arm.label} ({row.bn} BN)" if several else row.arm.label for row in rows]
    gains = [row.gain or row.change for row in rows]
    panel.barh(
        range(len(rows)),
        [gain.mean if gain else 0 for gain in gains],
        xerr=[gain.half if gain and gain.half == gain.half else 0 for gain in gains],
        color=[COLOURS[("main", "aux", "average").index(row.bn)] for row in rows],
        error_kw={"capsize": 2, "elinewidth": 1},
        height=0.7,
    )
    for place, row in enumerate(rows):
        points = list(row.gains.values())
        panel.plot(points, [place] * len(points), "o", color="#171b22", markersize=3, alpha=0.7)
    panel.set_xlim(*_seen([0.0, *(value for row in rows for value in row.gains.values())]))
    panel.set_yticks(range(len(rows)), names, fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)  # the first at the top; axes are shared
    panel.axvline(0, color="#171b22", linewidth=0.8)
    panel.set_xlabel("points of top-1 gained")
    panel.grid(axis="x", alpha=0.3)


def _seen(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of an axis that holds all values: intervals of two or three seeds can be far wider, and
    are cut."""
    margin = 0.15 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


def _lines(panel: Any, study: Study, rows: Sequence[Row]) -> None:
    """Top-1 over `Arm.x`, one line for each `Arm.line` and BN; arms without an x as a level."""
    for row in rows:
        if row.arm.x is None and not row.arm.scale and not row.arm.settings:
            panel.axhline(row.top1.mean, color="#6b7280", linestyle=":", label=row.arm.label)
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.arm.x is not None:
            lines.setdefault((row.arm.line, row.bn), []).append(row)
    dual = {line for line, bn in lines if bn != "main"}
    for number, ((line, bn), mine) in enumerate(lines.items()):
        panel.errorbar(
            [row.arm.x for row in mine],
            [row.top1.mean for row in mine],
            yerr=[0 if row.top1.half != row.top1.half else row.top1.half for row in mine],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=f"{line}, {bn} at test" if line in dual else line,
            capsize=3,
            markersize=4,
        )
    for number, mine in enumerate(lines.values()):
        for row in mine:
            panel.plot(
                [row.arm.x] * len(row.values), list(row.values.values()), ".", markersize=3,
                color=COLOURS[number % len(COLOURS)], alpha=0.5,
            )  # fmt: skip
    panel.set_ylim(*_seen([value for row in rows for value in row.values.values()]))
    if study.log_x:
        panel.set_xscale("log", base=2)
    ticks = sorted({row.arm.x for row in rows if row.arm.x is not None})
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set(xlabel=study.x_label, ylabel="top-1 (%)")
    panel.grid(alpha=0.3)
