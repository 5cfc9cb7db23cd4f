"""Greys of more than 8 bits, and floats: which of their values are black and white.

That is decided by the type, or by a range that is given for the whole data set, and never by what one
picture holds: two pictures of a set with equal values are equally bright.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from ray_synth.data.marks import ValueRange
from ray_synth.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS = 64  # converted at a time: a whole picture as floats would take eight bytes for each pixel


class Greys(NamedTuple):
    """How an opened picture keeps its greys.

    Attributes:
        kind: in words: "16-bit greys".
        own_range: black and white by the type; None where the type does not say.
        unit: what one step of the file's own values is in PIL's.
        unsigned: PIL reads values from 2^31 as negative ones.
    """

    kind: str
    own_range: ValueRange | None
    unit: float = 1.0
    unsigned: bool = False


def greys_of(image: ImageFile.ImageFile) -> Greys | None:
    """Of a picture that is opened and not loaded yet; None for colour, masks and palettes."""
    tile: Any = getattr(image, "tile", None)  # of a file's image alone
    given = tile[0].args if tile else None
    parts = given if isinstance(given, tuple) else (given,)
    raw = str(parts[0])
    top = 255 if image.mode == "L" else 65535
    if image.format == "PPM" and image.mode in ("L", "I"):
        # Its header names the white, and PIL has scaled by it.
        white = parts[1] if len(parts) > 1 and isinstance(parts[1], int) and parts[1] else top
        return Greys("greys of a PGM file", (0, white), top / white)
    if image.mode == "L":
        return Greys("8-bit greys", (0, 255))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return (
            Greys("12-bit greys", (0, 4095)) if raw == "I;12" else Greys("16-bit greys", (0, top))
        )
    if image.mode == "I":
        kind = "signed 16-bit greys" if raw in ("I;16S", "I;16BS") else "32-bit greys"
        return Greys(kind, None, unsigned=raw == "I;32N")
    return Greys("floating-point greys", (0, 1)) if image.mode == "F" else None


def to_eight_bits(
    image: Image.Image, greys: Greys, value_range: ValueRange | None = None
) -> Image.Image:
    """Greys of any type to `L`: black, white and what is between; beyond them is cut. NaN is black.

    Args:
        value_range: of the data set, in the file's own values; default: by the type.

    Raises:
        UserError: no range is given, and the type says none, or the values are not of its range.
    """
    given = value_range or greys.own_range
    if given is None:
        raise UserError(
            f"{greys.kind} do not say which values are black and white: give the data set's "
            "value_range: [BLACK, WHITE]"
        )
    low, high = (float(value) * greys.unit for value in given)
    pixels = _pixels(image, greys)
    out = np.empty(pixels.shape, np.uint8)
    for start in range(0, len(pixels), ROWS):
        part = pixels[start : start + ROWS].astype(np.float64)
        part[np.isnan(part)] = low
        if value_range is None and (part.min() < low or part.max() > high):
            raise UserError(
                f"{greys.kind} are taken for {low:g} (black) to {high:g} (white), and this picture "
                f"has {part.min():g} to {part.max():g}: give the data set's value_range: [BLACK, WHITE]"
            )
        scaled = (part.clip(min(low, high), max(low, high)) - low) * (255.0 / (high - low))
        out[start : start + ROWS] = np.rint(scaled)
    return Image.fromarray(out)


def values_of(image: Image.Image, greys: Greys) -> tuple[float, float]:
    """The least and the greatest finite value, in the file's own units."""
    pixels = _pixels(image, greys)
    finite = pixels[np.isfinite(pixels)] if image.mode == "F" else pixels
    if not finite.size:
        return 0.0, 0.0
    return float(finite.min()) / greys.unit, float(finite.max()) / greys.unit


def _pixels(image: Image.Image, greys: Greys) -> NDArray[Any]:
    """(height, width), in PIL's units."""
    pixels = np.asarray(image)
    return pixels.view(np.uint32) if greys.unsigned else pixels
