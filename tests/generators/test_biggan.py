"""BigGAN through its library, with tiny random weights: classes by name, noise by seed."""

import json

import numpy as np
import pytest
import torch
from pytorch_pretrained_biggan import BigGAN, BigGANConfig
from safetensors.torch import load_file, save_file
from test_store import plan_rows

from ray_synth.config import GenerationConfig
from ray_synth.generators.biggan import BigGanGenerator, imagenet_indices
from ray_synth.generators.protocol import generate_all
from ray_synth.generators.registry import check_generator, fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.json and model.safetensors of a 32x32 model."""
    torch.manual_seed(0)
    config = BigGANConfig(
        output_dim=32,
        z_dim=8,
        class_embed_dim=8,
        channel_width=4,
        layers=[(True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)],
        attention_layer_position=2,
    )
    model = BigGAN(config)
    model.embeddings.weight.data.normal_()
    model.generator.bn.weight.data.fill_(1.0)  # the library leaves these two unset
    model.generator.bn.bias.data.zero_()
    path = tmp_path_factory.mktemp("biggan")
    (path / "config.json").write_text(config.to_json_string())
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors"
    )
    return path


def config_of(folder, *, settings=(), **others):
    return GenerationConfig(
        generator="ray_synth.generators.biggan:BigGanGenerator",
        generator_kwargs={"weights": str(folder), **dict(settings)},
        **{"width": 32, "height": 32, "batch_size": 3, "device": "cpu", "num_threads": 1, **others},
    )


def rows_of(*names, meaning=""):
    return [
        {**row, "class_name": name, "meaning": meaning, "seed": 2**40 + i}
        for i, (row, name) in enumerate(zip(plan_rows(len(names)), names, strict=True))
    ]


def pixels(image):
    return np.asarray(image).astype(int)


def test_an_image_is_made_of_its_class_and_its_seed_alone(folder):
    generator = BigGanGenerator(config_of(folder))
    rows = rows_of("goldfish", "tench", "hen", "goldfish", "goldfish")
    rows[4]["seed"] = rows[0]["seed"]
    rows[1]["seed"] = rows[0]["seed"]
    made = generator.generate(rows)
    assert [(image.size, image.mode) for image in made] == [((32, 32), "RGB")] * 5
    again = generator.generate(rows[::-1])[::-1]
    for one, other in zip(made, again, strict=True):
        np.testing.assert_array_equal(pixels(one), pixels(other))
    (alone,) = generator.generate(rows[3:4])
    np.testing.assert_array_equal(pixels(alone), pixels(made[3]))
    np.testing.assert_array_equal(pixels(made[4]), pixels(made[0]))
    assert np.abs(pixels(made[1]) - pixels(made[0])).mean() > 2  # another class
    assert np.abs(pixels(made[3]) - pixels(made[0])).mean() > 2  # another seed


def test_all_bits_of_a_seed_count(folder):
    rows = rows_of("hen", "hen")
    rows[0]["seed"], rows[1]["seed"] = 5, 5 + 2**32
    one, other = BigGanGenerator(config_of(folder)).generate(rows)
    assert np.abs(pixels(one) - pixels(other)).mean() > 2


def test_less_truncation_is_more_variety(folder):
    def spread(truncation):
        config = config_of(folder, settings={"truncation": truncation})
        made = BigGanGenerator(config).generate(rows_of(*["hen"] * 6))
        return np.stack([pixels(image) for image in made]).std(axis=0).mean()

    assert spread(0.1) < spread(1.0)


def test_images_have_the_size_of_the_config(folder):
    made = BigGanGenerator(config_of(folder, width=48, height=16)).generate(rows_of("hen"))
    assert made[0].size == (48, 16)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("tench", 0),
        ("Tinca tinca", 0),
        ("tench, Tinca tinca", 0),
        ("great_white_shark", 2),
        ("n01443537", 1),
        ("Golden Retriever", 207),
    ],
)
def test_classes_go_by_names_synonyms_and_wordnet_ids(folder, name, index):
    assert imagenet_indices(name) == {index}
    assert BigGanGenerator(config_of(folder)).class_index(rows_of(name)[0]) == index


def test_the_class_map_comes_first_and_the_meaning_last(folder):
    mapped = {"tench": 5, "my bird": "hen", "another": "n01443537"}
    generator = BigGanGenerator(config_of(folder, settings={"class_map": mapped}))
    found = [generator.class_index(row) for row in rows_of(*mapped)]
    assert found == [5, 8, 1]
    assert generator.class_index(rows_of("7", meaning="golden retriever")[0]) == 207


@pytest.mark.parametrize(
    ("name", "says"),
    [("gryphon", "'gryphon'.*none of them"), ("crane", "'crane'.*several of them")],
)
def test_a_class_that_is_none_or_several_of_imagenets_is_named(folder, name, says):
    generator = BigGanGenerator(config_of(folder))
    with pytest.raises(ValueError, match=says) as error:
        generator.generate(rows_of("hen", name, meaning="a beast"))
    assert "class_map" in str(error.value)
    (good, _), (none, reason) = generate_all(generator, rows_of("hen", name))
    assert good is not None and none is None and name in reason


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"truncation": 0}, "truncation"),
        ({"truncation": 1.5}, "truncation"),
        ({"trunkation": 0.5}, "did you mean 'truncation'"),
        ({"weights": "/nowhere"}, "pytorch_model.bin is converted once"),
        ({"class_map": {"a": 1000}}, "'a' is mapped to 1000"),
        ({"class_map": {"a": "golden retreiver"}}, "golden retriever"),
    ],
)
def test_wrong_settings_are_told_before_a_start(folder, settings, says):
    with pytest.raises(ValueError, match=says):
        check_generator(config_of(folder, settings=settings))


def test_references_are_refused(folder):
    with pytest.raises(ValueError, match=r"generation\.reference"):
        check_generator(config_of(folder, reference={}))


def test_pickled_weights_are_never_read(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    for weights in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="save_file"):
            BigGanGenerator(config_of(weights))


def test_weights_that_do_not_fit_are_told(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "channel_width": 8}))
    state = load_file(folder / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not BigGAN's"):
        BigGanGenerator(config_of(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(values))
    state.pop("embeddings.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as embeddings\.weight"):
        BigGanGenerator(config_of(tmp_path))


def test_the_fingerprint_changes_with_what_decides_the_pixels_alone(folder, tmp_path):
    own = fingerprint(config_of(folder))
    same = [config_of(folder, batch_size=7), config_of(folder / "model.safetensors")]
    assert {fingerprint(config) for config in same} == {own}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    state["generator.bn.bias"] += 0.25
    save_file(state, tmp_path / "model.safetensors")
    changed = [
        config_of(tmp_path),
        config_of(folder, settings={"truncation": 0.5}),
        config_of(folder, settings={"class_map": {"a": 1}}),
        config_of(folder, width=64),
    ]
    assert own not in {fingerprint(config) for config in changed}
