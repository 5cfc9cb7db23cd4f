"""What every drawing module shares: sizes, OpenCV, noise that follows a seed, and blending.

In and out: numpy pictures, RGB. Nothing here knows what is drawn.
"""

import io
import random
from typing import Any

import numpy as np
from PIL import Image

try:
    import cv2
except ImportError as error:  # pragma: no cover - tested in a process of its own
    raise ImportError(
        "The recipe draws with OpenCV, which ray-synth does not install by itself: "
        "pip install 'ray-synth[recipe]'"
    ) from error

__all__ = ["DRAWING", "PICTURE", "array_rng", "as_bytes", "blend", "blur", "cv2", "decode", "grain"]

PICTURE = 64  # pixels per side of a training picture
DRAWING = 128  # pixels per side while a digit is drawn

Array = np.ndarray[Any, Any]


def array_rng(rng: random.Random) -> np.random.Generator:
    """A numpy generator that follows from `rng`, so that one seed makes the whole picture."""
    return np.random.default_rng(rng.getrandbits(64))


def as_bytes(picture: Array) -> Array:
    """Any numbers to uint8, clipped to 0..255."""
    return np.clip(picture, 0, 255).astype(np.uint8)


def blur(picture: Array, sigma: float) -> Array:
    """A Gaussian blur of `sigma` pixels."""
    return cv2.GaussianBlur(picture, (0, 0), sigma)


def blend(under: Array, over: Any, cover: Array) -> Array:
    """`over` on top of `under` where `cover (height, width, 1)` is 1, a mixture between."""
    return under * (1 - cover) + np.asarray(over, float) * cover


def grain(rng: random.Random, colour: Any, strength: float, *, soften: float = 0.0) -> Array:
    """A sheet of one colour with grey noise: `(DRAWING, DRAWING, 3) float` in 0..255.

    Args:
        rng: where the noise comes from.
        colour: three numbers in 0..255.
        strength: standard deviation of the noise.
        soften: pixels by which the noise is blurred, into blotches of the same visibility.
    """
    noise = array_rng(rng).standard_normal((DRAWING, DRAWING, 1)) * strength
    if soften:
        noise = blur(noise, soften)[..., None] * soften * 1.8
    return np.clip(np.asarray(colour, float) + noise, 0, 255)


def decode(jpeg: bytes, side: int | None = None) -> Array:
    """A JPEG as `(height, width, 3) uint8`, resized to a square of `side` if given."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    if side is not None:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)
