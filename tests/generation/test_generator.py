"""One diffusers pipeline: real images from the embedded weights, each from its own seed."""

import json

import numpy as np
import pytest
import torch
from test_store import plan_rows

from ray_synth.config import GenerationConfig
from ray_synth.data.images import decode_image
from ray_synth.generation.generator import (
    Generator,
    check_model,
    fingerprint,
    prompt_tokens,
    resolve_model,
)

SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
CONFIG = GenerationConfig(model="embedded", image_format="png", dtype="float32", **SMALL)


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG)


def test_images_are_made_with_their_provenance(generator):
    rows = generator.generate(plan_rows(3))
    for row in rows:
        image = decode_image(row["image"])
        assert image.size == (row["width"], row["height"]) == (64, 64)
        assert np.asarray(image).std() > 5
        assert row["accepted"]
        facts = json.loads(row["generator"])
        assert facts["num_inference_steps"] == 2
        assert facts["fingerprint"] == fingerprint(CONFIG)
    assert len({row["image"] for row in rows}) == 3


def test_an_image_does_not_depend_on_its_batch(generator):
    rows = plan_rows(5)
    together = generator.generate(rows)[3]
    alone = generator.generate([rows[3]])[0]
    pixels = [np.asarray(decode_image(row["image"])).astype(int) for row in (together, alone)]
    # Convolutions of other batch sizes may round otherwise; a wrong seed differs by tens.
    assert np.abs(pixels[0] - pixels[1]).max() <= 2


def test_one_bad_row_is_kept_aside_and_the_others_are_made(generator):
    rows = plan_rows(4)
    rows[2]["prompt"] = None  # what a tokenizer cannot read
    made = generator.generate(rows)
    assert [row["accepted"] for row in made] == [True, True, False, True]
    assert made[2]["reject_reason"]
    assert made[2]["image"] == b""


def test_guidance_uses_the_negative_prompt():
    config = CONFIG.model_copy(update={"guidance_scale": 4.0})
    rows = [{**row, "negative_prompt": "red, blurry"} for row in plan_rows(2)]
    assert all(row["accepted"] for row in Generator(config).generate(rows))


def test_the_fingerprint_changes_with_what_decides_the_pixels_alone():
    same = CONFIG.model_copy(update={"batch_size": 7, "num_cpus": 3})
    assert fingerprint(same) == fingerprint(CONFIG)
    for change in ({"num_inference_steps": 3}, {"guidance_scale": 2.0}, {"width": 32}):
        assert fingerprint(CONFIG.model_copy(update=change)) != fingerprint(CONFIG)


def test_any_pipeline_folder_loads(tmp_path, generator):
    generator.pipeline.save_pretrained(tmp_path / "mine")
    config = CONFIG.model_copy(
        update={"model": str(tmp_path / "mine"), "scheduler": "DDIMScheduler"}
    )
    check_model(config)
    row = Generator(config).generate(plan_rows(1))[0]
    assert json.loads(row["generator"])["scheduler"] == "DDIMScheduler"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/nowhere/at/all", "no such folder"),
        ("just-a-name", "hub id looks like owner/name"),
        ("tests", "model_index.json"),
    ],
)
def test_an_unknown_model_is_named(model, says):
    with pytest.raises(ValueError, match=says):
        resolve_model(model)


def test_a_hub_id_out_of_reach_says_so(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"unknown generator 'nobody/no-model'"):
        check_model(CONFIG.model_copy(update={"model": "nobody/no-model"}))


def test_tokens_are_the_text_encoders_own():
    count, limit = prompt_tokens(CONFIG)
    assert limit == 64
    assert count("") == 2
    assert count("a photo of a crane, a large wading bird") > 8
    assert count("word " * 200) > limit


def test_weights_are_never_unpickled(tmp_path, generator):
    generator.pipeline.save_pretrained(tmp_path / "p")
    weights = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="cannot load the generator"):
        Generator(CONFIG.model_copy(update={"model": str(tmp_path / "p")}))
