"""Sixteen surfaces that a digit can be on: paper, blackboard, brick, neon, sand and so on.

In: a `Lettering` (the digit's mask and what may go with it). Out: a drawing and its words.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.embedded_models import captions
from jobs.embedded_models.canvas import (
    DRAWING,
    Array,
    array_rng,
    blend,
    blur,
    cv2,
    decode,
    grain,
)
from jobs.embedded_models.wordnet import Noun

Colour = tuple[int, int, int]
INKS: tuple[tuple[Colour, str], ...] = (
    ((20, 20, 24), "black"),
    ((25, 40, 130), "blue"),
    ((170, 25, 30), "red"),
    ((20, 90, 40), "green"),
    ((90, 40, 120), "purple"),
)
PAINTS: tuple[tuple[Colour, str], ...] = (
    *INKS,
    ((240, 130, 20), "orange"),
    ((235, 205, 40), "yellow"),
    ((245, 245, 245), "white"),
    ((230, 110, 160), "pink"),
)
TUBES = ((255, 50, 90), (60, 220, 255), (120, 255, 90), (255, 190, 60), (220, 90, 255))
SIGNS = (
    ((20, 70, 160), "blue"),
    ((0, 105, 70), "green"),
    ((240, 200, 30), "yellow"),
    ((200, 30, 35), "red"),
)
LEDS = (((255, 40, 30), "red"), ((70, 255, 90), "green"), ((255, 180, 40), "amber"))
NOTES = (((250, 235, 120), "yellow"), ((250, 170, 190), "pink"), ((170, 225, 250), "blue"))
BRICK, MORTAR = (150, 70, 52), (190, 180, 170)
RELIEF = np.array([[-2, -1, 0], [-1, 0, 1], [0, 1, 2]], np.float64)  # lit from the lower right
CONTRAST = 220  # summed difference that two colours need to be told apart


@dataclass(frozen=True)
class Lettering:
    """What a surface gets to draw with.

    Attributes:
        mask: the digit's coverage, `(128, 128) float` in 0..1.
        hand: words for handwriting, empty when typeset.
        photographs: JPEGs with their classes, for backgrounds.
        rng: where the choices come from.
    """

    mask: Array
    hand: str
    photographs: Sequence[tuple[bytes, Noun]]
    rng: random.Random

    @property
    def cover(self) -> Array:
        """The mask as `(128, 128, 1)`, to blend with."""
        return self.mask[..., None]

    def thickened(self, pixels: int) -> Array:
        """The digit's outline: the mask widened, `(128, 128, 1)`."""
        return cv2.dilate(self.mask, np.ones((pixels, pixels)))[..., None]

    def noise(self, *shape: int) -> Array:
        """Standard normal numbers."""
        return array_rng(self.rng).standard_normal(shape)

    def say(self, *ways: str) -> list[str]:
        """One of several wordings."""
        return [self.rng.choice(ways)]


Drawn = tuple[Array, list[str]]  # (128, 128, 3) numbers around 0..255, and words


def pen(on: Lettering) -> Drawn:
    """Ink on white paper."""
    ink, name = on.rng.choice(INKS)
    paper = grain(on.rng, (on.rng.randint(225, 252),) * 3, 4)
    words = on.say(
        f"written in {name} ink on white paper",
        f"{name} pen on paper",
        f"on white paper in {name} ink",
        "on a sheet of paper",
    )
    return blend(paper, ink, on.cover), [*words, on.hand]


def white(on: Lettering) -> Drawn:
    """Soft white strokes on black."""
    black = grain(on.rng, (on.rng.randint(0, 14),) * 3, 2)
    soft = blur(on.mask, on.rng.uniform(0.5, 2))[..., None]
    words = on.say(
        "white on a black background",
        "in white on black",
        "black background",
        "on a dark background",
        "white strokes on black",
    )
    return blend(black, on.rng.randint(200, 255), soft), [*words, on.hand]


