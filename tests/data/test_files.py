"""What files of a set were, and what has changed of them since: by name, size, time and content."""

import os

import numpy as np
import pytest
from buckets import make_bucket, serving
from samples import encoded
from test_sources import as_huggingface, as_parquet, as_webdataset

from ray_synth.config import SourceConfig
from ray_synth.data import files as files_module
from ray_synth.data.dataset import load_index, named, read_index
from ray_synth.data.files import changes, digest, files, with_marks
from ray_synth.data.inspection import mark, sample
from ray_synth.storage.folder import Folder


def marked(index):
    """The files of an index with digests of their contents, as a run keeps them."""
    marks = np.array([mark(index.locate(at).read()) for at in range(len(index))])
    return with_marks(files(index), index.shards[0].source, marks)


@pytest.mark.parametrize("convert", [None, as_parquet, as_webdataset, as_huggingface])
def test_rows_are_found_by_their_names(convert, image_folder, tmp_path):
    source = SourceConfig(format="imagefolder", path=str(image_folder))
    if convert:
        (tmp_path / "out").mkdir()
        source = convert(image_folder, tmp_path / "out")
    index = load_index(source)
    ids = [row["image_id"] for row in read_index(index)]
    for wanted in ([], ids[3:4], ids[::3], ids, ["elsewhere/0.png", *ids[-1:]]):
        found = named(index, wanted)
        assert [index.image_id(at) for at in np.flatnonzero(found)] == [
            name for name in ids if name in wanted
        ]
    digits = load_index(SourceConfig(format="digits", split="train"))
    assert np.flatnonzero(named(digits, [digits.image_id(17), digits.image_id(2400)])).tolist() == [
        17, 2400,
    ]  # fmt: skip


def test_a_copy_is_no_change_and_the_same_size_is_no_proof(image_folder, monkeypatch):
    source = SourceConfig(format="imagefolder", path=str(image_folder))
    kept = marked(load_index(source))
    for path in image_folder.rglob("*.*"):
        os.utime(path, (1, 1))
    index = load_index(source)
    now = files(index)
    assert digest(now) != digest(kept)
    assert not changes(kept, now, index)
    dog = image_folder / "dog" / "0.png"
    dog.write_bytes(bytes(dog.stat().st_size))
    (image_folder / "cat" / "0.png").unlink()
    (image_folder / "cat" / "9.png").write_bytes(encoded(9))
    index = load_index(source)
    found = changes(kept, files(index), index)
    assert (found.added, found.removed, found.replaced) == (
        [f"{image_folder}/cat/9.png"], [f"{image_folder}/cat/0.png"], [str(dog)],
    )  # fmt: skip
    assert str(found).startswith("files 1 added (")
    monkeypatch.setattr(files_module, "MOST_COMPARED", 3)  # some stand for all
    for path in image_folder.rglob("*.*"):
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, (2, 2))
    index = load_index(source)
    assert len(changes(kept, files(index), index).replaced) == 3


def test_a_large_file_is_known_by_stretches_of_it(tmp_path):
    source = SourceConfig(format="webdataset", path=str(tmp_path))
    size = 5 * files_module.STRETCHES * files_module.STRETCH
    content = lambda: files_module._content(source, str(tmp_path / "a.tar"), size)  # noqa: E731
    (tmp_path / "a.tar").write_bytes(bytes(size))
    before = content()
    for at in (0, size - 1):
        with open(tmp_path / "a.tar", "r+b") as file:
            file.seek(at)
            file.write(b"x")
        after = content()
        assert after != before
        before = after


def test_a_sample_is_spread_over_the_set(image_folder, tmp_path):
    index = load_index(SourceConfig(format="imagefolder", path=str(image_folder)))
    assert sample(index, 10).tolist() == list(range(10))
    assert sample(index, 4).tolist() == [0, 3, 6, 9]
    tables = load_index(as_parquet(image_folder, tmp_path))  # row groups of 3, 3, 3 and 1
    assert sample(tables, 6).tolist() == [0, 1, 2, 9]


@pytest.mark.slow
def test_a_bucket_is_asked_once_for_a_folder(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with serving("s3", tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        make_bucket(server)
        bucket = Folder(server.uri)
        for path in sorted(image_folder.rglob("*.*")):
            bucket.write_bytes(f"set/{path.parent.name}/{path.name}", path.read_bytes())
        source = SourceConfig(format="imagefolder", path=bucket.child("set").uri)
        index = load_index(source)
        before = len(server.requests())
        table = files(index)
        assert len(server.requests()) - before <= 4
        assert table["size"].to_pylist() == [
            path.stat().st_size for path in sorted(image_folder.rglob("*.*"))
        ]
        kept = marked(index)
        bucket.write_bytes("set/cat/1.jpg", (image_folder / "cat" / "1.jpg").read_bytes())
        bucket.write_bytes("set/dog/1.jpg", encoded(77))
        bucket.delete("set/dog/2.webp")
        index = load_index(source)
        found = changes(kept, files(index), index)
        assert [name[-9:] for name in found.removed] == ["og/2.webp"]
        assert [name[-9:] for name in found.replaced] == ["dog/1.jpg"]
        assert not found.added
