"""Every family makes images from real images of the class; what a safety checker flags is no image."""

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image
from pipelines import FAMILIES, GUIDANCE, config_of, load, sd15_with_safety_checker
from samples import encoded
from test_store import plan_rows

from ray_synth.config import ReferenceConfig
from ray_synth.data.images import encode_array, encode_image
from ray_synth.embedded import sd_folder
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.image_to_image import (
    image_to_image,
    prepare_references,
    reference_arguments,
    reference_steps,
)
from ray_synth.generators.prompt_encoder import PromptEncoder
from ray_synth.generators.protocol import Failure

IMAGE_TO_IMAGE = ("sd15", "lcm", "sdxl", "sdxl-turbo", "sd3", "flux", "embedded")


def pixels(image):
    return np.asarray(image).astype(int)


def test_what_a_safety_checker_flags_is_a_failure(tmp_path):
    folder = sd15_with_safety_checker(tmp_path / "prudish", flags=True)
    made = DiffusionGenerator(config_of(folder)).generate(plan_rows(2))
    assert all(isinstance(item, Failure) and "safety checker" in item for item in made)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Image-to-image pipelines by name, each made once."""
    torch.set_num_threads(1)
    folder, made = tmp_path_factory.mktemp("families"), {}

    def get(name):
        if name not in made:
            if name == "embedded":
                pipeline = AutoPipelineForText2Image.from_pretrained(
                    sd_folder(), dtype=torch.float32
                )
                pipeline.set_progress_bar_config(disable=True)
            else:
                pipeline = load(name, folder)
            made[name] = image_to_image(pipeline), pipeline
        return made[name]

    return get


def scene(seed):
    """An image of smooth shapes, which any autoencoder keeps, as PNG bytes."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(40, 216, (3, 4, 3), dtype=np.uint8))
    return encode_image(small.resize((96, 80), Image.Resampling.BICUBIC))


def guided(pipeline, rows, *, strength, name="", steps=10):
    """(n, 64, 64, 3) in 0..255, by the arguments that a generator would give."""
    config = config_of("embedded", num_inference_steps=steps, reference={"strength": strength})
    guidance = GUIDANCE.get(name, 3.0)
    prompts = [row["prompt"] for row in rows]
    text = PromptEncoder(pipeline).arguments(prompts, [""] * len(rows), guidance)
    with torch.inference_mode():
        output = pipeline(
            generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
            **text,
            **reference_arguments(pipeline, rows, config),
        )
    return output.images * 255


def row_of(reference, seed):
    return {"prompt": "a photo of a crane", "seed": seed, "reference_image": scene(reference)}


def reconstruction(pipeline, reference):
    """What the autoencoder alone makes of a reference: random weights lose the image itself."""
    vae = pipeline.vae
    (image,) = prepare_references([Image.open(reference)], width=64, height=64)
    tensor = pipeline.image_processor.preprocess(image)
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(tensor).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(decoded, output_type="np")[0] * 255


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_a_reference_guides_each_image_by_its_strength(twins, name, tmp_path):
    pipeline, _ = twins(name)
    rows = [row_of(0, 1), row_of(7, 1), row_of(0, 2)]
    weak = guided(pipeline, rows, strength=0.2, name=name)
    strong = guided(pipeline, rows, strength=0.9, name=name)
    for images in (weak, strong):
        assert np.abs(images[0] - images[1]).mean() > 0.5, "it depends on the reference"
        assert np.abs(images[0] - images[2]).mean() > 0.5, "it depends on the seed"
    for image_weak, image_strong, row in zip(weak, strong, rows, strict=True):
        path = tmp_path / "reference.png"
        path.write_bytes(row["reference_image"])
        if name == "embedded":
            (image,) = prepare_references([Image.open(path)], width=64, height=64)
            target = np.asarray(image).astype(float)
        else:
            target = reconstruction(pipeline, path)
        assert np.abs(image_weak - target).mean() < np.abs(image_strong - target).mean()


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_a_guided_image_does_not_depend_on_its_batch(twins, name):
    pipeline, _ = twins(name)
    rows = [row_of(i, 5 + i) for i in range(3)]
    made = guided(pipeline, rows, strength=0.5, steps=4, name=name)
    turned = guided(pipeline, rows[::-1], strength=0.5, steps=4, name=name)[::-1]
    np.testing.assert_array_equal(made, turned)  # of the same size: to the bit
    alone = guided(pipeline, rows[1:2], strength=0.5, steps=4, name=name)
    assert np.abs(alone[0] - made[1]).max() <= 1


def test_the_twin_shares_its_parts(twins):
    twin, original = twins("sd15")
    assert type(twin).__name__ == "StableDiffusionImg2ImgPipeline"
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert getattr(twin, name) is getattr(original, name)


def test_a_family_without_image_to_image_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"generation\.reference.*PixArtSigmaPipeline"):
        image_to_image(load("pixart-sigma", tmp_path))


def test_the_generator_is_guided_by_references(tmp_path):
    config = config_of(
        FAMILIES["sd15"](tmp_path / "sd"), num_inference_steps=4, reference=ReferenceConfig()
    )
    rows = [{**row, "reference_image": scene(i)} for i, row in enumerate(plan_rows(2))]
    made = DiffusionGenerator(config).generate(rows)
    assert [np.asarray(image).shape for image in made] == [(64, 64, 3)] * 2
    other = DiffusionGenerator(config).generate([rows[0], {**rows[1], "reference_image": scene(9)}])
    np.testing.assert_array_equal(pixels(made[0]), pixels(other[0]))
    assert np.abs(pixels(made[1]) - pixels(other[1])).mean() > 0.5


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(4, 0.25, 1), (20, 0.75, 15), (4, 1.0, 4), (1, 1.0, 1)]
)
def test_strength_is_a_share_of_the_steps(steps, strength, run):
    assert reference_steps(steps, strength) == run


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.99), (4, 0.2), (2, 0.4)])
def test_less_than_one_step_names_the_strength(steps, strength):
    with pytest.raises(ValueError, match=r"generation\.reference\.strength"):
        reference_steps(steps, strength)


def test_references_are_cut_at_the_middle():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    (image,) = prepare_references([Image.fromarray(wide).convert("RGBA")], width=8, height=8)
    assert image.mode == "RGB" and image.size == (8, 8)
    assert (np.asarray(image) >= 190).all()


def test_a_reference_that_cannot_be_read_is_told(twins):
    pipeline, _ = twins("sd15")
    config = config_of("embedded", reference={"strength": 1.0})
    for broken in (b"", b"no image", encoded(0)[:50]):
        with pytest.raises(ValueError, match=r"empty|not a readable image"):
            reference_arguments(pipeline, [{"reference_image": broken}], config)


@pytest.mark.parametrize(("name", "sized"), [("sd15", False), ("sd3", True), ("flux", True)])
def test_sizes_are_given_to_the_calls_that_take_them(twins, name, sized):
    config = config_of("embedded", reference={"strength": 1.0})
    grey = {"reference_image": encode_array(np.full((9, 9, 3), 99, np.uint8))}
    arguments = reference_arguments(twins(name)[0], [grey], config)
    assert arguments["image"][0].size == (64, 64)
    assert ({"width", "height"} <= arguments.keys()) is sized
