"""The run directory: whole files or none."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def numbered(start: int, stop: int) -> pa.Table:
    numbers = list(range(start, stop))
    return pa.table({"n": numbers, "text": [f"row {n}" for n in numbers]}, schema=SCHEMA)


@pytest.fixture(scope="module")
def rows_on_disk(tmp_path_factory) -> Folder:
    """100 rows in tables of 40, 40 and 20: groups of 16, 16, 8, 16, 16, 8, 16 and 4 rows."""
    folder = Folder(tmp_path_factory.mktemp("rows"))
    tables = (numbered(start, min(start + 40, 100)) for start in (0, 40, 80))
    folder.write_tables("t.parquet", SCHEMA, tables, row_group_size=16)
    return folder


@given(st.integers(0, 120), st.integers(0, 120), st.sampled_from([None, ["text"], ["text", "n"]]))
def test_any_rows_are_read_as_a_slice_of_the_whole(rows_on_disk, start, length, columns):
    found = rows_on_disk.read_rows("t.parquet", start, start + length, columns)
    expected = numbered(0, 100).slice(min(start, 100), length)
    assert found.equals(expected if columns is None else expected.select(columns))


def test_only_the_row_groups_that_hold_the_rows_are_read(tmp_path):
    folder = Folder(tmp_path)
    folder.write_tables("t.parquet", SCHEMA, [numbered(0, 30)], row_group_size=10)
    first = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).column(0)
    at = first.dictionary_page_offset
    with open(tmp_path / "t.parquet", "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * first.total_compressed_size)
    assert folder.read_rows("t.parquet", 10, 30).equals(numbered(10, 30))
    with pytest.raises(OSError, match=r".+"):
        folder.read_rows("t.parquet", 9, 30)


def test_tables_are_written_as_they_come_and_none_is_a_file_too(tmp_path):
    folder = Folder(tmp_path)
    seen = []

    def tables():
        for start in (0, 10):
            seen.append(folder.names())
            yield numbered(start, start + 10)

    folder.write_tables("deep/t.parquet", SCHEMA, tables())
    assert seen == [[], []]
    assert folder.read_table("deep/t.parquet").equals(numbered(0, 20))
    folder.write_tables("none.parquet", SCHEMA, [])
    assert folder.read_table("none.parquet").equals(numbered(0, 0))
    assert folder.read_rows("none.parquet", 0, 5).equals(numbered(0, 0))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [0, 2])
def test_tables_that_fail_on_the_way_leave_the_old_file_and_nothing_else(tmp_path, error, before):
    folder = Folder(tmp_path)
    folder.write_tables("t.parquet", SCHEMA, [numbered(0, 3)])

    def tables():
        for start in range(before):
            yield numbered(start, start + 1)
        raise error("no more")

    with pytest.raises(error, match="no more"):
        folder.write_tables("t.parquet", SCHEMA, tables())
    with pytest.raises(ValueError, match="schema"):
        folder.write_tables("new.parquet", SCHEMA, [pa.table({"other": [1]})])
    assert folder.read_table("t.parquet").equals(numbered(0, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
