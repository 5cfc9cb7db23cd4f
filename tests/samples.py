"""Small pictures for any test."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def draw(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A small picture that differs by seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def encoded(seed: int, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    draw(seed).save(buffer, format=image_format)
    return buffer.getvalue()
