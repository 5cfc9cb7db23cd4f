"""Runs from Python: each stage as a function of a config, and what a run's directory holds.

The verbs of the command call these. What is done is skipped, what was begun goes on; one process at a
time works on a run. Ray is started for a call, or joined as `cluster` of the config says, and left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_synth.cluster.connection import runs_folder
from ray_synth.config import Config, load_run_config
from ray_synth.meaning.entries import read_meanings
from ray_synth.pipeline.runner import run_pipeline
from ray_synth.report.status import RunStatus, read_status
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    from ray_synth.generation.store import ImageStore
    from ray_synth.prompting.plan_file import PlanFile


class Run:
    """What a run's directory holds; nothing is started or written, and its real images are not needed.

        >>> run = Run("runs/finished")
        >>> run.status().verdict
        'done'
        >>> run.meanings()["six"]
        'a number 6'
        >>> len(run.plan)
        32

    Args:
        place: the directory, its URI (`s3://...`), or the config of a run, begun or not.

    Attributes:
        folder: where it is kept, on disk or in a bucket.

    Raises:
        UserError: its storage does not answer.
    """

    def __init__(self, place: str | Config) -> None:
        if isinstance(place, Config):
            self.folder = runs_folder(place.runs_dir).child(place.name)
        else:
            self.folder = Folder(place)
        self.folder.check_readable()

    def __repr__(self) -> str:
        return f"Run({self.folder.address()!r})"

    @property
    def config(self) -> Config:
        """The settings that it was begun with. Raises UserError where there is no run."""
        return load_run_config(self.folder)

    def status(self) -> RunStatus:
        """How it stands: `verdict`, `message`, and `stages`. Raises UserError where there is no run."""
        return read_status(self.folder)

    def meanings(self) -> dict[str, str | None]:
        """Class name -> the meaning that was chosen; DamagedFile where there are none yet."""
        return {entry["class_name"]: entry.get("choice") for entry in read_meanings(self.folder)}

    @property
    def plan(self) -> PlanFile:
        """The prompts: `len(run.plan)`, `run.plan.rows(0, 10)`; never read whole."""
        from ray_synth.prompting.plan_file import PlanFile

        return PlanFile(self.folder)

    @property
    def images(self) -> ImageStore:
        """The images: `run.images.tables(...)` goes through them part by part."""
        from ray_synth.generation.store import ImageStore

        return ImageStore(self.folder.child("images"))

    def metrics(self) -> dict[str, Any]:
        """metrics.json, as the report left it: accuracies, gains, rates and times."""
        return self.folder.read_json("metrics.json")


def resolve_meanings(config: Config, *, force_stage: str | None = None) -> dict[str, str]:
    """What each class name means, by the language model's candidates and CLIP (paper, section 3.1).

    Args:
        force_stage: do this stage and all later ones again, as `--force-stage`; of all functions here.

    Returns:
        Class name -> meaning; meanings.json has the candidates and scores.

    Raises:
        UserError: something is wrong with the config, its data or what the run has kept, or another
            driver works on the run; of all functions here.
    """
    return run_pipeline(config, until="meaning", force_stage=force_stage)


def plan(config: Config, *, force_stage: str | None = None) -> dict[str, Any]:
    """The prompts of all images, after what must come before them (section 3.2).

    Returns:
        `num_synthetic` rows of `Run.plan`, `context_sources` (rows by who wrote their scene), how many
        prompts were `shortened`, and the plan's `digest`.
    """
    return run_pipeline(config, until="plan", force_stage=force_stage)


def generate(config: Config, *, force_stage: str | None = None) -> dict[str, Any]:
    """The images of the plan, after what must come before them.

    Returns:
        `made_in_this_stage`, `num_synthetic` in the store, those `rejected` and their
        `reject_reasons`, `images_per_actor_second`, and `facts`: hours, cost, retries. Nothing where the
        plan comes in rounds (`prompting.practice`), of which training plans the later ones.
    """
    return run_pipeline(config, until="generation", force_stage=force_stage)


def train(config: Config, *, force_stage: str | None = None) -> dict[str, Any]:
    """The models, on real and synthetic images, while these are made (section 3.3).

    Returns:
        `steps` of the mixed model, and `seconds` by arm. The weights lie in `models/` of the run.
    """
    return run_pipeline(config, until="training", force_stage=force_stage)


def evaluate(config: Config, *, force_stage: str | None = None) -> dict[str, Any]:
    """All models on all test sets, after what must come before them.

    Returns:
        `results` by model, BatchNorm and test set, with counts and 95% intervals; `corrupt`: images
        that could not be read. `run_pipeline` goes on to gains and the report.
    """
    return run_pipeline(config, until="evaluation", force_stage=force_stage)
