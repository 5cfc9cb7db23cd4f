"""Runs studies: trials out of the catalogue, a grid that makes and tests them, tables and plots.

`<run>/studies/<name>/` gets `study.json`, `table.md`, `table.parquet`, `plot.png` and `plot.svg`;
`<run>/studies/index.html` tells all that were run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ray_synth.cluster.connection import connect, runs_folder
from ray_synth.config import Config
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import hold_out, load_index, require_every_class
from ray_synth.errors import UserError
from ray_synth.monitoring.driver_lock import sole_driver
from ray_synth.monitoring.heartbeat import watched
from ray_synth.preflight import preflight
from ray_synth.storage.folder import Folder
from ray_synth.studies import measures, plots
from ray_synth.studies.arm import VALIDATION_PER_CLASS, Arm, Trial, trials_of
from ray_synth.studies.catalog import known_name, seeds_of, studies
from ray_synth.studies.design import Study
from ray_synth.studies.drift import drift_figure, measure_corruptions
from ray_synth.studies.grid import VALIDATION, Grid, workspace
from ray_synth.studies.layers import layer_figure, measure_layers
from ray_synth.studies.rare_classes import measure_by_frequency
from ray_synth.studies.results import (
    Table,
    accuracy_table,
    as_table,
    choice,
    compute_table,
    result_rows,
)
from ray_synth.studies.rivals import check_rivals, with_rivals
from ray_synth.studies.saturation import measure_saturation

log = logging.getLogger("ray_synth")
STEPS = ("sources", "training", "validation", "report")


def run_studies(
    name: str, config: Config, *, seeds: Sequence[int] | None = None, until: str = "report"
) -> Folder:
    """Run one study, or `all`; what was done before is not done again. The studies' folder.

    Args:
        seeds: instead of the config's.
        until: the last of `STEPS` to take; test images are read in the last one alone.

    Raises:
        ValueError: there is no such study, an arm's settings are wrong, or as the pipeline does.
    """
    from ray_synth.studies.page import write_page
    from ray_synth.studies.tracking import StudyTracker

    name = known_name(name)
    assert until in STEPS
    config, counts = with_validation(config)
    catalogue = studies(config, counts)
    everything = [arm for study in catalogue.values() for arm in study.arms]
    if name == "all":
        chosen = _possible(catalogue, config)
    else:
        check_rivals(catalogue[name], config)
        chosen = [name]

    def trials_in(name: str, arms: Sequence[Arm]) -> list[Trial]:
        return trials_of(config, arms, seeds or seeds_of(config, name), everything=everything)

    # Of rivals, which are trained on what is yet to be tuned or retrieved, the other arms come first.
    trials = {
        one: trials_in(one, [a for a in catalogue[one].arms if not a.rival]) for one in chosen
    }
    run_folder = runs_folder(config.runs_dir).child(config.name)
    with ExitStack() as watching, connect(config.cluster):
        reach = preflight(trials[chosen[0]][0].config)
        grids = {one: Grid(config, trials[one], reach) for one in chosen}
        for grid in grids.values():
            grid.check()
        watching.enter_context(sole_driver(workspace(config)))
        watching.enter_context(watched(workspace(config), f"study {name}"))
        for one in chosen:
            started = time.perf_counter()
            # Taken out: what a grid has opened goes with it.
            grid, study = grids.pop(one), catalogue[one]
            if any(arm.rival for arm in study.arms):
                study = with_rivals(study, config, grid)
                grid = Grid(config, trials_in(one, study.arms), reach)
                grid.check()
            found = run_study(study, config, grid, until=until)
            if found is None:
                continue
            log.info("study %s: %.0f s", one, time.perf_counter() - started)
            if config.tracking.enabled:
                StudyTracker(config, one).log(found)
            write_page(run_folder, list(catalogue), config.name)
    return workspace(config)


def _possible(catalogue: dict[str, Study], config: Config) -> list[str]:
    """All studies but those whose rivals cannot be had, of which a line says why."""
    found = []
    for name, study in catalogue.items():
        try:
            check_rivals(study, config)
        except UserError as error:
            log.warning("study %s is left out: %s", name, error)
            continue
        found.append(name)
    return found


def with_validation(config: Config) -> tuple[Config, dict[str, int]]:
    """The config with a number of held-out images, and what is left to train on by class name.

    Where `data.validation` does not say, `VALIDATION_PER_CLASS` are held out, but no more
    than a fifth of the smallest class.
    """
    names = read_class_names(config.data.class_names)
    index = require_every_class(load_index(config.data.train, names), "data.train")
    smallest = min(index.counts().values())
    held = config.data.validation or max(1, min(VALIDATION_PER_CLASS, smallest // 5))
    data = config.data.model_copy(update={"validation": held})
    return config.model_copy(update={"data": data}), hold_out(index, held)[0].counts()


def run_study(
    study: Study, config: Config, grid: Grid, *, until: str = "report"
) -> measures.Measured | None:
    """One study on a connected cluster; None where it stops before its end."""
    log.info("study %s: %d arms, %d trials", study.name, len(study.arms), len(grid.trials))
    grid.make_sources()
    if until == "sources":
        return None
    grid.train()
    if until == "training":
        return None
    tables: list[Table] = []
    if study.selects:
        grid.validate()
        chosen = choice(
            study, measures.trials_by_key(grid.trials, lambda t: grid.results(t, VALIDATION))
        )
        tables += [chosen] if chosen else []
    if until == "validation":
        return None
    grid.test()
    rows = result_rows(study, measures.trials_by_key(grid.trials, grid.results))
    measured = measures.Measured(study, grid, rows)
    figures = {"plot": plots.draw(study, rows)}
    tables.insert(0, accuracy_table(study, rows))
    for kind in study.measures:
        tables += MEASURES[kind](measured)
    if curves := measured.figures.pop("curves", None):
        figures["drift"] = drift_figure(curves, config.studies.corruption.severities)
    if layers := measured.figures.pop("layers", None):
        figures["layers"] = layer_figure(layers)
    tables.append(
        compute_table(
            study,
            measures.trials_by_key(grid.trials, grid.card),
            measures.trials_by_key(
                grid.trials, lambda t: t.config.training.num_synth if t.mixed else 0
            ),
        )
    )
    _write(study, grid, measured, tables, figures)
    return measured


MEASURES: dict[str, Callable[[measures.Measured], list[Table]]] = {
    "distance": measures.measure_distance,
    "diversity": measures.measure_diversity,
    "prompts": measures.measure_prompts,
    "generation": measures.measure_generation,
    "meanings": measures.measure_meanings,
    "by_frequency": measure_by_frequency,
    "corruptions": measure_corruptions,
    "layers": measure_layers,
    "saturation": measure_saturation,
}


def _write(
    study: Study,
    grid: Grid,
    measured: measures.Measured,
    tables: list[Table],
    figures: dict[str, Any],
) -> None:
    folder = grid.folder.child(study.name)
    folder.write_table("table.parquet", as_table(measured.rows))
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            folder.write_bytes(f"{name}.{kind}", plots.save(figure, kind))
    parts = [f"### {table.title}\n\n{table.markdown()}" for table in tables]
    text = f"## {study.title}\n\n{study.question}\n\n" + "\n\n".join(parts) + "\n"
    folder.write_bytes("table.md", text.encode())
    folder.write_json(
        "study.json",
        {
            "name": study.name,
            "title": study.title,
            "question": study.question,
            "seeds": sorted({trial.seed for trial in grid.trials}),
            "trials": [
                {"arm": t.arm.name, "seed": t.seed, "digest": t.digest, "source": t.source}
                for t in grid.trials
            ],
            "plots": list(figures),
            "tables": [vars(table) for table in tables],
            "figures": measured.figures,
        },
    )


__all__ = ["run_studies", "run_study"]
