"""Real images of a pool by CLIP: the best of each class whatever their order, no copies, no test sets."""

import json
import pickle
import shutil

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_synth.config import ClipConfig, DataConfig, SourceConfig
from ray_synth.data.dataset import ImagesByClass, load_index, select, tasks
from ray_synth.data.digits import load_digits
from ray_synth.data.images import encode_array
from ray_synth.data.pool import load_pool, pool_digest, refuse_tests
from ray_synth.errors import UserError
from ray_synth.generation import retrieval
from ray_synth.generation.retrieval import Finder, Nearest, Writer, tar_name
from ray_synth.generation.thresholds import measure_reference, save_reference
from ray_synth.meaning.clip import load_clip
from ray_synth.storage.folder import Folder

NAMES = ("six", "seven")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=40), st.randoms())
@settings(deadline=None)
def test_the_best_are_the_same_in_whatever_parts_and_order_they_come(images, random):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "WAITING", 3)
        compare(images, random)


def compare(images, random):
    rows = list(range(len(images)))
    whole, parts = Nearest(3, 4), Nearest(3, 4)

    def add(to, some):
        return to.add(
            np.array([images[row][0] for row in some], np.int64),
            np.array([images[row][1] for row in some], np.float32),
            np.array(some, np.int64),
        )

    add(whole, rows)
    random.shuffle(rows)
    while rows:
        count = random.randint(1, len(rows))
        some, rows = rows[:count], rows[count:]
        add(parts, some)
        add(parts, some)  # a unit that comes twice counts once
    for label in range(3):
        of_class = [row for row, (mine, _) in enumerate(images) if mine == label]
        best = sorted(of_class, key=lambda row: (-images[row][1], row))[:4]
        for found in (whole, parts):
            labels, scores, places = found.settled()
            assert places[labels == label].tolist() == best
            assert scores[labels == label].tolist() == [images[row][1] for row in best]


def test_an_image_of_several_classes_goes_where_it_comes_first():
    """Class 1's text is near to all images: by the score alone it would take them all."""
    nearest = Nearest(3, 3)
    scores = {0: [0.3, 0.2, 0.1], 1: [0.7, 0.8, 0.9]}
    for label, of_class in scores.items():
        nearest.add(np.full(3, label), np.array(of_class, np.float32), np.array([10, 11, 12]))
    found = {label: rows.tolist() for label, (_, rows) in nearest.shared_out().items()}
    assert found == {0: [10], 1: [12, 11]}
    assert Nearest(3, 3).shared_out() == {}


def test_what_is_worse_than_the_best_is_let_go_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(retrieval, "WAITING", 10)
    nearest, rng = Nearest(2, 5), np.random.default_rng(0)
    for start in range(0, 5_000, 10):
        labels, scores = rng.integers(0, 2, 10), rng.random(10).astype(np.float32)
        nearest.add(labels, scores, np.arange(start, start + 10))
        assert sum(len(part[0]) for part in nearest._parts) <= 30
    assert not nearest.add(
        np.array([0, 1]), np.zeros(2, np.float32), np.array([9_998, 9_999])
    ).any()


def digits(split, name, count):
    pixels, labels = load_digits("digits", split)
    return [pixels[at] for at, label in enumerate(labels) if label == name][:count]


def trained_on():
    same = {name: name for name in NAMES}
    source = SourceConfig(format="digits", split="train", class_map=same)
    return select(load_index(source, NAMES), 5, 0)


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory):
    """Sixes and sevens at any depth, two copies of one, one of a training image, and no picture."""
    folder = tmp_path_factory.mktemp("pool")
    for name in NAMES:
        (folder / "deep" / name).mkdir(parents=True)
        for at, pixels in enumerate(digits("test", name, 12)):
            (folder / "deep" / name / f"{at}.png").write_bytes(encode_array(pixels))
    shutil.copy(folder / "deep" / "six" / "0.png", folder / "again.png")
    shutil.copy(folder / "deep" / "six" / "0.png", folder / "deep" / "once-more.png")
    (folder / "trained-on.png").write_bytes(ImagesByClass(trained_on())[1][0])
    (folder / "broken.png").write_bytes(b"<html>")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("reference"))
    source = SourceConfig(format="digits", split="train", class_map={name: name for name in NAMES})
    real = select(load_index(source, NAMES), 5, 0)
    clip = load_clip(ClipConfig(device="cpu"))
    texts = {0: "the number 6", 1: "the number 7"}
    save_reference(folder, measure_reference(ImagesByClass(real), texts, clip))
    return folder


