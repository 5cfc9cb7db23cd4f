"""Corrupted copies of images, as a test of what a classifier withstands. torchvision does the drawing.

The kinds follow ImageNet-C (Hendrycks and Dietterich, 2019) where torchvision has them; strengths are
ours, relative to the image's size, so that they mean the same on 28 and on 500 pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ray_synth.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

STRENGTHS = {
    "blur": (0.01, 0.02, 0.03, 0.045, 0.06),  # standard deviation over the shorter side
    "brightness": (1.15, 1.3, 1.5, 1.7, 1.9),  # factor
    "contrast": (0.7, 0.5, 0.35, 0.25, 0.15),  # factor
    "elastic": (0.2, 0.4, 0.6, 0.8, 1.0),  # displacement, of torchvision's default for 224 pixels
    "jpeg": (50, 30, 20, 12, 7),  # quality
    "noise": (0.04, 0.08, 0.14, 0.2, 0.3),  # standard deviation, of the range
    "rotate": (5, 10, 20, 30, 45),  # degrees, to either side
}


def check_kinds(kinds: Iterable[str]) -> None:
    """Raises UserError for an unknown kind, with the nearest."""
    for kind in kinds:
        if kind not in STRENGTHS:
            raise UserError(f"no corruption is called {kind!r}; {did_you_mean(kind, STRENGTHS)}")


def corrupt(image: Image.Image, kind: str, severity: int, *, name: str) -> Image.Image:
    """A corrupted copy in RGB, of the same size.

    Args:
        kind: one of `STRENGTHS`.
        severity: 1 to 5.
        name: of the image; with kind and severity it decides every random number.
    """
    import torch
    from torchvision.transforms.v2 import functional

    check_kinds([kind])
    strength = STRENGTHS[kind][severity - 1]
    pixels = functional.pil_to_tensor(image.convert("RGB"))
    seed = zlib.crc32(f"{name}\x1f{kind}\x1f{severity}".encode())
    generator = torch.Generator().manual_seed(seed)
    changed = _CORRUPTIONS[kind](functional, pixels, strength, generator)
    return functional.to_pil_image(changed.clamp(0, 255).to(torch.uint8))


def _blur(functional: Any, pixels: Any, strength: float, generator: Any) -> Any:
    sigma = strength * min(pixels.shape[-2:])
    return functional.gaussian_blur(pixels, 2 * max(1, round(3 * sigma)) + 1, sigma)


def _elastic(functional: Any, pixels: Any, strength: float, generator: Any) -> Any:
    import torch

    height, width = pixels.shape[-2:]
    field = torch.rand((1, 2, height, width), generator=generator) * 2 - 1
    # As torchvision's ElasticTransform: 50 pixels of 224, smoothed over 5.
    sigma = 5 * min(height, width) / 224 + 0.5
    kernel = 2 * max(1, round(2 * sigma)) + 1
    smooth = functional.gaussian_blur(field, kernel, sigma)
    scale = torch.tensor([width, height]).view(1, 2, 1, 1)
    displacement = smooth * strength * 50 / 224 * 2 / scale * min(height, width)
    return functional.elastic(pixels, displacement.permute(0, 2, 3, 1))


def _jpeg(functional: Any, pixels: Any, strength: float, generator: Any) -> Any:
    from ray_synth.data.images import decode_image, encode_image

    picture = functional.to_pil_image(pixels)
    data = encode_image(picture, image_format="jpeg", quality=int(strength))
    return functional.pil_to_tensor(decode_image(data))


def _noise(functional: Any, pixels: Any, strength: float, generator: Any) -> Any:
    import torch

    return pixels + 255 * strength * torch.randn(pixels.shape, generator=generator)


def _rotate(functional: Any, pixels: Any, strength: float, generator: Any) -> Any:
    import torch

    sign = 1 if torch.rand(1, generator=generator) < 0.5 else -1
    height, width = pixels.shape[-2:]
    # The edge goes on outwards, so that no black corner turns into the picture.
    margin = max(height, width) // 2
    wide = functional.pad(pixels, [margin] * 4, padding_mode="edge")
    bilinear = functional.InterpolationMode.BILINEAR
    turned = functional.rotate(wide, sign * strength, interpolation=bilinear)
    return functional.center_crop(turned, [height, width])


_CORRUPTIONS: dict[str, Callable[[Any, Any, float, Any], Any]] = {
    "blur": _blur,
    "brightness": lambda f, pixels, strength, _: f.adjust_brightness(pixels, strength),
    "contrast": lambda f, pixels, strength, _: f.adjust_contrast(pixels, strength),
    "elastic": _elastic,
    "jpeg": _jpeg,
    "noise": _noise,
    "rotate": _rotate,
}
assert set(_CORRUPTIONS) == set(STRENGTHS)


def corrupted_rows(
    rows: Iterable[dict[str, Any]], kinds: list[str], severities: list[int], *, max_pixels: int
) -> Iterator[dict[str, Any]]:
    """Rows `{image_id, image, class_index, kind, severity}` of all copies of some test images.

    Images that cannot be decoded are passed over, as in every test.
    """
    from ray_synth.data.images import decode_image, encode_image

    for row in rows:
        try:
            image = decode_image(row["image"], max_pixels=max_pixels)
        except UserError:
            continue
        for kind in kinds:
            for severity in severities:
                changed = corrupt(image, kind, severity, name=row["image_id"])
                yield {
                    "image_id": f"{row['image_id']}-{kind}-{severity}",
                    "image": encode_image(changed, image_format="png"),
                    "class_index": row["class_index"],
                    "kind": kind,
                    "severity": severity,
                }
