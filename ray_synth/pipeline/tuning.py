"""The verb `tune`: a LoRA of the image model, tuned on the training images of a config, in a Ray task.

In: a config, of which test sets are taken away first. Out: an adapter folder for `generation.adapters`.
"""

from __future__ import annotations

import logging
from typing import Any

from ray_synth.cluster.connection import connect, runs_folder
from ray_synth.config import Config
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import Index, hold_out, load_index, require_every_class, select
from ray_synth.errors import UserError
from ray_synth.generators.registry import check_generator, filled
from ray_synth.generators.tuning import RECORD, WEIGHTS, check_tuning, tune
from ray_synth.generators.tuning_card import TuningJob
from ray_synth.meaning.entries import MEANINGS, read_meanings
from ray_synth.monitoring import logs
from ray_synth.monitoring.driver_lock import sole_driver
from ray_synth.monitoring.progress import Bar, make_board, watch
from ray_synth.pipeline.commits import at_commits, fetch_generator, find_commits, read_commits
from ray_synth.preflight import check_budget, cluster_reach
from ray_synth.prompting.contexts import plain_prompt
from ray_synth.prompting.plan_settings import plan_settings
from ray_synth.storage.folder import Folder
from ray_synth.storage.hub import MODELS

log = logging.getLogger("ray_synth")
TUNED = "tuned"  # the folder in a run's


def tune_generator(config: Config, to: str | None = None) -> dict[str, Any]:
    """Tune the config's generator on its training images; what `card.json` says, and `folder`.

    What is done is not done again; what was stopped goes on. Test sets are not opened, nor images that
    `data.validation` holds out.

    Args:
        to: the folder; default: `tuned/` in the run's.

    Raises:
        UserError: the model cannot be tuned, the folder holds another tuning, or it does not fit the
            cluster.
    """
    check_tuning(config.generation)
    run_folder = runs_folder(config.runs_dir).child(config.name)
    folder = Folder(to) if to else run_folder.child(TUNED)
    folder.check_writable()
    with sole_driver(folder):
        config, commits = pinned(without_tests(config), folder, "generation.")
        check_generator(config.generation)
        images = training_images(config)
        job = tuning_job(config, images, _meanings(run_folder, images.class_names), folder)
        if not _is_done(job):
            folder.write_json(MODELS, commits)
            with connect(config.cluster):
                check_budget(config, cluster_reach(config), stages=("generation",))
                fetch_generator(config)
                run_tuning(job)
        return {**folder.read_json(RECORD), "folder": folder.address()}


def without_tests(config: Config) -> Config:
    """The config with its training set for a test set, and no other: there is none to be opened."""
    data = config.data.model_copy(update={"test": config.data.train, "ood": {}})
    return config.model_copy(update={"data": data})


def training_images(config: Config) -> Index:
    """The images that a run of this config trains on, but for what its inspection sets aside.

    Raises:
        UserError: as opening a run does.
    """
    names = read_class_names(config.data.class_names)
    index = require_every_class(load_index(config.data.train, names), "data.train")
    pool, _ = hold_out(index, config.data.validation)
    return select(pool, config.data.train.images_per_class, config.seed)


def tuning_job(
    config: Config, images: Index, meanings: dict[str, str], folder: Folder
) -> TuningJob:
    """A tuning on some images, whose prompts are the plain ones of the run's plan.

    Args:
        meanings: by class name; a class that it lacks is called by its name alone.
    """
    adapters = [item for item in config.generation.adapters if item.kind != "ip_adapter"]
    own = {"adapters": adapters, "reference": None}
    generation = filled(config.generation.model_copy(update=own))
    settings = plan_settings(config.model_copy(update={"generation": generation}))
    limit = {name: settings[name] for name in ("count_tokens", "max_tokens")}
    captions = [plain_prompt(n, meanings.get(n, n), **limit) for n in images.class_names]
    return TuningJob(
        generation,
        config.tuning,
        images,
        tuple(captions),
        folder,
        seed=config.seed,
        max_pixels=config.data.max_pixels,
    )


def run_tuning(job: TuningJob) -> None:
    """Do a tuning that is not done, in a task with the CPUs and GPUs of a generator.

    Raises:
        UserError: as `tune`.
    """
    import ray

    if _is_done(job):
        return
    board, generation = make_board(), job.generation
    own = {"num_cpus": generation.num_cpus, "num_gpus": generation.num_gpus, "max_retries": 3}
    work: Any = ray.remote(_tune).options(**own)
    bars = {"tuned": Bar("tuning", job.tuning.steps, "steps")}
    with watch(board, bars):
        problem = ray.get(work.remote(job, board))
    if problem:
        raise UserError(problem)


def _tune(job: TuningJob, board: Any) -> str | None:
    """The task: what the user has to know of a failure, or None."""
    from dataclasses import replace

    logs.forward(board, stage="tuning")
    try:
        tune(replace(job, board=board))
    except UserError as error:
        return str(error)
    return None


def _is_done(job: TuningJob) -> bool:
    """Raises UserError where the folder holds another tuning."""
    if not job.folder.exists(RECORD):
        return False
    if job.folder.read_json(RECORD).get("identity") != job.identity or not job.folder.exists(
        WEIGHTS
    ):
        raise UserError(
            f"{job.folder.address()} holds a tuning of other images, prompts or settings: give another "
            "folder with --out, or delete this one"
        )
    log.info("tuning: done before, in %s", job.folder.address())
    return True


def _meanings(run: Folder, class_names: tuple[str, ...]) -> dict[str, str]:
    """What the run has found of them; none where it has not come so far, or has other classes."""
    if not run.exists(MEANINGS):
        log.info("tuning: prompts name classes alone, as the run has no meanings yet")
        return {}
    return {
        entry["class_name"]: entry["choice"]
        for entry in read_meanings(run)
        if entry["class_name"] in class_names and entry.get("choice")
    }


def pinned(config: Config, folder: Folder, model: str) -> tuple[Config, dict[str, Any]]:
    """The config at the commits that the work in a folder began with, and these.

    Args:
        model: the section whose models are used, beside the training images.
    """
    commits = find_commits(config, read_commits(folder), ("data.train.", model))
    return at_commits(config, commits), commits
