"""The shape of a digit: typeset or by hand, turned, tilted and seen from an angle.

In: a digit, font files, a `random.Random`. Out: a coverage mask and words for the view.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jobs.embedded_models import captions
from jobs.embedded_models.canvas import DRAWING, Array, array_rng, blur, cv2

Point = tuple[float, float]
Stroke = tuple[Point, ...]

# Skeletons in a unit box (x to the right, y down): for each digit its ways of writing, each way
# its strokes, each stroke its control points.
STROKES: dict[int, tuple[tuple[Stroke, ...], ...]] = {
    0: ((((0.5, 0.05), (0.15, 0.3), (0.15, 0.7), (0.5, 0.95), (0.85, 0.7), (0.85, 0.3),
          (0.5, 0.05)),),),
    1: ((((0.5, 0.05), (0.5, 0.95)),),
        (((0.3, 0.25), (0.52, 0.05), (0.52, 0.95)),),
        (((0.3, 0.25), (0.52, 0.05), (0.52, 0.95)), ((0.3, 0.95), (0.75, 0.95)))),
    2: ((((0.15, 0.25), (0.35, 0.05), (0.7, 0.08), (0.8, 0.3), (0.5, 0.6), (0.15, 0.95),
          (0.85, 0.95)),),
        (((0.18, 0.22), (0.5, 0.04), (0.8, 0.25), (0.55, 0.6), (0.22, 0.88), (0.2, 0.95),
          (0.4, 0.86), (0.85, 0.95)),)),
    3: ((((0.18, 0.12), (0.5, 0.04), (0.8, 0.2), (0.6, 0.44), (0.4, 0.48), (0.65, 0.52),
          (0.84, 0.72), (0.55, 0.96), (0.15, 0.86)),),
        (((0.18, 0.06), (0.8, 0.06), (0.45, 0.42), (0.8, 0.6), (0.7, 0.9), (0.4, 0.97),
          (0.15, 0.84)),)),
    4: ((((0.62, 0.05), (0.12, 0.65), (0.9, 0.65)), ((0.66, 0.3), (0.66, 0.96))),
        (((0.2, 0.05), (0.18, 0.5), (0.8, 0.5)), ((0.75, 0.05), (0.72, 0.96)))),
    5: ((((0.8, 0.06), (0.25, 0.06), (0.2, 0.45), (0.5, 0.38), (0.82, 0.6), (0.7, 0.9),
          (0.4, 0.97), (0.15, 0.86)),),
        (((0.25, 0.06), (0.2, 0.45), (0.55, 0.4), (0.82, 0.65), (0.6, 0.95), (0.15, 0.88)),
         ((0.25, 0.06), (0.82, 0.05)))),
    6: ((((0.7, 0.05), (0.3, 0.3), (0.15, 0.65), (0.35, 0.95), (0.7, 0.9), (0.8, 0.65),
          (0.55, 0.5), (0.2, 0.68)),),
        (((0.6, 0.03), (0.25, 0.5), (0.25, 0.85), (0.55, 0.97), (0.8, 0.75), (0.55, 0.55),
          (0.25, 0.72)),)),
    7: ((((0.15, 0.07), (0.85, 0.07), (0.4, 0.96)),),
        (((0.15, 0.07), (0.85, 0.07), (0.4, 0.96)), ((0.3, 0.5), (0.72, 0.5))),
        (((0.15, 0.18), (0.17, 0.07), (0.84, 0.08), (0.55, 0.5), (0.45, 0.96)),)),
    8: ((((0.75, 0.18), (0.5, 0.04), (0.22, 0.2), (0.5, 0.47), (0.82, 0.75), (0.5, 0.97),
          (0.18, 0.76), (0.5, 0.48), (0.76, 0.2)),),
        (((0.5, 0.48), (0.22, 0.25), (0.5, 0.04), (0.78, 0.25), (0.5, 0.48), (0.18, 0.74),
          (0.5, 0.97), (0.82, 0.74), (0.5, 0.48)),)),
    9: ((((0.8, 0.25), (0.5, 0.05), (0.2, 0.25), (0.4, 0.5), (0.78, 0.35), (0.8, 0.2),
          (0.75, 0.6), (0.65, 0.96)),),
        (((0.78, 0.3), (0.45, 0.06), (0.2, 0.3), (0.45, 0.52), (0.78, 0.3), (0.74, 0.7),
          (0.45, 0.97), (0.2, 0.9)),)),
}  # fmt: skip


def spline(points: Sequence[Point], *, steps: int = 16) -> Array:
    """A Catmull-Rom curve through the points: `((len(points) - 1) * steps, 2)`."""
    knots = np.array([points[0], *points, points[-1]], float)
    t = np.linspace(0, 1, steps)[:, None]
    pieces = []
    for a, b, c, d in zip(knots, knots[1:], knots[2:], knots[3:], strict=False):
        pieces.append(
            0.5
            * (
                2 * b
                + (c - a) * t
                + (2 * a - 5 * b + 4 * c - d) * t**2
                + (3 * b - a - 3 * c + d) * t**3
            )
        )
    return np.vstack(pieces)


def handwritten(digit: int, size: float, rng: random.Random) -> Array:
    """A digit drawn with jittered strokes: `(128, 128) uint8`, 255 where there is ink."""
    mask = np.zeros((DRAWING, DRAWING), np.uint8)
    jitter, width = rng.uniform(0.01, 0.05), round(rng.uniform(2.5, 9))
    narrow = np.array([rng.uniform(0.5, 0.9), 1])
    for stroke in rng.choice(STROKES[digit]):
        moved = [(x + rng.gauss(0, jitter), y + rng.gauss(0, jitter)) for x, y in stroke]
        curve = (spline(moved) - 0.5) * narrow * size * DRAWING + DRAWING / 2
        eighths = np.round(curve * 8).astype(np.int32)  # shift=3: eighths of a pixel
        cv2.polylines(mask, [eighths], False, 255, width, cv2.LINE_AA, 3)
    return mask


def typeset(digit: int, size: float, fonts: Sequence[Path], rng: random.Random) -> Array:
    """A digit in one of the fonts, some bolder or thinner: `(128, 128) uint8`."""
    font = ImageFont.truetype(str(rng.choice(fonts)), int(DRAWING * size * rng.uniform(0.9, 1.1)))
    image = Image.new("L", (DRAWING, DRAWING))
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = pen.textbbox((0, 0), str(digit), font=font)
    corner = (DRAWING / 2 - (left + right) / 2, DRAWING / 2 - (top + bottom) / 2)
    pen.text(corner, str(digit), font=font, fill=255)
    mask = np.array(image)
    if rng.random() < 0.3:
        weight = cv2.dilate if rng.random() < 0.5 else cv2.erode
        side = rng.choice((2, 3))
        mask = weight(mask, np.ones((side, side), np.uint8))
    return mask


def posed(mask: Array, rng: random.Random) -> tuple[Array, list[str]]:
    """Turns, slants, stretches, scales and shifts a mask; words for what shows."""
    tags = []
    degrees, slant, stretch = rng.gauss(0, 7), rng.gauss(0, 0.13), rng.uniform(0.8, 1.15)
    scale, draw = 1.0, rng.random()
    if draw < 0.15:
        scale = rng.uniform(1.25, 1.5)
        tags.append(rng.choice(captions.CLOSE))
    elif draw < 0.3:
        scale = rng.uniform(0.45, 0.65)
        tags.append(rng.choice(captions.WIDE))
    if rng.random() < 0.12:
        degrees = rng.choice((-1, 1)) * rng.uniform(18, 32)
        tags.append(rng.choice(("tilted", "at a tilted angle", "dutch angle")))
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.array([[cosine * stretch, -sine + slant], [sine, cosine]]) * scale
    middle = np.full(2, DRAWING / 2)
    moved = np.array([rng.gauss(0, 4), rng.gauss(0, 4)])
    shift = middle + moved - matrix @ middle
    affine = np.hstack([matrix, shift[:, None]]).astype(np.float32)
    return cv2.warpAffine(mask, affine, (DRAWING, DRAWING)), tags


def from_an_angle(mask: Array, rng: random.Random) -> tuple[Array, str]:
    """Sees a mask in perspective, from below or above; the words for it."""
    inset, below = rng.uniform(0.12, 0.25) * DRAWING, rng.random() < 0.5
    end = float(DRAWING)
    square = np.array([[0, 0], [end, 0], [end, end], [0, end]], np.float32)
    seen = square.copy()
    row = 0 if below else 2  # the far edge is the shorter one
    seen[row, 0] += inset if below else -inset
    seen[row + 1, 0] += -inset if below else inset
    matrix = cv2.getPerspectiveTransform(square, seen)
    words = ("low angle", "from below") if below else ("high angle", "from above")
    return cv2.warpPerspective(mask, matrix, (DRAWING, DRAWING)), rng.choice(words)


def wobbled(mask: Array, rng: random.Random) -> Array:
    """Bends a mask by a smooth random field, as an unsteady hand would."""
    reach, noise = rng.uniform(4, 14) * 8, array_rng(rng)
    across, down = (
        blur(noise.uniform(-1, 1, (DRAWING, DRAWING)).astype(np.float32), 14) * reach
        for _ in range(2)
    )
    rows, columns = np.mgrid[:DRAWING, :DRAWING].astype(np.float32)
    return cv2.remap(mask, columns + across, rows + down, cv2.INTER_LINEAR)


def glyph(
    digit: int, fonts: Sequence[Path], rng: random.Random, *, by_hand: bool
) -> tuple[Array, list[str]]:
    """Coverage of a digit, `(128, 128) float` in 0..1, and words for how it is seen.

    Raises:
        ValueError: there are no fonts to set a typeset digit in.
    """
    if not fonts and not by_hand:
        raise ValueError("No fonts to set digits in: put .ttf or .otf files into data/fonts.")
    size = rng.uniform(0.55, 0.8)
    mask = handwritten(digit, size, rng) if by_hand else typeset(digit, size, fonts, rng)
    mask, tags = posed(mask, rng)
    if rng.random() < 0.18:
        mask, tag = from_an_angle(mask, rng)
        tags.append(tag)
    if by_hand or rng.random() < 0.3:
        mask = wobbled(mask, rng)
    return mask / 255.0, tags
