"""Exports are read back by each format's own library; cards by a Markdown parser."""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torchvision
import webdataset
import yaml
from huggingface_hub import DatasetCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from samples import encoded
from test_store import made, plan_rows

from ray_synth.config import SourceConfig
from ray_synth.data.dataset import load_index, read_index
from ray_synth.export import layouts as export
from ray_synth.export.card import cell, size_category
from ray_synth.export.layouts import LAYOUTS, export_images
from ray_synth.export.names import class_list, folder_names
from ray_synth.generation.store import ImageStore
from ray_synth.prompting.plan_file import PLAN_SCHEMA
from ray_synth.storage.folder import Folder

CLASSES = ["crane/bird", "test", "Kranich | `x` <b>\nß"]
KINDS = ["plain", "contextual", "stylized"]
FORMATS = ["PNG", "WEBP", "JPEG"]
EVIL = "a | photo\nof `it` <script>alert(1)</script> [x](y) $z$ # *b* _c_ \\"
COUNT = 24


def image_rows() -> list[dict]:
    """24 rows of three classes: 4 rejected, one of them never made, and 1 accepted with a remark."""
    rows = made(plan_rows(COUNT))
    for i, row in enumerate(rows):
        row |= {
            "class_name": CLASSES[i % 3],
            "meaning": f"meaning {i % 3}",
            "kind": KINDS[i // 3 % 3],
            "style": "pop art" if i // 3 % 3 == 2 else "",
            "prompt": f"{EVIL} {i}",
            "image": encoded(i, FORMATS[i % 3]),
            "clip_score": i / 100 if i % 2 else None,
            "embedding": [0.5, i / 8],
            "generator": json.dumps({"model": "/home/me/sd", "num_inference_steps": 4}),
            "gpu_seconds": 60.0,
        }
    for i in (1, 2, 5):
        rows[i] |= {"accepted": False, "reject_reason": f"clip score 0.1{i} below 0.21"}
    rows[7] |= {"accepted": False, "reject_reason": "RuntimeError: no", "image": b"", "width": 0}
    rows[8] |= {"reject_reason": "blank: every pixel is alike"}
    return rows


def write_plan(folder: Folder, rows: list[dict]) -> None:
    plan = pa.Table.from_pylist(
        [{name: row[name] for name in PLAN_SCHEMA.names} for row in rows], schema=PLAN_SCHEMA
    )
    folder.write_table("plan.parquet", plan)


def write_store(folder: Folder, rows: list[dict], size: int = 5) -> None:
    store = ImageStore(folder.child("images"))
    for start in range(0, len(rows), size):
        store.write(rows[start : start + size])


@pytest.fixture
def run(tmp_path) -> Folder:
    folder = Folder(tmp_path / "runs" / "small")
    write_plan(folder, image_rows())
    write_store(folder, image_rows())
    stranger = {**image_rows()[0], "sample_id": "of-another-plan", "class_name": "gone"}
    ImageStore(folder.child("images")).write([stranger])
    source = {"format": "digits"}
    folder.write_yaml(
        "config.yaml",
        {
            "name": "small",
            "data": {"train": source, "test": source},
            "training": {"steps": 1},
            "generation": {"num_gpus": 1, "num_cpus": 2, "checks": {"policy": "reject"}},
            "cluster": {"price_per_gpu_hour": 3.0, "price_per_cpu_hour": 0.5},
            "versions": {"torch": "2.14.1"},
        },
    )
    return folder


def accepted() -> dict[str, dict]:
    return {row["sample_id"]: row for row in image_rows() if row["accepted"]}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def load(folder: Path, cache: Path) -> datasets.Dataset:
    datasets.disable_progress_bars()
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))


