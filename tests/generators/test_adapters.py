"""LoRA files and textual inversions: of the right model, in any batch, in every family that has them."""

import json
import logging
from functools import partial

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from adapters import save_lora, save_words
from language_pipelines import LANGUAGE_FAMILIES
from pipelines import FAMILIES, WIDTH
from safetensors.torch import load_file, save_file
from test_store import plan_rows

from ray_synth.config import AdapterConfig, GenerationConfig
from ray_synth.embedded import sd_folder
from ray_synth.errors import UserError
from ray_synth.generators.adapter_files import adapter_file
from ray_synth.generators.diffusion import DiffusionGenerator
from ray_synth.generators.registry import check_generator, fingerprint, prompt_tokens
from ray_synth.generators.settings import family_of

ALL = {**FAMILIES, **LANGUAGE_FAMILIES}
WITHOUT = {"pixart-sigma"}  # diffusers loads no LoRA into it
config_of = partial(pipelines.config_of, guidance_scale=2.0)
QUICK = ("sd15", "flux", "z-image")  # a UNet, a transformer, one at a time
PROMPTS = ("a crane", "a photo of a red bird on a large cat")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def made(root):
    """Folder of a family, and of a LoRA for it; made once."""
    kept = {}

    def get(name):
        if name not in kept:
            folder = ALL[name](root / name)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
            lora = None if name in WITHOUT else save_lora(pipeline, root / f"{name}-lora", alpha=4)
            kept[name] = folder, lora
        return kept[name]

    return get


def rows_of(*prompts, negative=""):
    return [
        {**row, "prompt": prompt, "negative_prompt": negative}
        for row, prompt in zip(plan_rows(len(prompts)), prompts, strict=True)
    ]


def load(folder, **settings):
    generator = DiffusionGenerator(config_of(folder, **settings))
    if generator.family.sizes:
        generator.pipeline.resolutions = [(64, 64)]
    return generator


def pixels(generator, rows):
    return [np.asarray(image).astype(int) for image in generator.generate(rows)]


def worn(path, **more):
    return [{"path": str(path), **more}]


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in ALL
        if name not in WITHOUT
    ],
)
def test_a_lora_changes_each_image_alike_in_any_batch(made, name):
    folder, lora = made(name)
    config = config_of(folder, adapters=worn(lora))
    if sizes := family_of(config).sizes:  # checked at one of them, and drawn small below
        width, height = sizes[0]
        check_generator(config.model_copy(update={"width": width, "height": height}))
    else:
        check_generator(config)
    generator = load(folder, adapters=worn(lora))
    rows = rows_of(*PROMPTS)
    together = pixels(generator, rows)
    for row, image in zip(rows, together, strict=True):
        np.testing.assert_array_equal(pixels(generator, [row])[0], image)
    plain = pixels(load(folder), rows)
    assert all((one != other).any() for one, other in zip(together, plain, strict=True))
    names = [name for part in generator.pipeline.components.values()
             if isinstance(part, torch.nn.Module) for name, _ in part.named_modules()]  # fmt: skip
    assert not any("lora" in name for name in names), "it is in the weights themselves"
    assert fingerprint(config) != fingerprint(config_of(folder))
    (told,) = json.loads(json.dumps(generator.provenance))["adapters"]
    assert told["path"] == str(lora) and len(told["sha256"]) == 64 and told["weight"] == 1.0


def test_its_change_is_that_of_diffusers_own_pipeline(made):
    """Weight and alpha count as they do there, whose header says alpha 4 of rank 2."""
    folder, lora = made("sd15")
    generator = load(folder, adapters=worn(lora, weight=0.5))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(lora), adapter_name="one")
    pipeline.set_adapters(["one"], [0.5])
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    theirs = pipeline.unet.get_submodule(layer)
    assert theirs.scaling["one"] == 1.0  # alpha / rank x weight: delta has it
    expected = theirs.base_layer.weight + theirs.get_delta_weight("one")
    torch.testing.assert_close(generator.pipeline.unet.get_submodule(layer).weight, expected)


def test_several_add_up_and_the_order_of_weights_counts(made, root):
    folder, lora = made("sd15")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    other = save_lora(pipeline, root / "other", seed=1)
    rows = rows_of(PROMPTS[0])
    both = load(folder, adapters=[*worn(lora, weight=0.5), *worn(other, weight=-1.0)])
    swapped = load(folder, adapters=[*worn(lora, weight=-1.0), *worn(other, weight=0.5)])
    one = load(folder, adapters=worn(lora, weight=0.5))
    images = [pixels(generator, rows)[0] for generator in (both, swapped, one)]
    assert (images[0] != images[1]).any() and (images[0] != images[2]).any()