def test_the_nearest_images_become_a_set_that_import_reads(pool_folder, reference, tmp_path):
    pool, clip = load_pool(str(pool_folder)), ClipConfig(device="cpu", max_batch_size=7)
    assert len(pool) == 28 and pool.counts() == {"": 28}
    units = tasks(pool)
    finder = Finder(clip, reference, 20, 10**6)
    found = finder({
        "unit": np.arange(len(units)), "start": np.zeros(len(units), np.int64),
        "task": np.array([pickle.dumps(unit) for unit in units], dtype=object),
    })  # fmt: skip
    assert len(units) == 1 and found["read"] == [27] and found["bad"] == [1]
    assert json.loads(found["named"][0])[0].endswith("broken.png")
    nearest = Nearest(2, 20)
    nearest.add(*(np.array(found[key][0]) for key in ("classes", "scores", "rows")))
    writer = Writer(
        clip, reference, 10**6, pool=pool, class_names=NAMES, per_class=10, to=Folder(tmp_path)
    )
    written = {}
    for label in (0, 1):
        scores, rows = nearest.shared_out()[label]
        batch = {"class_index": np.array([label]), "rows": [rows], "scores": [scores]}
        written[label] = writer(batch)
    assert [written[label]["written"][0] for label in (0, 1)] == [10, 10]
    source = SourceConfig(format="webdataset", path=str(tmp_path))
    index = load_index(source, NAMES)
    assert index.counts() == {"six": 10, "seven": 10}
    sources = []
    for label, name in enumerate(NAMES):
        facts = [
            json.loads(sample["json"])
            for sample in webdataset.WebDataset(str(tmp_path / tar_name(label)), shardshuffle=False)
        ]
        assert {item["label"] for item in facts} == {name}
        scores = [item["clip_score"] for item in facts]
        assert scores == sorted(scores, reverse=True)
        right = sum(f"/deep/{name}/" in item["source"] for item in facts)
        assert right >= 8, "the embedded CLIP knows sixes from sevens"
        sources += [item["source"].rpartition("/")[2] for item in facts]
    copies = [item for item in sources[:10] if item in ("0.png", "again.png", "once-more.png")]
    assert len(copies) == 1, "of copies one stays"
    assert "trained-on.png" not in sources


def test_a_pool_is_pictures_at_any_depth_or_tars_without_labels(pool_folder, tmp_path):
    images = [path.read_bytes() for path in sorted((pool_folder / "deep").rglob("?.png"))]
    (tmp_path / "tars").mkdir()
    for part in range(2):
        place = tmp_path / "tars" / f"{part}.tar"
        with webdataset.TarWriter(str(place)) as tar:
            for at, data in enumerate(images[part::2]):
                tar.write({"__key__": f"{at:04d}", "png": data, "txt": f"a caption of {at}"})
    pool = load_pool(str(tmp_path / "tars"))
    assert len(pool) == len(images)
    assert {pool.locate(at).read() for at in range(len(pool))} == set(images)
    one = load_pool(str(tmp_path / "tars" / "0.tar"))
    assert len(one) == (len(images) + 1) // 2
    assert pool_digest(pool) != pool_digest(one) != pool_digest(load_pool(str(pool_folder)))
    with pytest.raises(UserError, match="no such"):
        load_pool(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image .* and no tar file in"):
        load_pool(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("pool", "refused"),
    [("a", True), ("a/test", True), ("a/test/deep", True), ("a/test/*.tar", True), ("a/te", False),
     ("b", False), ("link", True)],
)  # fmt: skip
def test_a_pool_that_holds_a_test_set_or_lies_in_one_is_refused(tmp_path, pool, refused):
    (tmp_path / "a" / "test" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    digits = SourceConfig(format="digits", split="train")
    test = SourceConfig(format="imagefolder", path=str(tmp_path / "a" / "test"))
    for data in (
        DataConfig(train=digits, test=test),
        DataConfig(train=digits, test=digits, ood={"x": test}),
    ):
        if refused:
            with pytest.raises(UserError, match=r"lie in one another: test\s+images"):
                refuse_tests(str(tmp_path / pool), data)
        else:
            refuse_tests(str(tmp_path / pool), data)
