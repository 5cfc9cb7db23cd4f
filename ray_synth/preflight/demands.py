"""What each stage of a run asks of the cluster at once, by its config; pure.

Counted are the units that hold CPUs and GPUs. Serve's controller and proxies, Ray Train's controller, Ray
Data's helpers and the progress board hold none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_synth.config import Config
from ray_synth.preflight.packing import Demand
from ray_synth.prompting.budgets import class_budgets, planned

READ = "a read task"
READ_CPUS = 1.0  # Ray Data needs room for one task that reads or selects, beside its actors
SERVE_CPUS = 0.1  # the ingress
INSPECT_CPUS = 0.5  # a task that decodes training images


@dataclass(frozen=True)
class Sizes:
    """How much there is to do; None where it is not known.

    Attributes:
        real: training images.
        classes: their classes.
        tests: test images by set.
        counts: training images by class name.
    """

    real: int | None = None
    classes: int | None = None
    tests: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] | None = None

    def synthetic(self, config: Config) -> int | None:
        """Images that the plan will have."""
        prompting = config.prompting
        budgets = class_budgets(prompting, self.counts) if self.counts else None
        if budgets is not None:
            return int(budgets.sum())
        if self.real is None or isinstance(prompting.fill_to, int):
            return None
        return planned(prompting.multiplier, self.real)


def demands(config: Config, sizes: Sizes | None = None) -> dict[str, list[Demand]]:
    """For each stage, what must run at once. Pools and elastic groups count with their fewest.

    Where the number of images is not known, they are taken to be streamed.
    """
    sizes = sizes or Sizes()
    llm, clip = config.meaning.llm, config.meaning.clip
    generation, training, evaluation = config.generation, config.training, config.evaluation
    read = Demand(READ, 1, READ_CPUS)
    pool = Demand(
        "generation.pool.min_size",
        generation.pool.min_size,
        generation.num_cpus,
        generation.num_gpus,
    )
    workers = Demand(
        "training.num_workers", training.min_workers, training.num_cpus, training.num_gpus
    )
    service = [
        Demand("meaning.llm.replicas", fewest(llm.replicas), llm.num_cpus, llm.num_gpus),
        Demand("meaning.clip.replicas", fewest(clip.replicas), clip.num_cpus, clip.num_gpus),
        Demand("the Serve ingress", 1, SERVE_CPUS),
    ]
    checks = generation.checks
    judge = Demand("the task that measures quality", 1, clip.num_cpus, clip.num_gpus)
    tester = Demand(
        "evaluation.num_actors", evaluation.num_actors, evaluation.num_cpus, evaluation.num_gpus
    )
    return {
        "data": [Demand("a task that decodes", 1, INSPECT_CPUS)],
        "meaning": service if config.meaning.enabled else [],
        "plan": service if asks_for_contexts(config) else [],
        "quality": [judge] if checks.need_clip else [],
        "generation": [pool, read],
        "training": [
            workers,
            *([pool] if training.feed != "stored" else []),
            *([read] if _streams(config, sizes) else []),
            *([Demand("a task that decodes", 1, 1.0)] if training.decode_on == "cluster" else []),
        ],
        "evaluation": [tester, read],
    }


def shared_training_gpu(config: Config) -> str:
    """What is wrong where several training workers have a fraction of a GPU each; "" where nothing is.

    Ray may put two of them on one GPU, and NCCL refuses two ranks of a group there.
    """
    training = config.training
    if training.max_workers == 1 or not 0 < training.num_gpus < 1:
        return ""
    return (
        f"training: {training.max_workers} workers with {training.num_gpus:g} of a GPU each; NCCL "
        "refuses two workers on one GPU: give each a whole one, or take one worker"
    )


def asks_for_contexts(config: Config) -> bool:
    """Whether the language model writes scenes."""
    prompting = config.prompting
    return bool(set(prompting.mix) - {"plain"}) and prompting.contexts_per_class > 0


def _streams(config: Config, sizes: Sizes) -> bool:
    """Whether training reads synthetic images through Ray Data; real ones its workers read themselves."""
    training, synthetic = config.training, sizes.synthetic(config)
    if training.feed != "stored" or synthetic is None:
        return True
    return not training.fits_in_memory(synthetic)


def fewest(count: int | tuple[int, int]) -> int:
    """The least that must run, of a number or of [fewest, most]."""
    return count if isinstance(count, int) else count[0]
