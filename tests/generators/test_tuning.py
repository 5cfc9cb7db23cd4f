"""DreamBooth-LoRA: learns its images, goes on from a kill to the same weights, says what it is of."""

import json
from functools import partial

import numpy as np
import pipelines
import pytest
import torch
from pipelines import FAMILIES
from test_store import plan_rows

from ray_synth.config import GenerationConfig, SourceConfig, TuningConfig
from ray_synth.data.dataset import load_index, select
from ray_synth.errors import UserError
from ray_synth.generators import tuning
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.registry import check_generator
from ray_synth.generators.tuning import check_tuning, tune
from ray_synth.generators.tuning_card import TuningJob
from ray_synth.storage.folder import Folder

config_of = partial(pipelines.config_of, guidance_scale=1.0)
FEW = TuningConfig(steps=4, batch_size=2, rank=2, checkpoint_every=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("tuning")


def job_of(folder, generation, source, *, settings=FEW, seed=0, **more):
    index = load_index(source)
    captions = tuple(f"a photo of {name}" for name in index.class_names)
    return TuningJob(
        generation, settings, index, captions, Folder(folder), seed=seed, max_pixels=10**7, **more
    )


def folder_source(path):
    return SourceConfig(format="imagefolder", path=str(path))


def pixels(generator):
    rows = [{**row, "prompt": "a photo of cat", "negative_prompt": ""} for row in plan_rows(2)]
    return np.stack([np.asarray(image).astype(int) for image in generator.generate(rows)])


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_what_it_leaves_is_an_adapter_of_its_model_and_says_of_what(
    name, root, tmp_path, image_folder
):
    generation = config_of(FAMILIES[name](root / name))
    check_tuning(generation)
    record = tune(job_of(tmp_path / "tuned", generation, folder_source(image_folder)))
    worn = generation.model_validate(
        {**generation.model_dump(), "adapters": [str(tmp_path / "tuned")]}
    )
    check_generator(worn)
    assert (pixels(DiffusionGenerator(worn)) != pixels(DiffusionGenerator(generation))).any()
    assert record == json.loads((tmp_path / "tuned" / "card.json").read_text())
    assert record["images"]["per_class"] == {"cat": 5, "dog": 5}
    assert record["captions"] == {"cat": "a photo of cat", "dog": "a photo of dog"}
    assert len(record["loss"]["values"]) == 4
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "10 training images of 2 classes (5 to 5 each)" in card and "rank 2" in card
    assert not (tmp_path / "tuned" / "checkpoint" / "state.safetensors").exists()


@pytest.mark.slow
def test_the_embedded_model_learns_its_images(tmp_path):
    """The loss of the same noise and timesteps, before and after."""
    generation = GenerationConfig(model="embedded", device="cpu", num_threads=1, dtype="float32")
    source = SourceConfig(format="digits", split="train", images_per_class=2)
    job = job_of(
        tmp_path, generation, source,
        settings=TuningConfig(steps=40, batch_size=4, learning_rate=1e-3),
    )  # fmt: skip
    job = TuningJob(**{**vars(job), "images": select(job.images, 1, 0)})
    losses = tune(job)["loss"]["values"]
    assert np.mean(losses[-10:]) < 0.97 * np.mean(losses[:10]), losses


def test_a_tuning_that_was_stopped_ends_with_the_same_weights(
    root, tmp_path, image_folder, monkeypatch
):
    generation = config_of(FAMILIES["sd15"](root / "stopped"))
    whole = job_of(tmp_path / "whole", generation, folder_source(image_folder))
    tune(whole)

    class Killed(Exception):
        pass

    job = job_of(tmp_path / "stopped", generation, folder_source(image_folder))
    step = tuning._step
    taken = []

    def dies(job, number, *others):
        if number == 3 and len(taken) == 3:
            raise Killed
        taken.append(number)
        return step(job, number, *others)

    monkeypatch.setattr(tuning, "_step", dies)
    with pytest.raises(Killed):
        tune(job)
    assert not job.folder.exists("card.json")
    tune(job)
    assert taken == [0, 1, 2, 2, 3], "from the checkpoint on"
    name = "pytorch_lora_weights.safetensors"
    assert job.folder.read_bytes(name) == whole.folder.read_bytes(name)
    assert job.folder.read_bytes("card.json") == whole.folder.read_bytes("card.json")
    other = job_of(tmp_path / "other", generation, folder_source(image_folder), seed=1)
    tune(other)
    assert other.folder.read_bytes(name) != whole.folder.read_bytes(name)
    assert other.identity != whole.identity == job.identity


def test_a_broken_image_is_left_out_and_told(root, tmp_path, image_folder):
    (image_folder / "cat" / "0.png").write_bytes(b"<html>")
    generation = config_of(FAMILIES["sd15"](root / "broken"))
    settings = TuningConfig(steps=5, batch_size=2, rank=2)
    record = tune(
        job_of(tmp_path / "tuned", generation, folder_source(image_folder), settings=settings)
    )
    (bad,) = record["images"]["set_aside"]
    assert bad.endswith("cat/0.png")
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="none of 2 training images can be decoded"):
        tune(job_of(tmp_path / "none", generation, folder_source(image_folder)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"generator": "glyphs"}, "tune works on diffusers models"),
        ({"num_gpus": 2}, "tune takes one GPU"),
        ({"model": "FLUX"}, "and .* is a FluxPipeline: tune it with its own tools"),
    ],
)
def test_what_cannot_be_tuned_is_refused(settings, says, root):
    if settings.get("model"):
        settings = {"model": str(FAMILIES["flux"](root / "flux"))}
    with pytest.raises(UserError, match=says):
        check_tuning(GenerationConfig(**settings))


def test_a_loss_that_is_no_number_ends_it(root, tmp_path, image_folder):
    generation = config_of(FAMILIES["sd15"](root / "diverged"))
    wild = TuningConfig(steps=30, batch_size=2, rank=2, learning_rate=1e18)
    with pytest.raises(UserError, match="is not a number: lower tuning.learning_rate"):
        tune(job_of(tmp_path, generation, folder_source(image_folder), settings=wild))
