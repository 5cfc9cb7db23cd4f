"""What the rivals of a study train on: a generator tuned on the arm's real images, or other real images.

In: a study, and the grid of its other arms, whose real images and meanings are found here. Out: the
study whose rivals have their settings, for each seed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ray_synth.config import Config
from ray_synth.data.pool import load_pool, refuse_tests
from ray_synth.generators.tuning import check_tuning
from ray_synth.meaning.entries import read_meanings
from ray_synth.pipeline.retrieval import RetrievalJob, run_retrieval
from ray_synth.pipeline.run import Run
from ray_synth.pipeline.tuning import run_tuning, tuning_job, without_tests
from ray_synth.preflight.refusals import check_clip
from ray_synth.storage.folder import Folder
from ray_synth.studies.arm import Arm
from ray_synth.studies.design import Study
from ray_synth.studies.grid import Grid

RIVALS = "rivals"  # the folder of what is made for them, in the studies'


def check_rivals(study: Study, config: Config) -> None:
    """Raises UserError where the generator cannot be tuned, or there is no pool that may be used."""
    rivals = {arm.rival for arm in study.arms}
    if "tuned" in rivals:
        check_tuning(config.generation)
    if "retrieved" in rivals and config.studies.pool:
        refuse_tests(config.studies.pool, config.data)
        check_clip(config.meaning.clip)
        load_pool(config.studies.pool)


def with_rivals(study: Study, config: Config, grid: Grid) -> Study:
    """Tune and retrieve what the rivals of a study train on, and say so in their settings.

    Args:
        config: that the studies are of.
        grid: of the study's other arms; those with synthetic images are the recipe's.

    Raises:
        UserError: as the verbs `tune` and `retrieve`.
    """
    grid.make_sources()
    runs = {trial.seed: grid.runs[trial.source] for trial in grid.trials if trial.mixed}
    folder = grid.folder.child(RIVALS)
    make = {"tuned": _tuned, "retrieved": _retrieved}
    arms = [
        replace(
            arm,
            by_seed={seed: make[arm.rival](config, run, arm, folder) for seed, run in runs.items()},
        )
        if arm.rival
        else arm
        for arm in study.arms
    ]
    return replace(study, arms=tuple(arms))


def _tuned(config: Config, run: Run, arm: Arm, folder: Folder) -> dict[str, Any]:
    """The same generator with a LoRA that is tuned on the run's training images, and its prompts."""
    own = without_tests(run.config).model_copy(update={"tuning": config.tuning})
    job = tuning_job(own, run.train, _meanings(run), folder)
    job = replace(job, folder=folder.child(f"tuned-{job.identity}"))
    run_tuning(job)
    given = [item.model_dump() for item in config.generation.adapters]
    return {"generation.adapters": [*given, {"path": job.folder.uri}]}


def _retrieved(config: Config, run: Run, arm: Arm, folder: Folder) -> dict[str, Any]:
    """Images of the pool in place of generated ones, each of them once."""
    assert config.studies.pool is not None
    names = run.train.class_names
    meanings = _meanings(run)
    job = RetrievalJob(
        without_tests(run.config),
        config.studies.pool,
        load_pool(config.studies.pool),
        run.train,
        tuple(meanings[name] for name in names),
        math.ceil(round(arm.scale * len(run.train)) / len(names)),
        folder,
    )
    job = replace(job, folder=folder.child(f"retrieved-{job.identity}"))
    run_retrieval(job)
    source = {"format": "webdataset", "path": job.folder.uri}
    return {
        "generation.generator": "imported",
        "generation.generator_kwargs": {"source": source},
        "generation.reference": None,
        "generation.adapters": [],
        "prompting.mix": {"plain": 1.0},
        "prompting.contexts_per_class": 0,
    }


def _meanings(run: Run) -> dict[str, str]:
    entries = read_meanings(run.folder, run.train.class_names)
    return {entry["class_name"]: entry["choice"] for entry in entries}
