"""Drawn digits: a glyph on a surface, under some light, and a caption that says so.

In: a digit, fonts, photographs for backgrounds. Out: a picture and its caption.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jobs.embedded_models import captions
from jobs.embedded_models.canvas import DRAWING, PICTURE, Array, as_bytes, blur, cv2
from jobs.embedded_models.filters import FILTERS
from jobs.embedded_models.glyphs import glyph
from jobs.embedded_models.surfaces import SURFACES, Lettering
from jobs.embedded_models.wordnet import Noun

HANDWRITING = ("handwritten", "hand-drawn", "written by hand")
SEVEN_SEGMENT = "DSEG"  # fonts of this name look like a digital clock
RELIGHT: dict[str, Callable[[Array], Array]] = {
    "dark": lambda drawing: drawing * 0.42,
    "bright": lambda drawing: drawing * 0.8 + 60,
    "warm": lambda drawing: drawing * np.array([1.05, 0.85, 0.6]),
    "cool": lambda drawing: drawing * np.array([0.68, 0.85, 1.08]),
}


def relit(drawing: Array, rng: random.Random) -> tuple[Array, str]:
    """A drawing under another light, some with a fall-off up or down; the light in words."""
    light = rng.choice(list(RELIGHT))
    drawing = RELIGHT[light](drawing)
    if rng.random() < 0.4:
        fall = np.linspace(1.15, 0.75, DRAWING)[:: rng.choice((1, -1))]
        drawing = drawing * fall[:, None, None]
    return drawing, rng.choice(captions.LIGHT[light])


def digit_picture(
    digit: int,
    fonts: Sequence[Path],
    photographs: Sequence[tuple[bytes, Noun]],
    rng: random.Random,
    *,
    restyle: bool = False,
    surface: str | None = None,
) -> tuple[Array, str]:
    """One picture of a digit, `(64, 64, 3) uint8`, and its caption.

    Args:
        digit: 0 to 9.
        fonts: font files for the typeset ones.
        photographs: JPEGs and their classes, for the surface `photo`.
        rng: where the choices come from.
        restyle: put the picture through one of the sixteen filters.
        surface: a key of `SURFACES`; by default one of them, by weight.
    """
    if surface is None:
        weights = [choice.weight for choice in SURFACES.values()]
        surface = rng.choices(list(SURFACES), weights)[0]
    chosen = SURFACES[surface]
    by_hand = rng.random() < chosen.by_hand
    if surface == "led" and rng.random() < 0.7:
        fonts = [font for font in fonts if SEVEN_SEGMENT in font.name] or fonts
    mask, details = glyph(digit, fonts, rng, by_hand=by_hand)
    hand = rng.choice(HANDWRITING) if by_hand else ""
    drawing, words = chosen.draw(Lettering(mask, hand, photographs, rng))
    drawing, details = np.clip(drawing, 0, 255), [*details, *words]

    if rng.random() < 0.35 and not chosen.glows:
        drawing, light = relit(drawing, rng)
        details.append(light)
    if rng.random() < 0.25:
        drawing = blur(drawing, rng.uniform(0.6, 1.6))
    side = (PICTURE, PICTURE)
    picture = cv2.resize(as_bytes(drawing), side, interpolation=cv2.INTER_AREA)

    style = None
    if restyle:
        style = rng.choice(list(FILTERS))
        picture = FILTERS[style](picture, rng)
    thing = captions.digit_phrase(digit, rng)
    details = [detail for detail in details if detail]
    return picture, captions.caption(thing, details, rng, style=style)
