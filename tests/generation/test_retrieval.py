"""Real images of a pool by CLIP: the nearest of each class, as they are, and no test image."""

import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from samples import encoded

from ray_synth.config import ClipConfig, GenerationConfig, SourceConfig
from ray_synth.data import pool as pools
from ray_synth.data.digits import load_digits
from ray_synth.data.images import decode_image, encode_array
from ray_synth.data.pool import pool_units
from ray_synth.errors import UserError
from ray_synth.generation.retrieval import (
    CANDIDATES,
    Best,
    Embedder,
    Question,
    Ranker,
    candidates,
    part_name,
    write_chosen,
)
from ray_synth.generation.thresholds import measure_reference
from ray_synth.generators.imported import ImportedGenerator
from ray_synth.generators.protocol import generate_all
from ray_synth.storage.folder import Folder

TEXTS = {0: "the number six", 1: "the number seven"}
CLASSES = ["six", "seven"]


def digits(name, split="train"):
    pixels, labels = load_digits("digits", split)
    return [encode_array(image) for image in pixels[np.array(labels) == name]]


@pytest.fixture(scope="module")
def embedder():
    return Embedder(ClipConfig())


@pytest.fixture(scope="module")
def question(embedder):
    """What sixes and sevens are like, by three of each and their names; a test set of five of each."""
    real = {at: digits(name)[:3] for at, name in enumerate(CLASSES)}
    reference = measure_reference(real, TEXTS, embedder.clip)
    tests = [image for name in CLASSES for image in digits(name, "test")[:5]]
    return Question.of(reference, embedder.features(tests)[1], by_text=False)


def write_pool(folder, *, tars=False):
    """20 sixes and 20 sevens, four test images, one file that is no picture; without labels."""
    images = {
        f"{name}/{at}": data for name in CLASSES for at, data in enumerate(digits(name)[3:23])
    }
    images |= {f"copy/{n}{at}": digits(n, "test")[at] for n in CLASSES for at in range(2)}
    images["broken/0"] = b"<html>"
    folder.mkdir()
    order = sorted(images, key=lambda key: key[::-1])
    if tars:
        for part in range(2):
            with webdataset.TarWriter(str(folder / f"{part}.tar"), encoder=False) as writer:
                for key in order[part::2]:
                    writer.write({"__key__": key.replace("/", "_"), "png": images[key]})
    else:
        for at, key in enumerate(order):
            path = folder / f"{at % 3}" / f"{key.replace('/', '_')}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(images[key])
    return SourceConfig(format="webdataset" if tars else "imagefolder", path=str(folder))


def ranker(embedder, question, parts):
    found = Ranker.__new__(Ranker)
    found.clip, found.question, found.parts = embedder.clip, question, parts
    return found


@pytest.mark.parametrize("tars", [False, True])
def test_the_nearest_of_each_class_are_taken_and_no_test_image(
    embedder, question, tmp_path, monkeypatch, tars
):
    monkeypatch.setattr(pools, "IMAGES_PER_UNIT", 16)
    source = write_pool(tmp_path / "pool", tars=tars)
    units, parts = pool_units(source), Folder(tmp_path / "parts")
    assert len(units) == (2 if tars else 3)
    rank = ranker(embedder, question, parts)
    assert sum(rank.rank(at, unit) for at, unit in enumerate(units)) == 45
    best, told = Best(np.array([10, 6])), []
    names = [part_name(at, unit) for at, unit in enumerate(units)]
    for at, table, counts in candidates(parts, names):
        best.add(at, table)
        told.append(counts)
    assert {key: sum(counts[key] for counts in told) for key in told[0]} == {
        "images": 45, "unreadable": 1, "copies": 4,
    }  # fmt: skip
    out = Folder(tmp_path / "out")
    for at, chosen in best.found().items():
        write_chosen(units[at], chosen, CLASSES, out, f"{at}.tar")
    config = GenerationConfig(
        generator="imported",
        generator_kwargs={"source": {"format": "webdataset", "path": out.address()}},
    )
    guides = ImportedGenerator.references(config, CLASSES, seed=0)
    assert {index: len(ids) for index, ids in guides.items()} == {0: 10, 1: 6}
    said = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            said += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    assert not [item for item in said if "copy" in item["from"]]
    assert len(said) == 16 and all(0 < item["score"] < 1 for item in said)
    rows = [{"sample_id": "x", "reference": guide} for guide in guides[0]]
    made = generate_all(ImportedGenerator(config), rows)
    pool = {decode_image(data).tobytes() for data in digits("six")[3:23] + digits("seven")[3:23]}
    assert all(image.tobytes() in pool for image, _ in made), "they are as they were"
    sixes = {decode_image(data).tobytes() for data in digits("six")}
    assert sum(image.tobytes() in sixes for image, _ in made) >= 9


def test_a_part_that_is_there_says_what_its_unit_was(tmp_path):
    """A pool that grew, or whose files are others, is ranked anew where it changed."""
    source = write_pool(tmp_path / "pool")
    (before,) = pool_units(source)
    (tmp_path / "pool" / "2" / "more.png").write_bytes(encoded(0))
    (after,) = pool_units(source)
    assert part_name(0, before) != part_name(0, after)
    assert pool_units(source)[0].digest == after.digest


@pytest.mark.parametrize("prune_at", [10, 1_000_000])
def test_what_is_kept_is_the_best_whenever_it_is_pruned(monkeypatch, prune_at):
    from ray_synth.generation import retrieval

    monkeypatch.setattr(retrieval, "PRUNE_AT", prune_at)
    random = np.random.default_rng(0)
    label = random.integers(0, 3, (4, 50))
    score = random.integers(0, 20, (4, 50)).astype(np.float32)  # with ties
    best = Best(np.array([5, 0, 100]))
    for unit in range(4):
        columns = [np.arange(50, dtype=np.int32), label[unit].astype(np.int32), score[unit]]
        best.add(unit, pa.table(columns, schema=CANDIDATES))
    found = {
        (row["class_index"], unit, row["row"], row["score"])
        for unit, table in best.found().items()
        for row in table.to_pylist()
    }
    every = sorted((-score[u, r], u, r) for u in range(4) for r in range(50) if label[u, r] == 0)
    expected = {(0, u, r, -s) for s, u, r in every[:5]}
    expected |= {(2, u, r, score[u, r]) for u in range(4) for r in range(50) if label[u, r] == 2}
    assert found == expected


def test_what_is_no_pool_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        pool_units(SourceConfig(format="imagefolder", path=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images \(.jpg"):
        pool_units(SourceConfig(format="imagefolder", path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"no .tar files"):
        pool_units(SourceConfig(format="webdataset", path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="from a folder of images or of tars .*, not digits"):
        pool_units(SourceConfig(format="digits"))
