"""The recipe as it was published: the baseline `recipe`, and the results it has to reach. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_synth.config import TrainingConfig, load_recipe, parse_config
from ray_synth.errors import UserError


@dataclass(frozen=True)
class Published:
    """What a recipe's authors report: top-1 in percent on ImageNet-1k's validation set, at 224 px.

    Attributes:
        model: timm's name of the model.
        top1: of training from scratch on ImageNet-1k alone.
        source: where it is reported.
    """

    model: str
    top1: float
    source: str


PUBLISHED = {
    "resnet50_a1": Published("resnet50", 80.4, "arXiv 2110.00476"),
    "resnet50_a2": Published("resnet50", 79.8, "arXiv 2110.00476"),
    "resnet50_a3": Published("resnet50", 78.1, "arXiv 2110.00476"),
    "convnext_tiny": Published("convnext_tiny", 82.1, "arXiv 2201.03545"),
    "convnext_small": Published("convnext_small", 83.1, "arXiv 2201.03545"),
    "convnext_base": Published("convnext_base", 83.8, "arXiv 2201.03545"),
    "vit_large": Published("deit3_large_patch16_224", 84.2, "arXiv 2204.07118"),
}
IMAGENET_CLASSES = 1000


def published_result(training: dict[str, Any], num_classes: int) -> Published | None:
    """What is reported for the recipe of a run, where the run is of the same model and 1,000 classes.

    Args:
        training: the settings of `training`, of whatever version.
    """
    found = PUBLISHED.get(str(training.get("recipe")))
    same = found and found.model == training.get("model") and num_classes == IMAGENET_CLASSES
    return found if same else None


def recipe_alone(training: TrainingConfig) -> TrainingConfig:
    """The config's recipe on real images alone, with its own batch, rates and length.

    Workers, devices and precision are the config's. The recipe's batch is shared out over the workers,
    and accumulated where a worker's share is larger than the config's batch.

    Raises:
        UserError: the recipe does not say its batch, or it cannot be shared out; or the config trains
            another model or image size than the recipe.
    """
    assert training.recipe is not None
    recipe = load_recipe(training.recipe)
    for key in ("model", "image_size", "eval_image_size"):
        own = recipe.get(key, TrainingConfig.model_fields[key].get_default())
        if getattr(training, key) != own:
            raise UserError(
                f"training.baseline {training.baseline}: recipe {training.recipe} has {key} {own}, "
                f"training.{key} is {getattr(training, key)}: a gain over it would be none of the "
                "images; take baseline: matched"
            )
    whole = recipe.get("recipe_batch")
    if whole is None:
        raise UserError(
            f"training.baseline {training.baseline}: recipe {training.recipe} does not say its "
            "recipe_batch, the images per step that its rates are made for"
        )
    parts = _shares(whole, training)
    given = training.model_dump()
    values = {**{key: given[key] for key in _KEPT}, **recipe, "dtype": training.dtype}
    values |= {
        "recipe": training.recipe,
        "batch_size": 2 * (whole // (training.max_workers * parts)),  # its real half is trained on
        "real_fraction": 0.5,
        "accumulate_steps": parts,
    }
    return parse_config(values, origin=f"recipe {training.recipe}", model=TrainingConfig)


# What a recipe does not decide: where and how fast it is trained, and from which draw of the classes.
_KEPT = (
    "compile", "sync_bn", "class_balance", "memory_mb", "decode_workers", "decode_on",
    "checkpoint_every", "log_every", "num_workers", "num_cpus", "num_gpus", "max_failures", "feed",
)  # fmt: skip


def _shares(whole: int, training: TrainingConfig) -> int:
    """Batches per step, the fewest that a worker has room for. Raises UserError where none is even."""
    workers = training.max_workers
    for parts in range(1, whole // workers + 1):
        each, rest = divmod(whole, workers * parts)
        if not rest and each % 2 == 0 and each <= training.batch_size:
            return parts
    raise UserError(
        f"training.baseline {training.baseline}: recipe {training.recipe} takes {whole} images per "
        f"step, which cannot be shared out evenly over {workers} workers in even batches of at most "
        f"{training.batch_size}"
    )


def check_recipe_batch(training: TrainingConfig) -> str:
    """What to say where the mixed arm does not take the recipe's whole batch in real images; else ""."""
    real = training.num_real * training.max_workers * training.accumulate_steps
    if training.recipe_batch in (None, real):
        return ""
    return (
        f"training takes {real} real images per step, and the rates of recipe {training.recipe} are "
        f"for {training.recipe_batch}: a matched baseline is weaker than the published one; raise "
        "batch_size or accumulate_steps, or take baseline: recipe"
    )
