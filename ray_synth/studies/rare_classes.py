"""Accuracy of frequent, middling and rare classes of a long-tailed set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ray_synth.studies.results import IN_DOMAIN, Table
from ray_synth.studies.statistics import estimate, paired

if TYPE_CHECKING:
    from ray_synth.studies.measures import Measured

PARTS = 3


def frequency_groups(counts: Mapping[str, int]) -> dict[str, list[str]]:
    """Classes in thirds, the most frequent first, by how many images they have (`2 to 5 images`).

    Thirds whose classes all have the same number are one group.

    Args:
        counts: images by class name.
    """
    groups: dict[str, list[str]] = {}
    for part in np.array_split(sorted(counts, key=lambda name: -counts[name]), PARTS):
        names = part.tolist()
        if names:
            fewest, most = counts[names[-1]], counts[names[0]]
            said = (
                f"{fewest} to {most} images" if fewest < most else f"{most} image{'s' * (most > 1)}"
            )
            groups.setdefault(said, []).extend(names)
    return groups


def measure_by_frequency(measured: Measured) -> list[Table]:
    """In-domain top-1 by group, and what it changes against the arm that an arm is held against."""
    arms = [arm for arm in measured.study.arms if arm.name.startswith("tail_")]
    groups: dict[str, list[str]] = {}
    found: dict[str, dict[str, dict[int, float]]] = {}  # arm -> group -> seed -> top-1
    for trial in (t for t in measured.grid.trials if t.arm in arms):
        groups = groups or frequency_groups(measured.run(trial).train.counts())
        by_class = measured.grid.results(trial)["main"][IN_DOMAIN]["by_class"]
        for group, names in groups.items():
            top1 = float(np.mean([by_class[name] for name in names if name in by_class]))
            found.setdefault(trial.arm.name, {}).setdefault(group, {})[trial.seed] = top1
    rows = []
    for arm in arms:
        cells = []
        for group, by_seed in found[arm.name].items():
            mean = estimate([*by_seed.values()])
            measured.figures[f"by_frequency.{arm.name}.{group}"] = mean.mean
            change = ""
            if arm.against in found and arm.against != arm.name:
                change = paired(by_seed, found[arm.against][group]).shown(signed=True)
            cells += [mean.shown(), change]
        rows.append((arm.label, *cells))
    if not rows:
        return []
    heads = [text for group in groups for text in (group, "change")]
    note = (
        "In-domain top-1 in percent, main BN, by how many real images their classes have; changes as in "
        "the table of accuracy."
    )
    return [Table("Rare classes", ("arm", *heads), tuple(rows), note)]