def test_torchvision_reads_an_imagefolder_with_the_same_bytes(run, tmp_path):
    counts = export_images(run, str(tmp_path / "out"), layout="imagefolder")
    found = torchvision.datasets.ImageFolder(tmp_path / "out")
    assert found.classes == sorted(folder_names(CLASSES))
    assert len(found) == counts["exported"] == len(accepted()) == 20
    for path, label in found.samples:
        row = accepted()[Path(path).stem]
        assert Path(path).read_bytes() == row["image"]
        assert found.classes[label] == folder_names(CLASSES)[row["class_index"]]
        assert Image.open(path).format == FORMATS[row["seed"] % 3]
    assert {Path(path).suffix for path, _ in found.samples} == {".png", ".webp", ".jpg"}
    assert counts["classes"] == dict(zip(CLASSES, (8, 6, 6), strict=True)), "by name"
    assert (counts["rejected"], counts["unreadable"], counts["files"]) == (4, 0, 21)


def test_hugging_face_reads_an_imagefolder_with_every_column(run, tmp_path):
    """A class named `test` is a class and not a split."""
    export_images(run, tmp_path / "out", layout="imagefolder")
    found = load(tmp_path / "out", tmp_path / "cache").cast_column(
        "image", datasets.Image(decode=False)
    )
    assert len(found) == 20
    for row in found:
        before = accepted()[row["sample_id"]]
        assert Path(row["image"]["path"]).read_bytes() == before["image"]
        assert row["label"] == before["class_name"]
        for name in ("prompt", "seed", "clip_score", "embedding", "generator", "kind"):
            assert row[name] == before[name], name


def test_webdataset_reads_its_shards(run, tmp_path):
    counts = export_images(run, tmp_path / "out", layout="webdataset", shard_rows=8)
    shards = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    assert counts["files"] == 3
    raw = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert {sample["__key__"] for sample in raw} == set(accepted())
    for sample in raw:
        row = accepted()[sample["__key__"]]
        suffix = {"PNG": "png", "WEBP": "webp", "JPEG": "jpg"}[FORMATS[row["seed"] % 3]]
        assert sample[suffix] == row["image"]
        facts = json.loads(sample["json"])
        assert facts["label"] == row["class_name"]
        assert facts == {"label": row["class_name"], **{k: row[k] for k in row if k != "image"}}
    decoded = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [s["cls"] for s in decoded] == [accepted()[s["__key__"]]["class_index"] for s in decoded]
    sizes = [next(s[k] for k in ("png", "webp", "jpg") if k in s).size for s in decoded]
    assert set(sizes) == {(24, 20)}


