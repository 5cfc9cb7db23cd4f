"""One run: its config, its directory and its real images; what is checked before it begins."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass
from typing import Any

import ray_synth
from ray_synth.cluster.connection import runs_folder
from ray_synth.config import Config, TrainingConfig
from ray_synth.data.dataset import Index, left_out
from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.store import ImageStore
from ray_synth.generators.licences import LICENCES, licences, warning
from ray_synth.generators.registry import advise, check_generator, check_plan, filled, fingerprint
from ray_synth.pipeline.commits import at_commits, find_commits, read_commits
from ray_synth.pipeline.kept import check_kept
from ray_synth.pipeline.practice import check_practice
from ray_synth.pipeline.records import CLEARED, StageRecords, adopt_older
from ray_synth.pipeline.sets import RealSets, open_sets
from ray_synth.pipeline.take_over import check_take_over
from ray_synth.preflight.demands import Sizes
from ray_synth.preflight.reach import is_local
from ray_synth.preflight.refusals import refuse_early
from ray_synth.prompting.plan_file import PlanFile
from ray_synth.prompting.plan_settings import prompt_limit
from ray_synth.prompting.rounds import steerings
from ray_synth.stages import REPORT, stage_inputs, up_to
from ray_synth.storage.folder import Folder
from ray_synth.storage.hub import MODELS
from ray_synth.training.job import TrainJob, total_steps
from ray_synth.training.published import recipe_alone
from ray_synth.training.trainer import check_recipe

log = logging.getLogger("ray_synth")
VERSIONS = ("ray", "torch", "diffusers", "transformers", "open_clip_torch", "timm", "mlflow")


@dataclass(frozen=True)
class Run:
    """One run: its config, its directory, and its real images; none of them is opened yet.

    Attributes:
        config: with the commits that models and data of a hub are at.
        sets: training images, without the corrupt ones once they were inspected; and all others.
        commits: what models.json has of them, which lies in `kept_in`.
    """

    config: Config
    runs: Folder
    folder: Folder
    records: StageRecords
    sets: RealSets
    commits: dict[str, Any]
    kept_in: Folder

    @property
    def train(self) -> Index:
        return self.sets.train

    @property
    def tests(self) -> dict[str, Index]:
        return self.sets.tests

    @property
    def validation(self) -> Index:
        return self.sets.validation

    @property
    def store(self) -> ImageStore:
        return ImageStore(self.folder.child("images"))

    @property
    def sizes(self) -> Sizes:
        """How much there is to do."""
        tests = {name: len(index) for name, index in self.tests.items()}
        return Sizes(
            len(self.train), len(self.train.class_names), tests, counts=self.train.counts()
        )

    @property
    def left_out(self) -> list[str]:
        """What is not used of the data, a sentence for each kind of it."""
        return left_out(self.train, self.tests)

    def todo(self, until: str) -> list[str]:
        """The stages up to one, or to `report`, that are not done."""
        return [stage for stage in up_to(until) if self.records.record(stage) is None]

    @property
    def arms(self) -> list[str]:
        """What is trained: the baselines that are asked for, and the mixed model."""
        return [*self.config.training.baselines, "mixed"]

    def arm_config(self, arm: str) -> TrainingConfig:
        """How an arm is trained."""
        training = self.config.training
        return recipe_alone(training) if arm == "recipe" else training

    def train_job(self, arm: str, *, num_synthetic: int, **others: Any) -> TrainJob:
        """What a training worker is told of an arm; `others` are fields of `TrainJob` that differ."""
        training = others.get("config") or self.arm_config(arm)
        own = {
            "config": training,
            "steps": total_steps(training, len(self.train)),
            "class_names": self.train.class_names,
            "seed": self.config.seed,
            "folder": self.folder,
            "real": self.train,
            "max_pixels": self.config.data.max_pixels,
        }
        return TrainJob(arm=arm, num_synthetic=num_synthetic, **{**own, **others})

    def generation_job(self, board: Any = None) -> GenerationJob:
        practice = self.config.prompting.practice
        return GenerationJob(
            self.config.generation,
            PlanFile(self.folder),
            self.store,
            run=self.folder,
            clip=self.config.meaning.clip,
            board=board,
            steering=steerings(practice, self.folder) if practice else (),
        )


def open_run(
    config: Config, force_stage: str | None = None, *, kept_in: Folder | None = None
) -> Run:
    """Check everything that can be checked without a cluster, and begin the run directory.

    Args:
        kept_in: the folder of models.json, where it is not the run's own: runs that share results take
            the same commits.

    Raises:
        ValueError: bad data, an unknown model, or a directory that holds other settings' results.
    """
    run = check_run(config, force_stage, kept_in=kept_in)
    check_kept(run)
    begin(run, force_stage)
    return run


def check_run(
    config: Config, force_stage: str | None = None, *, kept_in: Folder | None = None
) -> Run:
    """The run of a config, with all that can be known to be wrong looked for; nothing is written.

    Raises:
        ValueError: as `open_run` does.
    """
    runs = runs_folder(config.runs_dir)
    folder = runs.child(config.name)
    folder.check_readable()
    kept_in = kept_in or folder
    commits = read_commits(kept_in)
    if commits or not folder.exists("config.yaml"):  # a run of before there were commits has none
        commits = find_commits(config, commits)
    pinned = at_commits(config, commits)
    generation = filled(pinned.generation)
    # Finished stages are compared by what was asked for: a branch's name, not its commit.
    given = {"revision": config.generation.revision, "adapters": config.generation.adapters}
    asked = generation.model_copy(update=given)
    inputs = stage_inputs(config.model_copy(update={"generation": asked}), fingerprint(asked))
    config = pinned.model_copy(update={"generation": generation})
    records = StageRecords(folder, inputs)
    records.redo(force_stage)
    sets = open_sets(config, records, folder, kept_in)
    if records.record("generation") is None:
        check_take_over(config, sets.train.class_names, folder)
    records.check()
    if records.record("generation") is None:
        check_generator(config.generation)
        advise(config.generation, config.prompting.negative_prompt, sets.train.class_names)
    if records.record("plan") is None:
        prompt_limit(config)
    if records.record("training") is None:
        check_recipe(config.training)
    run = Run(config, runs, folder, records, sets, commits, kept_in)
    planned = run.sizes.synthetic(config)
    # Of a run that goes on from another, what is missing is known when its plan is written.
    if planned is not None and config.take_over is None and records.record("generation") is None:
        check_plan(config.generation, planned)
    if config.prompting.practice and records.record("training") is None:
        check_practice(run)
    refuse_early(config, sets.train.class_names, run.todo(REPORT), local=is_local(config))
    return run


def _clear(store: ImageStore, stage: str) -> None:
    """Empty the store, and say what goes with it."""
    sizes = [size for size, _ in store.folder.stamps().values()]
    if parts := len(store.parts()):
        log.warning(
            "--force-stage %s deletes the %d files of images (%.1f MB) in %s: all are made again",
            stage, parts, sum(sizes) / 1e6, store.folder.address(),
        )  # fmt: skip
    store.clear()


def begin(run: Run, force_stage: str | None = None) -> None:
    """Keep the config in the run directory, and forget what is to be done again.

    Raises:
        ValueError: nothing can be written there.
    """
    adopt_older(run.folder, run.records.inputs["plan"]["generator"])
    run.records.forget()
    if force_stage in CLEARED:
        _clear(run.store, force_stage)
    if run.records.record("generation") is None:
        run.folder.check_writable()
    if run.records.record("plan") is None:  # later starts ask the hub for no card
        found = licences(run.config)
        run.folder.write_json(LICENCES, [licence.as_dict() for licence in found])
        if line := warning(found):
            log.warning("%s", line)
    for name in ("data", "images", "images/rejected", "models", "quality", "report", "stages"):
        run.folder.child(name).sweep()
    run.folder.sweep()
    if run.commits != read_commits(run.kept_in):
        run.kept_in.write_json(MODELS, run.commits)
    # Uploaded code has no metadata of its own.
    versions = {"ray-synth": ray_synth.__version__}
    versions |= {name: importlib.metadata.version(name) for name in VERSIONS}
    values = run.config.model_dump(mode="json")
    run.folder.write_yaml("config.yaml", {**values, "versions": versions})
