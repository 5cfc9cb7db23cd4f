"""Prompts encoded once give the images that strings give, in every family, whatever the batch."""

import ast
import functools
import inspect
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
)
from pipelines import FAMILIES, GUIDANCE, load

from ray_synth.generators.prompt_encoder import (
    DIMENSIONS,
    PromptEncoder,
    returned_names,
)

PROMPTS = ["a photo of a red crane", "a cat on the large bird, in 3 colours", "a bird"]
NEGATIVE = ["red, small", "large cat", "on the crane"]
NONE = ["", "", ""]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Pipelines by name, each made once."""
    torch.set_num_threads(1)
    folder, made = tmp_path_factory.mktemp("families"), {}

    def get(name):
        if name not in made:
            made[name] = load(name, folder)
        return made[name]

    return get


def images(pipeline, seeds, guidance, **arguments):
    """(n, 64, 64, 3) uint8 as integers."""
    with torch.inference_mode():
        output = pipeline(
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            guidance_scale=guidance,
            num_inference_steps=2,
            width=64,
            height=64,
            **arguments,
        )
    return np.stack([np.asarray(image) for image in output.images]).astype(int)


def as_strings(prompts, negative):
    return {"prompt": prompts} | ({"negative_prompt": negative} if any(negative) else {})


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_give_the_image_that_strings_give(loaded, name):
    pipeline = loaded(name)
    encoder = PromptEncoder(pipeline)
    assert encoder.caches
    for guidance in (GUIDANCE.get(name, 4.0), 1.0):
        for negative in (NEGATIVE, NONE):
            for i in (0, 1):  # one at a time: the same to the bit
                prompt, against = [PROMPTS[i]], [negative[i]]
                cached = encoder.arguments(prompt, against, guidance)
                assert "prompt" not in cached
                np.testing.assert_array_equal(
                    images(pipeline, [i], guidance, **cached),
                    images(pipeline, [i], guidance, **as_strings(prompt, against)),
                )
            # Strings of a batch are encoded in one pass, which rounds otherwise by about 1e-6.
            together = images(pipeline, range(3), guidance, **as_strings(PROMPTS, negative))
            cached = encoder.arguments(PROMPTS, negative, guidance)
            differs = np.abs(images(pipeline, range(3), guidance, **cached) - together)
            assert differs.max() <= 1
    wrong = images(pipeline, range(3), guidance, **encoder.arguments(PROMPTS[::-1], NONE, guidance))
    assert np.abs(wrong - together)[0].max() >= 3, "a wrong prompt would have gone unnoticed"


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart-sigma"])
def test_an_embedding_does_not_depend_on_the_other_prompts(loaded, name, chunk):
    pipeline = loaded(name)
    alone = PromptEncoder(pipeline, chunk=chunk).arguments(PROMPTS[1:2], NEGATIVE[1:2], 4.0)
    many = PromptEncoder(pipeline, chunk=chunk)
    others = [f"crane {i}" for i in range(5)]
    many.arguments(others, others, 4.0)
    mixed = many.arguments([*others[:2], PROMPTS[1], "new"], [*others[:2], NEGATIVE[1], ""], 4.0)
    assert alone.keys() == mixed.keys()
    for key, value in alone.items():
        if value is not None:
            assert torch.equal(mixed[key][2:3], value), key


def count_texts(pipeline):
    """A list that grows by the number of texts of every pass through the first text encoder."""
    texts = []
    pipeline.text_encoder.register_forward_hook(
        lambda module, given, output: texts.append(len(given[0]))
    )
    return texts


def test_each_distinct_text_is_encoded_once(loaded):
    pipeline = loaded("sd15")
    encoder = PromptEncoder(pipeline)
    passes = count_texts(pipeline)
    encoder.arguments(["a", "b", "a", "a"], [""] * 4, 1.0)
    assert passes == [1, 1]
    encoder.arguments(["b", "a"], ["", ""], 1.0)
    assert passes == [1, 1]
    encoder.arguments(["b", "a"], ["bad", "bad"], 4.0)
    negative = len(passes) - 2
    encoder.arguments(["a", "b"], ["bad", "bad"], 4.0)
    assert len(passes) == 2 + negative and negative > 0


def test_what_was_not_used_for_longest_is_forgotten(loaded):
    pipeline = loaded("sd15")
    encoder = PromptEncoder(pipeline, capacity=2)
    first = encoder.arguments(["a", "b", "c"], [""] * 3, 1.0)  # more than it keeps
    passes = count_texts(pipeline)
    encoder.arguments(["b"], [""], 1.0)
    encoder.arguments(["d"], [""], 1.0)
    assert len(passes) == 1
    encoder.arguments(["b"], [""], 1.0)
    assert len(passes) == 1
    again = encoder.arguments(["c"], [""], 1.0)
    assert len(passes) == 2
    assert torch.equal(again["prompt_embeds"][0], first["prompt_embeds"][2])


@pytest.mark.parametrize("settings", [{"capacity": 0}, {"chunk": 0}])
def test_a_memory_of_nothing_is_refused(loaded, settings):
    with pytest.raises(ValueError, match="at least 1"):
        PromptEncoder(loaded("sd15"), **settings)


def test_negative_prompts_are_encoded_for_guidance_alone(loaded):
    encoder = PromptEncoder(loaded("sd15"))
    assert list(encoder.arguments(PROMPTS, NEGATIVE, 1.0)) == ["prompt_embeds"]
    guided = encoder.arguments(PROMPTS, NEGATIVE, 1.5)
    assert guided["negative_prompt_embeds"].shape == guided["prompt_embeds"].shape


def test_no_negative_prompt_is_zeros_in_sdxl_also_beside_others(loaded):
    encoder = PromptEncoder(loaded("sdxl"), chunk=2)
    mixed = encoder.arguments(PROMPTS, ["red", "", "cat"], 4.0)["negative_prompt_embeds"]
    assert [bool(row.any()) for row in mixed] == [True, False, True]


def test_negative_prompts_that_a_family_has_no_use_for_are_told(loaded, caplog):
    encoder = PromptEncoder(loaded("flux"))
    caplog.clear()
    encoder.arguments(PROMPTS, NONE, 4.0)
    assert not caplog.records
    encoder.arguments(PROMPTS, NEGATIVE, 4.0)
    assert "takes no negative prompts" in caplog.text


class Stranger(StableDiffusionPipeline):
    """What a checkpoint's own code may bring: the same names, another meaning."""

    def encode_prompt(self, *args, **kwargs):
        positive, negative = StableDiffusionPipeline.encode_prompt(self, *args, **kwargs)
        return negative, positive


