"""Images made elsewhere, as a generator's."""

import numpy as np
import pytest

from ray_synth.config import GenerationConfig
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.generators.imported import ImportedGenerator
from ray_synth.generators.protocol import Failure, generate_all
from ray_synth.generators.registry import check_generator
from ray_synth.prompting.budgets import within
from ray_synth.prompting.plan import ClassPrompts, make_plan


def config_of(folder, **source) -> GenerationConfig:
    kwargs = {"source": {"format": "imagefolder", "path": str(folder), **source}}
    return GenerationConfig(generator="imported", generator_kwargs=kwargs)


def plan_of(config, names):
    guides = ImportedGenerator.references(config, names, seed=3)
    classes = [ClassPrompts(i, name, name, [], guides.get(i, [])) for i, name in enumerate(names)]
    budgets = within(None, 15, [len(guides.get(i, ())) for i in range(len(names))])
    return make_plan(
        classes, num_images=int(budgets.sum()), budgets=budgets, mix={"plain": 1.0}, styles=[],
        negative_prompt="", fingerprint="g", seed=0, count_tokens=len, max_tokens=500,
    ).to_pylist()  # fmt: skip


def test_each_image_is_a_row_once_and_comes_back_as_it_is(image_folder):
    config = config_of(image_folder)
    rows = plan_of(config, ["dog", "owl", "cat"])
    assert sorted(row["class_name"] for row in rows) == ["cat"] * 5 + ["dog"] * 5, "each one once"
    assert len({row["reference"] for row in rows}) == 10
    made = generate_all(ImportedGenerator(config), rows)
    for row, (image, reason) in zip(rows, made, strict=True):
        assert reason == ""
        path = row["reference"].partition(":")[2]
        assert f"/{row['class_name']}/" in path
        file = image_folder / row["class_name"] / path.rpartition("/")[2]
        assert np.array_equal(np.asarray(image), np.asarray(decode_image(file.read_bytes())))


def test_fewer_than_there_are_is_a_choice_by_the_seed(image_folder):
    config = config_of(image_folder)
    one, other = (ImportedGenerator.references(config, ["cat", "dog"], s) for s in (1, 2))
    assert one != other
    assert {k: sorted(v) for k, v in one.items()} == {k: sorted(v) for k, v in other.items()}


def test_a_broken_image_costs_its_row_alone(image_folder):
    (image_folder / "cat" / "0.png").write_bytes(b"<html>")
    config = config_of(image_folder)
    made = generate_all(ImportedGenerator(config), plan_of(config, ["cat", "dog"]))
    failed = [reason for image, reason in made if image is None]
    assert len(failed) == 1
    assert isinstance(failed[0], Failure) and failed[0].startswith("unreadable: ")


def test_a_set_that_changed_is_refused_by_name(image_folder):
    config = config_of(image_folder)
    rows = plan_of(config, ["cat", "dog"])
    (image_folder / "cat" / "0.png").unlink()
    with pytest.raises(UserError, match="the imported set has changed since the plan was made: "):
        generate_all(ImportedGenerator(config), rows)


def test_what_is_wrong_is_told_before_anything_is_spent(image_folder):
    with pytest.raises(UserError, match=r"needs generation\.generator_kwargs\.source"):
        check_generator(GenerationConfig(generator="imported"))
    with pytest.raises(UserError, match=r"of cat, dog, none of which is a class \(owl\)"):
        ImportedGenerator.check_classes(config_of(image_folder), ["owl"])
    mapped = config_of(image_folder, class_map={"cat": "owl"})
    ImportedGenerator.check_classes(mapped, ["owl"])
