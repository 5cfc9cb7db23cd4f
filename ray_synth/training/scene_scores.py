"""What a learner says of scenes: how unsure it is of the images of each, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.generation.acceptance import scene_at, scene_text

Scenes = Mapping[str, Sequence[Mapping[str, str]]]  # of each class, phrases by field


class _Lookup:
    """The scene of a prompt; each prompt is looked up once."""

    def __init__(self, scenes: Scenes) -> None:
        self._scenes = scenes
        self._known: dict[tuple[str, str], str] = {}

    def __call__(self, row: Mapping[str, Any]) -> str:
        """Empty where a row has none."""
        if row["kind"] != "contextual":
            return ""
        key = row["class_name"], row["prompt"]
        if key not in self._known:
            written = self._scenes.get(key[0], ())
            at, _ = scene_at(key[1], written)
            self._known[key] = scene_text(written[at]) if at >= 0 else ""
        return self._known[key]


def by_scene(
    scenes: Scenes, rows: Sequence[Mapping[str, Any]], entropy: np.ndarray
) -> dict[str, dict[str, dict[str, Any]]]:
    """class -> scene -> `images` and mean `entropy`, of images that were scored.

    Args:
        rows: columns `class_name`, `kind` and `prompt` of the images; entropy: (n,) of each, in nats.
    """
    scene_of = _Lookup(scenes)
    sums: dict[str, dict[str, list[float]]] = {}
    for row, value in zip(rows, entropy.tolist(), strict=True):
        if scene := scene_of(row):
            found = sums.setdefault(row["class_name"], {}).setdefault(scene, [])
            found.append(value)
    return {
        name: {
            scene: {"images": len(values), "entropy": round(sum(values) / len(values), 6)}
            for scene, values in sorted(found.items())
        }
        for name, found in sorted(sums.items())
    }


def accepted_by_scene(scenes: Scenes, plan: pa.Table) -> dict[str, dict[str, list[int]]]:
    """class -> scene -> [accepted, made] of rows that were made.

    Args:
        plan: columns `class_name`, `kind`, `prompt`, and `accepted` (0 or 1).
    """
    scene_of = _Lookup(scenes)
    counts: dict[str, dict[str, list[int]]] = {}
    for row in plan.to_pylist():
        if scene := scene_of(row):
            found = counts.setdefault(row["class_name"], {}).setdefault(scene, [0, 0])
            found[0] += row["accepted"]
            found[1] += 1
    return {name: dict(sorted(found.items())) for name, found in sorted(counts.items())}
