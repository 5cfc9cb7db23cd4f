"""The classifier, how it is trained (paper, section 3.3), and how it is tested."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ray_synth.config.earlier import of_today
from ray_synth.config.section import Dtype, Fraction, Positive, Section, how, result
from ray_synth.errors import UserError

# training.baseline -> the arms that are trained on real images alone.
BASELINES: dict[str, tuple[str, ...]] = {
    "matched": ("real_only",),
    "recipe": ("recipe",),
    "both": ("real_only", "recipe"),
    "none": (),
}


class OptimizerConfig(Section):
    """A timm optimizer and its schedule."""

    name: str = result("adamw", description="any of timm's optimizers")
    lr: Annotated[float, Field(gt=0)] = result(1e-3)
    weight_decay: Annotated[float, Field(ge=0)] = result(0.05)
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = result(
        None, description="learning rates fall by this factor per layer, towards the input"
    )
    kwargs: dict[str, Any] = result(default_factory=dict, description="further arguments of timm's")
    schedule: Literal["cosine", "step", "multistep", "poly", "tanh", "constant"] = result("cosine")
    schedule_kwargs: dict[str, Any] = result(
        default_factory=dict, description="decay_milestones, decay_rate, ... (in steps)"
    )
    warmup_fraction: Fraction = result(0.05)
    min_lr_fraction: Fraction = result(0.01)
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = result(1.0)


class TrainingConfig(Section):
    """The classifier and how it is trained (paper, section 3.3)."""

    recipe: str | None = result(
        None, description="a named recipe, or a YAML file: defaults for what is not given here"
    )
    model: str = result("resnet50", description="any timm model name")
    model_kwargs: dict[str, Any] = result(default_factory=dict)
    pretrained: bool = result(False)
    checkpoint: str | None = result(None, description="a local safetensors file to start from")
    image_size: Positive = result(224)
    eval_image_size: Positive | None = result(None, description="default: image_size")
    augment: str | dict[str, Any] = result("imagenet", description="a policy, or its settings")
    mixup: Annotated[float, Field(ge=0)] = result(0.0, description="alpha, within one domain")
    cutmix: Annotated[float, Field(ge=0)] = result(0.0, description="alpha, within one domain")
    repeated_augmentation: Positive = result(
        1, description="draw each real image this many times, augmented differently each time"
    )
    feed: Literal["live", "lockstep", "stored"] = result("live")
    dual_bn: bool = result(True)
    dual_layer_norm: bool = result(False, description="twins for LayerNorm as well (ours)")
    steps: Positive | None = result(None, description="optimizer steps; or give epochs")
    epochs: Positive | None = result(None, description="passes over the real images")
    batch_size: Annotated[int, Field(ge=2)] = result(
        256, description="real + synthetic, per worker"
    )
    accumulate_steps: Positive = result(1, description="batches per optimizer step")
    real_fraction: Annotated[float, Field(gt=0, lt=1)] = result(0.5, description="of each batch")
    lambda_synth: Annotated[float, Field(ge=0)] = result(1.0, description="weight of L_synth")
    lambda_end: Annotated[float, Field(ge=0)] | None = result(
        None, description="go linearly from lambda_synth to this over the run"
    )
    class_balance: Fraction = result(
        0.0, description="draw classes by their counts (0) to equally often (1)"
    )
    label_smoothing: Fraction = result(0.0)
    loss: Literal["cross_entropy", "binary_cross_entropy"] = result("cross_entropy")
    target_threshold: Annotated[float, Field(ge=0, lt=1)] | None = result(
        None,
        description="binary_cross_entropy: a mixed image is wholly of each class that has more of it "
        "than this; default: in part",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = result(
        None, description="test an exponential moving average of the weights"
    )
    optimizer: OptimizerConfig = result(OptimizerConfig())
    dtype: Dtype = result("auto")
    compile: bool = result(False, description="torch.compile of the classifier")
    sync_bn: bool = result(False, description="BN statistics over all workers (on GPUs)")
    baseline: Literal["matched", "recipe", "both", "none"] = result(
        "matched",
        description="also train on real images alone: as many per step in as many steps as beside "
        "synthetic ones (matched), or the recipe at its own batch, rates and epochs (recipe)",
    )
    recipe_batch: Positive | None = result(
        None, description="images per step that the recipe's rates are made for"
    )
    warmup_images: Positive | None = result(None, description="live: default, two batches")
    memory_mb: Positive = how(
        8_192,
        description="of images that a worker keeps; more than that are read from storage as they are "
        "drawn",
    )
    decode_workers: Annotated[int, Field(ge=0)] | None = how(
        None,
        description="processes per worker that read, decode and crop; default: one less than num_cpus. "
        "0: one thread",
    )
    decode_on: Literal["node", "cluster"] = how(
        "node",
        description="cluster: decode_workers are tasks on any node's CPUs, where a GPU's own node has "
        "too few",
    )
    checkpoint_every: Positive = how(500)
    log_every: Positive = how(10)
    num_workers: Positive | tuple[Positive, Positive] = result(
        1, description="workers, or [fewest, most] on a cluster that shrinks and grows"
    )
    num_cpus: Annotated[float, Field(gt=0)] = how(1)
    num_gpus: Annotated[float, Field(ge=0)] = how(0)
    max_failures: Annotated[int, Field(ge=-1)] = how(
        3, description="failures without a new checkpoint between; -1: any number"
    )

    @field_validator("baseline", mode="before")
    @classmethod
    def _of_earlier_versions(cls, baseline: Any) -> Any:
        return of_today("training.baseline", baseline)

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give either steps or epochs")
        if not 1 <= round(self.batch_size * self.real_fraction) < self.batch_size:
            raise UserError(
                f"batch_size {self.batch_size} with real_fraction {self.real_fraction} leaves no "
                "room for both real and synthetic images"
            )
        if self.decode_on == "cluster" and not self.decode_workers:
            raise UserError(
                "decode_on: cluster needs decode_workers: how many CPUs decode for each worker"
            )
        if self.min_workers > self.max_workers:
            raise UserError(f"num_workers must be [fewest, most], got {self.num_workers}")
        if self.target_threshold is not None and self.loss != "binary_cross_entropy":
            raise UserError("target_threshold belongs to loss: binary_cross_entropy")
        if self.target_threshold == 0 and self.label_smoothing:
            raise UserError(
                "label_smoothing gives every class a part of each image, and target_threshold 0 would "
                "make it wholly of each: set one of them otherwise"
            )
        if "recipe" in self.baselines and not self.recipe:
            raise UserError(f"baseline {self.baseline} needs a training.recipe")
        if (self.mixup or self.cutmix) and (self.num_real % 2 or self.num_synth % 2):
            raise UserError(
                f"mixup and cutmix pair the images of a domain: {self.num_real} real and "
                f"{self.num_synth} synthetic images per batch must both be even"
            )
        return self

    @property
    def baselines(self) -> tuple[str, ...]:
        """The arms that are trained on real images alone."""
        return BASELINES[self.baseline]

    @property
    def min_workers(self) -> int:
        """Workers without which training does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Workers at most."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def fits_in_memory(self, images: int) -> bool:
        """Whether a worker keeps so many decoded images in memory."""
        return images * 3 * self.image_size**2 <= self.memory_mb << 20

    @property
    def decoders(self) -> int:
        """Processes of each worker that decode."""
        given = self.decode_workers
        return max(0, int(self.num_cpus) - 1) if given is None else given

    @property
    def num_real(self) -> int:
        """Real images in each worker's batch."""
        return round(self.batch_size * self.real_fraction)

    @property
    def num_synth(self) -> int:
        """Synthetic images in each worker's batch."""
        return self.batch_size - self.num_real


class EvaluationConfig(Section):
    """How trained models are tested."""

    batch_size: Positive = how(256)
    bns: list[Literal["main", "aux", "average", "blend"]] = result(
        ["main", "aux"],
        description="of a dual-BN model, tested one by one; blend: both, by a weight that is chosen on "
        "the validation images",
    )
    dtype: Dtype = result(
        "float32",
        description="of the models in the test; auto: half where the device computes in it",
    )
    num_actors: Positive = how(1)
    num_cpus: Annotated[float, Field(gt=0)] = how(1)
    num_gpus: Annotated[float, Field(ge=0)] = how(0)
