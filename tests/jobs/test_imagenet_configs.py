"""The ImageNet configs: the published batch in real images, reproducible feeds, and costs as they say."""

import re

import pytest
import yaml
from samples import ROOT

from ray_synth.cli.doctor import _outlook
from ray_synth.config import load_config, load_recipe
from ray_synth.data import imagenet
from ray_synth.preflight import outlook
from ray_synth.preflight.check import check_budget
from ray_synth.preflight.demands import Sizes
from ray_synth.preflight.packing import Nodes
from ray_synth.preflight.reach import Reach, added_nodes
from ray_synth.studies import outlook as of_studies
from ray_synth.training.job import total_steps
from ray_synth.training.published import check_recipe_batch, recipe_alone

CONFIGS = sorted((ROOT / "jobs" / "configs").glob("imagenet*.yaml"))
MARK = re.compile(
    r"^# `ray-synth estimate --config (\S+) --images (\d+) --classes (\d+) --studies`$", re.M
)


def of(path):
    text = path.read_text()
    found = MARK.search(text)
    assert found and found[1] == str(path.relative_to(ROOT)), f"{path} does not say what it costs"
    return load_config(path), Sizes(int(found[2]), int(found[3])), text


def test_there_are_five():
    assert [path.stem for path in CONFIGS] == [
        "imagenet100", "imagenet_convnext", "imagenet_lt", "imagenet_resnet50", "imagenet_vit_large",
    ]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_has_the_recipes_whole_batch_in_real_images_and_as_many_synthetic(path):
    config, sizes, _ = of(path)
    training = config.training
    real = training.num_real * training.max_workers * training.accumulate_steps
    assert real == load_recipe(training.recipe)["recipe_batch"]
    assert training.num_synth == training.num_real
    assert check_recipe_batch(training) == ""
    alone = recipe_alone(training)
    assert total_steps(alone, sizes.real) == total_steps(training, sizes.real)
    for key in (
        "loss",
        "target_threshold",
        "optimizer",
        "mixup",
        "epochs",
        "repeated_augmentation",
    ):
        assert getattr(alone, key) == getattr(training, key), key
    assert training.baseline in ("recipe", "matched")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_reproducible_and_says_what_is_ours(path):
    config, _, text = of(path)
    assert config.training.feed in ("lockstep", "stored")
    assert len(re.findall(r"\bours\b", text)) >= 4
    assert "2312.02253" in text
    given, _ = added_nodes(config.cluster.max_reach, [])
    check_budget(config, Reach(tuple(given)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_it_costs_is_what_the_command_prints(path):
    config, sizes, text = of(path)
    printed = outlook.lines(outlook.outlook(config, sizes), config.name)
    printed += of_studies.lines(
        of_studies.study_costs(config, sizes), config.cluster.price_per_gpu_hour
    )
    for line in printed:
        assert f"#   {line}".rstrip() in text
    (total,) = [line for line in printed if line.startswith(f"{config.name}: ")]
    for word in ("GPU-hours", "$", "TB", "days", "bottleneck: "):
        assert word in total


def test_imagenet100_takes_its_hundred_classes_from_imagenet():
    values = yaml.safe_load((ROOT / "jobs/configs/imagenet100.yaml").read_text())["data"]
    classes = values["train"]["class_map"]
    whole = imagenet.class_map("imagenet_wnids")
    assert len(classes) == 100
    assert classes.items() <= whole.items()
    assert values["test"]["class_map"] == classes


def test_imagenet100_is_a_days_work_of_one_node():
    config, sizes, _ = of(ROOT / "jobs/configs/imagenet100.yaml")
    found = outlook.outlook(config, sizes)
    assert found.seconds < 86_400
    check_budget(config, Reach((Nodes(1, 96, 8),)))


def test_an_outlook_adds_up_and_names_what_bounds_it():
    config, sizes, _ = of(ROOT / "jobs/configs/imagenet_resnet50.yaml")
    one, fast = outlook.outlook(config, sizes, "A10G"), outlook.outlook(config, sizes, "H100")
    assert fast.gpu_hours < one.gpu_hours
    assert one.gpu_hours == pytest.approx(sum(p.gpus * p.seconds / 3600 for p in one.parts))
    assert one.seconds == pytest.approx(sum(part.seconds for part in one.parts))
    # 300 epochs of 625 steps of 2 x 2,048 images
    steps = 300 * (1_281_167 // 2048)
    mixed = next(part for part in one.parts if part.what == "training mixed")
    rate = steps * 4096 / mixed.seconds / 8
    assert f"{rate:,.0f} images/s each" in mixed.bound
    assert "decoding: 7 CPUs" in next(p for p in fast.parts if p.what == "training mixed").bound
    live = config.model_copy(
        update={"training": config.training.model_copy(update={"feed": "live"})}
    )
    assert outlook.outlook(live, sizes, "A10G").seconds < one.seconds
    more = config.model_copy(
        update={"prompting": config.prompting.model_copy(update={"multiplier": 12})}
    )
    twice = outlook.outlook(more, sizes, "A10G")
    assert twice.parts[1].seconds == pytest.approx(2 * one.parts[1].seconds, rel=1e-6)
    assert one.bytes == pytest.approx(7_687_002 * 107_000, rel=0.1)
    with pytest.raises(ValueError, match="no GPU type is known"):
        outlook.outlook(config, sizes, "Abacus")


def test_operations_of_a_forward_pass_are_the_published_ones():
    """4.1 G multiply-adds of ResNet-50 (timm's tables), 4.5 of ConvNeXt-T, 61.6 of ViT-L."""
    assert outlook.forward_flops("resnet50", "{}", 224) == (pytest.approx(8.2e9, rel=0.02), True)
    assert outlook.forward_flops("convnext_tiny", "{}", 224)[0] == pytest.approx(8.9e9, rel=0.02)
    flops, conv = outlook.forward_flops("deit3_large_patch16_224", "{}", 224)
    assert flops == pytest.approx(123.2e9, rel=0.02) and not conv


def test_the_command_needs_neither_data_nor_cluster(capsys):
    from ray_synth.cli.command import main

    line = ["estimate", "-c", str(ROOT / "jobs/configs/imagenet_lt.yaml"), "--images", "115846"]
    with pytest.raises(SystemExit) as ended:
        main([*line, "--classes", "1000", "--gpu", "H100"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "imagenet-lt: " in said and "bottleneck: " in said
    with pytest.raises(SystemExit) as ended:
        main([*line, "--classes", "0"])
    assert ended.value.code == 2


def test_doctor_prints_it_for_the_gpus_that_there_are():
    config, sizes, _ = of(ROOT / "jobs/configs/imagenet_resnet50.yaml")
    there = Reach((Nodes(8, 8, 1, accelerator="H100"),))
    assert _outlook(config, sizes, there) == outlook.lines(
        outlook.outlook(config, sizes, "H100"), config.name
    )
    unnamed = Reach((Nodes(8, 8, 1),))  # what max_reach says then
    assert _outlook(config, sizes, unnamed) == outlook.lines(
        outlook.outlook(config, sizes, "A10G"), config.name
    )
