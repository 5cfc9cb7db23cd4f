"""Data as an input of stages: what is looked at before anything is spent, and what a next start finds."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import ROOT, encoded

from ray_synth.config import Config, load_config
from ray_synth.data.dataset import Index, read_index
from ray_synth.data.inspection import inspect_drawn
from ray_synth.errors import UserError
from ray_synth.pipeline.records import StageRecords
from ray_synth.pipeline.sets import (
    RealSets,
    found_again,
    inspect_tests,
    inspect_training,
    open_sets,
)
from ray_synth.stages import stage_inputs
from ray_synth.storage.folder import Folder

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@dataclass
class Start:
    """One start of the same command, up to where the run's images are known."""

    config: Config
    sets: RealSets
    records: StageRecords
    folder: Folder

    def look(self) -> RealSets:
        given = self.config, self.sets, self.records, self.folder
        inspect_tests(*given)
        self.records.run("data", lambda: inspect_training(*given))
        return found_again(*given)


def start(root: Path, *overrides: str, force: str | None = None) -> Start:
    train, test = (
        f"data.{part}={{format: imagefolder, path: {root / part}}}" for part in ("train", "test")
    )
    config = load_config(
        QUICKSTART, [train, test, "data.class_names=null", "data.ood={}", *overrides]
    )
    folder = Folder(root / "run")
    records = StageRecords(folder, stage_inputs(config, "g"))
    records.redo(force)
    sets = open_sets(config, records, folder, folder)
    records.check()
    return Start(config, sets, records, folder)


