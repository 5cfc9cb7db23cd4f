"""Greys of more than 8 bits: equal values are equally bright in all pictures of a set."""

import io
import logging
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import ImagesByClass, load_index, read_index, tasks
from ray_synth.data.images import decode_image, encode_image
from ray_synth.data.packing import _digest, write_tar
from ray_synth.data.survey import tell_greys
from ray_synth.errors import UserError
from ray_synth.generators.image_to_image import prepare_references
from ray_synth.storage.folder import Folder
from ray_synth.training.augmentation import eval_transform
from ray_synth.training.decoder import Decoder, decode_all

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
FULL = RAMP * 255


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def pgm(values: np.ndarray, white: int) -> bytes:
    kind = "u1" if white < 256 else ">u2"
    return b"P5 64 64 %d\n" % white + values.round().astype(kind).tobytes()


def shown(data: bytes, value_range: tuple[float, float] | None = None) -> np.ndarray:
    return np.asarray(decode_image(data, value_range=value_range)).astype(float)[..., 0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded((RAMP * 255).round().astype(np.uint8)), FULL),
        (encoded((RAMP * 65535).astype(np.uint16)), FULL),
        (encoded((RAMP * 65535).astype(np.uint16), "TIFF"), FULL),
        (encoded(RAMP.astype(np.float32), "TIFF"), FULL),
        (pgm(RAMP * 65535, 65535), FULL),
        (pgm(RAMP * 4095, 4095), FULL),  # its header says what white is
        (pgm(RAMP * 15, 15), np.round(RAMP * 15) * 17),
        # What is dark stays dark, and one brighter pixel changes nothing.
        (encoded((RAMP * 255).astype(np.uint16)), RAMP),
        (encoded((RAMP * 256).astype(np.uint16)), RAMP),
        (encoded((RAMP * 4095).astype(np.uint16)), RAMP * 16),
    ],
)
def test_greys_are_scaled_by_their_type(data, expected):
    assert np.abs(shown(data) - expected).max() <= 1


@pytest.mark.parametrize(
    ("data", "given"),
    [
        (encoded((RAMP * 4095).astype(np.uint16)), (0, 4095)),
        (encoded((RAMP * 4095).astype(np.uint16), "TIFF"), (0, 4095)),
        (encoded((RAMP * 2000 - 1000).astype(np.int32), "TIFF"), (-1000, 1000)),
        (encoded((RAMP * 20 + 290).astype(np.float32), "TIFF"), (290, 310)),
        (encoded((RAMP * 127).round().astype(np.uint8)), (0, 127)),
        (pgm(RAMP * 1000, 4095), (0, 1000)),
    ],
)
def test_a_range_says_which_values_are_black_and_white(data, given):
    assert np.abs(shown(data, given) - FULL).max() <= 1.5
    assert np.abs(shown(data, given[::-1]) - (255 - FULL)).max() <= 1.5  # black on white
    low, high = given
    half = (low + high) / 2
    assert np.abs(shown(data, (low, half)) - (2 * FULL).clip(0, 255)).max() <= 3  # beyond it is cut


def test_values_of_no_known_range_are_refused_and_not_guessed():
    for pixels in (
        (RAMP * 2000 - 1000).astype(np.int32),
        (RAMP * 300).astype(np.float32),
        np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32),
    ):
        with pytest.raises(UserError, match=r"value_range: \[BLACK, WHITE\]"):
            decode_image(encoded(pixels, "TIFF"))
    numbers = (RAMP * 4e9).astype(np.uint32)  # PIL takes half of these for negative ones
    signed = encoded(numbers.view(np.int32), "TIFF")
    mark = struct.pack("<HHIHH", 339, 3, 1, 2, 0)
    assert mark in signed
    unsigned = signed.replace(mark, struct.pack("<HHIHH", 339, 3, 1, 1, 0))
    assert np.abs(shown(unsigned, (0, 4e9)) - FULL).max() <= 1
    holes = np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)
    assert shown(encoded(holes, "TIFF")).max() <= 128  # no value is black


def test_colour_of_sixteen_bits_takes_no_range():
    deep = np.repeat((RAMP * 65535).astype(">u2")[..., None], 3, axis=2)
    lines = b"".join(b"\0" + row.tobytes() for row in deep)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ):
        png += (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )
    for data in (png, b"P6 64 64 65535\n" + deep.tobytes()):
        assert np.abs(shown(data) - FULL).max() <= 1
    with pytest.raises(UserError, match="value_range is for greys"):
        decode_image(png, value_range=(0, 4095))


