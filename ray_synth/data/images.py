"""Encoded bytes to RGB pictures and back, with limits on what is believed.

Image files come from strangers: nothing is decoded before its header's size was checked.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ray_synth.data.greys import Greys, greys_of, to_eight_bits, values_of
from ray_synth.data.marks import Marked, ValueRange, unmarked
from ray_synth.errors import UserError
from ray_synth.storage.texts import IS_POINTER, is_pointer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# PIL reads dozens of formats, some through external programs; these are the ones image sets use.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # MPO comes through JPEG
SUFFIXES = {name: name.lower() for name in FORMATS} | {"JPEG": "jpg", "MPO": "jpg"}
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    ".jfif", ".jpe", ".jif", ".pnm", ".pbm", ".dib", ".apng",
)  # fmt: skip
MAX_PIXELS = 50_000_000
LONGEST = 16  # times its shorter side is what a model is shown of a picture
ORIENTATION = 0x0112  # the tag of EXIF
STRIP = 64  # rows that are laid on white at a time
Image.MAX_IMAGE_PIXELS = None  # our own limit, in `_open`, raises instead of warning


def decode_image(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
    enough: int | None = None,
) -> Image.Image:
    """Decode to RGB; the first frame of animations, upright by EXIF.

    Args:
        value_range: the values of greys that are black and white; default: what the bytes are marked
            with (see `marks`), or the type's own. Colour of 8 bits is left as it is.
        enough: a shorter side that will do: larger pictures are made smaller as they are decoded, or
            right after, by whole numbers, and never below it.

    Raises:
        UserError: not an image in a known format, truncated, larger than `max_pixels`, or of values
            whose black and white are not known.
    """
    with _refusing():
        marked = _unmarked(data)
        opened = _open(marked.data, max_pixels)
        greys = greys_of(opened)
        value_range = value_range or marked.value_range
        if value_range and greys is None and ";16" in str(opened.tile):
            raise UserError(
                "colour of 16 bits is read by its type: value_range is for greys; convert it to 8 bits"
            )
        if enough:
            opened.draft(None, (enough, enough))  # JPEG alone
        opened.seek(0)
        image: Image.Image = opened
        ImageOps.exif_transpose(image, in_place=True)
        if greys and (value_range or image.mode != "L"):
            image = to_eight_bits(image, greys, value_range)
        picture = _to_rgb(image)
        times = min(picture.size) // enough if enough else 1
        return picture.reduce(times) if times > 1 else picture


def decoding_bytes(data: bytes, *, max_pixels: int = MAX_PIXELS, enough: int | None = None) -> int:
    """The most memory that `decode_image` takes for an image beside its bytes, told by the header.

    For a budget over all that are decoded at the same time.

    Raises:
        UserError: as `decode_image`, where the header shows it.
    """
    with _refusing():
        image = _open(_unmarked(data).data, max_pixels)
        # What a progressive JPEG has is kept until its last scan, whatever size is asked for.
        total = 6 * image.width * image.height if image.info.get("progressive") else 0
        if enough:
            image.draft(None, (enough, enough))
        each = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}.get(image.mode, 4)
        copies = 1 + (image.getexif().get(ORIENTATION, 1) != 1)
        rgb = 0 if image.mode == "RGB" else 4
        if image.format == "WEBP":
            rgb += 12  # libwebp's own picture, and two copies of it
        if image.mode.startswith(("I", "F")):
            rgb += each + 1
        total += image.width * image.height * (each * copies + rgb)
        return total + 20 * STRIP * image.width + 1_000_000


def grey_values(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Greys, float, float] | None:
    """How an image keeps its greys, with the least and the greatest of its finite values.

    None for colour, and for 8 bits that no range is given for. Raises UserError as `decode_image`.
    """
    with _refusing():
        marked = _unmarked(data)
        image = _open(marked.data, max_pixels)
        greys = greys_of(image)
        if greys is None or (image.mode == "L" and not marked.value_range):
            return None
        return greys, *values_of(image, greys)


@contextmanager
def _refusing() -> Iterator[None]:
    """Whatever PIL's decoders raise, as UserError; they raise nearly anything on broken files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UserError(f"not a readable image in one of the formats {known}") from None
    except Exception as error:  # struct.error, SyntaxError, MemoryError, ...
        raise UserError(f"not a readable image ({type(error).__name__}: {error})") from None


def _unmarked(data: bytes) -> Marked:
    marked = unmarked(data)
    if marked.refused is not None:
        raise UserError(marked.refused)
    if not marked.data:
        raise UserError("the file is empty")
    if is_pointer(marked.data):
        raise UserError(IS_POINTER)
    return marked


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """The header alone."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise UserError(f"{width}x{height} is over the limit of {max_pixels:,} pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _on_white(image)
    if image.mode == "RGB":
        image.load()  # not a copy
        return image
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """In strips: a whole picture would be there four times, of four bytes a pixel."""
    image.load()
    canvas = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        box = (0, top, image.width, min(top + STRIP, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        canvas.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return canvas


def not_too_thin(image: Image.Image) -> Image.Image:
    """The middle of a picture that is over `LONGEST` times as long as it is wide; others as they are.

    To be called before a picture is scaled by its shorter side: one of 5000x1 pixels would get a
    longer side of a million.
    """
    width, height = shown(*image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def shown(width: int, height: int) -> tuple[int, int]:
    """What `not_too_thin` leaves of a size."""
    most = LONGEST * min(width, height)
    return min(width, most), min(height, most)


def encode_image(image: Image.Image, *, image_format: str = "png", quality: int = 92) -> bytes:
    """Encode as png, webp or jpeg. PIL releases the GIL: several threads encode at once."""
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    if image_format == "png":
        options = {"compress_level": 3}
    image.convert("RGB").save(buffer, format=image_format.upper(), **options)
    return buffer.getvalue()


def encode_array(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of a (height, width) or (height, width, 3) uint8 array."""
    return encode_image(Image.fromarray(pixels))


def gray_image() -> bytes:
    """A small gray picture, where one is needed and none is looked at."""
    return encode_image(Image.new("RGB", (8, 8), (127, 127, 127)))


def file_suffix(data: bytes) -> str | None:
    """The usual file name suffix of an image's format, by its header; None where it is not an image."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return SUFFIXES[str(image.format)]
    except Exception:  # PIL's readers raise nearly anything on broken headers
        return None
