"""The run directory: whole files or none."""

import pickle

import pyarrow as pa
import pytest

from ray_synth.storage import Folder


def test_files_round_trip_and_are_listed_whole(tmp_path):
    folder = Folder(tmp_path / "run")
    folder.write_json("a/b.json", {"x": "é"})
    folder.write_table("t.parquet", pa.table({"n": [1, 2]}))
    assert folder.read_json("a/b.json") == {"x": "é"}
    assert folder.read_table("t.parquet").num_rows == 2
    assert folder.names() == ["t.parquet"]
    assert folder.child("a").names() == ["b.json"]
    assert folder.child("none").names() == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    folder = Folder(tmp_path)
    folder.write_bytes("f", b"old")
    with pytest.raises(TypeError):
        folder.write_bytes("f", "not bytes")  # type: ignore[arg-type]
    assert folder.read_bytes("f") == b"old"
    assert folder.names() == ["f"]


def test_unfinished_files_are_not_listed(tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / ".part-1.parquet.123.tmp").write_bytes(b"half")
    assert folder.names() == []


def test_uris_are_kept_and_a_folder_travels(tmp_path):
    folder = Folder(tmp_path.as_uri())
    folder.write_bytes("f", b"x")
    assert pickle.loads(pickle.dumps(folder)).read_bytes("f") == b"x"
    assert Folder("s3://bucket/runs").child("a").uri == "s3://bucket/runs/a"
    with pytest.raises(ValueError, match="cannot open"):
        _ = Folder("nosuch://x").filesystem