@pytest.fixture
def twelve_bits(tmp_path):
    """A folder and a table of the same 12-bit pictures, one of which is not whole."""
    rows = []
    for name, scale in (("a", 4095), ("b", 2000)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(2):
            data = encoded((RAMP * scale).astype(np.uint16))
            (tmp_path / "set" / name / f"{number}.png").write_bytes(data)
            rows.append({"image": data, "label": name})
    (tmp_path / "set" / "b" / "broken.png").write_bytes(encoded((RAMP * 9).astype(np.uint16))[:70])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    given = {"value_range": [0, 4095]}
    return [
        SourceConfig(format="imagefolder", path=str(tmp_path / "set"), **given),
        SourceConfig(format="parquet", path=str(tmp_path / "t.parquet"), **given),
    ]


def test_a_set_s_range_is_with_its_images_wherever_they_are_decoded(twelve_bits, tmp_path):
    """In training, evaluation, image-to-image, and packed for training."""
    expected = [255, 255 * 2000 / 4095]
    transform = eval_transform(64)
    for source in twelve_bits:
        index = load_index(source)
        rows = list(read_index(index))
        decoder = Decoder(transform)
        for item in decoder.keep_all(rows):
            assert abs(int(item.form.max()) - expected[item.label]) <= 1
        assert [name[-10:] for name in decoder.corrupt] == ["broken.png"][: len(index) - 4]
        for label, images in ImagesByClass(index).items():
            assert abs(shown(images[0]).max() - expected[label]) <= 1
        forms = [row["image"] for row in rows]
        if index.shards[0].addressable:
            forms = [index.locate(at) for at in range(len(index))]
        pixels, errors = decode_all(forms, [0] * len(forms), transform, 10**6)
        assert [*errors] == [4][: len(index) - 4]
        for at in range(4):
            assert abs(int(pixels[at].max()) - expected[rows[at]["class_index"]]) <= 1
        guide = decode_image(rows[0]["image"])
        (picture,) = prepare_references([guide], width=8, height=8)
        assert np.asarray(picture).max() > 230


def test_a_packed_set_keeps_its_range_and_another_range_is_another_set(twelve_bits, tmp_path):
    index = load_index(twelve_bits[1])
    write_tar(tasks(index), "0.tar", folder := Folder(tmp_path / "run"))
    with tarfile.open(tmp_path / "run" / "0.tar") as tar:
        found = [tar.extractfile(member).read() for member in tar]
    assert [round(shown(data).max()) for data in found] == [255, 255, 125, 125]
    assert folder.exists("0.tar.parquet")
    wider = twelve_bits[1].model_copy(update={"value_range": (0.0, 8190.0)})
    assert _digest(load_index(wider)) != _digest(index) == _digest(load_index(twelve_bits[1]))


def test_what_is_assumed_is_said_once(twelve_bits, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ray_synth")

    def said(source: SourceConfig, origin: str = "data.train") -> str:
        caplog.clear()
        tell_greys(origin, load_index(source))
        tell_greys(origin, load_index(source))
        assert len(caplog.records) <= 1
        return caplog.text

    for source in twelve_bits:
        assert "0 is black and 4095 white, by value_range; 4 of them hold" in said(
            source, source.format
        )
        text = said(source.model_copy(update={"value_range": None}), f"data.ood.{source.format}")
        assert "65535 white, by their type; 4 of them hold values from 0 to 4095, so all" in text
        assert f"give data.ood.{source.format}.value_range: [0, 4095]" in text
    for kind in ("CT", "colour"):
        (tmp_path / kind / "a").mkdir(parents=True)
    (tmp_path / "CT" / "a" / "0.tif").write_bytes(
        encoded((RAMP * 2000 - 1000).astype(np.int32), "TIFF")
    )
    ct = SourceConfig(format="imagefolder", path=str(tmp_path / "CT"))
    with pytest.raises(
        UserError, match=r"data\.test: 32-bit greys .* -1000 to 1000; give data\.test"
    ):
        tell_greys("data.test", load_index(ct))
    (tmp_path / "colour" / "a" / "0.png").write_bytes(encode_image(Image.new("RGB", (8, 8))))
    assert said(SourceConfig(format="imagefolder", path=str(tmp_path / "colour"))) == ""
    assert said(SourceConfig(format="digits", split="test")) == ""


def test_a_range_is_two_numbers():
    for given, says in (
        ([1, 1], "black and white are both 1"),
        ([0, float("inf")], "finite"),
        ([1], ""),
    ):
        with pytest.raises(ValueError, match=says or "."):
            SourceConfig(format="imagefolder", path="x", value_range=given)
