"""`ray-synth init` on the folders that people have: what it writes is what a run accepts."""

import shlex
import unicodedata

import pytest
from samples import encoded
from typer.testing import CliRunner

from ray_synth.cli.command import app
from ray_synth.cli.setup import describe, run_name, write_config
from ray_synth.config import load_config
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import load_index
from ray_synth.data.splits import find_splits
from ray_synth.errors import UserError


def put(root, *classes, images=2):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            (root / name / f"{i}.png").write_bytes(encoded(i))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("bilder_ä", "bilder_a"),
        ("my photos (1)", "my-photos-1"),
        ("_private", "private"),
        ("a+b", "a-b"),
        ("写真", "images"),
        ("it's #2", "it-s-2"),
        ("no", "no"),
        ("2024", "2024"),
        ("x" * 200, "x" * 80),
    ],
)
def test_init_writes_what_run_accepts(tmp_path, folder, name):
    put(tmp_path / folder / "train", "cat", "dog")
    put(tmp_path / folder / "test", "cat", "dog")
    out = tmp_path / folder / "c #1.yaml"
    said = describe(write_config(tmp_path / folder, out), out)
    config = load_config(out, [f"runs_dir={tmp_path}/runs #2"])
    assert config.name == run_name(tmp_path / folder) == name
    assert config.runs_dir == f"{tmp_path}/runs #2"
    assert config.data.train.path == str(tmp_path / folder / "train")
    words = shlex.split(said.splitlines()[-1].partition("then: ")[2])
    assert [word for word in words if word.endswith(".yaml")] == [str(out)] * 2
    assert load_index(config.data.train).counts() == {"cat": 2, "dog": 2}


def test_a_name_that_no_run_may_have_is_refused_before_anything_is_written(tmp_path):
    put(tmp_path / "a" / "train", "cat", "dog")
    put(tmp_path / "a" / "test", "cat", "dog")
    with pytest.raises(UserError, match="--name:\n  name: .*pattern"):
        write_config(tmp_path / "a", tmp_path / "c.yaml", name="my run")
    assert not (tmp_path / "c.yaml").exists()
    (tmp_path / "c.yaml").touch()  # as a full disk leaves it
    with pytest.raises(UserError, match="is empty, as a full disk"):
        load_config(tmp_path / "c.yaml")
    write_config(tmp_path / "a", tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml").name == "a"


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("TRAINING", "VAL"), ("train_set", "test-set"), ("training", "Validation")],
)
def test_usual_names_of_splits_are_found_in_any_case(tmp_path, train, test):
    put(tmp_path / train, "cat", "dog")
    put(tmp_path / test, "cat", "dog")
    put(tmp_path / "unlabeled", "x")
    assert find_splits(tmp_path) == (tmp_path / train, tmp_path / test, ["unlabeled"])


def test_a_class_called_train_is_a_class(tmp_path):
    put(tmp_path / "vehicles", "train", "car", "test")
    put(tmp_path / "other", "train", "car")
    found = write_config(tmp_path / "vehicles", tmp_path / "c.yaml", test=tmp_path / "other")
    assert found["counts"] == {"car": 2, "test": 2, "train": 2}
    put(tmp_path / "set" / "train", "train", "car")
    put(tmp_path / "set" / "test", "train", "car")
    found = write_config(tmp_path / "set", tmp_path / "d.yaml")
    assert found["counts"] == {"car": 2, "train": 2}
    assert found["left_out"] == []


def test_what_may_be_a_split_or_a_class_is_asked(tmp_path):
    put(tmp_path / "a" / "train", "steam", "goods")
    put(tmp_path / "a", "car")
    with pytest.raises(
        UserError, match=r"is .*/a/train the training set, or a class as car may be"
    ):
        find_splits(tmp_path / "a")
    put(tmp_path / "b" / "test", "cat", "dog")
    put(tmp_path / "b", "cat", "dog")
    with pytest.raises(UserError, match=r"has test/ but no train/"):
        find_splits(tmp_path / "b")
    put(tmp_path / "c" / "train", "cat")
    put(tmp_path / "c" / "Train", "cat")
    with pytest.raises(UserError, match="could both be meant"):
        find_splits(tmp_path / "c")


def test_init_tells_what_is_left_out_and_what_it_may_be(tmp_path):
    put(tmp_path / "set" / "train", "Cat", unicodedata.normalize("NFC", "Krähe"), "dog")
    test = tmp_path / "set" / "test"
    put(test, "cat", unicodedata.normalize("NFD", "Krähe"), "dog", "bird")
    put(tmp_path / "set" / "val", "dog")
    (test / "dog" / "1.heic").write_bytes(b"x")
    out = str(tmp_path / "c.yaml")
    result = CliRunner().invoke(app, ["init", "--images", str(tmp_path / "set"), "--out", out])
    assert result.exit_code == 0, result.output
    assert "4 test images" in result.output
    assert "warning: data.test: 4 images are left out" in result.output
    assert "'cat' (2 images; did you mean 'Cat'?)" in result.output
    assert "warning: data.test: not read: 1 .heic" in result.output
    assert "warning: not used: val/" in result.output


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "set" / "train", "cat", "dog")
    put(tmp_path / "set" / "test", "cat", "dog")
    write_config(tmp_path / "set", tmp_path / "c.yaml")
    home = [f"data.{split}.path=~/set/{split}" for split in ("train", "test")]
    config = load_config(
        tmp_path / "c.yaml", [*home, "runs_dir=~/runs", "data.class_names=~/n.txt"]
    )
    (tmp_path / "n.txt").write_text("dog\ncat\n")
    assert config.runs_dir == str(tmp_path / "runs")
    names = read_class_names(config.data.class_names)
    assert names == ("dog", "cat")
    assert load_index(config.data.train, names).counts() == {"dog": 2, "cat": 2}
