"""Sixteen image filters that make a photograph look drawn, printed or painted.

In: `(64, 64, 3) uint8` RGB and a `random.Random`. Out: the same, in the style.
"""

import random
from collections.abc import Callable

import numpy as np

from jobs.embedded_models.canvas import PICTURE, Array, array_rng, as_bytes, blend, blur, cv2

RELIEF_TINTS = ((1, 1, 1), (1.1, 0.85, 0.6), (0.9, 0.95, 1.05))  # stone, clay, steel
NEON_COLOURS = ((255, 60, 200), (60, 240, 255), (120, 255, 90), (255, 160, 40))
WOODCUT_INKS = ((20, 20, 20), (40, 20, 12), (20, 24, 60))


def _grey(picture: Array) -> Array:
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def _as_rgb(grey: Array) -> Array:
    return np.repeat(grey[..., None], 3, axis=2)


def sketch(picture: Array, rng: random.Random) -> Array:
    """Pencil: the picture divided by its own blur."""
    grey = _grey(picture)
    inverse = blur(255 - grey, rng.uniform(2, 4))
    return _as_rgb(cv2.divide(grey, 255 - inverse, scale=256))


def charcoal(picture: Array, rng: random.Random) -> Array:
    """Charcoal: dark edges, smudged tones, coarse grain."""
    grey = _grey(picture)
    edges = 255 - cv2.convertScaleAbs(cv2.Laplacian(grey, cv2.CV_16S, ksize=3), alpha=1.4)
    tones = cv2.addWeighted(edges, 0.6, cv2.GaussianBlur(grey, (0, 0), 1), 0.4, -20)
    return _as_rgb(as_bytes(tones + array_rng(rng).standard_normal(tones.shape) * 10))


def bw(picture: Array, rng: random.Random) -> Array:
    """Black and white, a little more contrast."""
    return _as_rgb(cv2.convertScaleAbs(_grey(picture), alpha=1.15, beta=-8))


def sepia(picture: Array, rng: random.Random) -> Array:
    """The usual sepia matrix, a little darker."""
    matrix = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    return as_bytes(picture @ matrix.T * 0.95)


def watercolor(picture: Array, rng: random.Random) -> Array:
    """Flat washes (two bilateral filters), thinned with white."""
    washes = cv2.bilateralFilter(cv2.bilateralFilter(picture, 7, 60, 7), 7, 60, 7)
    return cv2.addWeighted(washes, 0.75, np.full_like(washes, 255), 0.25, 0)


def oil(picture: Array, rng: random.Random) -> Array:
    """Dabs of few, saturated tones."""
    dabs = cv2.medianBlur(picture, 5) // 24 * 24 + 12
    hsv = cv2.cvtColor(dabs, cv2.COLOR_RGB2HSV).astype(int)
    hsv[..., 1] = np.clip(hsv[..., 1] * 1.35, 0, 255)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)


def pixel(picture: Array, rng: random.Random) -> Array:
    """A coarse grid of few colours."""
    side = rng.choice((12, 16, 20))
    coarse = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA) // 36 * 36 + 18
    return cv2.resize(coarse, (PICTURE, PICTURE), interpolation=cv2.INTER_NEAREST)


