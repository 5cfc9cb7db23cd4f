"""The study of robustness: the test set as it is corrupted more and more.

Corrupted copies are written once per test set, as Parquet, and tested as any test set is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from ray_synth.config import CorruptionConfig, SourceConfig
from ray_synth.data.dataset import Index, load_index, read_index, select
from ray_synth.evaluation.corruption import check_kinds, corrupted_rows
from ray_synth.monitoring.mlflow_run import digest
from ray_synth.pipeline.run import Run
from ray_synth.storage.folder import Folder
from ray_synth.studies.measures import Measured
from ray_synth.studies.plots import COLOURS, MARKERS
from ray_synth.studies.results import IN_DOMAIN, Table
from ray_synth.studies.statistics import Estimate, estimate, paired

KIND = "corrupted"


def corrupted_sets(
    folder: Folder, corruption: CorruptionConfig, max_pixels: int
) -> Callable[[Run], dict[str, Index]]:
    """A function from a run to its corrupted test sets, `<kind>-<severity>` each.

    Args:
        folder: where the copies are kept.

    Raises:
        ValueError: there is no such kind of corruption.
    """
    check_kinds(corruption.kinds)
    known: dict[str, dict[str, Index]] = {}

    def sets(run: Run) -> dict[str, Index]:
        test = run.tests[IN_DOMAIN]
        classes = len(test.class_names)
        few = select(test, max(1, corruption.images // classes), 0)
        name = f"{digest(few)[:16]}-{max_pixels}"
        if name not in known:
            known[name] = _write(folder.child(name), few, corruption, max_pixels)
        return known[name]

    return sets


def _write(
    folder: Folder, few: Index, corruption: CorruptionConfig, max_pixels: int
) -> dict[str, Index]:
    import ray

    names = {
        kind: [f"{kind}-{severity}" for severity in corruption.severities]
        for kind in corruption.kinds
    }
    write = ray.remote(num_cpus=1)(_write_kind)
    ray.get(
        [
            write.remote(folder, few, kind, list(corruption.severities), max_pixels)
            for kind, sets in names.items()
            if not all(folder.exists(f"{name}.parquet") for name in sets)
        ]
    )
    return {
        name: load_index(
            SourceConfig(
                format="parquet",
                path=folder.child(f"{name}.parquet").uri,
                label_column="class_name",
            ),
            few.class_names,
        )
        for sets in names.values()
        for name in sets
    }


def _write_kind(
    folder: Folder, few: Index, kind: str, severities: list[int], max_pixels: int
) -> None:
    """The task that draws one kind of corruption, at all severities."""
    found: dict[int, list[dict[str, Any]]] = {severity: [] for severity in severities}
    for row in corrupted_rows(read_index(few), [kind], severities, max_pixels=max_pixels):
        found[row["severity"]].append(
            {"image": row["image"], "class_name": few.class_names[row["class_index"]]}
        )
    for severity, rows in found.items():
        folder.write_table(f"{kind}-{severity}.parquet", pa.Table.from_pylist(rows))


def measure_corruptions(measured: Measured) -> list[Table]:
    """Top-1 by severity, on average over kinds, and by kind at the worst severity."""
    config = measured.grid.config
    sets = corrupted_sets(
        measured.grid.folder.child("corrupted"), config.studies.corruption, config.data.max_pixels
    )
    measured.grid.test_more(KIND, sets)
    severities, kinds = config.studies.corruption.severities, config.studies.corruption.kinds
    values = _values(measured)
    curves: dict[str, list[Estimate]] = {}
    by_severity, by_kind = [], []
    for label, seeds in values.items():
        real = values["real only"]
        means = [
            {
                seed: float(np.mean([found[f"{k}-{s}"] for k in kinds]))
                for seed, found in seeds.items()
            }
            for s in severities
        ]
        curves[label] = [estimate(list(mean.values())) for mean in means]
        gains = [
            paired(mean, {
                seed: float(np.mean([found[f"{k}-{s}"] for k in kinds]))
                for seed, found in real.items()
            })
            for mean, s in zip(means, severities, strict=True)
        ]  # fmt: skip
        cells = []
        for mean, gain in zip(curves[label], gains, strict=True):
            cells += [mean.shown(), "" if label == "real only" else gain.shown(signed=True)]
        by_severity.append((label, *cells))
        worst = severities[-1]
        by_kind.append(
            (label, *(
                estimate([found[f"{kind}-{worst}"] for found in seeds.values()]).shown()
                for kind in kinds
            ))
        )  # fmt: skip
        for severity, mean in zip(severities, curves[label], strict=True):
            measured.figures[f"corrupted.{label}.{severity}"] = mean.mean
    measured.figures["curves"] = curves
    head = [cell for s in severities for cell in (f"severity {s}", "gain")]
    note = f"Mean over {', '.join(kinds)}; top-1 in percent, gains over real only paired by seed."
    return [
        Table("Corrupted test images", ("arm", *head), tuple(by_severity), note),
        Table(f"By kind, at severity {severities[-1]}", ("arm", *kinds), tuple(by_kind)),
    ]


def _values(measured: Measured) -> dict[str, dict[int, dict[str, float]]]:
    """Top-1 by arm and BN, seed, and corrupted set."""
    values: dict[str, dict[int, dict[str, float]]] = {}
    for trial in measured.grid.trials:
        for bn, sets in measured.grid.results(trial, KIND).items():
            if bn == "main" or bn in measured.study.bns:
                label = trial.arm.label if bn == "main" else f"{trial.arm.label} ({bn})"
                top1 = {name: result["top1"] for name, result in sets.items()}
                values.setdefault(label, {})[trial.seed] = top1
    return values


def drift_figure(curves: dict[str, list[Estimate]], severities: list[int]) -> Any:
    """Top-1 over severity, one line per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    panel = figure.subplots()
    for number, (label, means) in enumerate(curves.items()):
        panel.errorbar(
            severities,
            [mean.mean for mean in means],
            yerr=[0 if mean.half != mean.half else mean.half for mean in means],
            label=label,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            markersize=4,
        )
    panel.set_xticks(severities)
    panel.set(xlabel="severity of corruption", ylabel="top-1 (%), mean over kinds")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure


__all__ = ["corrupted_sets", "drift_figure", "measure_corruptions"]
