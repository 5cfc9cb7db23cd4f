"""Training curves as SVG data URIs, in a light and a dark drawing.

The curves of models/<arm>.json in, images for the page out. matplotlib without pyplot: no state.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTS = 240  # a curve is averaged down to at most this many points
# (light, dark); the page's stylesheet uses the same ones.
COLOURS = {
    "real_only": ("#6b7280", "#9aa4b5"),
    "mixed": ("#2557d6", "#7ea2ff"),
    "synth": ("#c2620a", "#f0a04b"),
}
INK = ("#4b5563", "#aab3c2")
GRID = ("#e5e7eb", "#2b3240")


@dataclass(frozen=True)
class Line:
    """One curve: which arm, which of its values, and how it is drawn."""

    arm: str
    key: str
    label: str
    colour: str
    style: str = "-"


LOSS = (
    Line("real_only", "loss_real", "real only", "real_only", "--"),
    Line("recipe", "loss_real", "published recipe", "real_only", ":"),
    Line("mixed", "loss_real", "mixed, on real images", "mixed"),
    Line("mixed", "loss_synth", "mixed, on synthetic images", "synth"),
)
ACCURACY = (
    Line("real_only", "train_top1_real", "real only", "real_only", "--"),
    Line("recipe", "train_top1_real", "published recipe", "real_only", ":"),
    Line("mixed", "train_top1_real", "mixed, on real images", "mixed"),
    Line("mixed", "train_top1_synth", "mixed, on synthetic images", "synth"),
)


def loss_plot(curves: dict[str, list[dict[str, Any]]], *, dark: bool = False) -> str | None:
    """Training loss by step, as a data URI; None where no arm has a curve.

    Args:
        curves: arm (real_only, recipe, mixed) -> its `curve` of models/<arm>.json.
    """
    return _plot(curves, LOSS, title="Training loss", scale=1, dark=dark)


def accuracy_plot(curves: dict[str, list[dict[str, Any]]], *, dark: bool = False) -> str | None:
    """Top-1 on the (augmented) training batches in percent, as a data URI; None without curves."""
    return _plot(curves, ACCURACY, title="Training top-1, %", scale=100, dark=dark)


def thin(values: Sequence[float], points: int = POINTS) -> np.ndarray:
    """Means of consecutive groups, so that at most `points` are left."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= points:
        return array
    return np.array([group.mean() for group in np.array_split(array, points)])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean of the same length; the window is cut short at both ends."""
    if window <= 1 or len(values) < 3:
        return values
    kernel = np.ones(min(window, len(values)))
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    return np.convolve(values, kernel, mode="same") / counts


def _plot(
    curves: dict[str, list[dict[str, Any]]],
    lines: Sequence[Line],
    *,
    title: str,
    scale: float,
    dark: bool,
) -> str | None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = [
        (line, points)
        for line in lines
        if (points := [p for p in curves.get(line.arm) or [] if p.get(line.key) is not None])
    ]
    if not drawn:
        return None
    ink, grid = INK[dark], GRID[dark]
    figure = Figure(figsize=(4.7, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for line, points in drawn:
        steps = thin([point["step"] for point in points])
        values = thin([point[line.key] * scale for point in points])
        colour = COLOURS[line.colour][dark]
        if len(steps) > 20:  # a batch is a small sample: show its scatter behind the trend
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        trend = smooth(values, max(1, len(values) // 12))
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps, trend, color=colour, linewidth=1.9, linestyle=line.style, label=line.label,
            marker=marker, markersize=4,
        )  # fmt: skip
    axes.set_title(title, loc="left", color=ink, fontsize=11, fontweight="bold")
    axes.set_xlabel("step", color=ink, fontsize=9.5)
    axes.set_ylim(bottom=0, top=103 if scale == 100 else None)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(colors=ink, labelsize=9.5, length=0)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    legend = axes.legend(
        loc="lower right" if scale == 100 else "upper right",
        fontsize=9,
        labelcolor=ink,
        frameon=True,
        borderpad=0.3,
    )
    legend.get_frame().set(facecolor="#161b24" if dark else "#ffffff", alpha=0.75, linewidth=0)
    buffer = io.BytesIO()
    # Text stays text (a third of the size), and the file is the same for the same curves.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ray-synth"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
