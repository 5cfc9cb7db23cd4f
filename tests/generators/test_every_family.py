"""Each family, as a tiny folder: recognised, run with what it needs, and the same whatever the batch."""

import inspect
import re
from functools import partial

import diffusers
import numpy as np
import pipelines
import pytest
import sentencepiece
import torch
from language_pipelines import LANGUAGE_FAMILIES
from pipelines import FAMILIES, flux, pixart_sigma, sdxl
from samples import ROOT
from test_store import plan_rows
from torch._dynamo.testing import CompileCounter

from ray_synth.errors import UserError
from ray_synth.generators import diffusion
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.families import Facts, guidance_argument, listed, recognise
from ray_synth.generators.registry import filled, fingerprint, prompt_tokens
from ray_synth.generators.settings import advice, check_size, family_of

ALL = {**FAMILIES, **LANGUAGE_FAMILIES}
# Name, steps, guidance, side of the image, tokens of a prompt; by the tiny folders' own sizes.
NEEDS = {
    "sd15": ("Stable Diffusion", 20, 7.5, 64, 77),
    "lcm": ("LCM", 4, 8.5, 64, 77),
    "sd15-safety": ("Stable Diffusion", 20, 7.5, 64, 77),
    "sdxl": ("SDXL", 30, 5.0, 64, 77),
    "sdxl-turbo": ("SDXL-Turbo", 4, 0.0, 64, 77),
    "sd3": ("Stable Diffusion 3", 28, 4.5, 64, 256),
    "flux": ("FLUX.1 [dev]", 28, 3.5, 1024, 512),
    "flux-schnell": ("FLUX.1 [schnell]", 4, 0.0, 1024, 256),
    "pixart-sigma": ("PixArt-Sigma", 20, 4.5, 256, 300),
    "flux2": ("FLUX.2 [dev]", 28, 4.0, 1024, 452),
    "sana": ("Sana", 20, 4.5, 1024, 298),
    "lumina2": ("Lumina Image 2", 30, 4.0, 1024, 206),
    "qwen-image": ("Qwen-Image", 50, 4.0, 1024, 506),
    "z-image": ("Z-Image", 28, 4.0, 1024, 496),
    "z-image-turbo": ("Z-Image-Turbo", 9, 0.0, 1024, 496),
    "kandinsky5": ("Kandinsky 5", 50, 3.5, 1024, 506),
}
PROMPTS = (
    "a crane",
    "a photo of a crane that stands in shallow water at dawn, low angle, golden light, and a cat",
    "a red bird on a large cat",
)
ALONE = {"lumina2", "qwen-image", "z-image", "z-image-turbo", "kandinsky5"}
UNGUIDED = {"sdxl-turbo", "flux-schnell"}  # of which guidance is no input, and which get none


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's folder, made once."""
    torch.set_num_threads(1)
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(name):
        if name not in made:
            made[name] = ALL[name](root / name)
        return made[name]

    return get


config_of = partial(pipelines.config_of, guidance_scale=2.0)


def rows_of(*prompts, negative=""):
    return [
        {**row, "prompt": prompt, "negative_prompt": negative}
        for row, prompt in zip(plan_rows(len(prompts)), prompts, strict=True)
    ]


def pixels(images):
    return [np.asarray(image).astype(int) for image in images]


def load(folder, **settings):
    generator = DiffusionGenerator(config_of(folder, **settings))
    if generator.family.sizes:  # its own are too large for a test
        generator.pipeline.resolutions = [(64, 64)]
    return generator


