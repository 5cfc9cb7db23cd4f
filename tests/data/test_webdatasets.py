"""WebDatasets as they are found: cut off, joined, of foreign members, in other orders and layouts."""

import gzip
import io
import json
import logging
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs
from samples import encoded

from ray_synth.config import SourceConfig
from ray_synth.data import tar_cache
from ray_synth.data.dataset import load_index, read_index
from ray_synth.data.images import decode_image
from ray_synth.data.tars import scan_tar
from ray_synth.errors import UserError

A, B, C = (encoded(seed) for seed in range(3))
GOOD = [("a.png", A), ("a.cls", b"0")]
TWO = [*GOOD, ("b.png", B), ("b.cls", b"1")]
BLOCKS = 512 + 512 * -(-len(A) // 512)  # of a picture with its header; a label takes 1024


def tarred(members, **more) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **more) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                tar.addfile(info)
    return buffer.getvalue()


def found(tmp_path, *tars: bytes, **more) -> dict[str, str]:
    """name -> label of the images that a set of tars gives; each can be decoded."""
    for number, data in enumerate(tars):
        (tmp_path / f"{number}.tar").write_bytes(data)
    index = load_index(SourceConfig(format="webdataset", path=str(tmp_path), **more))
    rows = {}
    for row in read_index(index):
        assert row["image"] in (A, B, C)
        decode_image(row["image"])
        name = row["image_id"].removeprefix(f"{tmp_path}/")
        rows[name.partition("#")[2]] = index.class_names[row["class_index"]]
    assert len(rows) == len(index)
    return rows


@pytest.mark.parametrize(
    ("members", "expected", "says"),
    [
        (TWO, {"a": "0", "b": "1"}, ""),
        ([*GOOD, ("a.json", b"{}")], {"a": "0"}, ""),
        ([("a.PNG", A), ("a.CLS", b" 0\n")], {"a": "0"}, ""),
        ([("a.png", A), ("b.png", B), ("b.cls", b"1"), ("a.cls", b"0")], {"a": "0", "b": "1"}, ""),
        ([("x/a.png", A), ("y.z/a.png", B), ("y.z/a.cls", b"1"), ("x/a.cls", b"0")],
         {"x/a": "0", "y.z/a": "1"}, ""),
        ([("a.v1.png", A), ("a.v1.cls", b"0"), ("a.v2.png", B), ("a.v2.cls", b"1")],
         {"a.v1": "0", "a.v2": "1"}, ""),
        ([("a.left.png", A), ("a.right.png", B), ("a.cls", b"0")], {"a": "0"},
         "1 images beside the one that a label is for"),
        ([("a.png", A), ("a.mask.png", B), ("a.webp", C), ("a.cls", b"0")], {"a": "0"},
         "1 images that are there in another format, too"),
        ([*GOOD, ("b.png", B)], {"a": "0"}, "1 images without a label"),
        ([*GOOD, ("b.png", B), ("b.json", b'{"label": null}')], {"a": "0"}, "1 images without a label"),
        ([*GOOD, ("b.png", B), ("b.cls", b"\xff\xfe")], {"a": "0"}, "1 images without a label"),
        ([*GOOD, ("b.png", B), ("b.json", b"[" * 99999)], {"a": "0"}, "1 images without a label"),
        ([*GOOD, ("b.cls", b"1")], {"a": "0"}, "1 samples without an image"),
        ([*GOOD, ("a.png", B), ("a.cls", b"1")], {"a": "0"}, "2 members whose name comes again"),
        ([*GOOD, ("README", b"x"), ("LICENSE.md", b"x")], {"a": "0"}, "2 other files"),
        ([("__MACOSX/._a.png", b"x"), ("._a.png", b"x"), *GOOD], {"a": "0"}, ""),
        ([("d", (tarfile.DIRTYPE, "")), ("d/a.png", A), ("d/a.cls", b"0")], {"d/a": "0"}, ""),
        ([*GOOD, ("b.png", (tarfile.SYMTYPE, "/etc/passwd"))], {"a": "0"}, "1 links, devices"),
        ([*GOOD, ("\udcff.png", B)], {"a": "0"}, "1 members whose name is not UTF-8"),
    ],
)  # fmt: skip
def test_samples_are_put_together_by_name(members, expected, says, tmp_path, caplog):
    assert found(tmp_path, tarred(members)) == expected
    assert says in caplog.text
    assert ("left out" in caplog.text) == bool(says)
    assert len(caplog.records) == bool(says)


def test_the_layout_of_img2dataset(tmp_path, caplog):
    def sample(name, picture, **facts):
        beside = [(f"{name}.json", json.dumps({"url": "u", **facts}).encode())]
        return [(f"{name}.png", picture), (f"{name}.txt", b"a cat"), *beside]

    labelled = [*sample("0", A, label=3), *sample("1", B, label="x"), ("2.json", b"{}")]
    assert found(tmp_path, tarred(labelled)) == {"0": "3", "1": "x"}
    assert "captions" not in caplog.text
    assert "1 samples without an image (" in caplog.text  # it could not be fetched
    caplog.clear()
    assert found(tmp_path, tarred(sample("0", A, caption="a cat"))) == {"0": "a cat"}
    assert "labels of 1 images are the texts in .txt" in caplog.text
    assert found(tmp_path, tarred(sample("0", A, kind="b")), label_column="kind") == {"0": "b"}


WHOLE = tarred(TWO)