def names(index: Index) -> list[str]:
    return ["/".join(Path(row["image_id"]).parts[-2:]) for row in read_index(index)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train", "test"):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                (tmp_path / part / name / f"{i}.png").write_bytes(encoded(10 * c + i))
    return tmp_path


@pytest.fixture
def begun(root: Path, local_ray) -> Path:
    """A run whose first stage is done; cat/1.png was set aside."""
    (root / "train" / "cat" / "1.png").write_bytes(b"<html>404</html>")
    assert names(start(root).look().train) == GOOD
    return root


GOOD = [f"cat/{i}.png" for i in (0, 2, 3)] + [f"dog/{i}.png" for i in range(4)]


def test_what_was_set_aside_is_known_by_its_name(begun):
    """Deleted, it takes no other image with it; nor does a copy of the whole set, with other times."""
    first = start(begun)
    token = first.records.token("training")
    (begun / "train" / "cat" / "1.png").unlink()
    for path in (begun / "train").rglob("*.png"):
        os.utime(path, (1, 1))
    again = start(begun)
    assert names(again.sets.train) == names(again.look().train) == GOOD
    assert again.records.token("training") == token


@pytest.mark.parametrize(
    ("path", "data", "says"),
    [
        ("cat/1.png", encoded(9), r"1 replaced \(.*train/cat/1\.png\)"),
        ("cat/0b.png", encoded(9), r"1 added \(.*train/cat/0b\.png\)"),
        ("dog/2.png", None, r"1 removed \(.*train/dog/2\.png\)"),
        ("dog/2.png", "flipped", r"1 replaced \(.*train/dog/2\.png\)"),
    ],
)
def test_a_changed_image_is_told_with_what_it_costs(begun, path, data, says):
    start(begun).records.run("meaning", dict)
    file = begun / "train" / path
    if data == "flipped":  # of the same size
        data = file.read_bytes()[:-20] + bytes(20)
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(UserError, match="holds a finished data stage with other files") as told:
        start(begun)
    assert re.search(f"data.train: files {says}", str(told.value))
    assert "--force-stage data: data and meaning took 0." in str(told.value)
    if data != "flipped":
        again = start(begun, force="data")
        again.records.forget()
        assert len(again.look().train) == {"cat/1.png": 8, "cat/0b.png": 8, "dog/2.png": 6}[path]


def test_a_changed_test_image_concerns_the_evaluation_alone(begun):
    file = begun / "test" / "dog" / "0.png"
    file.write_bytes(encoded(77))
    again = start(begun)
    again.look()  # nothing that is done depends on it: it is looked at again
    again.records.run("evaluation", dict)
    os.utime(file, (1, 1))
    start(begun)
    file.unlink()
    with pytest.raises(UserError, match="finished evaluation stage with other files") as told:
        start(begun)
    assert "data.test: files 1 removed" in str(told.value)
    start(begun, force="evaluation")


def test_files_of_many_images_are_inputs_as_well(root, local_ray):
    def write(last: int) -> None:
        images = [encoded(i) for i in (*range(7), last)]
        images[3] = b"<html>404</html>"
        table = {"image": images, "label": ["cat", "dog"] * 4}
        pq.write_table(pa.table(table), root / "a.parquet", row_group_size=3)

    parquet = f"data.train={{format: parquet, path: {root / 'a.parquet'}}}"
    write(7)
    trained = [row["image"] for row in read_index(start(root, parquet).look().train)]
    assert trained == [encoded(i) for i in (0, 1, 2, 4, 5, 6, 7)]
    os.utime(root / "a.parquet", (1, 1))
    again = start(root, parquet).look()
    assert [row["image"] for row in read_index(again.train)] == trained
    write(8)
    with pytest.raises(UserError, match=r"data\.train: files 1 replaced \(.*/a\.parquet\)"):
        start(root, parquet)


def test_a_run_of_before_there_were_digests_goes_on(begun):
    folder = Folder(begun / "run")
    record = folder.read_json("stages/data.json")
    older = {key: record["result"][key] for key in ("num_real", "counts")}
    older["corrupt"] = [{**item, "shard": 0, "row": 1} for item in record["result"]["corrupt"]]
    inputs = {k: v for k, v in record["inputs"].items() if not k.startswith("files of")}
    folder.write_json("stages/data.json", {**record, "inputs": inputs, "result": older})
    (begun / "train" / "cat" / "1.png").unlink()
    assert names(start(begun).look().train) == GOOD


def test_others_are_drawn_in_the_places_of_what_cannot_be_decoded(root, local_ray, caplog):
    for i in range(4, 10):
        (root / "train" / "cat" / f"{i}.png").write_bytes(encoded(i))
    (root / "train" / "cat" / "3.png").write_bytes(b"<html>404</html>")
    one = "data.train.images_per_class=1"
    drawn = [names(start(root, one, f"seed={seed}", "name=x").sets.train) for seed in range(12)]
    bad = [seed for seed, found in enumerate(drawn) if "cat/3.png" in found]
    assert bad, "no seed draws the corrupt image: the test shows nothing"
    first = start(root, one, f"seed={bad[0]}").look()
    assert first.train.counts() == {"cat": 1, "dog": 1}
    assert "cat/3.png" not in names(first.train)
    assert names(first.train)[1:] == drawn[bad[0]][1:], "the other class keeps its image"
    (root / "train" / "cat" / "3.png").unlink()  # and with it the order of the draws
    again = start(root, one, f"seed={bad[0]}")
    assert names(again.sets.train) == names(first.train)
    assert "when this run drew its own" not in caplog.text
    (root / "train" / "dog" / "new.png").write_bytes(encoded(99))
    again = start(root, one, f"seed={bad[0]}")
    assert names(again.sets.train) == names(first.train)
    assert "data.train has 14 images, and had 14 when this run drew its own" in caplog.text
    for i in set(range(10)) - {3}:
        (root / "train" / "cat" / f"{i}.png").write_bytes(b"")
    found = inspect_drawn(again.sets.pool, 1, 0, max_pixels=10**6, most=10**6)
    assert len(found.corrupt) == 9, "a class of which all fail is seen through"


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_set_that_is_broken_as_a_whole_stops_the_run_at_once(root, local_ray, part):
    files = sorted((root / part).rglob("*.png"))
    for path in files[:3]:
        path.write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"data\.{part}: 3 of the 8 images looked at") as told:
        start(root).look()
    assert f"{files[0]}: a Git LFS pointer, not the file itself: run `git lfs pull`" in str(
        told.value
    )
    assert start(root, "data.max_corrupt=0.5").look().train
    assert not Folder(root / "run").exists("stages/meaning.json")