def watch(generator):
    """A set that grows by the shapes of all tensors that the denoiser is given at a step."""
    part = getattr(generator.pipeline, "unet", None) or generator.pipeline.transformer
    seen = set()

    def shapes(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        return tuple(map(shapes, value)) if isinstance(value, list | tuple) else None

    part.register_forward_pre_hook(
        lambda module, given, named: seen.add(
            (shapes(given), *((name, shapes(value)) for name, value in sorted(named.items())))
        ),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("name", ALL)
def test_an_image_is_of_its_own_prompt_and_guidance_alone(folders, name):
    generator = load(folders(name), guidance_scale=0.0 if name in UNGUIDED else 2.0)
    seen = watch(generator)
    rows = rows_of(*PROMPTS)
    made = generator.generate(rows)
    assert [image.size for image in made] == [(64, 64)] * 3
    together = pixels(made)
    assert min(image.std() for image in together) > 5
    assert len(seen) == 1 or name in ALONE, "one shape, so that it is compiled once"
    assert generator.batch_size == (1 if name in ALONE else 2)
    for row, image in zip(rows, together, strict=True):
        (alone,) = pixels(generator.generate([row]))
        np.testing.assert_array_equal(alone, image)
    for image, again in zip(together, pixels(generator.generate(rows[::-1]))[::-1], strict=True):
        np.testing.assert_array_equal(image, again)
    other = [{**rows[0], "prompt": "a small red cat on a bird"}]
    assert (pixels(generator.generate(other))[0] != together[0]).any(), "the prompt counts"
    generator.config = generator.config.model_copy(update={"guidance_scale": 5.0})
    if name != "flux-schnell":
        stronger = pixels(generator.generate(rows[:1]))[0]
        assert (stronger != together[0]).any(), "guidance counts"


@pytest.mark.parametrize("name", ALL)
def test_what_a_config_leaves_open_is_the_familys(folders, name):
    nothing = {"width": None, "height": None, "num_inference_steps": None, "guidance_scale": None}
    config = config_of(folders(name), **nothing)
    family, now = family_of(config), filled(config)
    found = (family.name, now.num_inference_steps, now.guidance_scale, now.width)
    assert (*found, prompt_tokens(config)[1]) == NEEDS[name]
    assert now.height == now.width
    assert family.licence
    assert advice(now) == [], "what it is made for needs no warning"
    check_size(now)
    assert fingerprint(now) == fingerprint(config), "the same pixels, so the same name"
    assert filled(config_of(folders(name), num_inference_steps=7)).num_inference_steps == 7


def test_the_table_of_the_documents_is_the_one_of_the_code():
    lines = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8").splitlines()
    head = next(at for at, line in enumerate(lines) if line.startswith("| family | steps"))
    assert lines[head + 2 : head + 2 + len(listed())] == [
        f"| {f.name} | {f.steps} | {f.guidance:g} | {f.size or 'by its folder'} | {f.context} | "
        f"{'any' if f.float16 else 'bfloat16'} | {f.licence} |"
        for f in listed()
    ]


@pytest.mark.parametrize(
    ("name", "settings", "negative", "says"),
    [
        ("sdxl-turbo", {"guidance_scale": 7.5}, "", "guidance_scale 7.5: SDXL-Turbo is distilled"),
        ("flux-schnell", {"guidance_scale": 7.5}, "", "distilled to run without: set 0"),
        ("z-image-turbo", {"guidance_scale": 5.0}, "", "distilled to run without: set 0"),
        ("sdxl-turbo", {"num_inference_steps": 30}, "", "steps 30: SDXL-Turbo .* run in 4"),
        ("lcm", {"num_inference_steps": 30}, "", "steps 30: LCM is distilled"),
        ("sdxl", {"num_inference_steps": 4}, "", "steps 4: SDXL is not distilled"),
        ("sdxl", {"guidance_scale": 0.0}, "", "without guidance, images of SDXL hardly follow"),
        ("sdxl", {"width": 128, "height": 128}, "", "trained on 64 x 64, and repeats itself"),
        ("flux", {"width": 256, "height": 256}, "", "trained on 1024 x 1024, and loses its shapes"),
        ("qwen-image", {"dtype": "float16"}, "", "dtype float16: activations of Qwen-Image"),
        ("sdxl-turbo", {}, "blurry", "negative_prompt counts with guidance alone"),
    ],
)
def test_what_is_unwise_is_said_with_what_to_set(folders, name, settings, negative, says):
    nothing = {"width": None, "height": None, "num_inference_steps": None, "guidance_scale": None}
    (said,) = advice(
        config_of(folders(name), **nothing, **{}).model_copy(update=settings), negative
    )
    assert re.search(says, said), said


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("kandinsky5", (512, 512), "Kandinsky 5 makes 1024 x 1024, 640 x 1408"),
        ("flux", (1000, 1024), r"FLUX.1 \[dev\] makes multiples of 16"),
        ("z-image", (1024, 1032), "Z-Image makes multiples of 16"),
    ],
)
def test_a_size_that_would_come_out_as_another_is_refused(folders, name, size, says):
    config = config_of(folders(name), width=size[0], height=size[1])
    with pytest.raises(UserError, match=says):
        DiffusionGenerator.check(config)


def test_variants_of_a_class_are_told_apart_by_their_folders(tmp_path):
    folder = sdxl(tmp_path / "mine")
    assert family_of(config_of(folder)).name == "SDXL"
    config = config_of(folder, scheduler="LCMScheduler")
    assert family_of(config).name == "SDXL with LCM"
    for name, pipeline, facts, found in (
        ("a/b", "StableDiffusionXLPipeline", {"timestep_spacing": "trailing"}, "SDXL-Lightning"),
        ("stabilityai/sdxl-turbo", "StableDiffusionXLPipeline", {}, "SDXL-Turbo"),
        ("stabilityai/sd-turbo", "StableDiffusionPipeline", {}, "SD-Turbo"),
        (
            "/models/sd3.5-large-turbo/",
            "StableDiffusion3Pipeline",
            {},
            "Stable Diffusion 3.5 Turbo",
        ),
        ("/turbo/sd3.5-large", "StableDiffusion3Pipeline", {}, "Stable Diffusion 3"),
        ("lightx2v/Qwen-Image-Lightning", "QwenImagePipeline", {}, "Qwen-Image-Lightning"),
    ):
        schedule = {"_class_name": "EulerDiscreteScheduler", **facts}
        assert recognise(Facts(name, pipeline, scheduler=schedule)).name == found
    assert recognise(Facts("a/b", "Flux2KleinPipeline", {"is_distilled": True})).steps == 4
    # One that the table has not: as its pipeline's own call has it.
    other = recognise(Facts("a/b", "CogView4Pipeline"))
    assert (other.name, other.steps, other.guidance) == ("CogView4Pipeline", 50, 5.0)


