"""Decoding what strangers send."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import draw, encoded

from ray_synth.data.images import decode_image, encode_image


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = draw(1)
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 480).reshape(20, 24).astype(np.uint16))
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF" if mode in ("CMYK", "LA") else "PNG")
    decoded = decode_image(buffer.getvalue())
    assert decoded.mode == "RGB"
    assert decoded.size == (24, 20)


def test_sixteen_bit_greys_are_scaled_not_clipped():
    pixels = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    decoded = np.asarray(decode_image(buffer.getvalue()))[..., 0]
    assert abs(int(decoded.mean()) - 127) <= 1


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_encoding_round_trips(image_format):
    image = Image.new("RGB", (16, 8), (200, 30, 90))
    decoded = decode_image(encode_image(image, image_format=image_format, quality=95))
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(image)).max() <= 6


def test_a_phones_picture_of_several_frames_gives_its_first():
    buffer = io.BytesIO()
    draw(1).save(buffer, format="MPO", save_all=True, append_images=[draw(2)])
    assert decode_image(buffer.getvalue()).size == (24, 20)


def test_junk_is_told_which_formats_are_known():
    with pytest.raises(ValueError, match="not a readable image in one of the formats JPEG, PNG"):
        decode_image(b"hello")


def test_too_many_pixels_are_refused_before_decoding():
    header = encode_image(Image.new("RGB", (2000, 1000)))
    with pytest.raises(ValueError, match="2000x1000 is over the limit"):
        decode_image(header, max_pixels=1_000_000)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", encoded(0)[:60]])
def test_what_is_no_image_says_so(data):
    with pytest.raises(ValueError, match="empty|not a readable image"):
        decode_image(data)


@given(st.binary(max_size=400), st.integers(0, 300))
def test_broken_bytes_never_raise_anything_else(noise, cut):
    for data in (noise, encoded(3)[:cut] + noise):
        with contextlib.suppress(ValueError):
            assert decode_image(data).mode == "RGB"