@pytest.mark.parametrize(
    ("data", "expected", "says"),
    [
        (WHOLE[: BLOCKS + 1024 + 600], {"a": "0"}, r"0.tar: from byte 2,\d+: 'b.png' is cut off"),
        (WHOLE[: BLOCKS + 1024], {"a": "0"}, "its end is missing"),
        (WHOLE[: BLOCKS + 1024 + 100], {"a": "0"}, "its end is missing"),
        (b"", {}, "from byte 0: empty file"),
        (b"<html>not found</html>" * 100, {}, "from byte 0: no header"),
        (tarred(GOOD) + tarred([("b.png", B), ("b.cls", b"1")]), {"a": "0", "b": "1"}, ""),
        (b"\1" * 512 + WHOLE[512:], {}, "from byte 0: no header"),
        (WHOLE[: BLOCKS + 1024] + b"\1" * 512 + WHOLE[BLOCKS + 1536 :], {"a": "0"},
         "damaged stretches .*before 'b.cls'"),
        (tarred([("x" * 1_100_000 + ".png", B)], format=tarfile.GNU_FORMAT), {}, "a name or header"),
        (WHOLE[:BLOCKS] + b"\1" * 1024 + WHOLE[BLOCKS + 1024 :], {"b": "1"},
         "damaged stretches .*before 'b.png'"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_and_the_rest_is_kept(data, expected, says, tmp_path, caplog):
    rest = tarred([("c.png", C), ("c.cls", b"2")])
    assert found(tmp_path, data, rest) == {**expected, "c": "2"}
    import re

    assert re.search(says, caplog.text)
    assert bool(caplog.text) == bool(says)


@pytest.mark.parametrize("mode", ["local", "stream"])
@given(data=st.data())
def test_any_damage_leaves_the_true_images_of_the_rest(mode, data, tmp_path_factory):
    """Cut and overwritten anywhere: what is found is always one of the pictures, by its own label."""
    members = [*TWO, ("c.png", C), ("c.cls", b"2")]
    raw = bytearray(tarred(members, format=data.draw(st.sampled_from([0, 1, 2]))))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(raw) // 512 - 1)) * 512
        raw[at : at + 512] = data.draw(st.sampled_from([b"\0", b"\xff", b"7"])) * 512
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    place = tmp_path_factory.mktemp("tar") / "0.tar"
    place.write_bytes(raw)
    filesystem = fs.LocalFileSystem()
    if mode == "stream":
        import fsspec

        filesystem = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file")))
    scan = scan_tar(filesystem, str(place), SourceConfig(format="webdataset", path="x"))
    pictures = dict(zip("abc", (A, B, C), strict=True))
    for row in scan.images.to_pylist():
        assert row["name"] in pictures
        own = str("abc".index(row["name"]))
        assert row["label"] in ("", own, "7", "\0")  # the last two were written over it
        assert row["size"] == len(pictures[row["name"]])
        assert row["offset"] + row["size"] <= len(raw)
    if len(raw) < 512 + len(A):  # a picture may be whole without what fills its last block
        assert not len(scan.images)


def test_a_set_without_an_image_or_a_label_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none of the 1 images .*NAME\.cls, 'label' in NAME\.json"):
        found(tmp_path, tarred([("a.png", A), ("b.npy", b"x")]))
    with pytest.raises(
        UserError, match=r"no image .*left out: 1 tars .*0\.tar: from byte 0: empty"
    ):
        found(tmp_path, b"")
    with pytest.raises(UserError, match=r"0\.tar cannot be read as a tar file.*uncompress it"):
        found(tmp_path, gzip.compress(WHOLE))


def test_a_remote_tar_is_read_once_and_again_as_it_changes(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    filesystem = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file")))
    scans: list[str] = []
    scan = tar_cache.scan_tar
    monkeypatch.setattr(
        tar_cache, "scan_tar", lambda *args: (scans.append(args[1]), scan(*args))[1]
    )
    place = tmp_path / "0.tar"
    place.write_bytes(tarred([*GOOD, ("b.png", B)]))
    source = SourceConfig(format="webdataset", path="x")
    first, again = (tar_cache.known_tar(filesystem, str(place), source) for _ in range(2))
    assert len(scans) == 1
    assert again.images.equals(first.images)
    assert again.left_out == first.left_out == {"images without a label": (1, "b")}
    (kept,) = (tmp_path / "cache").rglob("*.arrow")
    kept.write_bytes(kept.read_bytes()[:100])  # it is made again
    assert tar_cache.known_tar(filesystem, str(place), source).images.equals(first.images)
    named = source.model_copy(update={"label_column": "kind"})
    tar_cache.known_tar(filesystem, str(place), named)
    place.write_bytes(WHOLE)
    assert len(tar_cache.known_tar(filesystem, str(place), source).images) == 2
    place.write_bytes(b"")
    empty = [tar_cache.known_tar(filesystem, str(place), source) for _ in range(2)]
    assert [(len(found.images), *found.left_out) for found in empty] == [
        (0, "tars that are cut off or damaged")
    ] * 2
    assert len(scans) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept there
    assert len(tar_cache.known_tar(filesystem, str(place), source).images) == 0


def test_a_header_of_less_than_nothing_ends(tmp_path, caplog):
    """Its size would lead the reader back to the same header for ever."""
    raw = bytearray(WHOLE)
    at = BLOCKS + 1024
    raw[at + 124 : at + 136] = b"\xff" * 10 + (-1024 & 0xFFFF).to_bytes(2, "big")
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    caplog.set_level(logging.WARNING, "ray_synth")
    assert found(tmp_path, bytes(raw)) == {"a": "0"}
    assert "less than 0 bytes" in caplog.text
