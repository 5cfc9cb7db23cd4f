"""A run directory on real storage servers: whole objects or none, whatever happens to their writers."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from buckets import make_bucket, serving
from pyarrow.fs import FileSelector
from test_folder import SCHEMA, numbered

from ray_synth.generation.store import ImageStore
from ray_synth.storage.folder import Folder

pytestmark = pytest.mark.slow
WHOLE = 12_000_000  # bytes; more than one part of a multipart upload
# Writes one name again and again, each time with other bytes; says so before each.
WRITER = f"""
import sys
from ray_synth.storage.folder import Folder
folder = Folder(sys.argv[1])
for number in range(1000):
    print(number, flush=True)
    data = bytes([number % 251]) * {WHOLE}
    if sys.argv[2] == "bytes":
        folder.write_bytes("f", data)
    else:
        with folder.stream("f") as stream:
            stream.write(data)
"""


@pytest.fixture(scope="module", params=["s3", "gs", "abfs"])
def server(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with serving(request.param, tmp_path_factory.mktemp(request.param)) as found:
            for name, value in found.environment.items():
                patch.setenv(name, value)
            make_bucket(found)
            yield found


@pytest.fixture
def folder(server, request):
    return Folder(server.uri).child(request.node.name.split("[")[0])


def everything(folder) -> list[str]:
    """The names of all objects in a folder, hidden ones too."""
    selector = FileSelector(folder.path(), recursive=True, allow_not_found=True)
    return sorted(i.base_name for i in folder.filesystem.get_file_info(selector) if i.is_file)


def whole(folder, name: str = "f") -> bool:
    data = folder.read_bytes(name)
    return len(data) == WHOLE and data == data[:1] * WHOLE


def test_files_round_trip(folder):
    assert folder.names() == []
    folder.check_readable()
    folder.check_writable()
    folder.write_json("a/b.json", {"x": "é"})
    folder.write_bytes("a/empty", b"")
    folder.write_tables("t.parquet", SCHEMA, [numbered(0, 40), numbered(40, 60)], row_group_size=16)
    folder.write_table("u.parquet", numbered(0, 3))
    folder.write_table("u.parquet", numbered(0, 5))
    assert folder.read_json("a/b.json") == {"x": "é"}
    assert folder.child("a").names() == ["b.json", "empty"]
    assert folder.read_rows("t.parquet", 10, 50).equals(numbered(10, 50))
    assert folder.read_table("u.parquet").num_rows == 5
    assert folder.names(".parquet") == ["t.parquet", "u.parquet"]
    assert not folder.exists("none")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("none")
    folder.sweep()
    assert everything(folder) == ["b.json", "empty", "t.parquet", "u.parquet"]
    folder.delete("u.parquet")
    folder.delete("u.parquet")
    assert folder.names() == ["t.parquet"]


def test_a_writer_that_fails_leaves_the_old_object_and_nothing_else(folder):
    folder.write_bytes("f", b"old")

    def tables():
        yield numbered(0, 1000)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            folder.write_tables("f", SCHEMA, tables())
    with pytest.raises(TypeError):
        folder.write_bytes("f", "text")  # type: ignore[arg-type]
    assert folder.read_bytes("f") == b"old"
    assert everything(folder) == ["f"]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("way", ["bytes", "stream"])
def test_a_writer_ended_at_any_moment_leaves_a_whole_object_or_none(server, folder, sign, way):
    rng = random.Random(0)
    folder = folder.child(f"{sign.name}-{way}")
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, folder.uri, way],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout
        for _ in range(rng.randint(1, 3)):
            assert process.stdout.readline(), "it ended by itself"
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(sign)
        process.wait(timeout=60)
        assert process.returncode != 0
        assert folder.names() in ([], ["f"])
        if folder.names():
            assert whole(folder)
    folder.write_bytes("f", b"\x01" * WHOLE)
    assert whole(folder), "the same name can be written again"


def test_writers_of_the_same_name_leave_one_whole_object_that_readers_always_see_whole(folder):
    folder.write_bytes("f", b"\x00" * WHOLE)
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(whole(folder))

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: folder.write_bytes("f", bytes([i]) * WHOLE), range(12)))
    stop.set()
    reader.join()
    assert seen
    assert all(seen)
    assert everything(folder) == ["f"]


def contents(folder) -> dict[str, bytes]:
    """All files of a folder by their names in it."""
    root = folder.path()
    found = folder.filesystem.get_file_info(FileSelector(root, recursive=True))
    names = [info.path[len(root) :].lstrip("/") for info in found if info.is_file]
    return {name: folder.read_bytes(name) for name in names}


def test_a_run_in_a_bucket_is_exported_and_shown_as_one_on_disk(folder, tmp_path):
    from test_layouts import image_rows, write_plan, write_store

    from ray_synth.export.layouts import LAYOUTS, export_images
    from ray_synth.report.page import render_report, write_report
    from ray_synth.report.sheet import sheet_of, write_contact_sheet

    near, far = Folder(tmp_path / "run"), folder.child("run")
    for run in (near, far):
        write_plan(run, image_rows())
        write_store(run, image_rows())
        run.write_yaml("config.yaml", {"name": "run"})
        write_contact_sheet(run)
        write_report(run)
    assert contents(near.child("report")) == contents(far.child("report"))
    assert render_report(far).count("data:image/") > 3
    assert sheet_of(near).tobytes() == sheet_of(far).tobytes()
    for layout in LAYOUTS:
        for _ in range(2):  # the second time over what is there
            for run in (near, far):
                to = Folder(tmp_path if run is near else folder.uri).child(layout)
                assert export_images(run, to, layout=layout)["exported"] > 10
        assert contents(Folder(tmp_path / layout)) == contents(folder.child(layout))


def test_a_part_is_one_request(server, folder):
    """On S3, where each is paid for: no rename, which is a copy and a deletion there."""
    if server.kind != "s3":
        pytest.skip("only moto's log is read")
    from test_store import made, plan_rows

    store = ImageStore(folder.child("images"))
    rows = made(plan_rows(4))
    store.write(rows)
    before = len(server.requests())
    store.write(rows)
    new = server.requests()[before:]
    assert [line.split()[0] for line in new] == ["PUT"], new


def test_the_endpoint_may_come_from_the_environment(server, folder, monkeypatch):
    if server.kind != "s3":
        pytest.skip("a variable of S3's")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    folder.write_bytes("f", b"x")
    assert Folder("s3://bucket/runs").child(folder.name).read_bytes("f") == b"x"


def test_a_missing_bucket_is_named(server):
    lost = Folder(server.uri.replace("bucket", "nosuch")).child("run")
    with pytest.raises(ValueError, match=r"nosuch.*bucket does not exist"):
        lost.check_writable()


def test_a_storage_that_does_not_answer_is_named_at_once(server):
    if server.kind == "gs":
        pytest.skip("its client tries for minutes")
    lost = Folder(server.uri.replace(str(server.port), "1"))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"no answer.*endpoint_override"):
        lost.check_readable()
    assert time.monotonic() - started < 60


def test_refused_credentials_are_named_and_not_shown(tmp_path, monkeypatch):
    """An S3 server that checks who asks."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    with serving("s3", tmp_path, INITIAL_NO_AUTH_ACTION_COUNT="1") as server:
        make_bucket(server)
        folder = Folder(server.uri)
        for work in (folder.check_writable, lambda: folder.write_bytes("f", b"x")):
            started = time.monotonic()
            with pytest.raises((ValueError, OSError)) as error:
                work()
            assert time.monotonic() - started < 30, "waiting would not fix it"
        with pytest.raises(ValueError, match=r"access denied.*AWS_SECRET_ACCESS_KEY") as error:
            folder.check_writable()
        assert "hush" not in str(error.value)


def test_an_azure_folder_needs_its_key(server, monkeypatch):
    if server.kind != "abfs":
        pytest.skip("of Azure")
    monkeypatch.delenv("AZURE_STORAGE_KEY")
    assert "AZURE_STORAGE_KEY" not in os.environ
    with pytest.raises(ValueError, match="AZURE_STORAGE_KEY"):
        Folder(server.uri).check_readable()
