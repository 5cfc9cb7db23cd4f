"""The run directory: whole files or none."""

import errno
import os
import pickle
import stat
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import FileSelector

from ray_synth.errors import UserError
from ray_synth.storage.damage import DamagedFile
from ray_synth.storage.filesystems import open_uri, patiently
from ray_synth.storage.folder import ABANDONED_S, Folder


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
    away = Folder("s3://bucket/runs?region=x").child("a")
    assert away.uri == "s3://bucket/runs/a?region=x"
    assert (away.name, away.address("f")) == ("a", "s3://bucket/runs/a/f")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nosuch://x", "cannot open nosuch://x.*not known"),
        ("adl://box/x", "cannot open adl://box.*adlfs"),  # a package that is missing
        ("s3://", "names no bucket"),
        ("gs:///folder", "names no bucket"),
        ("s3://bucket/x?regoin=us-east-1", "regoin"),
        ("abfs://box/x", "no storage account"),
        ("abfs://box@account/x?scheme=http&account=y", "unknown option 'account'"),
    ],
)
def test_what_cannot_be_opened_is_named(uri, says, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(ValueError, match=says):
        _ = Folder(uri).filesystem


def test_a_file_uri_is_a_path(tmp_path):
    place = tmp_path / "a b@c"
    Folder(place.as_uri()).write_bytes("f", b"x")
    assert (place / "f").read_bytes() == b"x"
    filesystem, path = open_uri(f"{place.as_uri()}/f")
    assert filesystem.open_input_file(path).read() == b"x"


def test_a_file_system_of_fsspec_holds_whole_files_and_no_others():
    """memory:// is one that renames; its files are those of this process."""
    folder = Folder("memory://box/run")
    folder.write_bytes("a/f", b"old")
    folder.write_tables("t.parquet", SCHEMA, [numbered(0, 30)])
    with pytest.raises(ZeroDivisionError), folder.stream("a/f") as stream:
        stream.write(b"new" * (1 // 0))
    with pytest.raises(TypeError):
        folder.write_bytes("a/f", "text")  # type: ignore[arg-type]
    folder.write_bytes("a/g", b"1")
    folder.write_bytes("a/g", b"2")
    assert (folder.read_bytes("a/f"), folder.read_bytes("a/g")) == (b"old", b"2")
    assert folder.read_rows("t.parquet", 10, 20).equals(numbered(10, 20))
    assert pickle.loads(pickle.dumps(folder)).child("a").names() == ["f", "g"]
    found = folder.filesystem.get_file_info(FileSelector(folder.path(), recursive=True))
    assert sorted(info.base_name for info in found if info.is_file) == ["f", "g", "t.parquet"]
    folder.check_writable()
    folder.delete("a/g")
    assert folder.child("a").names() == ["f"]


def test_what_a_killed_writer_left_is_swept_when_it_is_old(tmp_path):
    folder = Folder(tmp_path)
    folder.write_bytes("part", b"x")
    for name, age in ((".part.0123abcd.tmp", 2 * ABANDONED_S), (".part.4567abcd.tmp", 5)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)
    os.utime(tmp_path / "part", times=(0, 0))
    folder.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {"part", ".part.4567abcd.tmp"}
    assert folder.names() == ["part"]


@pytest.mark.parametrize(
    ("error", "remote", "tries"),
    [
        (OSError(errno.ESTALE, "stale"), False, 3),
        (OSError(errno.ENOSPC, "full"), False, 1),
        (OSError("Couldn't deserialize thrift"), False, 1),
        (OSError("Couldn't deserialize thrift"), True, 1),
        (FileNotFoundError(errno.ENOENT, "none"), True, 1),
        (OSError("AWS Error NETWORK_CONNECTION during PutObject"), True, 3),
        (OSError("AWS Error ACCESS_DENIED during PutObject"), True, 1),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject"), True, 1),
        (ValueError("ours"), True, 1),
    ],
)
def test_only_what_may_pass_is_tried_again(error, remote, tries):
    seen = []

    def work():
        seen.append(1)
        if len(seen) < 3:
            raise error
        return "done"

    if tries == 3:
        assert patiently(work, remote=remote) == "done"
    else:
        with pytest.raises(type(error)):
            patiently(work, remote=remote)
    assert len(seen) == tries


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


@settings(deadline=None)  # of a busy machine
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


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        fsync(handle)
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    def renamed(source, to):
        replace(source, to)
        done.append("rename")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folder = Folder(tmp_path)
    folder.write_bytes("f", b"x")
    with folder.stream("g") as stream:
        stream.write(b"y")
    folder.write_table("t.parquet", numbered(0, 3))
    assert done == ["file", "rename", "folder"] * 3
    folder.write_bytes("f", b"z", durable=False)
    assert done[9:] == ["rename"]


@pytest.mark.parametrize("hours", [1, -1, 36])
def test_a_clock_that_is_off_sweeps_no_live_temporary_file(tmp_path, monkeypatch, hours):
    folder = Folder(tmp_path)
    (tmp_path / ".part.0123abcd.tmp").write_bytes(b"half")
    now = time.time() + hours * 3600
    monkeypatch.setattr(time, "time", lambda: now)
    folder.sweep()
    assert [path.name for path in tmp_path.iterdir()] == [".part.0123abcd.tmp"]
    # So does one that the writer's clock dated.
    monkeypatch.undo()
    os.utime(tmp_path / ".part.0123abcd.tmp", times=(time.time() - 3 * 3600,) * 2)
    folder.sweep()
    assert [path.name for path in tmp_path.iterdir()] == [".part.0123abcd.tmp"]


def test_a_damaged_file_is_told_by_name_with_what_to_do(tmp_path):
    folder = Folder(tmp_path)
    (tmp_path / "stages").mkdir()
    for name, fix in (("stages/plan.json", "delete it"), ("plan.parquet", "--force-stage plan")):
        for data in (b"", b'{"a": ', b"\xff\xfe", b"PAR1"):
            (tmp_path / name).write_bytes(data)
            read = folder.read_json if name.endswith("json") else folder.read_table
            with pytest.raises(DamagedFile, match=f"{name} is damaged .*{fix}") as error:
                read(name)
            assert "\n" not in str(error.value)
    assert isinstance(pickle.loads(pickle.dumps(error.value)), UserError)
    with pytest.raises(FileNotFoundError):
        folder.read_table("none.parquet")


def test_a_flipped_bit_of_any_table_is_found_when_it_is_read(tmp_path):
    folder = Folder(tmp_path)
    folder.write_tables("t.parquet", SCHEMA, [numbered(0, 3000)])
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(DamagedFile, match=r"t\.parquet"):
        folder.read_table("t.parquet")