def chalk(on: Lettering) -> Drawn:
    """Crumbling chalk on a blotchy board."""
    board = grain(on.rng, on.rng.choice(((36, 60, 44), (40, 42, 46))), 10, soften=3)
    crumbs = np.clip(array_rng(on.rng).random((DRAWING, DRAWING, 1)) * 1.4, 0.25, 1)
    words = on.say(
        "written in chalk on a blackboard",
        "chalk on a chalkboard",
        "on a blackboard in a classroom",
    )
    return blend(board, (238, 238, 225), on.cover * crumbs), [*words, on.hand]


def paint(on: Lettering) -> Drawn:
    """Paint on a brick wall."""
    wall = np.full((DRAWING, DRAWING, 3), BRICK, float)
    for course, top in enumerate(range(0, DRAWING, 16)):
        wall[top : top + 2] = MORTAR
        wall[top : top + 16, (24 if course % 2 == 0 else 8) :: 32] = MORTAR
    wall = np.clip(wall + on.noise(DRAWING, DRAWING, 1) * 9, 0, 255)
    colour, name = on.rng.choice(PAINTS)
    words = on.say(
        f"painted in {name} on a brick wall",
        f"{name} paint on a brick wall",
        "on a brick wall in the street",
    )
    return blend(wall, colour, on.cover * 0.9), words


def neon(on: Lettering) -> Drawn:
    """A glowing tube in the dark, white at its core."""
    colour = np.array(on.rng.choice(TUBES))
    glow = blur(on.mask, 7)[..., None] * 1.3
    core = blur(cv2.erode(on.mask, np.ones((3, 3))), 1)[..., None]
    words = on.say("a glowing neon sign", "neon light at night", "neon tubes in the dark")
    return grain(on.rng, (14, 12, 22), 4) + glow * colour * 0.8 + core * 180, words


def metal(on: Lettering) -> Drawn:
    """Stamped into brushed metal."""
    sheen = np.linspace(on.rng.randint(110, 150), on.rng.randint(170, 210), DRAWING)
    plate = sheen[:, None, None] * np.ones((DRAWING, DRAWING, 3)) + on.noise(1, DRAWING, 1) * 9
    edges = cv2.filter2D(blur(on.mask, 1.5), -1, RELIEF)[..., None]
    words = on.say("engraved on a metal plate", "stamped in steel", "on a metal plaque")
    return plate + edges * 60 - on.cover * 30, words


def wood(on: Lettering) -> Drawn:
    """Burnt into a board with a straight grain."""
    lines = np.repeat(on.noise(DRAWING, 1, 1) * 16, DRAWING, axis=1)
    board = np.array((150, 104, 62)) + lines + on.noise(DRAWING, DRAWING, 1) * 4
    words = on.say("carved in wood", "burned into a wooden board", "on a wooden sign")
    return blend(np.clip(board, 0, 255), (58, 34, 16), on.cover), words


def sign(on: Lettering) -> Drawn:
    """A road sign."""
    colour, name = on.rng.choice(SIGNS)
    figure = (20, 20, 20) if name == "yellow" else (245, 245, 245)
    words = on.say(f"on a {name} road sign", f"on a {name} street sign", f"a {name} traffic sign")
    return blend(grain(on.rng, colour, 4), figure, on.cover), words


def sand(on: Lettering) -> Drawn:
    """A furrow in sand."""
    beach = grain(on.rng, (212, 184, 136), 12)
    shade = cv2.filter2D(blur(on.mask, 2), -1, RELIEF)[..., None]
    words = on.say("drawn in the sand", "written in sand on a beach", "traced in wet sand")
    return beach - on.cover * 40 + shade * 45, [*words, on.hand]


def led(on: Lettering) -> Drawn:
    """A luminous display."""
    (red, green, blue), name = on.rng.choice(LEDS)
    colour = np.array((red, green, blue))
    glow = blur(on.mask, 3)[..., None]
    words = on.say(
        f"on a {name} LED display", "on a digital clock", f"{name} seven-segment display"
    )
    panel = grain(on.rng, (10, 10, 12), 3)
    return panel + on.cover * colour * 0.85 + glow * colour * 0.4, words


