"""A generator that costs next to nothing: one of a few pictures, changed a little by the row's seed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from PIL import Image

from ray_synth.config import GenerationConfig
from ray_synth.generators.protocol import plugin_size

PICTURES = 64


class Painter:
    """`generator_kwargs`: `seconds`, that a batch takes besides."""

    def __init__(self, config: GenerationConfig) -> None:
        self.seconds = float(config.generator_kwargs.get("seconds", 0))
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 255, (PICTURES, 8, 8, 3), dtype=np.uint8)
        size = plugin_size(config)
        self.pictures = [
            np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
            for picture in coarse
        ]

    def generate(self, rows: list[dict[str, Any]]) -> list[Image.Image]:
        time.sleep(self.seconds)
        return [self._paint(row) for row in rows]

    def _paint(self, row: dict[str, Any]) -> Image.Image:
        picture = self.pictures[(row["class_index"] * 31 + row["seed"]) % PICTURES]
        return Image.fromarray(np.roll(picture, row["seed"] % 17, axis=1))
