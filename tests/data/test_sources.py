"""The four formats and the embedded digits give the same rows."""

import io
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_synth.config import SourceConfig
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import (
    drop,
    load_index,
    read_index,
    require_every_class,
    select,
    to_ray,
)
from ray_synth.data.images import decode_image
from ray_synth.data.inspection import inspect
from ray_synth.errors import UserError


def as_parquet(folder, out):
    rows = [(p.read_bytes(), p.parent.name) for p in sorted(folder.rglob("*.*"))]
    table = pa.table({"image": [r[0] for r in rows], "label": [r[1] for r in rows]})
    pq.write_table(table, out / "a.parquet", row_group_size=3)
    return SourceConfig(format="parquet", path=str(out))


def as_webdataset(folder, out):
    with tarfile.open(out / "a.tar", "w") as tar:
        for i, path in enumerate(sorted(folder.rglob("*.*"))):
            for suffix, data in (
                (path.suffix, path.read_bytes()),
                (".cls", path.parent.name.encode()),
            ):
                info = tarfile.TarInfo(f"{i:04d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return SourceConfig(format="webdataset", path=str(out / "*.tar"))


def as_huggingface(folder, out):
    built = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(out / "c"))
    built.save_to_disk(str(out / "hf"))
    return SourceConfig(format="huggingface", path=str(out / "hf"), split="train")


@pytest.mark.parametrize("convert", [None, as_parquet, as_webdataset, as_huggingface])
def test_each_format_gives_the_same_images_and_classes(convert, image_folder, tmp_path):
    source = SourceConfig(format="imagefolder", path=str(image_folder))
    if convert:
        (tmp_path / "out").mkdir()
        source = convert(image_folder, tmp_path / "out")
    index = load_index(source)
    assert index.class_names == ("cat", "dog")
    assert index.counts() == {"cat": 5, "dog": 5}
    expected = {p.read_bytes(): p.parent.name for p in image_folder.rglob("*.*")}
    rows = list(read_index(index))
    assert len(rows) == 10
    for row in rows:
        assert decode_image(row["image"]).size == (24, 20)
        assert expected[row["image"]] == index.class_names[row["class_index"]]


def test_digits_are_real_and_split():
    names = read_class_names(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    )
    train = load_index(SourceConfig(format="digits", split="train"), names)
    test = load_index(SourceConfig(format="digits", split="test"), names)
    assert len(train) == len(test) == 2500
    assert set(train.counts().values()) == {250}
    few = select(train, 3, seed=1)
    seen = {row["image"] for row in read_index(few)}
    assert len(few) == 30
    assert not seen & {row["image"] for row in read_index(test)}


def test_selection_is_by_seed_and_nested(image_folder):
    index = load_index(SourceConfig(format="imagefolder", path=str(image_folder)))
    small, large = select(index, 2, seed=3), select(index, 4, seed=3)
    assert small.counts() == {"cat": 2, "dog": 2}
    pairs = lambda i: set(zip(i.shard.tolist(), i.row.tolist(), strict=True))  # noqa: E731
    assert pairs(small) < pairs(large)
    assert pairs(small) == pairs(select(index, 2, seed=3))
    assert any(pairs(select(index, 2, seed=s)) != pairs(small) for s in range(4, 9))


def test_a_corrupt_image_is_set_aside_counted_and_named(image_folder, local_ray):
    (image_folder / "cat" / "broken.png").write_bytes(b"\x89PNG nothing")
    (image_folder / "dog" / "empty.jpg").write_bytes(b"")
    index = load_index(SourceConfig(format="imagefolder", path=str(image_folder)))
    corrupt = inspect(index, max_pixels=10**6).corrupt
    assert sorted(item["image_id"].rsplit("/", 1)[-1] for item in corrupt) == [
        "broken.png",
        "empty.jpg",
    ]
    assert all(item["error"] for item in corrupt)
    assert drop(index, corrupt).counts() == {"cat": 5, "dog": 5}
    rows = to_ray(drop(index, corrupt), test_set="t").take_all()
    assert len(rows) == 10
    assert {row["test_set"] for row in rows} == {"t"}


