"""What happens to images before a model sees them: crops and colours by timm, our own for digits.

In: decoded RGB images of any size. Out: normalised batches. Nothing here draws from a global random
state that another thread uses: what comes out is a function of the images and the seed.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from ray_synth.data.images import not_too_thin, shown
from ray_synth.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ray_synth.config import TrainingConfig

INTERPOLATIONS = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
}


@dataclass(frozen=True)
class Augmentation:
    """How a training image may be changed; the defaults do nothing. Equal for real and synthetic.

    Before batching, on one image at its own size, by timm:
        crop_scale: area range of a random resized crop; None resizes and crops the centre.
        auto_augment: a policy in timm's words: `rand-m9-mstd0.5-inc1` (RandAugment), `augmix-m3-w3`,
            `3a` (3-Augment), `original` (AutoAugment).
    On the batch, on its device, drawn separately for every image:
        flip: probability of a horizontal flip.
        rotate, shear: largest angle in degrees, to either side.
        translate: largest shift as a fraction of the side.
        scale: range of the zoom factor.
        invert: probability of a colour inversion.
        grayscale: probability of dropping the colour.
        brightness, contrast: largest relative change, to either side.
        noise: largest standard deviation of Gaussian noise, of a range of 1.
        erase: probability of blanking a rectangle (timm's RandomErasing).
    """

    crop_scale: tuple[float, float] | None = None
    auto_augment: str = ""
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


RAND_AUGMENT = "rand-m{}-mstd0.5-inc1"
POLICIES: dict[str, Augmentation] = {
    "none": Augmentation(),
    # Always grayscale: real digits have no colour, so it would only tell the domains apart.
    "digits": Augmentation(rotate=15, shear=15, translate=0.1, scale=(0.75, 1.25), grayscale=1.0),
    "imagenet": Augmentation(crop_scale=(0.08, 1.0), flip=0.5),
    "imagenet_rand": Augmentation(
        crop_scale=(0.08, 1.0), flip=0.5, auto_augment=RAND_AUGMENT.format(7)
    ),
    "imagenet_strong": Augmentation(
        crop_scale=(0.08, 1.0), flip=0.5, auto_augment=RAND_AUGMENT.format(9), erase=0.25
    ),
    # DeiT III (arXiv 2204.07118): 3-Augment and colour jitter.
    "three": Augmentation(
        crop_scale=(0.08, 1.0), flip=0.5, auto_augment="3a", brightness=0.3, contrast=0.3
    ),
}


class ImageTransform:
    """From decoded images to normalised batches, in the two halves a data pipeline needs.

    `prepare` brings one image of any size to (3, size, size) uint8, on the host, before batching;
    `batch` takes such images stacked, on any device, to normalised floats. May be sent to processes.

    Attributes:
        random: whether `prepare` draws at random for a single image.
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
            raise UserError(
                f"unknown interpolation {interpolation!r}: choose one of "
                f"{', '.join(INTERPOLATIONS)}"
            )
        self.image_size = image_size
        self.augmentation = augmentation
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.random = augmentation.crop_scale is not None or bool(augmentation.auto_augment)
        mode = INTERPOLATIONS[interpolation]
        self._centre = v2.Compose(
            [
                v2.Resize(round(image_size / crop_pct), interpolation=mode, antialias=True),
                v2.CenterCrop(image_size),
            ]
        )
        self._drawn = _timm_transform(image_size, augmentation, interpolation, mean)

    def prepare(self, image: Tensor | Image.Image, seed: int | None = None) -> Tensor:
        """Resize and crop one RGB image, or (3, h, w) uint8, to (3, size, size) uint8.

        Args:
            seed: of what is drawn for this image; None: drawn at random.
        """
        if isinstance(image, Tensor) and (
            image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8
        ):
            raise ValueError(
                f"an image must be (3, height, width) uint8, got {tuple(image.shape)} "
                f"{image.dtype}: decode it as RGB"
            )
        if self._drawn is None:
            # Only the centre square is seen of what the shorter side's scale would make endless.
            if isinstance(image, Tensor):
                width, height = shown(image.shape[2], image.shape[1])
                return self._centre(v2.functional.center_crop(image, [height, width]))
            return self._centre(_pixels(not_too_thin(image)))
        if isinstance(image, Tensor):
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
        if seed is not None:
            _seed(seed)
        return torch.from_numpy(np.array(self._drawn(image))).permute(2, 0, 1)

    def batch(self, images: Tensor, seed: int | None = None) -> Tensor:
        """Augment and normalise (batch, 3, size, size) uint8; returns float32 on its device."""
        generator = torch.Generator(images.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        x = augment_batch(images.float() / 255, self.augmentation, generator)
        x = (x - self.mean.to(x.device)) / self.std.to(x.device)
        if self.augmentation.erase:
            from timm.data.random_erasing import RandomErasing

            if seed is not None:
                _seed(seed)
            x = RandomErasing(self.augmentation.erase, device=x.device)(x)
        return x


class Mixing:
    """Mixup and CutMix (timm's) inside each domain, never across.

    Args:
        mixup, cutmix: alpha of their Beta distributions; 0 is off.
    """

    def __init__(
        self, mixup: float, cutmix: float, *, num_classes: int, label_smoothing: float = 0.0
    ) -> None:
        from timm.data import Mixup

        self._mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

    @classmethod
    def of(cls, config: "TrainingConfig", num_classes: int) -> "Mixing | None":
        """As the config says; None where it is off."""
        if not (config.mixup or config.cutmix):
            return None
        return cls(
            config.mixup,
            config.cutmix,
            num_classes=num_classes,
            label_smoothing=config.label_smoothing,
        )

    def __call__(
        self, x: Tensor, labels: Tensor, num_real: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Mix (n, 3, s, s) floats, real rows first; returns them and (n, classes) targets."""
        np.random.seed(seed % 2**32)
        rows = [slice(num_real), slice(num_real, None)]
        mixed = [self._mix(x[part], labels[part]) for part in rows if len(x[part])]
        images, targets = zip(*mixed, strict=True)
        return torch.cat(images), torch.cat(targets)


def _timm_transform(
    image_size: int, augmentation: Augmentation, interpolation: str, mean: Sequence[float]
) -> Any:
    """timm's random half of `prepare`, PIL to PIL; None where nothing is drawn."""
    if augmentation.crop_scale is None and not augmentation.auto_augment:
        return None
    from timm.data.transforms_factory import transforms_imagenet_train

    # No flips nor jitter here: those of torchvision would draw from torch's global state.
    first, second, _ = transforms_imagenet_train(
        image_size,
        scale=augmentation.crop_scale or (1.0, 1.0),
        ratio=None if augmentation.crop_scale else (1.0, 1.0),
        hflip=0.0,
        color_jitter=None,  # type: ignore[arg-type]
        auto_augment=augmentation.auto_augment or None,
        interpolation=interpolation,
        mean=tuple(mean),
        separate=True,
    )
    for op in _operations(second):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return v2.Compose([first, second])


def _operations(transform: Any) -> list[Any]:
    """timm's `AugmentOp`s in its transforms of PIL images, of whichever policy."""
    found: list[Any] = []
    for part in transform.transforms:
        found += getattr(part, "ops", ())  # RandAugment, AugMix
        found += [op for ops in getattr(part, "policy", ()) for op in ops]  # AutoAugment
    return found


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, but one bit stays: it draws 0 and fewer as well, which Pillow 13 refuses."""
    return ImageOps.posterize(image, min(8, max(1, bits_to_keep)))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _seed(seed: int) -> None:
    """Seed what timm's transforms draw from; in a worker only the prefetcher's thread does."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


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
        UserError: for an unknown policy, field or interpolation.
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
        raise UserError(f"unknown augmentation policy {policy!r}: {did_you_mean(policy, POLICIES)}")
    known = [field.name for field in fields(Augmentation)]
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"unknown augmentation setting {name!r}: {did_you_mean(name, known)}")
        if isinstance(value, list):
            settings[name] = tuple(value)
    return Augmentation(**{**asdict(POLICIES[policy]), **settings})


def augment_batch(
    x: Tensor, augmentation: Augmentation, generator: torch.Generator | None = None
) -> Tensor:
    """Apply the batch half of `augmentation` to (batch, 3, h, w) floats in 0..1.

    torchvision draws one set of parameters for a whole batch; here every image gets its own.
    """
    a = augmentation
    n, device = x.shape[0], x.device

    def symmetric(limit: float) -> Tensor:
        return torch.empty(n, device=device).uniform_(-limit, limit, generator=generator)

    def chosen(probability: float) -> Tensor:
        return (torch.rand(n, device=device, generator=generator) < probability).view(n, 1, 1, 1)

    if a.rotate or a.shear or a.translate or a.scale != (1.0, 1.0):
        angle, shear = symmetric(math.radians(a.rotate)), symmetric(math.radians(a.shear)).tan()
        zoom = torch.empty(n, device=device).uniform_(*a.scale, generator=generator)
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
        strength = torch.rand(n, 1, 1, 1, device=device, generator=generator) * a.noise
        noise = torch.randn(x.shape, device=device, generator=generator)
        x = (x + strength * noise).clamp(0, 1)
    return x