def pop(picture: Array, rng: random.Random) -> Array:
    """Four tones, each in a loud colour, dark to light."""
    palette = [[rng.randrange(255) for _ in range(3)] for _ in range(3)] + [[250, 245, 230]]
    colours = np.array(sorted(palette, key=sum), np.uint8)
    return colours[cv2.GaussianBlur(_grey(picture), (3, 3), 0) // 64]


def blueprint(picture: Array, rng: random.Random) -> Array:
    """White outlines on blue."""
    lines = cv2.Canny(cv2.GaussianBlur(_grey(picture), (3, 3), 0), 50, 120)[..., None] / 255
    return blend(np.array([24.0, 62.0, 140.0]), (225, 235, 250), lines).astype(np.uint8)


def neon(picture: Array, rng: random.Random) -> Array:
    """Glowing outlines over a picture in the dark."""
    lines = cv2.dilate(cv2.Canny(_grey(picture), 60, 140), np.ones((2, 2), np.uint8))
    glow = blur(lines, 1.1)[..., None] / 255
    return as_bytes(glow * np.array(rng.choice(NEON_COLOURS)) * 1.6 + picture * 0.12)


def comic(picture: Array, rng: random.Random) -> Array:
    """Flat colours with black outlines."""
    flat = cv2.bilateralFilter(picture, 7, 50, 7) // 42 * 42 + 21
    outlines = cv2.adaptiveThreshold(
        cv2.medianBlur(_grey(picture), 3),
        255,
        cv2.ADAPTIVE_THRESH_MEAN_C,
        cv2.THRESH_BINARY,
        7,
        5,
    )
    return cv2.bitwise_and(flat, flat, mask=outlines)


def mosaic(picture: Array, rng: random.Random) -> Array:
    """Voronoi tiles of the mean colour, with dark joints."""
    tiles = rng.choice((9, 11, 13)) ** 2
    centres = array_rng(rng).random((tiles, 2)) * PICTURE
    rows, columns = np.mgrid[:PICTURE, :PICTURE]
    distance = (columns[..., None] - centres[:, 0]) ** 2 + (rows[..., None] - centres[:, 1]) ** 2
    tile = distance.argmin(-1)
    area = np.bincount(tile.ravel(), minlength=tiles).clip(1)
    sums = [np.bincount(tile.ravel(), picture[..., c].ravel(), tiles) for c in range(3)]
    coloured = np.stack([(total / area)[tile] for total in sums], axis=-1).astype(np.uint8)
    joints = (tile != np.roll(tile, 1, 0)) | (tile != np.roll(tile, 1, 1))
    coloured[joints] //= 3
    return coloured


def emboss(picture: Array, rng: random.Random) -> Array:
    """A relief lit from one corner, in stone, clay or steel."""
    kernel = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    relief = cv2.filter2D(_grey(picture), cv2.CV_16S, kernel) * 0.5 + 118
    return as_bytes(np.clip(relief, 0, 255)[..., None] * np.array(rng.choice(RELIEF_TINTS)))


def woodcut(picture: Array, rng: random.Random) -> Array:
    """One dark ink on cream paper."""
    paper = cv2.adaptiveThreshold(
        _grey(picture), 255, cv2.ADAPTIVE_THRESH_GAUSSIAN_C, cv2.THRESH_BINARY, 15, 2
    )
    ink = np.array(rng.choice(WOODCUT_INKS), float)
    return blend(ink, (240, 228, 200), paper[..., None] / 255).astype(np.uint8)


def pastel(picture: Array, rng: random.Random) -> Array:
    """Soft, pale, grainy."""
    pale = blur(picture, 0.9).astype(float) * 0.6 + 100
    return as_bytes(pale + array_rng(rng).standard_normal((PICTURE, PICTURE, 1)) * 14)


def pointillist(picture: Array, rng: random.Random) -> Array:
    """Dots on a 4-pixel grid, larger where it is darker."""
    dotted = np.full((PICTURE, PICTURE, 3), 245, np.uint8)
    for top in range(0, PICTURE, 4):
        for left in range(0, PICTURE, 4):
            red, green, blue = picture[top : top + 4, left : left + 4].reshape(-1, 3).mean(0)
            radius = int(1 + 2 * (1 - (red + green + blue) / 3 / 255))
            colour = (int(red), int(green), int(blue))
            cv2.circle(dotted, (left + 2, top + 2), radius, colour, -1, cv2.LINE_AA)
    return dotted


FILTERS: dict[str, Callable[[Array, random.Random], Array]] = {
    "sketch": sketch,
    "charcoal": charcoal,
    "bw": bw,
    "sepia": sepia,
    "watercolor": watercolor,
    "oil": oil,
    "pixel": pixel,
    "pop": pop,
    "blueprint": blueprint,
    "neon": neon,
    "comic": comic,
    "mosaic": mosaic,
    "emboss": emboss,
    "woodcut": woodcut,
    "pastel": pastel,
    "pointillist": pointillist,
}