def test_labels_become_classes_by_map_name_or_number(image_folder, tmp_path):
    folder = str(image_folder)
    mapped = SourceConfig(format="imagefolder", path=folder, class_map={"cat": "feline"})
    index = load_index(mapped, ("bird", "feline"))
    assert index.counts() == {"bird": 0, "feline": 5}
    table = pa.table({"image": [b"x", b"y"], "label": [1, 0]})
    pq.write_table(table, tmp_path / "n.parquet")
    numbers = load_index(
        SourceConfig(format="parquet", path=str(tmp_path / "n.parquet")), ("a", "b")
    )
    assert numbers.label.tolist() == [1, 0]
    with pytest.raises(ValueError, match="class_map"):
        load_index(SourceConfig(format="imagefolder", path=folder), ("apple", "pear"))


def test_bad_places_are_named(tmp_path, image_folder):
    def message(**settings):
        with pytest.raises(ValueError, match=".") as error:
            load_index(SourceConfig(**settings))
        return str(error.value)

    missing = str(tmp_path / "nowhere")
    assert missing in message(format="imagefolder", path=missing)
    assert missing in message(format="parquet", path=missing)
    (image_folder / "bird").mkdir()
    assert "bird" in message(format="imagefolder", path=str(image_folder))
    (tmp_path / "none").mkdir()
    assert "class folders" in message(format="imagefolder", path=str(tmp_path / "none"))
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "p.parquet")
    assert "no column 'image'" in message(format="parquet", path=str(tmp_path / "p.parquet"))
    assert "split" in message(format="digits", split="validation")


def test_a_class_without_images_is_named(image_folder):
    source = SourceConfig(format="imagefolder", path=str(image_folder))
    with pytest.raises(ValueError, match="no image of 'bird'"):
        require_every_class(load_index(source, ("bird", "cat", "dog")), "data.train")


def test_class_names_come_from_a_text_file(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n dog \n")
    assert read_class_names(str(tmp_path / "names.txt")) == ("cat", "dog")
    with pytest.raises(ValueError, match="no file of class names"):
        read_class_names(str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="given twice: cat"):
        read_class_names(["cat", "dog", "cat"])
    assert np.array_equal(read_class_names(None) or [], [])


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not at all")
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file"):
        load_index(SourceConfig(format="parquet", path=str(tmp_path)))


def test_a_list_of_images_takes_those_that_it_names(image_folder, tmp_path):
    listed = tmp_path / "train.txt"
    listed.write_text("cat/1.jpg 0\ndog/0.png 1\n\ncat/0.png 0\n")
    source = SourceConfig(format="imagefolder", path=str(image_folder), image_list=str(listed))
    index = load_index(source, ("tabby", "poodle"))
    assert index.counts() == {"tabby": 2, "poodle": 1}
    rows = list(read_index(index))
    assert [row["image_id"].removeprefix(f"{image_folder}/") for row in rows] == [
        "cat/0.png", "cat/1.jpg", "dog/0.png",
    ]  # fmt: skip
    assert rows[0]["image"] == (image_folder / "cat" / "0.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lists no image"),
        ("cat/0.png", r"line 1: 'cat/0.png' is not `path label`"),
        ("cat/0.png 0\n../else.png 1", "line 2: .* with a path below"),
        ("cat/0.png 0\ncat/0.png 1", "line 2: cat/0.png comes twice"),
    ],
)
def test_a_wrong_list_is_named_by_its_line(image_folder, tmp_path, text, says):
    (tmp_path / "list.txt").write_text(text)
    source = SourceConfig(
        format="imagefolder", path=str(image_folder), image_list=str(tmp_path / "list.txt")
    )
    with pytest.raises(UserError, match=says):
        load_index(source)
    gone = source.model_copy(update={"image_list": str(tmp_path / "gone.txt")})
    with pytest.raises(UserError, match="no such file"):
        load_index(gone)
    with pytest.raises(ValueError, match="image_list belongs to format: imagefolder"):
        SourceConfig(format="parquet", path="x", image_list="y")
