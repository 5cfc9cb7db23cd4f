"""The training recipe, thin over timm and torchvision: model, optimizer, schedule, images, loss.

In: names and numbers from the config, and decoded uint8 RGB images. Out: the objects a training
loop needs. The same recipe serves the real-only baseline and the mixed run.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler
    from timm.utils import ModelEmaV3

INTERPOLATIONS = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
}


@dataclass(frozen=True)
class Augmentation:
    """What a training image may suffer; the defaults do nothing. Equal for real and synthetic.

    Before batching, on one uint8 image at its own size:
        crop_scale: area range of a random resized crop; None resizes and crops the centre.
        rand_augment: magnitude (0 to 30) of torchvision's RandAugment with 2 operations; 0 is off.
    On the batch, on its device, drawn anew for every image:
        flip: probability of a horizontal flip.
        rotate, shear: largest angle in degrees, to either side.
        translate: largest shift as a fraction of the side.
        scale: range of the zoom factor.
        invert: probability of a colour inversion.
        grayscale: probability of dropping the colour.
        brightness, contrast: largest relative change, to either side.
        noise: largest standard deviation of Gaussian noise, of a range of 1.
        erase: probability of blanking a rectangle of 2 to 20 % of the area.
    """

    crop_scale: tuple[float, float] | None = None
    rand_augment: int = 0
    flip: float = 0.0
    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    invert: float = 0.0
    grayscale: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    erase: float = 0.0


POLICIES: dict[str, Augmentation] = {
    "none": Augmentation(),
    # Always grayscale: real digits have no colour, so it would only tell the domains apart.
    "digits": Augmentation(rotate=15, shear=15, translate=0.1, scale=(0.75, 1.25), grayscale=1.0),
    "imagenet": Augmentation(crop_scale=(0.08, 1.0), flip=0.5),
    "imagenet_strong": Augmentation(crop_scale=(0.08, 1.0), flip=0.5, rand_augment=9, erase=0.25),
}


class ImageTransform:
    """From decoded images to normalised batches, in the two halves a data pipeline needs.

    `prepare` brings one image of any size to (3, size, size) uint8, on the host, before batching;
    `batch` takes such images stacked, on any device, to normalised floats. Calling the transform
    does both, for one image (3, h, w) or a list of them.
    """

    def __init__(
        self,
        image_size: int,
        *,
        augmentation: Augmentation,
        crop_pct: float = 1.0,
        interpolation: str = "bilinear",
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"unknown interpolation {interpolation!r}: choose one of "
                f"{', '.join(INTERPOLATIONS)}"
            )
        mode = INTERPOLATIONS[interpolation]
        self.image_size = image_size
        self.augmentation = augmentation
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        steps: list[nn.Module]
        if augmentation.crop_scale is not None:
            steps = [
                v2.RandomResizedCrop(
                    image_size, scale=augmentation.crop_scale, interpolation=mode, antialias=True
                )
            ]
        else:
            shorter_side = round(image_size / crop_pct)
            steps = [
                v2.Resize(shorter_side, interpolation=mode, antialias=True),
                v2.CenterCrop(image_size),
            ]
        if augmentation.rand_augment:
            steps.append(v2.RandAugment(magnitude=augmentation.rand_augment, interpolation=mode))
        self._prepare = v2.Compose(steps)

    def prepare(self, image: Tensor) -> Tensor:
        """Resize and crop one image: (3, h, w) uint8 to (3, size, size) uint8."""
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(
                f"an image must be (3, height, width) uint8, got {tuple(image.shape)} "
                f"{image.dtype}: decode it as RGB"
            )
        return self._prepare(image)

    def batch(self, images: Tensor) -> Tensor:
        """Augment and normalise (batch, 3, size, size) uint8; returns float32 on its device."""
        x = augment_batch(images.float() / 255, self.augmentation)
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def __call__(self, images: Tensor | Iterable[Tensor]) -> Tensor:
        """(3, h, w) uint8 to (3, size, size) float32, or a list of such to a batch."""
        if isinstance(images, Tensor) and images.ndim == 3:
            return self.batch(self.prepare(images)[None])[0]
        return self.batch(torch.stack([self.prepare(image) for image in images]))


def train_transform(
    image_size: int,
    augment: str | Mapping[str, Any] = "imagenet",
    *,
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> ImageTransform:
    """The training transform.

    Args:
        image_size: side of the square the model sees.
        augment: a policy of `POLICIES`, or a mapping of `Augmentation` fields, in which the key
            `policy` names the one to start from (`none` without it).

    Raises:
        ValueError: for an unknown policy, field or interpolation.
    """
    return ImageTransform(
        image_size,
        augmentation=resolve_augmentation(augment),
        interpolation=interpolation,
        mean=mean,
        std=std,
    )


def eval_transform(
    image_size: int,
    *,
    crop_pct: float = 1.0,
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> ImageTransform:
    """The test transform: the shorter side to image_size / crop_pct, then the centre square."""
    return ImageTransform(
        image_size,
        augmentation=POLICIES["none"],
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=mean,
        std=std,
    )


def resolve_augmentation(augment: str | Mapping[str, Any]) -> Augmentation:
    """A policy name, or a mapping of fields over a policy, as an `Augmentation`."""
    settings: dict[str, Any] = {"policy": augment} if isinstance(augment, str) else dict(augment)
    policy = settings.pop("policy", "none")
    if policy not in POLICIES:
        raise ValueError(f"unknown augmentation policy {policy!r}{_nearest(policy, POLICIES)}")
    known = [field.name for field in fields(Augmentation)]
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"unknown augmentation setting {name!r}{_nearest(name, known)}")
        if isinstance(value, list):
            settings[name] = tuple(value)
    return Augmentation(**{**asdict(POLICIES[policy]), **settings})


def augment_batch(x: Tensor, augmentation: Augmentation) -> Tensor:
    """Apply the batch half of `augmentation` to (batch, 3, h, w) floats in 0..1.

    torchvision draws one set of parameters for a whole batch; here every image gets its own.
    """
    a = augmentation
    n, device = x.shape[0], x.device

    def symmetric(limit: float) -> Tensor:
        return torch.empty(n, device=device).uniform_(-limit, limit)

    def chosen(probability: float) -> Tensor:
        return (torch.rand(n, device=device) < probability).view(n, 1, 1, 1)

    if a.rotate or a.shear or a.translate or a.scale != (1.0, 1.0):
        angle, shear = symmetric(math.radians(a.rotate)), symmetric(math.radians(a.shear)).tan()
        zoom = torch.empty(n, device=device).uniform_(*a.scale)
        # Rows of the inverse map, from output to input, in the -1..1 coordinates of grid_sample;
        # a shift of a fraction f of the side is 2f there.
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        theta = torch.stack(
            [
                torch.stack([cos, sin + shear * cos, symmetric(2 * a.translate)], dim=1),
                torch.stack([-sin, cos - shear * sin, symmetric(2 * a.translate)], dim=1),
            ],
            dim=1,
        )
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        # Border padding: black corners would be a mark of augmentation on bright backgrounds.
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    if a.flip:
        x = torch.where(chosen(a.flip), x.flip(-1), x)
    if a.grayscale:
        x = torch.where(chosen(a.grayscale), v2.functional.rgb_to_grayscale(x, 3), x)
    if a.invert:
        x = torch.where(chosen(a.invert), 1 - x, x)
    if a.brightness:
        x = (x * (1 + symmetric(a.brightness)).view(n, 1, 1, 1)).clamp(0, 1)
    if a.contrast:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (mean + (x - mean) * (1 + symmetric(a.contrast)).view(n, 1, 1, 1)).clamp(0, 1)
    if a.noise:
        strength = torch.rand(n, 1, 1, 1, device=device) * a.noise
        x = (x + strength * torch.randn_like(x)).clamp(0, 1)
    if a.erase:
        erase = v2.RandomErasing(p=a.erase, scale=(0.02, 0.2), value=0.5)
        x = torch.stack([erase(image) for image in x])
    return x


def build_model(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model by name.

    Args:
        name: a timm model (`resnet50`, `resnet50.a1_in1k`), or with a prefix of timm's, such as
            `hf-hub:` or `local-dir:`.
        num_classes: size of the classifier.
        pretrained: fetch timm's weights.
        checkpoint: a safetensors file to start from; a classifier of another size is left out.
        model_kwargs: further arguments of the timm model.

    Raises:
        ValueError: for an unknown name (with the nearest ones), for arguments that the model
            refuses, or for a checkpoint that does not fit.
    """
    import timm

    if ":" not in name and not timm.is_model(name):
        raise ValueError(f"unknown timm model {name!r}{_nearest(name, timm.list_models())}")
    try:
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, **(model_kwargs or {})
        )
    except TypeError as error:
        raise ValueError(f"timm model {name!r} refuses model_kwargs: {error}") from error
    if checkpoint is not None:
        _load_checkpoint(model, Path(checkpoint))
    return model


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """A timm optimizer by name (`sgd`, `adamw`, `lamb`, ...).

    Biases and norm layers get no weight decay. `options` go to `timm.optim.create_optimizer_v2`
    (`momentum`, `betas`, `layer_decay`, ...).

    Raises:
        ValueError: for an unknown name, with the nearest ones.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    known = [str(known_name) for known_name in list_optimizers()]
    if name.lower() not in known:
        raise ValueError(f"unknown optimizer {name!r}{_nearest(name, known)}")
    return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay, **options)


def build_schedule(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup_steps: int = 0, min_lr: float = 0.0
) -> "Scheduler":
    """timm's cosine schedule over `steps` updates, after a linear warm-up that is part of them.

    After update `step` (counted from 1) call `schedule.step_update(step)`. The rate is a function
    of the step alone, so resuming needs nothing else.

    Raises:
        ValueError: when the warm-up leaves no step.
    """
    from timm.scheduler import CosineLRScheduler

    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and less than steps, got {warmup_steps} of {steps}"
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        # Not 0, which would waste the first update.
        warmup_lr_init=max(group["lr"] for group in optimizer.param_groups) / (warmup_steps + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def build_ema(model: nn.Module, decay: float) -> "ModelEmaV3":
    """timm's exponential moving average, warmed up; `ema.update(model, step)` after each update."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def mixed_loss(
    logits: Tensor,
    targets: Tensor,
    num_real: int,
    lambda_synth: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """L = L_real + lambda * L_synth (arXiv 2312.02253, section 3.3), each a mean over its rows.

    Args:
        logits: (batch, classes), real rows first.
        targets: (batch,) class indices, or (batch, classes) probabilities.
        num_real: how many of the rows are real; the loss of an absent domain is 0.

    Returns:
        The total, and the two domains' losses, unweighted.
    """
    if not 0 <= num_real <= len(logits):
        raise ValueError(f"num_real must be 0 to {len(logits)}, the batch size, got {num_real}")

    def mean_loss(rows: slice) -> Tensor:
        if logits[rows].numel() == 0:
            return logits.new_zeros(())
        return F.cross_entropy(logits[rows], targets[rows], label_smoothing=label_smoothing)

    loss_real, loss_synth = mean_loss(slice(num_real)), mean_loss(slice(num_real, None))
    return loss_real + lambda_synth * loss_synth, loss_real, loss_synth


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"checkpoint {path} must be an existing .safetensors file")
    weights, own = load_file(path), model.state_dict()
    classifier = getattr(model, "default_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for key in [key for key in weights if key.startswith(tuple(f"{head}." for head in heads))]:
        if key in own and own[key].shape != weights[key].shape:
            weights[key] = own[key]
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} does not fit the model: {error}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest known ones, or all when few."""
    known = list(known)
    matches = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if matches:
        return f": did you mean {' or '.join(matches)}?"
    return f": choose one of {', '.join(known)}" if len(known) <= 20 else ""
