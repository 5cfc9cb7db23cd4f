"""Encoded bytes to RGB pictures and back, with limits on what is believed.

Image files come from strangers: nothing is decoded before its header's size was checked.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ray_synth.errors import UserError
from ray_synth.storage.texts import IS_POINTER, is_pointer

if TYPE_CHECKING:
    from numpy.typing import NDArray

# PIL reads dozens of formats, some through external programs; these are the ones image sets use.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # MPO comes through JPEG
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
Image.MAX_IMAGE_PIXELS = None  # our own limit, in decode_image, raises instead of warning


def decode_image(data: bytes, *, max_pixels: int = 50_000_000) -> Image.Image:
    """Decode to RGB; the first frame of animations, upright by EXIF.

    Raises:
        UserError: not an image in a known format, truncated, or larger than `max_pixels`.
    """
    if not data:
        raise UserError(getattr(data, "why", "the file is empty"))  # of `boundary.Unreadable`
    if is_pointer(data):
        raise UserError(IS_POINTER)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{width}x{height} is over the limit of {max_pixels:,} pixels")
            image.seek(0)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UserError(f"not a readable image in one of the formats {known}") from None
    except Exception as error:  # PIL's decoders raise nearly anything on broken files
        raise UserError(f"not a readable image ({type(error).__name__}: {error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # 16-bit and float greyscale: PIL's convert would clip to white instead of scaling.
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535.0 if pixels.max(initial=0) > 255 else 255.0
        image = Image.fromarray((pixels.clip(0, top) * (255.0 / top)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    if image.mode == "RGB":
        image.load()  # not a copy
        return image
    return image.convert("RGB")


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
