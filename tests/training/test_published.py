"""The baseline: whose batch, rates and length it takes; and the loss of the published recipes."""

import pytest
import torch
import torch.nn.functional as F
import yaml
from timm.loss import BinaryCrossEntropy

from ray_synth.config import TrainingConfig, load_recipe, parse_config, recipe_names
from ray_synth.errors import UserError
from ray_synth.stages import changed
from ray_synth.training.augmentation import Mixing
from ray_synth.training.job import total_steps
from ray_synth.training.published import (
    PUBLISHED,
    check_recipe_batch,
    published_result,
    recipe_alone,
)
from ray_synth.training.recipe import build_loss, mixed_loss

IMAGENET = 1_281_167


def training(recipe="resnet50_a2", **settings) -> TrainingConfig:
    values = {**load_recipe(recipe), "recipe": recipe, "num_workers": 8, **settings}
    return parse_config(values, model=TrainingConfig)


def test_the_recipe_alone_has_its_own_batch_rates_and_length_whatever_the_run_has():
    mine = training(
        baseline="recipe", batch_size=128, optimizer={"name": "sgd", "lr": 9}, mixup=0.0,
        num_gpus=1, dtype="bfloat16", epochs=None, steps=5, lambda_synth=0.3,
    )  # fmt: skip
    alone = recipe_alone(mine)
    published = load_recipe("resnet50_a2")
    assert alone.num_real * 8 * alone.accumulate_steps == 2048
    assert alone.num_real <= 128 and alone.accumulate_steps == 2
    assert (alone.optimizer.name, alone.optimizer.lr) == ("lamb", published["optimizer"]["lr"])
    assert (alone.epochs, alone.steps, alone.mixup) == (300, None, 0.1)
    assert (alone.num_gpus, alone.dtype, alone.num_workers) == (1, "bfloat16", 8)
    assert total_steps(alone, IMAGENET) == 300 * (IMAGENET // 2048)


@pytest.mark.parametrize("name", sorted(set(PUBLISHED)))
def test_with_the_whole_batch_of_the_recipe_matched_and_recipe_are_the_same_training(name):
    whole = load_recipe(name)["recipe_batch"]
    mine = training(name, baseline="both", batch_size=2 * whole // 8, real_fraction=0.5)
    alone = recipe_alone(mine)
    differing = {
        key
        for key, value in alone.model_dump().items()
        if value != mine.model_dump()[key] and key != "baseline"
    }
    assert differing == set()
    assert total_steps(alone, IMAGENET) == total_steps(mine, IMAGENET)
    assert check_recipe_batch(mine) == ""


def test_a_step_with_less_than_the_recipes_batch_is_said():
    """1,024 real images a step at A2's rate for 2,048, as the config had it."""
    half = training(batch_size=256)
    assert "1024 real images per step, and the rates of recipe resnet50_a2 are for 2048" in (
        check_recipe_batch(half)
    )
    assert check_recipe_batch(TrainingConfig(steps=1)) == ""


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"model": "resnet18"},
            "recipe resnet50_a2 has model resnet50, training.model is resnet18",
        ),
        ({"image_size": 160}, "has image_size 224, training.image_size is 160"),
        (
            {"num_workers": 5},
            "2048 images per step, which cannot be shared out evenly over 5 workers",
        ),
    ],
)
def test_what_is_not_the_published_recipe_is_no_baseline(settings, says):
    with pytest.raises(UserError, match=says):
        recipe_alone(training(baseline="recipe", **settings))


def test_a_recipe_baseline_needs_a_recipe_and_its_batch(tmp_path):
    with pytest.raises(ValueError, match=r"baseline both needs a training.recipe"):
        TrainingConfig(steps=1, baseline="both")
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: test_resnet\nsteps: 3\n")
    config = training(str(mine), baseline="recipe")
    with pytest.raises(UserError, match="does not say its recipe_batch"):
        recipe_alone(config)


def test_baselines_of_earlier_versions_are_read_and_change_nothing():
    assert TrainingConfig(steps=1, baseline=True).baselines == ("real_only",)
    assert TrainingConfig(steps=1, baseline=False).baselines == ()
    old = yaml.safe_load("training.baseline: true")
    assert changed(old, {"training.baseline": "matched"}) == []
    assert changed(old, {"training.baseline": "none"}) == ["training.baseline: matched -> none"]


def test_every_recipe_says_the_batch_of_its_rates():
    for name in recipe_names():
        assert load_recipe(name)["recipe_batch"] > 0, name


def test_published_results_stand_beside_the_same_model_on_imagenet_alone():
    found = published_result({"recipe": "resnet50_a2", "model": "resnet50"}, 1000)
    assert found is not None and found.top1 == 79.8
    assert published_result({"recipe": "resnet50_a2", "model": "resnet18"}, 1000) is None
    assert published_result({"recipe": "resnet50_a2", "model": "resnet50"}, 100) is None
    assert published_result({"model": "resnet50"}, 1000) is None
    for name, published in PUBLISHED.items():
        assert load_recipe(name)["model"] == published.model


@pytest.mark.parametrize("recipe", ["resnet50_a2", "resnet50_a3", "vit_large"])
def test_the_loss_is_the_recipes_binary_cross_entropy(recipe):
    config = training(recipe)
    torch.manual_seed(0)
    logits = torch.randn(8, 10)
    _, targets = Mixing.of(config, 10)(torch.rand(8, 3, 8, 8), torch.arange(8), 4, 3)
    expected = BinaryCrossEntropy(0.0, target_threshold=config.target_threshold)
    total, real, _ = mixed_loss(logits, targets, 4, 0.5, build_loss(config))
    torch.testing.assert_close(real, expected(logits[:4], targets[:4]))
    torch.testing.assert_close(total, real + 0.5 * expected(logits[4:], targets[4:]))
    assert config.target_threshold == (0.0 if recipe == "vit_large" else 0.2)
    whole = torch.zeros(2, 10)
    whole[:, :2] = torch.tensor([0.6, 0.4])
    both = F.binary_cross_entropy_with_logits(logits[:2], (whole > 0).float())
    torch.testing.assert_close(build_loss(config)(logits[:2], whole), both)


def test_mixed_labels_are_smoothed_once():
    """ConvNeXt's 0.1: mixup smooths the targets, and the loss did it again."""
    config = training("convnext_tiny")
    assert config.label_smoothing == 0.1
    logits = torch.randn(4, 10)
    _, targets = Mixing.of(config, 10)(torch.rand(4, 3, 8, 8), torch.arange(4), 2, 0)
    expected = torch.sum(-targets * F.log_softmax(logits, 1), 1).mean()
    torch.testing.assert_close(build_loss(config)(logits, targets), expected)
    plain = config.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    hard = torch.arange(4)
    torch.testing.assert_close(
        build_loss(plain)(logits, hard), F.cross_entropy(logits, hard, label_smoothing=0.1)
    )


def test_a_threshold_belongs_to_binary_cross_entropy_and_not_beside_smoothing():
    with pytest.raises(ValueError, match="target_threshold belongs to loss"):
        TrainingConfig(steps=1, target_threshold=0.2)
    with pytest.raises(ValueError, match="would make it wholly of each"):
        TrainingConfig(
            steps=1, loss="binary_cross_entropy", target_threshold=0.0, label_smoothing=0.1
        )