def test_hugging_face_reads_its_parquet_with_features(run, tmp_path):
    counts = export_images(run, tmp_path / "out", layout="huggingface", shard_rows=8)
    assert counts["files"] == 3
    found = load(tmp_path / "out", tmp_path / "cache")
    assert isinstance(found.features["image"], datasets.Image)
    assert found.features["label"].names == CLASSES
    assert found.features["embedding"].feature.dtype == "float16"
    assert found[0]["image"].size == (24, 20)
    for row in found.cast_column("image", datasets.Image(decode=False)):
        before = accepted()[row["sample_id"]]
        assert row["image"]["bytes"] == before["image"]
        assert row["label"] == before["class_index"]
        assert {k: row[k] for k in before if k != "image"} == {
            k: before[k] for k in before if k != "image"
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_can_train_the_next_run(layout, run, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export_images(run, tmp_path / "out", layout=layout)
    names = tuple(folder_names(CLASSES) if layout == "imagefolder" else CLASSES)
    index = load_index(SourceConfig(format=layout, path=str(tmp_path / "out")), names)
    assert index.counts() == dict(zip(names, (8, 6, 6), strict=True))
    found = {(row["class_index"], row["image"]) for row in read_index(index)}
    assert found == {(row["class_index"], row["image"]) for row in accepted().values()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_export_has_the_same_bytes(layout, run, tmp_path):
    export_images(run, tmp_path / "one", layout=layout, shard_rows=7)
    first = digests(tmp_path / "one")
    export_images(run, tmp_path / "one", layout=layout, shard_rows=7)
    export_images(run, tmp_path / "two", layout=layout, shard_rows=7)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_export_ends_the_same(layout, run, tmp_path, monkeypatch):
    def interrupted(*args):
        yield from itertools.islice(whole(*args), 2)
        raise KeyboardInterrupt

    whole = export.read_chosen
    monkeypatch.setattr(export, "read_chosen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_images(run, tmp_path / "cut", layout=layout, shard_rows=6)
    monkeypatch.undo()
    marker = json.loads((tmp_path / "cut" / export.MARKER).read_text())
    assert marker["complete"] is False
    assert not (tmp_path / "cut" / "README.md").exists()
    visible = [path for path in (tmp_path / "cut").rglob("*.*") if path.name[0] != "."]
    assert [path for path in visible if path.suffix == ".tar"] == [
        path for path in visible if path.name == "shard-000000.tar"
    ], "only whole shards have a name"
    export_images(run, tmp_path / "cut", layout=layout, shard_rows=6)
    export_images(run, tmp_path / "whole", layout=layout, shard_rows=6)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_an_earlier_state_left_is_removed(layout, run, tmp_path):
    export_images(run, tmp_path / "out", layout=layout, shard_rows=6)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write_plan(run, [row for row in image_rows()[:9] if row["class_index"] != 1])
    export_images(run, tmp_path / "out", layout=layout, shard_rows=6)
    export_images(run, tmp_path / "fresh", layout=layout, shard_rows=6)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").unlink()
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    if layout == "imagefolder":
        assert len(torchvision.datasets.ImageFolder(tmp_path / "out").classes) == 2


def test_a_folder_with_something_else_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not empty.*thesis\.tex"):
        export_images(run, tmp_path / "mine", layout="imagefolder")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        export_images(run, tmp_path / "mine" / "thesis.tex", layout="imagefolder")
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    export_images(run, tmp_path / "clone", layout="webdataset", limit=3)
    others: list[dict[str, Any]] = [
        {"layout": "imagefolder"},
        {"layout": "webdataset", "limit": 4},
    ]
    for other in others:
        with pytest.raises(ValueError, match="another export"):
            export_images(run, tmp_path / "clone", **other)


def test_nothing_is_written_where_nothing_can_be_exported(run, tmp_path):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"layout": "tfrecord"}, "imagefolder, webdataset, huggingface"),
        ({"class_names": ["tset"]}, "did you mean 'test'"),
        ({"kinds": ["plane"]}, "there are contextual, plain, stylized"),
        ({"limit": 0}, "1 or more"),
        ({"shard_rows": 0}, "1 or more"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            export_images(run, tmp_path / "out", **{"layout": "webdataset", **arguments})
    with pytest.raises(ValueError, match=r"no plan\.parquet"):
        export_images(Folder(tmp_path / "none"), tmp_path / "out", layout="webdataset")
    write_plan(Folder(tmp_path / "young"), image_rows())
    with pytest.raises(ValueError, match="ray-synth generate"):
        export_images(Folder(tmp_path / "young"), tmp_path / "out", layout="webdataset")
    assert not (tmp_path / "out").exists()


def test_rejected_images_come_on_request_and_unmade_ones_never(run, tmp_path):
    counts = export_images(run, tmp_path / "out", layout="huggingface", accepted_only=False)
    assert (counts["exported"], counts["unreadable"]) == (23, 1)
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    reasons = {row["sample_id"]: row["reject_reason"] for row in rows if not row["accepted"]}
    assert reasons == {f"{i:06d}": f"clip score 0.1{i} below 0.21" for i in (1, 2, 5)}


def test_a_slice_keeps_class_indices_and_a_limit_takes_the_first_of_the_plan(run, tmp_path):
    export_images(
        run, tmp_path / "one", layout="huggingface", class_names=[CLASSES[2]], kinds=["plain"]
    )
    found = load(tmp_path / "one", tmp_path / "cache")
    assert set(found["label"]) == {2}
    assert set(found["kind"]) == {"plain"}
    assert found.features["label"].names == CLASSES
    counts = export_images(run, tmp_path / "few", layout="imagefolder", limit=5)
    ids = pq.read_table(tmp_path / "few" / "metadata.parquet")["sample_id"].to_pylist()
    assert sorted(ids) == sorted(accepted())[:5]
    assert counts["exported"] == 5


def test_a_shard_is_closed_by_its_bytes_too(run, tmp_path):
    size = len(image_rows()[0]["image"])
    counts = export_images(run, tmp_path / "out", layout="webdataset", shard_bytes=3 * size)
    assert 3 <= counts["files"] <= 20
    sizes = [len(list(shard)) for shard in map(_tar, sorted((tmp_path / "out").glob("*.tar")))]
    assert sum(sizes) == 20
    assert max(sizes) < 20


def _tar(path: Path) -> webdataset.WebDataset:
    return webdataset.WebDataset(str(path), shardshuffle=False)


class InMemory(Folder):
    """A folder of a file system that is not local, as s3:// is."""

    def _resolve(self):
        import fsspec

        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory"))), "/bucket/x"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_to_object_storage_is_the_local_one(layout, run, tmp_path):
    to = InMemory("memory://bucket/x")
    to.filesystem.delete_dir_contents("/bucket", missing_dir_ok=True)
    export_images(run, to, layout=layout)
    export_images(run, to, layout=layout)
    export_images(run, tmp_path / "out", layout=layout)
    found = to.filesystem.get_file_info(pafs.FileSelector(to.path(), recursive=True))
    remote = {
        info.path.removeprefix("/bucket/x/"): hashlib.sha256(
            to.filesystem.open_input_stream(info.path).read()
        ).hexdigest()
        for info in found
        if info.is_file
    }
    assert remote == digests(tmp_path / "out")


def cells(markdown: str) -> list[list[str]]:
    """The rows of all tables, as a Markdown parser sees them: the text of each cell."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
    rows: list[list[str]] = []
    for at, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("td_open", "th_open"):
            children = tokens[at + 1].children or []
            assert {child.type for child in children} <= {"text", "strong_open", "strong_close"}
            rows[-1].append("".join(child.content for child in children))
    return rows


def test_the_card_says_what_is_in_it_and_how_it_was_made(run, tmp_path):
    again = {**image_rows()[1], "gpu_seconds": 600.0}
    ImageStore(run.child("images/rejected")).write([again])
    export_images(run, tmp_path / "out", layout="webdataset", licence="cc-by-4.0")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.task_categories == ["image-classification"]
    assert card.data.size_categories == ["n<1K"]
    assert "synthetic" in card.data.tags
    assert "20 synthetic images of 3 classes" in card.text
    rows = cells(card.text)
    assert ["crane/bird", "meaning 0", "3", "3", "2", "8", "0"] in rows
    assert ["Kranich | `x` <b> ß", "meaning 2", "2", "2", "2", "6", "2"] in rows
    assert ["all", "", "7", "8", "5", "20", "4 (all classes)"] in rows
    assert ["rejected", "clip score", "3"] in rows
    assert ["rejected", "RuntimeError: no", "1"] in rows
    assert ["accepted", "blank", "1"] in rows
    prompts = [row for row in rows if len(row) == 5 and row[0] in KINDS]
    assert [row[0] for row in prompts] == [kind for kind in KINDS for _ in range(3)]
    assert prompts[0] == ["plain", "crane/bird", "", " ".join(EVIL.split()) + " 0", "000000"]
    assert "policy reject" in card.text
    # 24 images of a minute and an attempt of ten: 0.567 hours of a GPU and two CPUs.
    assert "took 2,040.0 seconds" in card.text
    assert "0.567 GPU hours and 1.13 CPU hours" in card.text
    assert "that is 2.27," in card.text
    assert "`ray-synth regenerate SAMPLE_ID`" in card.text
    assert "local folder sd" in card.text
    assert "/home/me" not in card.text
    assert "num\\_inference\\_steps 4" in card.text
    assert "SmolLM2" in card.text


def test_a_card_names_the_adapters_that_the_generator_was_given(run, tmp_path):
    values = yaml.safe_load(run.read_bytes("config.yaml"))
    export_images(run, tmp_path / "plain", layout="huggingface")
    assert "that was not fine-tuned" in DatasetCard.load(tmp_path / "plain" / "README.md").text
    values["generation"]["adapters"] = [{"path": "/home/me/tuned"}, {"path": "owner/style"}]
    run.write_yaml("config.yaml", values)
    export_images(run, tmp_path / "out", layout="huggingface")
    text = DatasetCard.load(tmp_path / "out" / "README.md").text
    assert "with a LoRA (local folder tuned) and a LoRA (owner/style)" in text
    assert "fine-tuned" not in text and "/home/me" not in text
    assert "adapter: [owner/style](https://huggingface.co/owner/style): see its licence" in text


def test_a_card_without_licence_or_config_still_names_the_generators_terms(run, tmp_path):
    run.delete("config.yaml")
    export_images(run, tmp_path / "out", layout="huggingface")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other"
    assert "licence of the generator governs" in card.text
    assert "At the prices" not in card.text


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("|`|\n---\n")
@example("<b>&lt; \\| www.x.org ![](a)")
def test_no_text_breaks_out_of_a_table_cell(text):
    found = cells(f"| a | b |\n|---|---|\n| {cell(text)} | end |\n")
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert found[1:] == [[plain, "end"]]


names = st.lists(
    st.one_of(
        st.text(),
        st.text(alphabet="aAbß./\\ _-ſé\u0301", max_size=4),
        st.sampled_from(["con", "NUL.txt", "..", "", "__x", ".git", "crane", "Crane", "猫"]),
    ),
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(names)
@example(["a", "A", "a (2)", "a/", "é", "e\u0301"])
@example(["x" * 300, "x" * 301, "猫" * 200])
def test_folder_names_are_safe_and_differ(class_names):
    found = folder_names(class_names)
    assert len(found) == len(class_names)
    folded = [unicodedata.normalize("NFKD", name).casefold() for name in found]
    assert len(set(folded)) == len(found), "also where case and Unicode form are ignored"
    for name in found:
        assert name == name.strip()
        assert not set(name) & set('/\\:*?"<>|[]{}%#\0\n\t')
        assert name[0] not in "._"
        assert name[-1] != "."
        assert 0 < len(name.encode()) < 200
        assert name.partition(".")[0].lower() not in ("con", "nul", "aux", "prn")
    assert folder_names(class_names) == found


def test_ordinary_class_names_stay_as_they_are(tmp_path):
    plain = ["golden retriever", "n01440764", "st. bernard", "3-D (old)", "猫", "हिन्दी", "Müller's"]
    assert folder_names(plain) == plain
    odd = ["a/b", "a\\b", "..", "", "Crane", "crane", "con", ".hidden", "__init__"]
    assert folder_names(odd) == [
        "a_b",
        "a_b (2)",
        "class 2",
        "class 3",
        "Crane",
        "crane (2)",
        "class con",
        "hidden",
        "init",
    ]
    for name in folder_names(odd):
        (tmp_path / name).mkdir()


def test_classes_that_share_a_name_stay_two(tmp_path):
    rows = image_rows()
    for row in rows:
        row["class_name"] = "crane" if row["class_index"] != 1 else "test"
    run = Folder(tmp_path / "run")
    write_plan(run, rows)
    write_store(run, rows)
    assert class_list(run) == ["crane", "test", "crane (2)"]
    export_images(run, tmp_path / "out", layout="imagefolder")
    assert len(torchvision.datasets.ImageFolder(tmp_path / "out").classes) == 3
    counts = export_images(run, tmp_path / "hub", layout="huggingface")
    assert counts["classes"] == {"crane": 8, "test": 6, "crane (2)": 6}
    run.write_json("meanings.json", [{"class_name": n} for n in ("crane", "test", "crane", "owl")])
    assert class_list(run) == ["crane", "test", "crane (2)", "owl"], "a class without images yet"


def test_a_sample_id_cannot_leave_the_folder(tmp_path):
    rows = [{**row, "sample_id": f"../{row['sample_id']}"} for row in image_rows()]
    write_plan(Folder(tmp_path / "run"), rows)
    write_store(Folder(tmp_path / "run"), rows)
    with pytest.raises(ValueError, match="cannot name a file"):
        export_images(Folder(tmp_path / "run"), tmp_path / "out", layout="imagefolder")


def test_size_categories_are_those_of_the_hub():
    found = [size_category(n) for n in (0, 999, 1000, 9999, 10_000, 1_000_000)]
    assert found == ["n<1K", "n<1K", "1K<n<10K", "1K<n<10K", "10K<n<100K", "1M<n<10M"]
