"""Whatever is wrong with a file of the user's is told by its name, and never as a traceback."""

import io
import os
import shutil
import subprocess
import sys
import tempfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded

from ray_synth.config import SourceConfig, load_config
from ray_synth.data.class_names import read_class_names
from ray_synth.data.dataset import load_index, read_index
from ray_synth.data.images import decode_image
from ray_synth.errors import UserError
from ray_synth.evaluation.checkpoint import _card_of
from ray_synth.preflight.model_sizes import stored_parameters
from ray_synth.storage.classifiers import load_model
from ray_synth.storage.folder import Folder
from ray_synth.storage.texts import read_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def source(path, form="imagefolder", **more) -> SourceConfig:
    return SourceConfig(format=form, path=str(path), **more)


def reasons(given: SourceConfig) -> dict[str, str]:
    """Why images of a source cannot be decoded, by the end of their names."""
    found = {}
    for row in read_index(load_index(given)):
        try:
            decode_image(row["image"])
        except UserError as error:
            found[row["image_id"].rsplit("/", 1)[-1]] = str(error)
    return found


def test_a_name_that_is_not_utf8_is_named(image_folder):
    with open(os.path.join(os.fsencode(image_folder), b"cat", b"k\xe4fer.png"), "wb") as file:
        file.write(encoded(0))
    with pytest.raises(UserError, match=r"cat/k\\xe4fer\.png is not UTF-8: rename it"):
        load_index(source(image_folder))


@pytest.mark.skipif(sys.platform == "win32", reason="rights of POSIX")
def test_a_folder_that_may_not_be_read_is_named(image_folder):
    """As another user than root, who may read everything."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        for name in ("cat", "dog"):
            shutil.copytree(image_folder / name, f"{place}/{name}")
        os.chmod(f"{place}/dog", 0)
        code = (
            "import os; from ray_synth.data.dataset import SourceConfig, UserError, load_index\n"
            "os.getuid() or os.setuid(65534)\n"
            f"try: load_index(SourceConfig(format='imagefolder', path={place!r}))\n"
            "except UserError as error: print(error)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    assert "may not be read by this user" in said.stdout
    assert f"{place}/dog" in said.stdout


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"\xef\xbb\xbfcat\r\ndog\r\n", ("cat", "dog")),
        ("cat\nkäfer\n".encode("utf-16"), ("cat", "käfer")),
    ],
)
def test_a_mark_before_a_text_is_no_part_of_a_name(tmp_path, data, names):
    (tmp_path / "names.txt").write_bytes(data)
    assert read_class_names(str(tmp_path / "names.txt")) == names


def test_a_text_in_another_encoding_is_named_by_its_line(tmp_path, image_folder):
    place = tmp_path / "names.txt"
    place.write_bytes("cat\nkäfer\n".encode("latin1"))
    says = r"names\.txt, line 2: not UTF-8 text; .*iconv -f latin1"
    for read in (
        lambda: read_class_names(str(place)),
        lambda: load_index(source(image_folder, image_list=str(place))),
        lambda: load_config(place),
    ):
        with pytest.raises(UserError, match=says):
            read()


def test_a_file_that_git_lfs_left_out_is_named_as_such(tmp_path, image_folder):
    (image_folder / "cat" / "0.png").write_bytes(POINTER)
    assert "a Git LFS pointer" in reasons(source(image_folder))["0.png"]
    for name in ("a.parquet", "names.txt", "model.safetensors", "card.json"):
        (tmp_path / name).write_bytes(POINTER)
    for read in (
        lambda: load_index(source(tmp_path / "a.parquet", "parquet")),
        lambda: read_class_names(str(tmp_path / "names.txt")),
        lambda: stored_parameters(tmp_path),
        lambda: read_json(tmp_path / "card.json"),
    ):
        with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
            read()


def test_a_broken_parquet_file_is_named_wherever_it_is_broken(tmp_path):
    whole = io.BytesIO()
    table = pa.table({"image": [encoded(i) for i in range(40)], "label": ["cat"] * 40})
    pq.write_table(table, whole, compression="none")
    data, place = whole.getvalue(), tmp_path / "a.parquet"
    for broken, says in (
        (b"", "a.parquet is empty"),
        (data[: len(data) // 2], "a.parquet is not a Parquet file, or a broken one"),
        (data[:4] + b"\xff" * 400 + data[404:], "a.parquet is not a Parquet file, or a broken one"),
    ):
        place.write_bytes(broken)
        with pytest.raises(UserError, match=says):
            list(read_index(load_index(source(place, "parquet"))))


def test_a_picture_that_a_table_points_to_and_that_is_gone_is_set_aside(tmp_path, image_folder):
    (tmp_path / "list.txt").write_text("cat/0.png cat\ncat/gone.png cat\ndog/1.jpg dog\n")
    listed = reasons(source(image_folder, image_list=str(tmp_path / "list.txt")))
    assert list(listed) == ["gone.png"]
    assert "no such file" in listed["gone.png"].lower()
    cells = [
        {"bytes": None, "path": str(image_folder / "cat" / name)} for name in ("0.png", "gone.png")
    ]
    table = {"image": pa.array(cells), "label": pa.array(["cat", "dog"])}
    pq.write_table(pa.table(table), image_folder / "a.parquet")
    assert list(reasons(source(image_folder / "a.parquet", "parquet"))) == ["a.parquet#0:1"]


def test_a_picture_that_is_deleted_while_a_run_goes_on_is_set_aside(image_folder):
    index = load_index(source(image_folder))
    (image_folder / "dog" / "1.jpg").unlink()
    rows = list(read_index(index))
    assert len(rows) == 10
    with pytest.raises(UserError, match="(?i)no such file"):
        decode_image(next(row["image"] for row in rows if row["image_id"].endswith("dog/1.jpg")))


def test_a_broken_hugging_face_folder_is_named(tmp_path):
    built = datasets.Dataset.from_dict({"image": [encoded(0)], "label": ["cat"]})
    built.save_to_disk(str(tmp_path / "hf"))
    (arrow,) = (tmp_path / "hf").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(UserError, match="hf"):
        load_index(source(tmp_path / "hf", "huggingface"))


@pytest.mark.parametrize("text", ["", '{"class_names": ["cat"', "[1, 2"])
def test_a_file_that_is_cut_off_is_named(tmp_path, text):
    (tmp_path / "mixed.json").write_text(text)
    with pytest.raises(UserError, match=r"mixed\.json is (empty|not whole JSON)"):
        _card_of(tmp_path / "mixed.main.safetensors")
    (tmp_path / "run.yaml").write_text("data: {train: [" + text)
    with pytest.raises(UserError, match=r"run\.yaml is not valid YAML"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("data", [b"", b"\x10", b"\xff" * 64, (8).to_bytes(8, "little") + b"{}"])
def test_corrupt_weights_are_named(tmp_path, data):
    folder = Folder(tmp_path)
    folder.write_bytes("models/mixed.main.safetensors", data)
    card = {"model": "test_resnet", "class_names": ["a", "b"], "model_kwargs": {}}
    with pytest.raises(UserError, match=r"models/mixed\.main\.safetensors is not the whole file"):
        load_model(folder, "mixed", "main", card)
    with pytest.raises(UserError, match=r"mixed\.main\.safetensors"):
        stored_parameters(tmp_path)
