"""Trials' results as a study's rows: means over seeds, gains, changes and tests. Pure.

Rows go to Parquet; tables for people are made of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_synth.report.table import BASELINES
from ray_synth.studies.arm import REAL_ONLY, Arm
from ray_synth.studies.design import Study
from ray_synth.studies.statistics import Estimate, estimate, false_discovery_rates, paired

IN_DOMAIN = "in_domain"
Key = tuple[str, int]  # an arm's name and a seed
Results = dict[str, dict[str, dict[str, Any]]]  # BN -> test set -> what was found


@dataclass(frozen=True)
class Row:
    """One arm with one choice of BN on one test set.

    Attributes:
        top1: percent, over seeds.
        gain: points over real images alone; None for those themselves.
        change: points over the arm that it is compared with, with the same BN where both were tested
            with it; None where that is itself.
        q: the change's p after Benjamini and Hochberg's correction over the study's table.
        values: top-1 in percent by seed.
        gains: points by seed over real images alone, or else over the arm compared with.
    """

    arm: Arm
    bn: str
    test_set: str
    top1: Estimate
    gain: Estimate | None
    change: Estimate | None
    q: float
    values: dict[int, float]
    gains: dict[int, float]


def result_rows(study: Study, found: dict[Key, Results]) -> list[Row]:
    """The rows of a study, in the order of its arms, in domain first.

    Args:
        found: results of each arm and seed that was tested.
    """
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for (arm_name, seed), results in found.items():
        for bn, sets in results.items():
            if bn == "main" or bn in study.bns:
                for test_set, result in sets.items():
                    values.setdefault((arm_name, bn, test_set), {})[seed] = result["top1"]
    names = [arm.name for arm in study.arms]
    arms = {arm.name: arm for arm in study.arms}
    order = sorted(
        values,
        key=lambda key: (
            names.index(key[0]), study.bns.index(key[1]) if key[1] in study.bns else 0,
            key[2] != IN_DOMAIN, key[2],
        ),
    )  # fmt: skip
    rows = []
    for name, bn, test_set in order:
        arm = arms[name]
        mine = values[name, bn, test_set]

        real = values.get((REAL_ONLY, "main", test_set), {})
        other = values.get((arm.against, bn, test_set)) or values.get(
            (arm.against, "main", test_set), {}
        )
        base = other if name == REAL_ONLY or not real else real
        gains = {seed: mine[seed] - base[seed] for seed in mine if seed in base}
        rows.append(
            Row(
                arm, bn, test_set, estimate(list(mine.values())),
                paired(mine, real) if real and name != REAL_ONLY else None,
                paired(mine, other) if other and name != arm.against else None,
                float("nan"), mine, gains,
            )
        )  # fmt: skip
    rates = false_discovery_rates([row.change.p if row.change else float("nan") for row in rows])
    return [Row(**{**vars(row), "q": q}) for row, q in zip(rows, rates, strict=True)]


def as_table(rows: Iterable[Row]) -> pa.Table:
    """The rows as an Arrow table, one row per seed beside its means."""
    lines = [
        {
            "arm": row.arm.name,
            "label": row.arm.label,
            "scale": row.arm.scale,
            "against": row.arm.against,
            "bn": row.bn,
            "test_set": row.test_set,
            "seed": seed,
            "top1": value,
            "mean": row.top1.mean,
            "half_interval": row.top1.half,
            "gain": row.gain.mean if row.gain else None,
            "gain_half_interval": row.gain.half if row.gain else None,
            "change": row.change.mean if row.change else None,
            "change_half_interval": row.change.half if row.change else None,
            "change_p": row.change.p if row.change else None,
            "change_q": row.q if row.change else None,
        }
        for row in rows
        for seed, value in row.values.items()
    ]
    return pa.Table.from_pylist(lines)


@dataclass(frozen=True)
class Table:
    """A table for people: Markdown, HTML and a terminal show the same cells.

    Attributes:
        title: of the table.
        head: of its columns.
        rows: cells as text; the first is the row's name.
        note: what its numbers are.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table as Markdown, its note below."""
        lines = [
            "| " + " | ".join(map(_cell, self.head)) + " |",
            "|---|" + "---:|" * (len(self.head) - 1),
            *("| " + " | ".join(map(_cell, row)) + " |" for row in self.rows),
        ]
        return "\n".join(lines + (["", self.note] if self.note else []))


def accuracy_table(study: Study, rows: Sequence[Row]) -> Table:
    """Top-1, gain and change of each arm and BN on each test set."""
    test_sets = list(dict.fromkeys(row.test_set for row in rows))
    labels = {arm.name: arm.label for arm in study.arms}
    by_key: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault((row.arm.name, row.bn), {})[row.test_set] = row
    several = any(bn != "main" for _, bn in by_key)
    compared = any(row.change and row.arm.against != REAL_ONLY for row in rows)
    gains = any(row.gain for row in rows)
    seeds = max((row.top1.num_seeds for row in rows), default=0)
    tested = compared or (gains and seeds > 1)
    head = ["arm", *(["BN at test"] if several else [])]
    for name in test_sets:
        shown = "in domain" if name == IN_DOMAIN else name.replace("_", " ")
        head += [f"{shown}, top-1"]
        head += ["gain over real only"] * gains + ["change"] * compared + ["q"] * tested
    head += ["changed against"] * compared
    lines = []
    for (name, bn), sets in by_key.items():
        row = next(iter(sets.values()))
        line = [row.arm.label, *([bn] if several else [])]
        for test_set in test_sets:
            cell = sets.get(test_set)
            line += [cell.top1.shown() if cell else ""]
            line += [_signed(cell.gain if cell else None)] * gains
            own = cell is not None and (not compared or row.arm.against != REAL_ONLY)
            line += [_signed(cell.change if cell and own else None)] * compared
            line += [_rate(cell.q) if cell and own else ""] * tested
        if compared:
            other = row.arm.against
            line += [labels[other] if other not in (REAL_ONLY, name) else ""]
        lines.append(tuple(line))
    note = (
        f"Percent and points; means of {seeds} seeds with 95% intervals (Student's t); gains and "
        "changes are paired by seed."
        + (" q: p of the paired t-test, corrected for the table's tests." if tested else "")
        if seeds > 1
        else "Percent and points, of one seed: there is no interval."
    )
    if gains:
        note += f" {BASELINES[study.baseline][1]}"
    return Table("Accuracy", tuple(head), tuple(lines), note)


def compute_table(study: Study, cards: dict[Key, dict[str, Any]], batch: dict[Key, int]) -> Table:
    """What each arm's training saw and took, on average over seeds.

    Args:
        cards: what the trainings left to say.
        batch: synthetic images of a training step.
    """
    lines = []
    for arm in study.arms:
        mine = {key: card for key, card in cards.items() if key[0] == arm.name}
        if not mine:
            continue
        n = len(mine)
        synthetic = sum(card["steps"] * batch[key] for key, card in mine.items()) / n
        lines.append(
            (
                arm.label,
                f"{sum(c['real_images_seen'] for c in mine.values()) / n:,.0f}",
                f"{sum(c['num_synthetic'] for c in mine.values()) / n:,.0f}",
                f"{synthetic:,.0f}",
                f"{sum(c['seconds'] for c in mine.values()) / n:.0f}",
            )
        )
    head = ("arm", "real images seen", "synthetic images", "synthetic images seen", "seconds")
    note = "Per seed; seconds of training steps, several trainings sharing the machine."
    return Table("Compute", head, tuple(lines), note)


def choice(study: Study, found: dict[Key, Results]) -> Table | None:
    """The arm that the validation images choose, best first; None where the study does not choose.

    Args:
        found: results on the validation images.
    """
    if not study.selects:
        return None
    rows = [row for row in result_rows(study, found) if row.bn == "main" and row.arm.scale]
    rows.sort(key=lambda row: -row.top1.mean)
    lines = tuple((row.arm.label, row.top1.shown()) for row in rows)
    return Table(
        "Chosen on the validation images",
        ("arm", "validation top-1"),
        lines,
        f"The choice is {lines[0][0]}." if lines else "",
    )


def _rate(q: float) -> str:
    """A corrected p; "" where there was no test."""
    if math.isnan(q):
        return ""
    return "<0.001" if q < 0.001 else f"{q:.3f}" if q < 0.01 else f"{q:.2f}"


def _signed(value: Estimate | None) -> str:
    return value.shown(signed=True) if value else ""


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
