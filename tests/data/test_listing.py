"""Which files are data: no leftovers of systems and tools, links once; what else is there is told."""

import os

import fsspec
import pyarrow.fs as pafs
import pytest
from samples import encoded

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import left_out, load_index
from ray_synth.data.listing import list_files
from ray_synth.errors import UserError

LEFT_BEHIND = (
    "__MACOSX/cat/._0.png", "cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png",
    "dog/@eaDir/0.png/THUMB_M.jpg", ".ipynb_checkpoints/a.png", ".thumbnails/cat/0.png",
    "cat/old/.cache/1.png", "#recycle/0.png", "$RECYCLE.BIN/1.jpg", "lost+found/2.png",
    "dog/Thumbs.db", "cat/.DS_Store",
)  # fmt: skip


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(1))


def counts(root, **more):
    return load_index(SourceConfig(format="imagefolder", path=str(root), **more)).counts()


def test_leftovers_are_neither_pictures_nor_classes(image_folder):
    put(image_folder, *LEFT_BEHIND)
    assert counts(image_folder) == {"cat": 5, "dog": 5}
    index = load_index(SourceConfig(format="imagefolder", path=str(image_folder)))
    (line,) = left_out(index, {})
    assert line.startswith("data.train: not read: ")
    assert "__MACOSX/" in line
    assert "hidden f" in line


def test_a_bucket_is_listed_as_a_disk_is(image_folder):
    put(image_folder, *LEFT_BEHIND, "cat/deep/er/1.png")
    local = list_files(pafs.LocalFileSystem(), str(image_folder))
    remote = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("file")))
    other = list_files(remote, str(image_folder))
    assert other.files == local.files
    assert other.folders == local.folders == {"cat", "dog"}


def test_links_are_followed_once_and_never_in_circles(image_folder, tmp_path):
    put(tmp_path, "elsewhere/1.png")
    (image_folder / "cat" / "self").symlink_to(image_folder / "cat")
    (image_folder / "cat" / "up").symlink_to(image_folder)
    (image_folder / "dog" / "other").symlink_to(image_folder / "cat")
    (image_folder / "dog" / "gone.png").symlink_to(tmp_path / "gone.png")
    (image_folder / "dog" / "ring.png").symlink_to("ring.png")
    (image_folder / "above").symlink_to(tmp_path)
    (image_folder / "tabby").symlink_to("cat")
    found = load_index(SourceConfig(format="imagefolder", path=str(image_folder)))
    # A class or a part of one that is a link is read; what leads back is not.
    assert found.counts() == {"cat": 5, "dog": 10, "tabby": 5}
    assert found.left_out.passed_over["links to folders that are read already"] >= 3
    assert found.left_out.passed_over["links that lead nowhere, or special files"] == 2


def test_many_links_to_each_other_end(tmp_path):
    put(tmp_path, *(f"a/{i}/0.png" for i in range(12)))
    for i in range(12):
        for j in range(12):
            (tmp_path / "a" / str(i) / f"to{j}").symlink_to(tmp_path / "a" / str(j))
    assert counts(tmp_path) == {"a": 12}


def test_other_endings_are_read_or_told(image_folder):
    put(
        image_folder,
        "cat/a.jfif",
        "dog/b.HEIC",
        "dog/c.avif",
        "dog/IMG_0001",
        "cat/notes.txt",
        "x.png",
    )
    index = load_index(SourceConfig(format="imagefolder", path=str(image_folder)))
    assert index.counts() == {"cat": 6, "dog": 5}
    assert left_out(index, {}) == [
        "data.train: not read: 1 .avif, 1 .heic, 1 .txt, 1 images beside the class folders, "
        "1 without an ending"
    ]
    put(image_folder, "bird/1.heic", "bird/2.heic", "bird/3")
    with pytest.raises(UserError, match=r"bird \(it holds 2 \.heic, 1 without an ending\)"):
        counts(image_folder)


def test_parquet_leftovers_are_not_read(image_folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [encoded(1)], "label": ["cat"]})
    for name in ("a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / "p" / name)
    (tmp_path / "p" / "._a.parquet").write_bytes(b"\0\5\26\7")
    assert len(load_index(SourceConfig(format="parquet", path=str(tmp_path / "p")))) == 1
    pattern = SourceConfig(format="parquet", path=str(tmp_path / "p" / "*.parquet"))
    assert len(load_index(pattern)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(image_folder):
    (image_folder / "cat").chmod(0)
    try:
        with pytest.raises(UserError, match=r"images/cat may not be read"):
            counts(image_folder)
    finally:
        (image_folder / "cat").chmod(0o755)


def test_a_name_that_is_not_utf8_is_named(image_folder):
    name = os.fsencode(str(image_folder / "dog")) + b"/gr\xfcn.png"
    with open(name, "wb") as file:
        file.write(encoded(1))
    with pytest.raises(UserError, match=r"gr\\xfcn\.png is not UTF-8"):
        counts(image_folder)
