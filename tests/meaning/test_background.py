"""Sums over images say what the images themselves would: mean and spread of any text's similarity."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_synth.meaning.background import (
    SIDE,
    WORTH,
    Background,
    beside,
    pictures,
    shipped_background,
)
from ray_synth.meaning.clip import ClipModel


def unit_rows(number: int, seed: int = 0, dim: int = 12) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(number, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=6))
def test_sums_of_all_less_a_classs_own_are_those_of_the_others(sizes: list[int]) -> None:
    classes = [unit_rows(size, seed) for seed, size in enumerate(sizes)]
    whole = sum((Background.of(rows) for rows in classes[1:]), Background.of(classes[0]))
    others = np.concatenate(classes[1:])
    texts = unit_rows(3, seed=99).astype(np.float64)
    means, spreads = whole.without(classes[0]).of_texts(texts)
    assert whole.without(classes[0]).count == len(others)
    assert means == pytest.approx((texts @ others.T).mean(axis=1), abs=1e-6)
    assert spreads == pytest.approx((texts @ others.T).std(axis=1), abs=1e-3)


def test_memory_does_not_grow_with_the_images() -> None:
    few, many = Background.of(unit_rows(2)), Background.of(unit_rows(5000))
    assert few.squares.shape == many.squares.shape == (12, 12)
    assert few.total.nbytes == many.total.nbytes


def test_the_packages_pictures_weigh_less_the_more_others_there_are() -> None:
    shipped, others = Background.of(unit_rows(500, 1)), Background.of(unit_rows(144, 2))
    assert beside(None, shipped) is shipped
    assert beside(others.without(unit_rows(144, 2)), shipped) is shipped  # no other class
    both = beside(others, shipped)
    assert both is not None and both.count == 144 + WORTH
    texts = unit_rows(2, 3).astype(np.float64)
    mean = (144 * others.of_texts(texts)[0] + WORTH * shipped.of_texts(texts)[0]) / both.count
    assert both.of_texts(texts)[0] == pytest.approx(mean)


def test_a_background_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    found = Background.of(unit_rows(40))
    found.save(tmp_path / "new" / "one.safetensors")
    again = Background.load(tmp_path / "new" / "one.safetensors")
    assert again.count == 40
    assert again.total == pytest.approx(found.total, rel=1e-5)
    assert again.squares == pytest.approx(found.squares, rel=1e-5)
    assert (again.squares == again.squares.T).all()


def test_the_packaged_background_is_that_of_the_packaged_pictures() -> None:
    """And so `jobs/background.py` made both: another model's is measured from the same pictures."""
    clip, some = ClipModel("embedded"), pictures()
    assert len(some) == 500 and {picture.size for picture in some} == {(SIDE, SIDE)}
    packaged = shipped_background(clip)
    assert packaged.count == len(some) and packaged.total.shape == (384,)
    part = Background.of(clip.encode_images(some[::10]))
    texts = clip.encode_texts(["a photo of a cat", "the number 7", "a person of no influence"])
    means, spreads = packaged.of_texts(texts.astype(np.float64))
    near, around = part.of_texts(texts.astype(np.float64))
    assert means == pytest.approx(near, abs=0.04) and spreads == pytest.approx(around, rel=0.4)


class Other:
    """A CLIP that is not the embedded one; counts what it is asked."""

    name = "ViT-Z"

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.seen = seed, 0

    def encode_images(self, images: list) -> np.ndarray:
        self.seen += len(images)
        return unit_rows(len(images), self.seed)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return unit_rows(len(texts), self.seed + 1)


def test_another_model_is_measured_once_and_kept(tmp_path: Path) -> None:
    first, again, other = Other(), Other(), Other(seed=5)
    found = shipped_background(first, cache=tmp_path)
    assert (first.seen, found.count) == (500, 500)
    kept = shipped_background(again, cache=tmp_path)
    assert again.seen == 0 and kept.total == pytest.approx(found.total, rel=1e-5)
    assert shipped_background(other, cache=tmp_path).count == 500 and other.seen == 500
    for file in tmp_path.iterdir():
        file.write_bytes(b"half of it")
    assert shipped_background(Other(), cache=tmp_path).count == 500
    (tmp_path / "file").write_text("")
    assert shipped_background(Other(), cache=tmp_path / "file").count == 500  # where none can be