def test_in_bfloat16_it_stays_beside_the_weights(made):
    """A change smaller than what bfloat16 tells apart would be lost in them."""
    folder, _ = made("sd15")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    small = save_lora(pipeline, folder.parent / "small", scale=0.005)
    generator = load(folder, dtype="bfloat16", adapters=worn(small))
    unet = generator.pipeline.unet
    layer = unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    assert {weights.dtype for weights in unet.parameters()} == {torch.bfloat16}
    delta, weight = layer.get_delta_weight("adapter_0"), layer.base_layer.weight
    kept = (weight + delta) - weight
    assert (kept - delta).norm() > 0.2 * delta.norm(), "so much would be lost"
    rows = rows_of(*PROMPTS)
    together = pixels(generator, rows)
    np.testing.assert_array_equal(pixels(generator, rows[:1])[0], together[0])
    exact = pixels(load(folder, adapters=worn(small)), rows)
    assert np.abs(exact[0] - together[0]).mean() < 3


def test_the_embedded_model_takes_one(root):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(sd_folder())
    lora = save_lora(pipeline, root / "embedded", scale=0.1)
    config = GenerationConfig(
        model="embedded", adapters=worn(lora), device="cpu", num_threads=1, batch_size=2,
        dtype="float32", num_inference_steps=1,
    )  # fmt: skip
    check_generator(config)
    rows = rows_of("a photo of the number 3", "the number 7")
    changed = pixels(DiffusionGenerator(config), rows)
    plain = pixels(DiffusionGenerator(config.model_copy(update={"adapters": []})), rows)
    assert (changed[0] != plain[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_it_is_as_it_is_without(made, dtype):
    folder, lora = made("sd15")
    rows = rows_of(*PROMPTS)
    eager = pixels(load(folder, adapters=worn(lora), dtype=dtype), rows)
    generator = load(folder, adapters=worn(lora), dtype=dtype, compile=True)
    assert generator.compiled
    compiled = pixels(generator, rows)
    np.testing.assert_array_equal(pixels(generator, rows[1:])[0], compiled[1])
    assert np.abs(compiled[0] - eager[0]).mean() < 3


def broken(path, folder, **header):
    """A copy of a LoRA whose header has other peft settings."""
    folder.mkdir()
    file = "pytorch_lora_weights.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps(header)} if header else None
    save_file(load_file(path / file), folder / file, metadata=metadata)
    return folder


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("nowhere.safetensors", "no such file: .*nowhere.safetensors; give a safetensors file"),
        ("lora.pt", "is no .safetensors file; other formats can hold code"),
        ("empty", "no file pytorch_lora_weights.safetensors in .* .no safetensors files there"),
        ("truncated.safetensors", "is not a complete safetensors file"),
        ("of-sdxl", "does not fit"),
        ("of-flux", "changes nothing of .*: none of its layers is there; it was made for another"),
        ("zero", "all of its changes are 0: it changes nothing"),
        ("code", "asks for peft's megatron_core = 'os', which a file may not decide"),
        ("start", "asks for peft's init_lora_weights = 'pissa'"),
        ("pattern", "asks for peft's rank_pattern"),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(made, tmp_path, case, says):
    folder, lora = made("sd15")
    path = tmp_path / case
    if case == "lora.pt":
        path.write_bytes(b"pickled")
    elif case == "empty":
        path.mkdir()
    elif case == "truncated.safetensors":
        path.write_bytes((lora / "pytorch_lora_weights.safetensors").read_bytes()[:500])
    elif case.startswith("of-"):
        path = made(case.removeprefix("of-"))[1]
    elif case == "zero":
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        save_lora(pipeline, path, scale=0.0)
    elif case == "code":
        broken(lora, path, **{"unet.megatron_core": "os"})
    elif case == "start":
        broken(lora, path, **{"unet.init_lora_weights": "pissa"})
    elif case == "pattern":
        broken(lora, path, **{"unet.rank_pattern": {"(a+)+$": 1}})
    config = config_of(folder, adapters=worn(path))
    with pytest.raises(UserError, match=f"generation.adapters: .*{says}"):
        check_generator(config)


def test_a_uri_is_copied_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    place = save_words(tmp_path / "there" / "learned_embeds.safetensors", **{"<x>": 4})
    adapter = AdapterConfig(path=f"file://{place.parent}", kind="textual_inversion")
    copy = adapter_file(adapter)
    assert copy != place and copy.read_bytes() == place.read_bytes()
    assert adapter_file(adapter) == copy and len(list(copy.parent.iterdir())) == 1
    with pytest.raises(UserError, match="no such file: file://.*/pytorch_lora_weights"):
        adapter_file(AdapterConfig(path=f"file://{place.parent}"))


def test_a_family_without_says_so(made):
    folder, _ = made("pixart-sigma")
    with pytest.raises(UserError, match="diffusers loads no LoRA into PixArtSigmaPipeline"):
        check_generator(config_of(folder, adapters=worn(made("sd15")[1])))


def test_layers_that_are_not_there_are_counted(made, tmp_path, caplog):
    folder, lora = made("sd15")
    file = "pytorch_lora_weights.safetensors"
    weights = load_file(lora / file)
    name = next(key for key in weights if "down_blocks.1" in key).replace(
        "down_blocks.1", "down_blocks.7"
    )
    more = {name.replace("lora_B", "lora_A"): torch.ones(2, 32)}
    more[next(iter(more)).replace("lora_A", "lora_B")] = torch.ones(32, 2)
    save_file({**weights, **more}, tmp_path / file)
    with caplog.at_level(logging.WARNING, "ray_synth"):
        check_generator(config_of(folder, adapters=worn(tmp_path)))
    assert "1 of its 17 layers are not in" in caplog.text


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"path": "a/b", "weight": 0}, "with weight 0 changes nothing"),
        ({"path": "a/b", "token": "<x>"}, "token belongs to kind: textual_inversion"),
        ({"path": "a/b", "kind": "textual_inversion", "weight": 2}, "weight belongs to kind: lora"),
        ({"path": "a/b", "weight_name": "lora.bin"}, "pattern"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(adapter, says):
    with pytest.raises(ValueError, match=says):
        AdapterConfig.model_validate(adapter)


def test_a_place_alone_is_a_lora():
    config = GenerationConfig.model_validate({"adapters": ["owner/name"]})
    assert config.adapters == [AdapterConfig(path="owner/name")]


def test_no_adapter_leaves_a_runs_digests_as_they_were(made):
    folder, _ = made("sd15")
    assert fingerprint(config_of(folder)) == fingerprint(config_of(folder, adapters=[]))


# Textual inversion


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_word_of_several_vectors_is_read_and_counted(made, root, name):
    folder, _ = made(name)
    shapes = {"clip_l": (3, WIDTH), "clip_g": (3, WIDTH)} if name == "sdxl" else {"<x>": (3, WIDTH)}
    path = save_words(root / f"{name}-words.safetensors", **shapes)
    given = worn(path, kind="textual_inversion", token="<mine>")
    config = config_of(folder, adapters=given)
    check_generator(config)
    generator, plain = load(folder, adapters=given), load(folder)
    rows = rows_of("a photo of <mine>", "a crane")
    (with_word, without), (as_letters, same) = pixels(generator, rows), pixels(plain, rows)
    assert (with_word != as_letters).any()
    np.testing.assert_array_equal(without, same)
    np.testing.assert_array_equal(pixels(generator, rows[:1])[0], with_word)
    other = load(folder, adapters=worn(
        save_words(root / f"{name}-other.safetensors", seed=1, **shapes),
        kind="textual_inversion", token="<mine>",
    ))  # fmt: skip
    assert (pixels(other, rows)[0] != with_word).any(), "what it is made of counts"
    count, _ = prompt_tokens(config)
    before, _ = prompt_tokens(config_of(folder))
    assert count("a <mine>") == before("a") + 3
    assert fingerprint(config) != fingerprint(config_of(folder))
    assert generator.provenance["adapters"][0]["token"] == "<mine>"


def test_a_word_may_stand_in_the_negative_prompt(made, root):
    folder, _ = made("sd15")
    path = save_words(root / "bad.safetensors", **{"<bad>": WIDTH})
    generator = load(folder, adapters=worn(path, kind="textual_inversion"))
    assert generator.provenance["adapters"][0]["token"] == "<bad>", "as the file calls it"
    (with_word,) = pixels(generator, rows_of("a crane", negative="<bad>"))
    (without,) = pixels(generator, rows_of("a crane"))
    assert (with_word != without).any()


@pytest.mark.parametrize(
    ("vectors", "token", "says"),
    [
        ({"<x>": (2, 8)}, None, "has vectors of 8 numbers, and text_encoder of .* reads 32"),
        ({"emb_params": (2, WIDTH)}, None, "does not say its word: give it as token"),
        ({"<x>": (2, WIDTH), "<y>": (2, WIDTH)}, "<z>", "not the vectors of one word"),
        ({"<x>": (2, WIDTH)}, "a", "'a' is a word of .* already"),
        ({"clip_g": (1, WIDTH)}, "<z>", "is for text_encoder_2, which .* lacks"),
    ],
)
def test_a_word_that_does_not_fit_is_refused_early(made, tmp_path, vectors, token, says):
    folder, _ = made("sd15")
    path = save_words(tmp_path / "words.safetensors", **vectors)
    given = worn(path, kind="textual_inversion", token=token)
    with pytest.raises(UserError, match=says):
        check_generator(config_of(folder, adapters=given))
