"""Single images are read from where they lie, whatever the format, and many of them at once."""

import gzip
import pickle
import threading

import pytest
from buckets import make_bucket, serving
from test_sources import as_huggingface, as_parquet, as_webdataset

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import ImagesByClass, Index, load_index, read_index, select
from ray_synth.data.packing import addressable
from ray_synth.data.places import AT_ONCE, read_all
from ray_synth.errors import UserError
from ray_synth.storage.folder import Folder


def as_folder(folder, out):
    return SourceConfig(format="imagefolder", path=str(folder))


def by_id(index: Index) -> dict[str, tuple[bytes, int]]:
    return {row["image_id"]: (row["image"], row["class_index"]) for row in read_index(index)}


def one_by_one(index: Index) -> dict[str, tuple[bytes, int]]:
    """As a feed reads them: by position, in any order."""
    order = [*range(len(index))][::-1]
    return {index.image_id(at): (index.locate(at).read(), int(index.label[at])) for at in order}


@pytest.mark.parametrize("convert", [as_folder, as_webdataset, as_huggingface])
def test_an_image_is_read_alone_from_any_format(convert, image_folder, tmp_path):
    (tmp_path / "out").mkdir()
    index = load_index(convert(image_folder, tmp_path / "out"))
    assert len(by_id(index)) == 10
    assert one_by_one(index) == by_id(index)


@pytest.mark.parametrize("convert", [as_folder, as_webdataset, as_huggingface, as_parquet])
def test_images_of_a_class_are_read_when_they_are_asked_for(
    convert, image_folder, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    index = select(load_index(convert(image_folder, tmp_path / "out")), 3, seed=0)
    opened: list[int] = []
    locate = Index.locate
    monkeypatch.setattr(Index, "locate", lambda self, at: (opened.append(at), locate(self, at))[1])
    images = ImagesByClass(index)
    assert (list(images), len(images), opened) == ([0, 1], 2, [])
    expected = {0: [], 1: []}
    for row in read_index(index):
        expected[row["class_index"]].append(row["image"])
    assert images[1] == expected[1]
    assert len(opened) == (0 if convert is as_parquet else 3)
    assert dict(pickle.loads(pickle.dumps(images))) == expected


def test_digits_are_read_alone():
    index = select(load_index(SourceConfig(format="digits", split="train")), 2, seed=0)
    assert one_by_one(index) == by_id(index)


def test_a_parquet_set_is_written_once_as_files_with_places(image_folder, tmp_path, local_ray):
    (tmp_path / "out").mkdir()
    index = load_index(as_parquet(image_folder, tmp_path / "out"))
    index = select(index, 4, seed=0)
    folder = Folder(tmp_path / "run")
    placed = addressable(index, folder)
    assert placed.label.tolist() == index.label.tolist()
    images = [row["image"] for row in read_index(index)]
    assert [placed.locate(at).read() for at in range(len(placed))] == images
    assert all(index.image_id(at) in placed.image_id(at) for at in range(len(index)))
    # Another arm, or the same run again, uses them; what was cut short is written again.
    (tar,) = (tmp_path / "run").rglob("*.tar")
    written = tar.stat().st_mtime_ns
    addressable(index, folder)
    assert tar.stat().st_mtime_ns == written
    tar.write_bytes(b"half")
    tar.with_name("part-00000.tar.parquet").unlink()
    again = addressable(index, folder)
    assert [again.locate(at).read() for at in range(len(again))] == images
    # Other images of the set are other files.
    addressable(select(index, 1, seed=1), folder)
    assert len([*(tmp_path / "run").rglob("*.tar")]) == 2


def test_what_gives_single_images_already_is_not_written_again(image_folder, tmp_path):
    index = load_index(as_folder(image_folder, tmp_path))
    assert addressable(index, Folder(tmp_path / "run")) is index


def test_a_compressed_tar_is_refused_by_name(image_folder, tmp_path):
    (tmp_path / "out").mkdir()
    source = as_webdataset(image_folder, tmp_path / "out")
    tar = tmp_path / "out" / "a.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError, match=r"a\.tar cannot be read as a tar file.*uncompress it"):
        load_index(source)


class Meeting:
    """Can only be read together with the others."""

    def __init__(self, barrier: threading.Barrier, number: int) -> None:
        self.barrier, self.number = barrier, number

    def read(self) -> bytes:
        self.barrier.wait(timeout=20)
        return bytes([self.number])


def test_32_images_are_read_at_once_and_come_in_order():
    barrier = threading.Barrier(AT_ONCE)
    assert AT_ONCE >= 32
    images = [Meeting(barrier, number) for number in range(4 * AT_ONCE)]
    found = [*read_all([b"first", *images, b"last"])]
    assert found == [b"first", *(bytes([number]) for number in range(4 * AT_ONCE)), b"last"]


@pytest.mark.slow
def test_images_of_a_bucket_are_read_by_place(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "out").mkdir()
    with serving("s3", tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        make_bucket(server)
        bucket = Folder(server.uri)
        expected = set()
        for path in sorted(image_folder.rglob("*.*")):
            expected.add(path.read_bytes())
            bucket.write_bytes(f"set/{path.parent.name}/{path.name}", path.read_bytes())
        as_webdataset(image_folder, tmp_path / "out")
        bucket.write_bytes("tars/a.tar", (tmp_path / "out" / "a.tar").read_bytes())
        for kind, name in (("imagefolder", "set"), ("webdataset", "tars")):
            index = load_index(SourceConfig(format=kind, path=bucket.child(name).uri))
            places = [index.locate(at) for at in range(len(index))]
            assert {*read_all(places)} == expected
            assert one_by_one(index) == by_id(index)
