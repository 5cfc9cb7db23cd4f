"""Any timm checkpoint is tested on a config's test sets, exactly, by any number of actors."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from samples import encoded
from typer.testing import CliRunner

from ray_synth.cli.command import app
from ray_synth.config import parse_config
from ray_synth.data.dataset import load_index
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.evaluation import predictor
from ray_synth.evaluation.checkpoint import evaluate_checkpoint
from ray_synth.evaluation.predictor import require_results, warn_of_missing
from ray_synth.storage.folder import Folder
from ray_synth.training.augmentation import eval_transform


def settings(image_folder, **evaluation):
    source = {"format": "imagefolder", "path": str(image_folder)}
    return parse_config(
        {
            "name": "check",
            "data": {"train": source, "test": source, "ood": {"other": source}},
            "training": {"model": "resnet18", "steps": 1},
            "evaluation": {"batch_size": 3, "num_actors": 2, "num_cpus": 0.5, **evaluation},
        }
    )


def saved(path, name="test_resnet", num_classes=2):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes).eval()
    save_file(model.state_dict(), path)
    return model


@pytest.mark.parametrize("few", [predictor.FEW, 0], ids=["in the actor", "where they are read"])
def test_two_actors_and_odd_batches_count_each_image_once(
    few, local_ray, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(predictor, "FEW", few)
    model = saved(tmp_path / "mine.safetensors")
    (image_folder / "dog" / "broken.jpg").write_bytes(b"no picture")
    results = evaluate_checkpoint(
        settings(image_folder),
        Folder(tmp_path / "out"),
        model="test_resnet",
        checkpoint=tmp_path / "mine.safetensors",
    )
    data = timm.data.resolve_model_data_config(model)
    transform = eval_transform(
        data["input_size"][-1],
        crop_pct=data["crop_pct"],
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
    )
    right = 0
    (image_folder / "dog" / "broken.jpg").unlink()
    for label, name in enumerate(("cat", "dog")):
        for path in sorted((image_folder / name).iterdir()):
            pixels = transform.prepare(decode_image(path.read_bytes()))
            with torch.no_grad():
                right += model(transform.batch(pixels[None])).argmax().item() == label
    assert set(results) == {"in_domain", "other"}
    for result in results.values():
        assert result["images"] == 10
        assert result["top1"] == 10 * right
    written = Folder(tmp_path / "out").read_json("mine.json")
    assert written["results"]["other"]["images"] == 10
    assert [name.rsplit("/", 1)[-1] for name in written["corrupt"]] == ["broken.jpg"] * 2


@pytest.mark.slow
def test_a_test_set_of_which_no_image_can_be_used_is_no_result(local_ray, image_folder, tmp_path):
    config, out = settings(image_folder, num_actors=1), Folder(tmp_path / "out")
    saved(tmp_path / "mine.safetensors")
    for path in image_folder.rglob("*.*"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="test set 'in_domain' has no results"):
        evaluate_checkpoint(
            config, out, model="test_resnet", checkpoint=tmp_path / "mine.safetensors"
        )
    assert not out.exists("mine.json")


def test_results_of_all_test_sets_are_required():
    found = {("mixed.main", "in_domain"): {"top1": 50.0}}
    require_results(["in_domain"], found, [])
    with pytest.raises(UserError, match=r"test set 'ood' has no results.*\(such as a/1.png\)"):
        require_results(["in_domain", "ood"], found, ["a/1.png"])
    with pytest.raises(UserError, match="test set 'in_domain' has no results"):
        require_results(["in_domain"], {}, ["a/1.png"])


def test_what_does_not_fit_is_refused_before_anything_starts(image_folder, tmp_path):
    config, out = settings(image_folder), Folder(tmp_path / "out")
    saved(tmp_path / "three.safetensors", num_classes=3)
    with pytest.raises(ValueError, match=r"fc\.(bias|weight) is \(3"):
        evaluate_checkpoint(
            config, out, model="test_resnet", checkpoint=tmp_path / "three.safetensors"
        )
    with pytest.raises(ValueError, match="either --checkpoint"):
        evaluate_checkpoint(config, out, model="test_resnet")
    result = CliRunner().invoke(app, ["evaluate", "--checkpoint", "x.safetensors"])
    assert "go with --model" in str(result.exception)


def test_a_class_missing_from_a_test_set_is_named(image_folder, caplog):
    source = settings(image_folder).data.test
    index = load_index(source, ("bird", "cat", "dog"))
    warn_of_missing("val", index)
    assert "test set 'val' has no image of 1 of 3 classes (bird)" in caplog.text
    with pytest.raises(ValueError, match="test set 'val' has no image of any class"):
        warn_of_missing("val", index.take(index.label[:0]))
    assert encoded(0)
