"""Decoding what strangers send."""

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import draw, encoded

from ray_synth.data.images import decode_image, decoding_bytes, encode_image, not_too_thin


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


def photograph(size=(1200, 900)) -> Image.Image:
    """Smooth, as photographs are, so that sizes can be compared."""
    small = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_a_picture_is_made_no_larger_than_enough(kind, mode):
    if (kind, mode) in {("JPEG", "P"), ("JPEG", "RGBA"), ("PNG", "CMYK"), ("WEBP", "CMYK")}:
        return
    buffer = io.BytesIO()
    photograph().convert(mode).save(buffer, format=kind)
    whole, small = (decode_image(buffer.getvalue(), enough=enough) for enough in (None, 100))
    assert (whole.size, small.mode) == ((1200, 900), "RGB")
    assert 100 <= min(small.size) < 200
    gap = np.asarray(whole.resize(small.size, Image.Resampling.BOX)).astype(int) - np.asarray(small)
    assert np.abs(gap).mean() < 4
    assert decode_image(buffer.getvalue(), enough=900).size == (1200, 900)


def test_a_picture_on_its_side_is_upright_at_any_size():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph().save(buffer, format="JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (900, 1200)
    assert decode_image(buffer.getvalue(), enough=100).size == (113, 150)


def test_transparent_pictures_are_laid_on_white_as_a_whole_would_be():
    image = photograph((300, 200)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert (np.asarray(decode_image(buffer.getvalue())) == np.asarray(whole)).all()


PEAKS = """
import re, sys
from pathlib import Path
from ray_synth.data.images import decode_image, decoding_bytes
status = Path("/proc/self/status")
memory = lambda kind: 1024 * int(re.search(kind + r":\\s+(\\d+)", status.read_text())[1])
decode_image(Path(sys.argv[1]).read_bytes())
for path in map(Path, sys.argv[2:]):
    data, enough = path.read_bytes(), 448 if "small" in path.name else None
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    decode_image(data, enough=enough)
    print(memory("VmHWM") - before, decoding_bytes(data, enough=enough))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_the_memory_of_decoding_is_known_before(tmp_path):
    size = (4000, 3000)
    warm, paths = tmp_path / "warm.webp", []
    draw(1).save(warm)
    for name, mode in (
        ("small.jpg", "RGB"), ("a.jpg", "RGB"), ("p.png", "P"), ("a.png", "RGBA"), ("f.tif", "F"),
        ("a.webp", "RGBA"),
    ):  # fmt: skip
        Image.new(mode, size).save(tmp_path / name)
        paths.append(tmp_path / name)
    command = [sys.executable, "-c", PEAKS, warm, *paths]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    took, foretold = ([int(number) for number in out[at::2]] for at in (0, 1))
    pixels = size[0] * size[1]
    for least, most in zip(took, foretold, strict=True):
        assert most / 2.5 - 2_000_000 <= least <= most
    assert foretold[0] < pixels / 2  # a thumbnail of a photograph takes next to nothing
    assert took[1] > 3 * pixels  # it was measured at all
    with pytest.raises(ValueError, match="over the limit"):
        decoding_bytes(paths[0].read_bytes(), max_pixels=1000)


def test_a_thin_picture_keeps_its_middle():
    image = Image.new("L", (1000, 2))
    image.paste(255, (484, 0, 516, 2))
    middle = not_too_thin(image)
    assert (middle.size, middle.getextrema()) == ((32, 2), (255, 255))
    assert not_too_thin(image.transpose(Image.Transpose.ROTATE_90)).size == (2, 32)
    assert not_too_thin(photograph()).size == (1200, 900)
