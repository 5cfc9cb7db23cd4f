"""The named recipes: each holds together, and what the user gives wins."""

import pytest
import torch
import yaml

from ray_synth.config import TrainingConfig, load_config, load_recipe, parse_config, recipe_names
from ray_synth.training.augmentation import train_transform
from ray_synth.training.recipe import build_model, build_optimizer, build_schedule
from ray_synth.training.trainer import check_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_its_model_optimizer_and_images(name):
    config = parse_config(load_recipe(name), model=TrainingConfig)
    check_recipe(config)
    with torch.device("meta"):
        model = build_model(config.model, num_classes=10, model_kwargs=config.model_kwargs)
    schedule = build_schedule(build_optimizer(model, config.optimizer), config.optimizer, steps=100)
    schedule.step_update(50)
    transform = train_transform(config.image_size, config.augment)
    image = torch.randint(0, 255, (3, 300, 260), dtype=torch.uint8)
    assert transform.batch(transform.prepare(image, 0)[None], 0).shape[-1] == config.image_size


def config_file(path, **training):
    source = {"format": "digits"}
    values = {"name": "x", "data": {"train": source, "test": source}, "training": training}
    path.write_text(yaml.safe_dump(values))
    return path


def test_what_the_user_gives_wins_over_the_recipe(tmp_path):
    path = config_file(
        tmp_path / "a.yaml",
        recipe="convnext_tiny",
        model="convnext_atto",
        steps=7,
        optimizer={"lr": 0.5},
    )
    training = load_config(path).training
    assert (training.steps, training.epochs) == (7, None)
    assert training.model == "convnext_atto"
    assert training.model_kwargs == {}
    assert training.optimizer.lr == 0.5
    assert training.optimizer.weight_decay == 0.05
    assert training.mixup == 0.8
    assert load_config(path, ["training.mixup=0.2"]).training.mixup == 0.2


def test_a_recipe_may_be_a_file_and_its_errors_name_it(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: test_resnet\nsteps: 3\nmixup: 0.1\n")
    training = load_config(config_file(tmp_path / "a.yaml", recipe=str(mine))).training
    assert (training.model, training.mixup) == ("test_resnet", 0.1)
    mine.write_text("steps: 3\nmixupp: 0.1\n")
    with pytest.raises(
        ValueError, match=r"recipe mine.yaml:\n  mixupp: unknown key; did you mean 'mix"
    ):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="no recipe 'resnet50_a4'; did you mean 'resnet50_a"):
        load_config(config_file(tmp_path / "b.yaml", recipe="resnet50_a4"))
