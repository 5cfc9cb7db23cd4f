"""Natural pictures: a photograph, perhaps cropped and re-styled, and a caption that fits it.

In: a JPEG and its class as a `Noun`. Out: a picture and what can be seen in it, in words.
"""

import random

import numpy as np
from PIL import Image

from jobs.embedded_models import captions
from jobs.embedded_models.canvas import PICTURE, Array, decode
from jobs.embedded_models.filters import FILTERS
from jobs.embedded_models.wordnet import Noun

BACKGROUND_FORMS = (
    "on a {} background",
    "against a {} background",
    "with a {} background",
    "{} background",
)
BORDER = 6  # pixels around the edge that are taken for the background
EVEN_BORDER = 58  # standard deviation below which the background has one colour
COLOURLESS = 4  # mean distance from grey below which a photograph is black and white


def _crop(picture: Array, share: float, rng: random.Random) -> Array:
    side = int(PICTURE * share)
    left, top = rng.randint(0, PICTURE - side), rng.randint(0, PICTURE - side)
    image = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(image.resize((PICTURE, PICTURE), Image.Resampling.BICUBIC))


def background_colour(picture: Array) -> str | None:
    """The name of the background's colour, if the border is of about one colour."""
    inner = np.ones(picture.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = False
    border = picture[inner]
    if border.std(0).mean() >= EVEN_BORDER:
        return None
    return captions.nearest_colour(border.mean(0))


def natural_picture(
    jpeg: bytes, noun: Noun, rng: random.Random, *, restyle: bool = False
) -> tuple[Array, str]:
    """One picture, `(64, 64, 3) uint8`, and its caption.

    Args:
        jpeg: a photograph of 64x64 pixels.
        noun: its class.
        rng: where the choices come from.
        restyle: put the picture through one of the sixteen filters.
    """
    picture, details = decode(jpeg, PICTURE), []
    if rng.random() < 0.35:
        share = rng.uniform(0.62, 0.85)
        picture = _crop(picture, share, rng)
        if share < 0.75:
            details.append(rng.choice(captions.CLOSE))
    colour = background_colour(picture)
    if colour:
        details.append(rng.choice(BACKGROUND_FORMS).format(colour))
    details.append(rng.choice(captions.LIGHT[captions.light_of(picture.reshape(-1, 3).mean(0))]))

    style = None
    if restyle:
        style = rng.choice(list(FILTERS))
        picture = FILTERS[style](picture, rng)
        if rng.random() < 0.6:  # most filters hide colour and light
            details = []
    elif np.abs(picture - picture.mean(2, keepdims=True)).mean() < COLOURLESS:
        details.append("black and white")
    thing = captions.noun_phrase(noun, rng)
    return picture, captions.caption(thing, details, rng, style=style)
