"""One diffusers pipeline: real images from the embedded weights, each from its own seed."""

import json

import numpy as np
import pytest
import torch
from test_store import plan_rows

from ray_synth.config import GenerationConfig
from ray_synth.generators.compilation import wants_compile
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.loading import resolve_model
from ray_synth.generators.protocol import generate_all
from ray_synth.generators.registry import check_generator, fingerprint, prompt_tokens

SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
CONFIG = GenerationConfig(model="embedded", dtype="float32", batch_size=4, **SMALL)


def changed(**settings):
    return CONFIG.model_copy(update=settings)


@pytest.fixture(scope="module")
def generator():
    return DiffusionGenerator(CONFIG)


def pixels(images):
    return [np.asarray(image) for image in images]


def test_images_differ_by_seed_and_say_what_made_them(generator):
    images = generator.generate(plan_rows(3))
    assert [image.size for image in images] == [(64, 64)] * 3
    assert all(image.std() > 5 for image in pixels(images))
    assert len({image.tobytes() for image in images}) == 3
    facts = generator.provenance
    assert (facts["num_inference_steps"], facts["dtype"], facts["batch_size"]) == (2, "float32", 4)


def test_an_image_is_the_same_to_the_bit_in_any_batch(generator):
    rows = plan_rows(7)  # two batches, the second padded
    together = pixels(generator.generate(rows))
    for at, row in enumerate(rows):
        assert (pixels(generator.generate([row]))[0] == together[at]).all()
    backwards = pixels(generator.generate(rows[::-1]))[::-1]
    assert all((a == b).all() for a, b in zip(together, backwards, strict=True))


def test_one_bad_row_is_kept_aside_and_the_others_are_made(generator):
    rows = plan_rows(4)
    rows[2]["prompt"] = None  # what a tokenizer cannot read
    made = generate_all(generator, rows)
    assert [image is not None for image, _ in made] == [True, True, False, True]
    assert "prompt is None" in made[2][1]


def test_guidance_is_computed_only_above_1(generator):
    """Two predictions per step above 1, one at or below: counted at the denoiser."""
    rows = [{**row, "negative_prompt": "red, blurry"} for row in plan_rows(2)]
    seen = []
    hook = generator.pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["sample"])),
        with_kwargs=True,
    )
    try:
        generator.generate(rows)
        guided = DiffusionGenerator(changed(guidance_scale=4.0))
        guided.pipeline.unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["sample"])),
            with_kwargs=True,
        )
        with_negative = pixels(guided.generate(rows))
        without = pixels(guided.generate(plan_rows(2)))
    finally:
        hook.remove()
    assert seen == [4, 4, 8, 8, 8, 8]
    assert (with_negative[0] != without[0]).any()


@pytest.mark.slow
def test_compiled_makes_nearly_the_same_images(generator):
    compiled = DiffusionGenerator(changed(compile=True))
    assert compiled.provenance["compile"]
    rows = plan_rows(5)
    for a, b in zip(pixels(compiled.generate(rows)), pixels(generator.generate(rows)), strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 1
    alone = pixels(compiled.generate(rows[4:]))[0]
    assert (alone == pixels(compiled.generate(rows))[4]).all()


def test_compile_is_automatic_only_where_it_pays():
    assert wants_compile(CONFIG, num_images=100_000, on_gpu=True)
    assert not wants_compile(CONFIG, num_images=100, on_gpu=True)
    assert not wants_compile(CONFIG, num_images=100_000, on_gpu=False)
    assert wants_compile(changed(compile=True), num_images=1, on_gpu=False)
    assert not wants_compile(changed(compile=False), num_images=100_000, on_gpu=True)


def test_the_fingerprint_changes_with_what_decides_the_pixels_alone():
    same = CONFIG.model_copy(update={"batch_size": 7, "num_cpus": 3})
    assert fingerprint(same) == fingerprint(CONFIG)
    for change in ({"num_inference_steps": 3}, {"guidance_scale": 2.0}, {"width": 32}):
        assert fingerprint(CONFIG.model_copy(update=change)) != fingerprint(CONFIG)
    quick = changed(compile=True, offload=True, num_threads=1)
    assert fingerprint(quick) == fingerprint(CONFIG), "how fast is not what"


def test_any_pipeline_folder_loads(tmp_path, generator):
    generator.pipeline.save_pretrained(tmp_path / "mine")
    config = CONFIG.model_copy(
        update={"model": str(tmp_path / "mine"), "scheduler": "DDIMScheduler"}
    )
    check_generator(config)
    mine = DiffusionGenerator(config)
    assert mine.provenance["scheduler"] == "DDIMScheduler"
    assert mine.generate(plan_rows(1))[0].size == (64, 64)


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
        check_generator(CONFIG.model_copy(update={"model": "nobody/no-model"}))


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
        DiffusionGenerator(CONFIG.model_copy(update={"model": str(tmp_path / "p")}))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scheduler": "EulerDiscretScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"scheduler": "torch"}, "no scheduler 'torch'"),
        ({"reference": {"strength": 0.2}}, "less than one step"),
        ({"offload": True}, "there is none"),
        ({"generator": "no-such-plug-in"}, "unknown generator 'no-such-plug-in'"),
        ({"generator": "painting:Nobody"}, "cannot load the generator 'painting:Nobody'"),
        ({"generator": "no_module:X"}, "cannot load the generator 'no_module:X'"),
    ],
)
def test_what_cannot_work_says_so(settings, says):
    config = GenerationConfig.model_validate({**CONFIG.model_dump(), **settings})
    with pytest.raises(ValueError, match=says):
        (check_generator(config), DiffusionGenerator(config))


def test_a_size_that_is_no_multiple_of_8_is_refused_by_the_config():
    from ray_synth.config import parse_config

    with pytest.raises(ValueError, match=r"height: .*multiple of 8 \(given: 100\)"):
        parse_config({"height": 100}, model=GenerationConfig)


def test_a_checkpoint_with_code_of_its_own_is_refused_until_trusted(tmp_path, generator):
    folder = tmp_path / "custom"
    generator.pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    marker = tmp_path / "ran"
    (folder / "pipeline.py").write_text(
        f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
        "from diffusers import StableDiffusionPipeline as Mine\n"
    )
    index["_class_name"] = ["pipeline", "Mine"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"code of its own \(pipeline\).*trust_remote_code"):
        check_generator(changed(model=str(folder)))
    with pytest.raises(ValueError, match="code of its own"):
        DiffusionGenerator(changed(model=str(folder)))
    assert not marker.exists(), "the code must not have run"
