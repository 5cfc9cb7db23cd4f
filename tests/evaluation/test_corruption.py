"""Corrupted copies: the same again, worse with severity, and recognisably the same image."""

import itertools

import numpy as np
import pytest
from PIL import Image
from samples import encoded

from ray_synth.data.images import decode_image
from ray_synth.evaluation.corruption import (
    STRENGTHS,
    check_kinds,
    corrupt,
    corrupted_rows,
)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth blobs of grey, 64 x 48."""
    y, x = np.mgrid[:48, :64] / 10
    waves = 128 + 60 * np.sin(x) * np.cos(1.3 * y)
    return Image.fromarray(np.stack([waves, waves * 0.8, 255 - waves], axis=-1).astype(np.uint8))


def apart(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize("kind", STRENGTHS)
def test_damage_grows_with_severity_and_can_be_made_again(picture, kind):
    copies = [corrupt(picture, kind, severity, name="a") for severity in range(1, 6)]
    damage = [apart(picture, copy) for copy in copies]
    assert damage[0] > 0
    assert damage[-1] > 1.5 * damage[0]
    assert all(b > 0.9 * a for a, b in itertools.pairwise(damage)), damage
    assert damage[-1] < 100  # still an image of the same thing
    assert all(copy.size == picture.size and copy.mode == "RGB" for copy in copies)
    assert apart(corrupt(picture, kind, 3, name="a"), copies[2]) == 0


@pytest.mark.parametrize("kind", ["noise", "elastic"])
def test_every_image_has_a_noise_of_its_own(picture, kind):
    assert apart(corrupt(picture, kind, 3, name="a"), corrupt(picture, kind, 3, name="b")) > 0


def test_rotation_fills_with_the_page_and_not_with_black():
    page = Image.new("L", (32, 32), 240)
    turned = np.asarray(corrupt(page, "rotate", 5, name="x"))
    assert turned.min() >= 239


def test_rows_of_copies_keep_their_class_and_unreadable_images_are_passed_over():
    rows = [
        {"image_id": "good", "image": encoded(0), "class_index": 4},
        {"image_id": "bad", "image": b"no picture", "class_index": 1},
    ]
    found = list(corrupted_rows(rows, ["blur", "noise"], [1, 5], max_pixels=10**6))
    assert [row["image_id"] for row in found] == [
        "good-blur-1", "good-blur-5", "good-noise-1", "good-noise-5"
    ]  # fmt: skip
    assert {row["class_index"] for row in found} == {4}
    assert all(
        decode_image(row["image"]).size == decode_image(rows[0]["image"]).size for row in found
    )


def test_an_unknown_kind_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'blur'"):
        check_kinds(["blurr"])
