"""A renderer of characters: a generator that is not a network, for digits and letters.

In: plan rows, of which the class and the seed count. Out: the class's characters in one of matplotlib's
fonts, turned, sheared, scaled and moved, on paper of another grey: what a generator must beat.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ray_synth.config import GenerationConfig, Section, parse_config
from ray_synth.errors import UserError
from ray_synth.generators.protocol import Row, digest_settings, plugin_size

if TYPE_CHECKING:
    from PIL import Image

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYMBOL_FONTS = ("cmex", "cmsy", "cmmi", "STIXNonUni", "STIXSiz", "Display")
LONGEST = 3  # characters


class GlyphSettings(Section):
    """`generation.generator_kwargs` of this generator."""

    class_map: dict[str, str] = Field(default_factory=dict)


class GlyphGenerator:
    """Draws each class's characters.

    Args:
        config: the generation section; of `generator_kwargs` it takes `class_map` (class name ->
            characters). Without it number words are their digits, and names of at most 3 characters
            themselves.

    Attributes:
        provenance: what made the images, for their rows.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self.settings = _settings(config)
        self.size = plugin_size(config)
        self.fonts = font_files()
        self.provenance = {"library": "Pillow", "fonts": len(self.fonts), "dtype": "uint8"}

    def generate(self, rows: list[Row]) -> list[Image.Image]:
        """One RGB image of (width, height) for each row; `class_name` and `seed` are used.

        Raises:
            UserError: a class without characters; names it, and `class_map`.
        """
        return [
            self._draw(characters_of(row["class_name"], self.settings), row["seed"]) for row in rows
        ]

    def _draw(self, text: str, seed: int) -> Image.Image:
        from PIL import Image, ImageDraw, ImageFont

        rng = np.random.default_rng(seed)
        width, height = self.size
        side = min(self.size)
        font = ImageFont.truetype(
            str(self.fonts[int(rng.integers(len(self.fonts)))]), int(side * rng.uniform(0.6, 0.95))
        )
        ink, paper = int(rng.integers(0, 90)), int(rng.integers(150, 256))
        if rng.random() < 0.5:
            ink, paper = paper, ink
        page = Image.new("L", self.size, paper)
        centre = (width * rng.uniform(0.45, 0.55), height * rng.uniform(0.45, 0.55))
        ImageDraw.Draw(page).text(centre, text, fill=ink, font=font, anchor="mm")
        angle, shear = np.deg2rad(rng.uniform(-20, 20)), rng.uniform(-0.3, 0.3)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ np.array([[1, shear], [0, 1]])
        middle = np.array([width / 2, height / 2])
        shift = middle - matrix @ middle
        coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
        changed = page.transform(
            self.size,
            Image.Transform.AFFINE,
            tuple(map(float, coefficients)),
            resample=Image.Resampling.BICUBIC,
            fillcolor=paper,
        )
        return changed.convert("RGB")

    @staticmethod
    def check(config: GenerationConfig) -> None:
        """Raises UserError for a wrong setting."""
        _settings(config)

    @staticmethod
    def check_classes(config: GenerationConfig, class_names: Sequence[str]) -> None:
        """Raises UserError for a class that has no characters to draw."""
        settings = _settings(config)
        for name in class_names:
            characters_of(name, settings)

    @staticmethod
    def fingerprint(config: GenerationConfig) -> str:
        """Of all that decides the pixels besides the row."""
        fonts = [path.name for path in font_files()]
        values: list[Any] = [_settings(config).model_dump(), *plugin_size(config), fonts]
        return digest_settings([*values, *config.encoding.values()])


def characters_of(class_name: str, settings: GlyphSettings) -> str:
    """What is drawn for a class. Raises UserError where that is nothing."""
    if class_name in settings.class_map:
        return settings.class_map[class_name]
    name = class_name.strip().casefold()
    if name in NUMBERS:
        return str(NUMBERS.index(name))
    if 0 < len(name) <= LONGEST:
        return class_name.strip()
    raise UserError(
        f"there are no characters to draw for class {class_name!r}: map it in "
        "generation.generator_kwargs.class_map"
    )


@functools.cache
def font_files() -> tuple[Path, ...]:
    """The text fonts that matplotlib carries, by name."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(
        path
        for path in sorted(folder.glob("*.ttf"))
        if not any(mark in path.name for mark in SYMBOL_FONTS)
    )


def _settings(config: GenerationConfig) -> GlyphSettings:
    return parse_config(
        config.generator_kwargs, origin="generation.generator_kwargs", model=GlyphSettings
    )