def test_a_pipeline_from_elsewhere_is_given_strings(loaded):
    pipeline: Any = Stranger(**loaded("sd15").components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    encoder = PromptEncoder(pipeline)
    assert not encoder.caches
    assert encoder.arguments(PROMPTS, NEGATIVE, 1.0) == {"prompt": PROMPTS}
    guided = encoder.arguments(PROMPTS, NEGATIVE, 4.0)
    assert guided == {"prompt": PROMPTS, "negative_prompt": NEGATIVE}
    assert images(pipeline, range(3), 4.0, **guided).shape == (3, 64, 64, 3)


@pytest.mark.parametrize(
    "returns",
    [
        lambda embeds, texts: (embeds, None, embeds),
        lambda embeds, texts: embeds,
        lambda embeds, texts: ([embeds], None),
        lambda embeds, texts: (embeds.mean(1), None),
    ],
)
def test_embeddings_of_another_form_than_expected_are_not_used(
    loaded, caplog, monkeypatch, returns
):
    pipeline = loaded("sd15")
    original = pipeline.encode_prompt

    @functools.wraps(original)
    def encode_prompt(**kwargs):
        return returns(original(**kwargs)[0], kwargs["prompt"])

    monkeypatch.setattr(pipeline, "encode_prompt", encode_prompt)
    encoder = PromptEncoder(pipeline)
    for _ in range(2):
        assert encoder.arguments(PROMPTS, NONE, 1.0) == {"prompt": PROMPTS}
    ours = [record.getMessage() for record in caplog.records if record.name == "ray_synth"]
    assert len(ours) == 1
    assert "in a way of its own" in ours[0]


@pytest.mark.parametrize("form", [torch.clone, list])
def test_embeddings_as_long_as_their_prompt_are_found_out_at_the_start(loaded, monkeypatch, form):
    pipeline = loaded("sd15")
    original = pipeline.encode_prompt

    @functools.wraps(original)
    def encode_prompt(**kwargs):
        embeds, negative = original(**kwargs)
        return form(embeds[:, : len(kwargs["prompt"][0])]), negative

    assert not PromptEncoder(pipeline).varies
    monkeypatch.setattr(pipeline, "encode_prompt", encode_prompt)
    encoder = PromptEncoder(pipeline)
    assert encoder.varies
    assert not encoder.caches
    assert encoder.arguments(PROMPTS, NEGATIVE, 4.0) == {
        "prompt": PROMPTS,
        "negative_prompt": NEGATIVE,
    }


HANDED = {
    "device",
    "dtype",
    "do_classifier_free_guidance",
    "lora_scale",  # of LoRA layers that are loaded, and these are none
    "negative_prompt",  # None where the call has none (latent consistency models)
    "negative_prompt_embeds",
}
KNOWN: set[Any] = {
    kind
    for mapping in (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING)
    for kind in mapping.values()
    if returned_names(kind)
}


@pytest.mark.parametrize("kind", sorted(KNOWN, key=str))
def test_the_table_agrees_with_the_source_of_diffusers(kind):
    """By the names in encode_prompt's return statement, unless their number gives them away."""
    names = returned_names(kind) or ()
    source = ast.parse(textwrap.dedent(inspect.getsource(kind.encode_prompt)))
    (returned,) = [node.value for node in ast.walk(source) if isinstance(node, ast.Return)]
    assert isinstance(returned, ast.Tuple)
    written = [ast.unparse(item).split(" if ")[0] for item in returned.elts]
    if len(written) != len(names) or kind.__name__.startswith("ZImage"):
        return  # strings are passed: see the test above; Z-Image has lists in place of tensors
    assert written == [name or "text_ids" for name in names]
    # What the call hands on besides is what `_encode` hands on: its own parameters' defaults.
    own = inspect.signature(kind.__call__).parameters
    call = ast.parse(textwrap.dedent(inspect.getsource(kind.__call__)))
    for node in ast.walk(call):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.encode_prompt":
            handed = {keyword.arg for keyword in node.keywords} - own.keys()
            assert handed <= HANDED


def test_the_common_families_are_known():
    names = {kind.__name__ for kind in KNOWN}
    for family in ("", "XL", "3"):
        assert f"StableDiffusion{family}Pipeline" in names
        assert f"StableDiffusion{family}Img2ImgPipeline" in names
    assert {"FluxPipeline", "FluxImg2ImgPipeline", "PixArtAlphaPipeline", "SanaPipeline"} <= names
    assert set(DIMENSIONS) >= {
        name.removeprefix("negative_")
        for kind in KNOWN
        for name in returned_names(kind) or ()
        if name
    }


def test_a_compiled_denoiser_is_compiled_once_and_makes_the_same_images(loaded):
    pipeline = loaded("lcm")
    encoder = PromptEncoder(pipeline)
    plain = images(pipeline, range(3), 4.0, **encoder.arguments(PROMPTS, NONE, 4.0))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    original = pipeline.unet
    try:
        pipeline.unet = torch.compile(original, backend=backend, dynamic=False, fullgraph=True)
        for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS):
            made = images(pipeline, range(3), 4.0, **encoder.arguments(prompts, NONE, 4.0))
    finally:
        pipeline.unet = original
    np.testing.assert_array_equal(made, plain)
    assert len(graphs) == 1


def test_parts_moved_in_turn_make_the_same_images(tmp_path):
    pipeline = load("sdxl", tmp_path)
    plain = images(pipeline, [5], 4.0, prompt=PROMPTS[:1], negative_prompt=NEGATIVE[:1])
    pipeline.enable_model_cpu_offload(device="cpu")
    encoder = PromptEncoder(pipeline)
    for _ in range(2):
        arguments = encoder.arguments(PROMPTS[:1], NEGATIVE[:1], 4.0)
        np.testing.assert_array_equal(images(pipeline, [5], 4.0, **arguments), plain)
