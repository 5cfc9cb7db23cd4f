"""The renderer of characters: by class and seed alone, and legible to CLIP."""

import numpy as np
import pytest

from ray_synth.config import GenerationConfig
from ray_synth.generators.glyphs import NUMBERS, GlyphGenerator, font_files
from ray_synth.generators.registry import fingerprint, generator_class

CONFIG = GenerationConfig(generator="glyphs", width=64, height=48)


def rows(*names: str) -> list[dict]:
    return [{"class_name": name, "seed": seed} for seed, name in enumerate(names)]


def test_images_depend_on_their_row_alone():
    generator = GlyphGenerator(CONFIG)
    some = rows("seven", "two", "seven")
    together = generator.generate(some)
    assert [image.size for image in together] == [(64, 48)] * 3
    for row, image in zip(some, together, strict=True):
        assert np.array_equal(np.asarray(generator.generate([row])[0]), np.asarray(image))
    assert not np.array_equal(np.asarray(together[0]), np.asarray(together[2]))


def test_what_is_drawn_can_be_read():
    from ray_synth.meaning.clip import ClipModel

    clip = ClipModel()
    generator = GlyphGenerator(GenerationConfig(generator="glyphs", width=64, height=64))
    names = [name for name in NUMBERS for _ in range(10)]
    images = clip.encode_images(generator.generate(rows(*names)))
    texts = clip.encode_texts([f"a photo of the number {name}" for name in NUMBERS])
    right = (images @ texts.T).argmax(1) == np.repeat(np.arange(10), 10)
    assert right.mean() > 0.7


def test_a_class_without_characters_is_named():
    with pytest.raises(ValueError, match=r"'crane'.*class_map"):
        GlyphGenerator(CONFIG).generate(rows("crane"))
    config = CONFIG.model_copy(update={"generator_kwargs": {"class_map": {"crane": "C"}}})
    assert GlyphGenerator(config).generate(rows("crane"))
    with pytest.raises(ValueError, match="did you mean 'class_map'"):
        GlyphGenerator(CONFIG.model_copy(update={"generator_kwargs": {"clas_map": {}}}))


def test_it_is_an_installed_plug_in_with_a_fingerprint_of_its_own():
    assert generator_class("glyphs") is GlyphGenerator
    other = CONFIG.model_copy(update={"width": 32})
    assert fingerprint(CONFIG) != fingerprint(other)
    assert len(font_files()) > 10
