"""One reader of labels: what is a label, which class it is, and what is told of the others."""

import io
import json
import tarfile
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import encoded

from ray_synth.config import DataConfig, SourceConfig
from ray_synth.data.dataset import left_out, load_index, load_tests
from ray_synth.data.labels import closest, read_column
from ray_synth.errors import UserError

NAMES = ("crane", "mouse", "zebra")
KRAEHE = unicodedata.normalize("NFC", "Krähe")


def parquet(tmp_path, labels, names=None, name="a", **columns):
    table = pa.table(
        {"image": [encoded(i) for i in range(len(labels))], "label": labels, **columns}
    )
    if names:
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
        )
        table = table.replace_schema_metadata(features.arrow_schema.metadata)  # as exports write it
    pq.write_table(table, tmp_path / f"{name}.parquet")
    return SourceConfig(format="parquet", path=str(tmp_path / f"{name}.parquet"))


def huggingface(tmp_path, labels, names):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    cells = [{"bytes": encoded(i), "path": None} for i in range(len(labels))]
    made = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    made.save_to_disk(str(tmp_path / "hf"))
    return SourceConfig(format="huggingface", path=str(tmp_path / "hf"))


def webdataset(tmp_path, labels, member="cls"):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, label in enumerate(labels):
            parts = {"png": encoded(i)} | ({member: label} if label is not None else {})
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return SourceConfig(format="webdataset", path=str(tmp_path / "a.tar"))


def folder(root, *classes):
    for name in classes:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(encoded(1))
    return SourceConfig(format="imagefolder", path=str(root))


@pytest.mark.parametrize(
    "make",
    [
        lambda at: huggingface(at, [0, -1, None, 2, 2], NAMES),
        lambda at: parquet(at, [0, -1, None, 2, 2], NAMES),
        lambda at: parquet(at, ["crane", "", None, " zebra", "zebra\n"]),
        lambda at: parquet(at, pa.array([0, -1, None, 2, 2], pa.int8())),
        lambda at: parquet(at, [0.0, float("nan"), None, 2.0, 2.0]),
        lambda at: webdataset(at, [b"0", b"-1", None, b"2", b" 2\n"]),
        lambda at: webdataset(
            at, [json.dumps({"label": x}).encode() for x in ("crane", "", None, "zebra", "zebra ")],
            "json",
        ),
    ],
)  # fmt: skip
def test_rows_without_a_label_are_counted_and_never_another_class(tmp_path, make):
    source = make(tmp_path)
    index = load_index(source, NAMES)
    assert index.counts() == {"crane": 1, "mouse": 0, "zebra": 2}
    assert [index.image_id(at)[-1] for at in range(3)] == ["0", "3", "4"]
    assert index.left_out.unlabelled == 2
    assert "2 images have no label" in left_out(index, {})[0]
    data = DataConfig(train=source, test=source)
    with pytest.raises(UserError, match=r"data\.test: 2 images of .* have no label"):
        load_tests(data, NAMES, 0)


def test_a_source_without_any_label_is_refused(tmp_path):
    source = huggingface(tmp_path, [-1, -1, -1], NAMES)
    with pytest.raises(UserError, match=r"hf: none of its 3 images has a label"):
        load_index(source, NAMES)


def test_names_in_a_parquet_file_are_what_its_numbers_mean(tmp_path):
    train = load_index(parquet(tmp_path, [0, 1, 1], ["mouse", "crane"]))
    assert train.counts() == {"crane": 2, "mouse": 1}
    # A test set that has numbers alone means the same by them, though the classes are sorted.
    data = DataConfig(train=SourceConfig(format="digits"), test=parquet(tmp_path, [0, 0, 1]))
    tests = load_tests(data, train.class_names, 0, numbering=train.numbering)
    assert tests["in_domain"].counts() == {"crane": 1, "mouse": 2}
    named = load_tests(data, ("crane", "mouse"), 0)
    assert named["in_domain"].counts() == {"crane": 2, "mouse": 1}


def test_labels_that_look_alike_are_one_class(tmp_path):
    decomposed = unicodedata.normalize("NFD", KRAEHE)
    source = parquet(tmp_path, ["cat ", "cat", decomposed, KRAEHE, "\ufeffcat"])
    assert load_index(source).counts() == {KRAEHE: 2, "cat": 3}
    mapped = source.model_copy(update={"class_map": {decomposed: "crow", " cat": "cat"}})
    assert load_index(mapped).counts() == {"cat": 3, "crow": 2}


