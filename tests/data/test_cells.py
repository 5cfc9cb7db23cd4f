"""What a table, a list or a link names is read inside the source's own folder alone."""

import http.server
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded

from ray_synth.config import SourceConfig
from ray_synth.data.cells import image_bytes
from ray_synth.data.dataset import load_index, read_index
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError

IN, OUT = encoded(1), encoded(2)


@pytest.fixture
def place(tmp_path):
    """A set with a picture inside, and others outside that names and links lead to."""
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "0.png").write_bytes(IN)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "0.png").write_bytes(OUT)
    (tmp_path / "set-2").mkdir()  # begins as the set does
    (tmp_path / "set-2" / "0.png").write_bytes(OUT)
    (tmp_path / "set" / "out.png").symlink_to(tmp_path / "secret" / "0.png")
    (tmp_path / "set" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "set" / "in.png").symlink_to("cat/0.png")
    os.mkfifo(tmp_path / "set" / "pipe.png")
    (tmp_path / "set" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "set" / "loop.png").symlink_to("loop.png")
    return tmp_path


def read(name, source: SourceConfig) -> bytes | str:
    """An image's bytes, or why it is set aside."""
    data = image_bytes(name, source)
    try:
        decode_image(data)
    except UserError as error:
        assert OUT not in data
        return str(error)
    return data


@pytest.mark.parametrize("form", ["parquet", "huggingface"])
def test_names_in_a_table_stay_below_its_folder(place, form):
    source = SourceConfig(format=form, path=str(place / "set"))
    for name in ("cat/0.png", "./cat/0.png", "in.png", str(place / "set" / "cat" / "0.png")):
        assert read(name, source) == read({"bytes": None, "path": name}, source) == IN
    assert read({"bytes": IN, "path": "/etc/passwd"}, source) == IN
    for name in (
        "/etc/passwd", "../secret/0.png", str(place / "secret" / "0.png"), "cat/../../secret/0.png",
        "out.png", "out/0.png", str(place / "set-2" / "0.png"), f"file://{place}/secret/0.png",
        "http://169.254.169.254/latest/meta-data", "s3://bucket/0.png", "zip://0.png::/x.zip",
        "zero.png", "a\0b", "~/0.png/../../../../../etc/passwd",
    ):  # fmt: skip
        assert "is not below" in str(read({"bytes": None, "path": name}, source)), name
    for name, says in (
        ("gone.png", "cannot be read"), ("loop.png", "cannot be read"), ("x" * 5000, "cannot be read"),
        ("cat", "cannot be read"), ("pipe.png", "no regular file"), ("", "empty"), ([1], "a list"),
    ):  # fmt: skip
        assert says in str(read(name, source))


def test_a_table_s_rows_that_name_what_is_outside_are_set_aside(place):
    """A file among others, and a pattern: its folder is what counts."""
    rows = [{"bytes": None, "path": name} for name in ("cat/0.png", "../secret/0.png")]
    pq.write_table(pa.table({"image": rows, "label": ["a", "b"]}), place / "set" / "t.parquet")
    for path in ("set", "set/t.parquet", "set/*.parquet"):
        found = list(read_index(load_index(SourceConfig(format="parquet", path=str(place / path)))))
        assert found[0]["image"] == IN
        with pytest.raises(UserError, match="names '../secret/0.png', which is not below"):
            decode_image(found[1]["image"])


def test_no_request_leaves_for_what_a_table_names(place):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/0.png"
        for form in ("parquet", "huggingface"):
            read({"bytes": None, "path": url}, SourceConfig(format=form, path=str(place / "set")))
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


def test_names_in_a_bucket_s_table_stay_in_its_folder(place):
    """Of a file system that is reached by URI."""
    source = SourceConfig(format="parquet", path="memory://set/part-*.parquet")
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/cat/0.png", IN)
    memory.pipe_file("/secret/0.png", OUT)
    for name in ("cat/0.png", "memory://set/cat/0.png"):
        assert read(name, source) == IN
    for name in ("../secret/0.png", "memory://secret/0.png", "/etc/passwd", "http://x/0.png"):
        assert "is not below memory://set" in str(read(name, source))
    assert "cannot be read" in str(read("gone.png", source))


def test_links_out_of_a_folder_are_followed_where_that_is_asked_for(place):
    (place / "set" / "cat" / "1.png").symlink_to(place / "secret" / "0.png")
    (place / "set" / "cat" / "2.png").symlink_to("0.png")
    (place / "set" / "dog").symlink_to(place / "secret")
    listed = place / "list.txt"
    listed.write_text("cat/0.png cat\ncat/1.png cat\ncat/2.png cat\ndog/0.png dog\na\0b dog\n")
    for more in ({}, {"image_list": str(listed)}):
        source = SourceConfig(format="imagefolder", path=str(place / "set"), **more)
        index = load_index(source, ("cat", "dog"))
        wanted = {
            f"{place}/set/{name}" for name in ("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png")
        }
        rows = {
            row["image_id"]: row["image"] for row in read_index(index) if row["image_id"] in wanted
        }
        assert [*map(rows.get, sorted(rows))][::2] == [IN, IN]
        for name in ("cat/1.png", "dog/0.png"):
            with pytest.raises(UserError, match="a link to outside of .* follow_links: true"):
                decode_image(rows[f"{place}/set/{name}"])
        followed = load_index(source.model_copy(update={"follow_links": True}), ("cat", "dog"))
        rows = {row["image_id"]: row["image"] for row in read_index(followed)}
        assert rows[f"{place}/set/cat/1.png"] == rows[f"{place}/set/dog/0.png"] == OUT
    # The folder itself may be a link: it is what the user named.
    (place / "named").symlink_to(place / "set")
    index = load_index(
        SourceConfig(format="imagefolder", path=str(place / "named")), ("cat", "dog")
    )
    assert next(iter(read_index(index)))["image"] == IN


def test_a_picture_that_is_gone_is_set_aside_and_the_others_are_read(place):
    (place / "set" / "cat" / "1.png").write_bytes(IN)
    index = load_index(SourceConfig(format="imagefolder", path=str(place / "set")), ("cat",))
    (place / "set" / "cat" / "0.png").unlink()
    first, second = (row["image"] for row in read_index(index))
    with pytest.raises(UserError, match="cannot be read .No such file"):
        decode_image(first)
    assert second == IN