@pytest.mark.parametrize(
    ("pipeline", "argument"),
    [
        ("QwenImagePipeline", "true_cfg_scale"),  # its guidance_scale is for models to come
        ("QwenImage21Pipeline", "true_cfg_scale"),
        ("FluxPipeline", "guidance_scale"),
        ("ZImagePipeline", "guidance_scale"),
        ("WuerstchenCombinedPipeline", "prior_guidance_scale"),
        ("UnCLIPPipeline", "prior_guidance_scale"),
        ("DDPMPipeline", ""),
    ],
)
def test_guidance_goes_by_the_argument_that_the_pipeline_heeds(pipeline, argument):
    call = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    assert guidance_argument(call) == argument


@pytest.mark.parametrize(("name", "overflows"), [("sd15", False), ("qwen-image", True)])
def test_half_precision_is_one_that_the_family_stays_within(folders, name, overflows, monkeypatch):
    asked = {}

    def pick_dtype(dtype, device, **more):
        asked.update(more)
        return torch.float32

    monkeypatch.setattr(diffusion, "pick_dtype", pick_dtype)
    load(folders(name))
    assert asked == {"overflows": overflows}


@pytest.mark.parametrize(("name", "reads"), [("flux", True), ("sd3", True), ("sd15", False)])
def test_words_behind_clips_77_tokens_count_where_t5_reads_them(folders, name, reads):
    config = config_of(folders(name))
    count, limit = prompt_tokens(config)
    long = " ".join(["a photo of the large crane on the small cat"] * 4)  # CLIP's here are letters
    assert count(long) <= limit or not reads
    generator = load(folders(name))
    rows = [{**rows_of(long)[0], "prompt": f"{long} {end}"} for end in ("in red", "of bird")]
    one, other = pixels(generator.generate(rows))
    assert (one != other).any() == reads


@pytest.mark.parametrize(
    "name",
    [
        "qwen-image",
        pytest.param("z-image", marks=pytest.mark.slow),
        pytest.param("kandinsky5", marks=pytest.mark.slow),
    ],
)
def test_a_length_of_prompt_is_not_compiled_anew(folders, name, monkeypatch, tmp_path):
    graphs = CompileCounter()
    compile_module, compile_function = torch.nn.Module.compile, torch.compile
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **k: compile_module(self, backend=graphs, **k)
    )
    monkeypatch.setattr(torch, "compile", partial(compile_function, backend=graphs))
    generator = load(folders(name), compile=True, guidance_scale=0.0)
    generator.generate(rows_of("a cat"))
    first = graphs.frame_count
    assert first
    for length in (1, 7, 30):
        generator.generate(rows_of("a crane " * length))
    assert graphs.frame_count <= first + 1, "a prompt of another length is not compiled anew"


def test_flux_without_an_input_for_guidance_ignores_it(tmp_path):
    """The reason for the warning: the pipeline takes the scale, and the model does not."""
    generator = load(flux(tmp_path / "schnell", guidance_embeds=False), guidance_scale=0.0)
    rows = rows_of("a crane")
    before = pixels(generator.generate(rows))[0]
    generator.config = generator.config.model_copy(update={"guidance_scale": 7.5})
    np.testing.assert_array_equal(pixels(generator.generate(rows))[0], before)


def test_a_t5_tokenizer_of_one_sentencepiece_file_is_read(tmp_path):
    """As PixArt's folders have it: no tokenizer.json, which sentencepiece makes up for."""
    folder = pixart_sigma(tmp_path / "pixart")
    place = folder / "tokenizer"
    for file in place.iterdir():
        file.unlink()
    with (place / "spiece.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*PROMPTS, "a small photo of the large crane in red"] * 9),
            model_writer=model,
            vocab_size=34,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    (place / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}'
    )
    count, limit = prompt_tokens(config_of(folder))
    assert limit == 300
    assert count("a photo of a crane") > count("a crane") > 2
    one, other = pixels(load(folder).generate(rows_of("a crane", "a red cat")))
    assert (one != other).any()
