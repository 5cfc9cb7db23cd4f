"""How much of the auxiliary BN: chosen on validation images and corrupted copies, never on a test."""

import pytest
import timm
import torch
from safetensors.torch import load, save
from samples import ROOT

from ray_synth.config import SourceConfig, load_config
from ray_synth.data.dataset import load_index, read_index, select
from ray_synth.evaluation.blend import MOST, WEIGHTS, choose, few_of, write_blend
from ray_synth.storage.folder import Folder
from ray_synth.training.dual_bn import convert_dual_bn
from ray_synth.training.state_dicts import export_aux, export_main

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def tried(*pairs):
    return [
        {"weight": weight, "clean": clean, "corrupted": corrupted}
        for weight, (clean, corrupted) in zip(WEIGHTS, pairs, strict=False)
    ]


def test_the_best_on_corrupted_copies_that_is_no_worse_than_real_images_alone():
    found = tried((95, 65), (93, 68), (90, 70), (88, 74))
    assert choose(found, {"clean": 89})["weight"] == 0.25
    assert choose(found, {"clean": 96})["weight"] == 0  # none is as good: main
    assert choose(found, None)["weight"] == 0  # no baseline: none is as good as main
    assert choose(tried((90, 60), (91, 60)), {"clean": 80})["weight"] == 0  # of equals, main


@pytest.fixture
def trained(tmp_path) -> Folder:
    """A run whose mixed model has BNs that differ, and a baseline."""
    folder = Folder(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    folder.write_bytes("models/real_only.main.safetensors", save(dict(model.state_dict())))
    convert_dual_bn(model)
    for name, value in model.state_dict().items():
        if ".aux." in name and value.is_floating_point():
            value.add_(torch.rand_like(value) * 0.1)
    for bn, export in (("main", export_main), ("aux", export_aux)):
        state = {key: value.contiguous() for key, value in export(model).items()}
        folder.write_bytes(f"models/mixed.{bn}.safetensors", save(state))
    card = {
        "model": "test_resnet", "model_kwargs": {}, "class_names": list(NAMES), "image_size": 32,
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
    }  # fmt: skip
    folder.write_json("models/real_only.json", {**card, "bns": ["main"]})
    folder.write_json("models/mixed.json", {**card, "bns": ["main", "aux", "average"]})
    return folder


def validation():
    index = load_index(SourceConfig(format="digits", split="train"), NAMES)
    return select(index, 2, seed=0)


def test_the_blend_is_a_plain_model_and_its_card_says_how_it_was_chosen(trained):
    rows = [*read_index(validation()), {"image": b"no", "image_id": "x", "class_index": 0}]
    found = write_blend(trained, rows, 10**6)
    assert [item["weight"] for item in found["tried"]] == list(WEIGHTS)
    assert found["clean"] >= found["baseline"]["clean"] or found["weight"] == 0
    card = trained.read_json("models/mixed.json")
    assert card["bns"] == ["main", "aux", "average", "blend"]
    assert card["blend"] == found
    model = timm.create_model("test_resnet", num_classes=10)
    model.load_state_dict(load(trained.read_bytes("models/mixed.blend.safetensors")))
    again = write_blend(trained, rows, 10**6)  # a killed stage that is done again
    assert again == found
    assert trained.read_json("models/mixed.json") == card


def test_a_model_without_bn_has_no_blend(trained):
    card = trained.read_json("models/mixed.json")
    trained.write_json("models/mixed.json", {**card, "bns": ["main"]})
    assert write_blend(trained, [], 10**6) is None
    assert not trained.exists("models/mixed.blend.safetensors")


def test_of_many_images_some_are_taken_of_the_whole_set():
    index = load_index(SourceConfig(format="digits", split="train"), NAMES)
    few = few_of(index)
    assert len(few) == MOST < len(index)
    assert min(few.counts().values()) > 0.9 * MOST / len(NAMES)


def test_a_blend_needs_validation_images():
    with pytest.raises(ValueError, match=r"data\.validation holds none"):
        load_config(QUICKSTART, ["evaluation.bns=[main, blend]"])
    config = load_config(QUICKSTART, ["evaluation.bns=[main, blend]", "data.validation=20"])
    assert config.data.validation == 20