def test_a_class_that_is_called_minus_one_is_named(tmp_path):
    source = parquet(tmp_path, [-1, 1, -1])
    assert load_index(source).counts() == {"1": 1}
    assert load_index(source, ("-1", "1")).counts() == {"-1": 2, "1": 1}
    mapped = source.model_copy(update={"class_map": {"-1": "no", "1": "yes"}})
    assert load_index(mapped).counts() == {"no": 2, "yes": 1}


@pytest.mark.parametrize(
    ("labels", "names", "says"),
    [
        ([["cat"], ["dog"]], None, "holds values of type list"),
        ([{"a": 1}, {"a": 2}], None, "holds values of type struct"),
        ([0, 1, 3], NAMES, r"row 2: 3 is no class: the 3 classes count from 0"),
        ([0.5, 1.0], None, "row 0: 0.5 is no class"),
        ([b"cat", b"\xff"], None, "row 1: .* is not UTF-8"),
    ],
)
def test_what_is_no_label_is_named_by_its_file(tmp_path, labels, names, says):
    with pytest.raises(UserError, match=rf"a\.parquet, column 'label'.*{says}"):
        load_index(parquet(tmp_path, labels, names))


def test_a_number_past_the_last_class_is_named(tmp_path):
    with pytest.raises(UserError, match="label 3 is past the last of the 3 classes"):
        load_index(parquet(tmp_path, [1, 2, 3]), NAMES)


def test_metadata_that_cannot_be_read_is_named(tmp_path):
    table = pa.table({"image": [b"x"], "label": [0]}).replace_schema_metadata({"huggingface": "{"})
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"m\.parquet: its Hugging Face metadata"):
        load_index(SourceConfig(format="parquet", path=str(tmp_path / "m.parquet")))


def test_a_broken_label_in_a_tar_is_no_label(tmp_path):
    for member, data in (("json", b"{"), ("json", b'{"lable": 1}'), ("json", b'{"label": [1]}'),
                         ("cls", b"\xff")):  # fmt: skip
        index = load_index(webdataset(tmp_path, [data, b"1" if member == "cls" else b'{"label": 1}'],
                                      member))  # fmt: skip
        assert index.left_out.unlabelled == 1
        with pytest.raises(
            UserError, match=r"a\.tar: none of the 1 images in its tar files has a label"
        ):
            load_index(webdataset(tmp_path, [data], member))


def test_labels_that_are_no_class_are_told_with_the_nearest(tmp_path):
    decomposed = unicodedata.normalize("NFD", KRAEHE)
    train = load_index(folder(tmp_path / "train", "Cat", KRAEHE, "dog"))
    test = folder(tmp_path / "test", "cat", decomposed, "dog", "bird")
    tests = load_tests(DataConfig(train=test, test=test), train.class_names, 0)
    assert tests["in_domain"].counts() == {"Cat": 0, KRAEHE: 1, "dog": 1}
    (line,) = left_out(train, tests)
    assert line.startswith("data.test: 2 images are left out, since their label is no class")
    assert "'cat' (1 images; did you mean 'Cat'?)" in line
    assert "'bird' (1 images)" in line
    mapped = test.model_copy(update={"class_map": {"cat": "Cat", "dog": "dgo"}})
    lines = left_out(train, {"photos": load_index(mapped, train.class_names)})
    assert "data.ood.photos: 1 images are left out" in lines[0]
    assert "'dog' (1 images" in lines[0]
    assert "class_map leaves out 2 images of 'Krähe', 'bird'" in unicodedata.normalize(
        "NFC", lines[1]
    )


def test_the_nearest_class_ignores_case_and_accents_forms():
    assert closest("CAT", ["dog", "Cat"]) == "Cat"
    assert closest("wolpertinger", ["dog", "Cat"]) is None


def test_a_million_rows_are_read_by_their_different_labels(tmp_path):
    column = pa.array(np.arange(1_000_000) % 1_000).cast(pa.string())
    labels = read_column(pa.chunked_array([column, column]), "x")
    assert len(labels.names) == 1_000
    assert labels.codes.shape == (2_000_000,)
    assert labels.names[labels.codes[1_234_567]] == "567"
