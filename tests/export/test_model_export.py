"""A finished run's model answers as it was tested, from the run and from each form it is written in."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from buckets import make_bucket, serving
from hubs import TOKEN
from safetensors.torch import load_file

from ray_synth.errors import UserError
from ray_synth.export import model_export
from ray_synth.export.classifier import open_classifier
from ray_synth.export.comparison import check_pixels
from ray_synth.export.model_export import MODEL_FORMATS, export_model
from ray_synth.export.predictions import find_pictures, predict
from ray_synth.export.weights import RECOMMENDED, choose_weights
from ray_synth.report.page import headlines
from ray_synth.report.table import comparison_rows
from ray_synth.storage.folder import Folder
from ray_synth.training import model_files


def answers(place: str | Path, pictures: Path, weights: str | None = None) -> dict[str, dict]:
    """Picture -> class -> probability, of all classes."""
    classifier = open_classifier(str(place), weights)
    found = predict(classifier, find_pictures([str(pictures)]), top=99)
    return {p.name: dict(p.top) for p in found}


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory) -> dict[str, Folder]:
    place = tmp_path_factory.mktemp("models")
    for form in MODEL_FORMATS:
        checked = export_model(choose_weights(finished), Folder(place / form), form=form)
        assert checked.of == "test images"
        assert checked.pictures == 64
        assert checked.difference < 1e-5
    return {form: Folder(place / form) for form in MODEL_FORMATS}


@pytest.mark.parametrize("weights", [None, "mixed.aux", "real_only"])
def test_a_model_is_as_right_as_its_run_says(finished, digits, weights):
    results = finished.read_json("metrics.json")
    for part in (weights or "mixed.main").split("."):
        results = results[part]
    found = answers(finished.uri, digits, weights)
    right = [max(top, key=top.get) == Path(name).parent.name for name, top in found.items()]
    assert len(right) == results["in_domain"]["images"] == 40
    assert 100 * np.mean(right) == pytest.approx(results["in_domain"]["top1"])
    assert all(sum(top.values()) == pytest.approx(1, abs=1e-6) for top in found.values())


def test_the_model_that_is_taken_is_that_of_the_reports_headline(finished):
    arm, bn = RECOMMENDED.split(".")
    metrics = finished.read_json("metrics.json")
    shown = headlines(comparison_rows(metrics))
    assert [item["test_set"] for item in shown] == ["in_domain", "uci_digits"]
    assert shown[0]["after"] == metrics[arm][bn]["in_domain"]
    assert choose_weights(finished).name == RECOMMENDED


def test_predict_prints_a_line_for_each_picture_and_names_a_bad_one(
    finished, digits, tmp_path, call
):
    shutil.copytree(digits / "six", tmp_path / "a")
    (tmp_path / "a" / "broken\x1b[2J.png").write_bytes(b"no picture")
    (tmp_path / "a" / "notes.txt").write_text("six")
    out, err = call("predict", finished.uri, str(tmp_path / "a"))
    lines = out.splitlines()
    assert len(lines) == 21
    assert "\x1b" not in out
    assert [line for line in lines if "not read: not a readable image" in line] == [lines[-1]]
    assert all(line.split()[1] in ("six", "seven") and line.endswith("%") for line in lines[:-1])
    assert "21 pictures, 1 of them could not be read; 1 other files passed over" in err
    assert "mixed.main" in err

    one = str(digits / "six" / sorted(p.name for p in (digits / "six").iterdir())[0])
    out, _ = call("predict", finished.uri, one, str(tmp_path / "a"), "--json", "--top", "2")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0]["image"] == one
    assert rows[0]["top"][0] == {k: rows[0][k] for k in ("class_name", "probability")}
    assert len(rows[0]["top"]) == 2
    assert [row["image"].endswith(".png") for row in rows if "error" in row] == [True]
    _, err = call("predict", finished.uri, str(tmp_path / "a" / "notes.txt"), code=2)
    assert "not one of the pictures could be read" in err
    _, err = call("predict", finished.uri, str(tmp_path / "none.png"), code=2)
    assert "no such picture or folder" in err


@pytest.mark.parametrize("form", ["onnx", "timm"])
def test_an_exported_model_says_what_the_run_says(finished, exported, digits, form):
    before, after = answers(finished.uri, digits), answers(exported[form].uri, digits)
    assert before.keys() == after.keys()
    for name, top in before.items():
        assert after[name] == pytest.approx(top, abs=1e-5 if form == "onnx" else 1e-7)


def test_onnx_runs_without_us_on_batches_of_any_size(finished, exported, digits):
    about = exported["onnx"].read_json("model.json")
    session = onnxruntime.InferenceSession(exported["onnx"].path("model.onnx"))
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    assert about["class_names"] == ["six", "seven"]
    assert about["preprocessing"].items() >= {
        "image_size": 32, "resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bicubic", "normalised_inside": True, "value_range": None,
    }.items()  # fmt: skip
    pixels, _ = check_pixels(choose_weights(finished), [str(digits)])
    model = choose_weights(finished).load()
    with torch.inference_mode():
        expected = model((torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5).numpy()
    for count in (1, 7, len(pixels)):
        logits, probabilities = session.run(None, {"images": pixels[:count]})
        np.testing.assert_allclose(logits, expected[:count], atol=1e-5)
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


def test_torch_export_runs_without_us_on_batches_of_any_size(finished, exported, digits):
    program = torch.export.load(exported["torch"].path("model.pt2")).module()
    pixels, of = check_pixels(choose_weights(finished), [str(digits)])
    assert of == "pictures"
    model = choose_weights(finished).load()
    for count in (1, 7, len(pixels)):
        images = torch.from_numpy(pixels[:count])
        with torch.inference_mode():
            logits, _ = program(images)
            expected = model((images.float() / 255 - 0.5) / 0.5)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_timm_loads_the_folder_as_one_of_its_own(finished, exported):
    folder = exported["timm"].path()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    own = choose_weights(finished).load().state_dict()
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in own.items()
    }
    assert load_file(f"{folder}/model.safetensors").keys() == own.keys()
    config = exported["timm"].read_json("config.json")
    assert config["label_names"] == ["six", "seven"]
    made = timm.data.resolve_model_data_config(model)
    assert made["input_size"] == (3, 32, 32)
    assert (list(made["mean"]), made["crop_pct"]) == ([0.5] * 3, 1.0)
    assert "license" not in config["pretrained_cfg"], "timm's weights have one; these are ours"


def test_no_file_names_a_folder_of_this_machine(exported):
    for folder in exported.values():
        for name in folder.names():
            data = folder.read_bytes(name)
            assert str(Path(model_files.__file__).parents[2]).encode() not in data, name


def test_a_model_that_answers_otherwise_is_not_written(finished, tmp_path, monkeypatch):
    other = choose_weights(finished, "mixed.aux")
    monkeypatch.setitem(
        model_export._MAKERS, "timm", lambda _, make=model_export._timm: make(other)
    )
    with pytest.raises(UserError, match="is not the trained one: a logit differs by"):
        export_model(choose_weights(finished), Folder(tmp_path / "out"), form="timm")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused_before_any_work(finished, tmp_path, monkeypatch, call):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    weights = choose_weights(finished)
    with pytest.raises(UserError, match=r"holds no timm model \(there is thesis.tex\)"):
        export_model(weights, Folder(tmp_path / "full"), form="timm")
    with pytest.raises(UserError, match="unknown model format 'onx'"):
        export_model(weights, Folder(tmp_path / "out"), form="onx")
    with pytest.raises(UserError, match="did you mean 'mixed.average'"):
        choose_weights(finished, "mixed.avrage")
    with pytest.raises(UserError, match="has no trained model yet"):
        choose_weights(Folder(tmp_path / "empty"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name)
    )
    line = ["export", str(tmp_path / "out"), "--run", finished.uri, "--model", "onnx"]
    _, err = call(*line, code=2)
    assert "ONNX needs onnxscript, which is not installed: pip install 'ray-synth[onnx]'" in err
    _, err = call("export", str(tmp_path / "o"), "--run", finished.uri, "--weights", "a", code=2)
    assert "--weights and --check-on go with --model" in err


def test_without_test_images_the_runs_own_are_checked_on(finished, tmp_path):
    run = Folder(shutil.copytree(finished.uri, tmp_path / "run"))
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("format: digits\n    path: null",
                                                  "format: imagefolder\n    path: /nowhere"))  # fmt: skip
    pixels, of = check_pixels(choose_weights(run), None)
    assert (of, len(pixels)) == ("synthetic images", 32)


def test_no_file_of_an_exported_folder_is_unpickled_or_sets_what_it_may_not(
    exported, tmp_path, digits
):
    with pytest.raises(UserError, match="may hold pickled Python"):
        open_classifier(exported["torch"].uri)
    with pytest.raises(UserError, match="neither a run's directory"):
        open_classifier(str(digits))
    with pytest.raises(UserError, match="is no run, and has one model"):
        open_classifier(exported["timm"].uri, "mixed.main")
    folder = Folder(shutil.copytree(exported["timm"].uri, tmp_path / "timm"))
    config = folder.read_json("config.json")
    for changed, said in (
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args.checkpoint_path"),
        ({"pretrained_cfg": {**config["pretrained_cfg"], "file": "x.bin"}}, "pretrained_cfg.file"),
        ({"label_names": ["six", 7]}, "class_names is not what it should be"),
        ({"label_names": None}, "class_names is not"),
        ({"pretrained_cfg": 3}, "lacks what a classifier needs"),
        ({"label_names": ["six", "seven", "eight"]}, "does not fit config.json"),
    ):
        folder.write_json("config.json", {**config, **changed})
        with pytest.raises(UserError, match=said):
            open_classifier(folder.uri)
    onnx = Folder(shutil.copytree(exported["onnx"].uri, tmp_path / "onnx"))
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="is no ONNX model that can be run"):
        open_classifier(onnx.uri)
    onnx.write_json("model.json", {"model": "a", "class_names": ["a"]})
    with pytest.raises(UserError, match="lacks KeyError"):
        open_classifier(onnx.uri)


@pytest.mark.slow
def test_runs_pictures_and_models_may_lie_in_buckets(
    finished, exported, digits, tmp_path, monkeypatch, hub, call
):
    with serving("s3", tmp_path) as server:
        make_bucket(server)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = Folder(server.uri)
        for folder, to in ((finished, "run"), (exported["onnx"], "onnx")):
            for path in Path(folder.uri).rglob("*"):
                if path.is_file() and "images" not in path.parts:
                    name = path.relative_to(folder.uri).as_posix()
                    bucket.child(to).write_bytes(name, path.read_bytes())
        six = sorted((digits / "six").iterdir())[:3]
        for path in six:
            bucket.child("pictures").write_bytes(f"six/{path.name}", path.read_bytes())
        local = answers(finished.uri, digits / "six")
        for model in ("run", "onnx"):
            found = find_pictures([bucket.child("pictures").uri])
            classifier = open_classifier(bucket.child(model).uri)
            there = {Path(p.name).name: p.top[0] for p in predict(classifier, found)}
            assert there.keys() == {path.name for path in six}
            for path in six:
                name, value = there[path.name]
                assert value == pytest.approx(local[str(path)][name], abs=1e-5)
        to = bucket.child("written")
        export_model(choose_weights(bucket.child("run")), to, form="timm")
        assert to.names() == ["config.json", "model.json", "model.safetensors"]
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        call("push", bucket.child("run").uri, "me/digits", "--only", "model")
    pushed = list(hub.repositories["me/digits"].commits.values())[-1]
    assert pushed["model.safetensors"] == exported["timm"].read_bytes("model.safetensors")
    assert not (tmp_path / "run.push").exists()
