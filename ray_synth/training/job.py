"""What a training worker is told: one arm of a run, by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_synth.config import TrainingConfig
from ray_synth.data.dataset import Index
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stored import StoredRows
from ray_synth.prompting.plan_file import PLAN_FILE
from ray_synth.storage.folder import Folder

if TYPE_CHECKING:
    import pyarrow as pa

STATE_FILE = "state.pt"  # a learner and all that changes with it


@dataclass(frozen=True)
class TrainJob:
    """All that a worker needs.

    Attributes:
        arm: names the files under `models/` and the curves; `mixed`, `real_only`, ...
        steps: optimizer steps; each sees the same number of real images in all arms.
        real: the index of real training images.
        num_synthetic: this many first rows of the run's plan are trained on; 0: real images alone.
        stored: where the synthetic images of a finished store lie, if not read into memory.
        source: where the plan and its images lie, if not in `folder`.
        tracking: MLflow's uri and run id, or None.
        board: the progress board's handle.
        num_threads: of torch, on CPUs; default: all cores.
        stop: the step at which this part of the training ends; default: the last. Rates and lambda are
            those of the whole.
        segment: number of the part; the order of synthetic images is its own.
        begin: the step at which this part begins.
        fresh_from: the plan's first row that no part before has trained on; where images are streamed,
            those from it on come first.
        publish: the folder of the models that this part leaves; default: `folder`.
        resume: where the part before has left its state, for a part of which there is no checkpoint.
        keep_state: leave the state at the end with the models, for the next part.
    """

    arm: str
    config: TrainingConfig
    steps: int
    class_names: tuple[str, ...]
    seed: int
    folder: Folder
    real: Index
    max_pixels: int
    num_synthetic: int = 0
    stored: StoredRows | None = None
    source: Folder | None = None
    tracking: dict[str, str] | None = None
    board: Any = None
    num_threads: int | None = None
    stop: int | None = None
    segment: int = 0
    begin: int = 0
    fresh_from: int = 0
    publish: Folder | None = None
    resume: Folder | None = None
    keep_state: bool = False

    @property
    def end(self) -> int:
        """The step at which this job ends."""
        return self.steps if self.stop is None else self.stop

    @property
    def mixed(self) -> bool:
        """Whether synthetic images are trained on."""
        return self.num_synthetic > 0

    @property
    def num_synth(self) -> int:
        """Synthetic images in each worker's batch."""
        return self.config.num_synth if self.mixed else 0

    @property
    def store(self) -> ImageStore:
        return ImageStore((self.source or self.folder).child("images"))

    def read_plan(self) -> pa.Table:
        """The rows of the plan that are trained on."""
        return (self.source or self.folder).read_rows(PLAN_FILE, 0, self.num_synthetic)

    @property
    def holds_real(self) -> bool:
        """Whether each worker holds the real images in memory, few as they are."""
        return self.config.fits_in_memory(len(self.real))

    @property
    def reads_store(self) -> bool:
        """Whether each worker loads the finished store itself, small as it is."""
        return self.config.feed == "stored" and self.config.fits_in_memory(self.num_synthetic)


def total_steps(config: TrainingConfig, num_real_images: int) -> int:
    """Optimizer steps of a run: given, or the real epochs' (at least one each, of all workers)."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    a_step = config.num_real * config.max_workers * config.accumulate_steps
    return config.epochs * max(1, num_real_images // a_step)
