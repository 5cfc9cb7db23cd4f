"""A plug-in generator for tests: paints at once, or after a while, and fails where it is told to."""

from __future__ import annotations

import time

import numpy as np
from PIL import Image


class Painter:
    """Noise from each row's own seed. `generator_kwargs`: seconds per batch; fail, blank: words that
    make a row fail or come out blank."""

    def __init__(self, config):
        self.kwargs = config.generator_kwargs
        self.size = (config.height, config.width, 3)

    def generate(self, rows):
        time.sleep(self.kwargs.get("seconds", 0))
        return [self._paint(row) for row in rows]

    def _paint(self, row):
        if self.kwargs.get("fail") and self.kwargs["fail"] in row["prompt"]:
            raise ValueError("this prompt cannot be painted")
        if self.kwargs.get("blank") and self.kwargs["blank"] in row["prompt"]:
            return Image.new("RGB", self.size[:2], "white")
        if self.kwargs.get("blank_seeds") and row["seed"] in self.kwargs["blank_seeds"]:
            return Image.new("RGB", self.size[:2], "white")
        if "reference_image" in row:
            from ray_synth.data.images import decode_image

            return decode_image(row["reference_image"]).resize(self.size[:2])
        pixels = np.random.default_rng(row["seed"]).integers(0, 255, self.size, dtype=np.uint8)
        return Image.fromarray(pixels)


class Stranger:
    """Not a generator at all."""