def jersey(on: Lettering) -> Drawn:
    """White with a dark edge on cloth."""
    colour = [on.rng.randint(20, 210) for _ in range(3)]
    name = captions.nearest_colour(colour)
    cloth = blend(grain(on.rng, colour, 12, soften=2), (15, 15, 20), on.thickened(9))
    words = on.say(
        f"on a {name} sports jersey", f"on a {name} football shirt", "on the back of a jersey"
    )
    return blend(cloth, 248, on.cover), words


def book(on: Lettering) -> Drawn:
    """Printed on a cream page."""
    words = on.say("printed in a book", "printed on a page", "in printed type")
    return blend(grain(on.rng, (246, 241, 228), 3), (24, 22, 20), on.cover), words


def graffiti(on: Lettering) -> Drawn:
    """Sprayed, with a black edge, on a wall of two colours."""
    upper, lower = ([float(on.rng.randint(30, 225)) for _ in range(3)] for _ in range(2))
    wall = blend(np.array(upper), lower, np.linspace(0, 1, DRAWING)[:, None, None])
    wall = np.clip(wall + on.noise(DRAWING, DRAWING, 1) * 8, 0, 255)
    colour, name = on.rng.choice(PAINTS)
    words = on.say("spray-painted graffiti", f"{name} graffiti on a wall", "street art")
    return blend(blend(wall, 12, on.thickened(7)), colour, on.cover), words


def note(on: Lettering) -> Drawn:
    """Marker on a sticky note."""
    colour, name = on.rng.choice(NOTES)
    ink, ink_name = on.rng.choice(INKS)
    words = on.say(
        f"on a {name} sticky note",
        f"written on a {name} post-it",
        f"{ink_name} marker on {name} paper",
    )
    return blend(grain(on.rng, colour, 3), ink, on.cover), [*words, on.hand]


def photo(on: Lettering) -> Drawn:
    """Laid over a photograph, light on dark or dark on light, with a faint edge."""
    jpeg, noun = on.rng.choice(on.photographs)
    scene = decode(jpeg, DRAWING).astype(float)
    figure = np.array((250, 250, 250) if scene.mean() < 140 else (15, 15, 20), float)
    edged = blend(scene, 255 - figure, on.thickened(5) * 0.6)
    words = [f"over a photo of {captions.article(noun.lemmas[0], on.rng)}"]
    return blend(edged, figure, on.cover), words


def plain(on: Lettering) -> Drawn:
    """One random colour on another that differs enough."""

    def colour() -> Array:
        return np.array([on.rng.randint(0, 255) for _ in range(3)], float)

    figure, ground = colour(), colour()
    while np.abs(figure - ground).sum() < CONTRAST:
        ground = colour()
    front, back = captions.nearest_colour(figure), captions.nearest_colour(ground)
    words = on.say(f"{front} on a {back} background", f"in {front}, {back} background")
    return blend(grain(on.rng, ground, 4), figure, on.cover), [*words, on.hand]


@dataclass(frozen=True)
class Surface:
    """A way to draw, how often it is taken, how often by hand, and whether it is a light."""

    draw: Callable[[Lettering], Drawn]
    weight: int = 1
    by_hand: float = 0.0
    glows: bool = False


SURFACES: dict[str, Surface] = {
    "pen": Surface(pen, weight=2, by_hand=0.85),
    "white": Surface(white, weight=2, by_hand=0.8),
    "chalk": Surface(chalk, by_hand=0.85),
    "paint": Surface(paint, by_hand=0.5),
    "neon": Surface(neon, by_hand=0.3, glows=True),
    "metal": Surface(metal),
    "wood": Surface(wood),
    "sign": Surface(sign),
    "sand": Surface(sand, by_hand=0.8),
    "led": Surface(led, glows=True),
    "jersey": Surface(jersey),
    "book": Surface(book),
    "graffiti": Surface(graffiti, by_hand=0.6),
    "note": Surface(note, by_hand=0.85),
    "photo": Surface(photo),
    "plain": Surface(plain, weight=2, by_hand=0.4),
}
