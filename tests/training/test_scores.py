"""What a learner says of itself: figures by hand, and a real model on real and synthetic images."""

import json

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import save
from test_store import plan_rows

from ray_synth.config import GenerationConfig, QualityConfig, SourceConfig
from ray_synth.data.dataset import load_index, select
from ray_synth.data.images import encode_image
from ray_synth.generation.maker import GenerationJob
from ray_synth.generation.store import ImageStore
from ray_synth.generation.stream import stored_rows
from ray_synth.prompting.plan_file import PLAN_SCHEMA, PlanFile
from ray_synth.storage.folder import Folder
from ray_synth.training import recipe
from ray_synth.training.scene_scores import accepted_by_scene, by_scene
from ray_synth.training.scores import Sample, by_class, few_real, score_learner, unpacked, verdicts

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_figures_of_two_images():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    found = verdicts(logits, np.array([0, 1]))
    assert found["doubt"].tolist() == pytest.approx([0.3, 0.75])
    assert found["loss"].tolist() == pytest.approx([-np.log(0.7), -np.log(0.25)])
    assert found["margin"].tolist() == pytest.approx([0.5, 0.25])
    assert found["error"].tolist() == [0, 1]
    assert found["entropy"][1] == pytest.approx(1.5 * np.log(2))
    rows = by_class(found, np.array([0, 1]), ("a", "b", "c"))
    assert [row["images"] for row in rows] == [1, 1, 0]
    assert rows[1]["confused"][0] == ["c", 0.5, 1]
    assert "confused" not in rows[2]


def test_huge_logits_give_finite_figures():
    found = verdicts(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([0, 0]))
    assert np.isfinite(found["loss"]).all()
    assert np.isfinite(found["entropy"]).all()


def test_the_same_few_real_images_each_time():
    index = load_index(SourceConfig(format="digits", split="train"), NAMES)
    few = few_real(index, 40)
    assert len(few) == 40
    assert (few.row == few_real(index, 40).row).all()
    assert len(few_real(index, 10**6)) == len(index)
    assert len(few_real(index.take(np.arange(0)))) == 0


def learner(folder: Folder) -> Folder:
    """A model without training, as training writes one with a single BN."""
    model = recipe.build_model("test_resnet", num_classes=10, model_kwargs={})
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    folder.write_bytes("models/mixed.main.safetensors", save(weights, {"format": "pt"}))
    data = recipe.data_config(model)
    card = {
        "model": "test_resnet", "model_kwargs": {}, "class_names": NAMES, "image_size": 32,
        **{key: data[key] for key in ("mean", "std", "interpolation")}, "crop_pct": 1.0,
        "bns": ["main"], "steps": 7, "num_synthetic": 24,
    }  # fmt: skip
    folder.write_json("models/mixed.json", card)
    return folder


def made(folder: Folder, picture) -> GenerationJob:
    """24 planned and made images of which every third was refused."""
    rows = plan_rows(24)
    folder.write_table("plan.parquet", pa.Table.from_pylist(rows, schema=PLAN_SCHEMA))
    store = ImageStore(folder.child("images"))
    facts = {
        "width": 32, "height": 32, "reject_reason": "", "attempt": 0, "generator": "g",
        "gpu_seconds": 1.0,
        "image": encode_image(picture, image_format="png", quality=95),
    }  # fmt: skip
    for at in range(0, 24, 8):
        some = [
            {**row, **facts, "accepted": (at + i) % 3 > 0}
            for i, row in enumerate(rows[at : at + 8])
        ]
        store.write(some)
    config = GenerationConfig(
        generator="painting:Painter", width=32, height=32, batch_size=8,
        checks=QualityConfig(policy="off"),
    )  # fmt: skip
    return GenerationJob(config, PlanFile(folder), store)


def test_a_real_model_is_scored_on_real_and_on_the_newest_images(tmp_path):
    from samples import draw

    folder = Folder(tmp_path)
    index = select(load_index(SourceConfig(format="digits", split="train"), NAMES), 2, seed=0)
    stored = stored_rows(made(folder, draw(1, (32, 32))), 24)
    sample = Sample(folder, index, "validation", stored, 12, 24, 10**6, ("c1",), "few.parquet")
    record = score_learner(learner(folder), "mixed", sample)
    assert json.loads(json.dumps(record)) == record
    real, synthetic = record["real"], record["synthetic"]
    assert (real["set"], real["images"], real["looked_at"]) == ("validation", 20, 20)
    assert real["error"] == pytest.approx(1 - unpacked(real["right"], 20).mean())
    assert [item["images"] for item in real["classes"]] == [2] * 10
    assert synthetic["images"] == 8, "the accepted ones of rows 12 to 24"
    by_kind = synthetic["accepted"]["kind"]
    assert [sum(v) for v in zip(*by_kind.values(), strict=True)] == [8, 12]
    assert {row["class_name"] for row in folder.read_table("few.parquet").to_pylist()} == {"c1"}
    assert record == score_learner(folder, "mixed", sample), "the same again"


def test_scenes_are_told_apart_by_their_prompts_class_by_class():
    pond = {
        "foreground": "near reeds",
        "background": "in a pond",
        "lighting": "",
        "camera_angle": "",
    }
    site = {"foreground": "", "background": "on a site", "lighting": "at dusk", "camera_angle": ""}
    scenes = {"crane": [pond, site], "heron": [pond]}
    rows = [
        {"class_name": "crane", "kind": "contextual", "prompt": "a crane, near reeds, in a pond"},
        {"class_name": "crane", "kind": "contextual", "prompt": "a crane, on a site"},
        {"class_name": "crane", "kind": "contextual", "prompt": "a crane, on a site"},
        {"class_name": "crane", "kind": "plain", "prompt": "a photo of a crane"},
        {"class_name": "heron", "kind": "contextual", "prompt": "a photo of a heron, in a pond"},
        {"class_name": "stork", "kind": "contextual", "prompt": "a photo of a stork, in a pond"},
    ]  # fmt: skip
    found = by_scene(scenes, rows, np.array([0.5, 1.0, 2.0, 9.0, 0.25, 9.0]))
    assert found == {
        "crane": {
            "near reeds, in a pond": {"images": 1, "entropy": 0.5},
            "on a site, at dusk": {"images": 2, "entropy": 1.5},
        },
        "heron": {"near reeds, in a pond": {"images": 1, "entropy": 0.25}},
    }
    table = pa.Table.from_pylist([{**row, "accepted": at % 2} for at, row in enumerate(rows)])
    assert accepted_by_scene(scenes, table) == {
        "crane": {"near reeds, in a pond": [0, 1], "on a site, at dusk": [1, 2]},
        "heron": {"near reeds, in a pond": [0, 1]},
    }
