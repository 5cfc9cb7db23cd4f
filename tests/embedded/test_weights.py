"""The packaged models load as any local model does, and do what their card says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ray_synth.embedded
from jobs.embedded_models.captions import DIGITS
from jobs.embedded_models.pack import IN_EIGHT_BITS, LARGE
from ray_synth.embedded import clip_folder, sd_folder

MAX_BYTES = 31 * 2**20
WEIGHTS = sd_folder().parent


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers import AutoPipelineForText2Image

    pipeline = AutoPipelineForText2Image.from_pretrained(sd_folder(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any, Any]:
    """The model, its preprocessing and its tokenizer."""
    import open_clip

    name = f"local-dir:{clip_folder()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def _draw(pipeline: Any, prompts: list[str]) -> list[Any]:
    return pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=1.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(0),
    ).images


def test_the_weights_are_small() -> None:
    total = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    assert total <= MAX_BYTES


def test_large_matrices_are_stored_in_eight_bits_and_the_rest_in_sixteen() -> None:
    files = sorted(str(path.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*.safetensors"))
    assert set(IN_EIGHT_BITS) < set(files)
    for name in files:
        for key, tensor in load_file(WEIGHTS / name).items():
            eight = name in IN_EIGHT_BITS and tensor.ndim >= 2 and tensor.numel() >= LARGE
            expected = torch.float8_e4m3fn if eight else torch.float16
            assert tensor.dtype == expected, (name, key)
            assert tensor.float().isfinite().all(), (name, key)


def test_the_pipeline_computes_in_the_dtype_that_is_asked_for(pipeline: Any) -> None:
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {tensor.dtype for tensor in part.parameters()} == {torch.float32}


def test_the_pipeline_makes_digits_that_the_clip_model_recognises(
    pipeline: Any, clip: tuple[Any, Any, Any]
) -> None:
    model, preprocess, tokenizer = clip
    prompts = [
        f"a {word}, the number {figure}, {surface}"
        for figure, word in enumerate(DIGITS)
        for surface in ("white on a black background, handwritten", "on a blue road sign")
    ]
    images = _draw(pipeline, prompts)
    assert {image.size for image in images} == {(64, 64)}
    with torch.no_grad():
        seen = model.encode_image(
            torch.stack([preprocess(image) for image in images]), normalize=True
        )
        said = model.encode_text(
            tokenizer([f"the digit {word}" for word in DIGITS]), normalize=True
        )
    assert seen.shape == (20, 384)
    found = (seen @ said.T).argmax(-1)
    right = (found == torch.arange(10).repeat_interleave(2)).float().mean()
    assert right >= 0.5  # chance: 0.1


def test_a_seed_makes_the_same_image(pipeline: Any) -> None:
    first, again = (np.asarray(_draw(pipeline, ["a banana"])[0]) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    "text",
    [
        "a seven, the number 7, chalk on a blackboard",
        "Crane, lifts and moves heavy objects!",
        "",
        "naïve café ☕",
        "word " * 100,
    ],
)
def test_both_tokenizers_give_the_same_ids(
    text: str, pipeline: Any, clip: tuple[Any, Any, Any]
) -> None:
    options = {"padding": "max_length", "truncation": True, "max_length": 64}
    ours = pipeline.tokenizer(text, **options, return_tensors="pt")["input_ids"]
    assert torch.equal(ours, clip[2]([text]))
    assert ours.shape == (1, 64)


def test_both_models_share_the_text_encoder(pipeline: Any, clip: tuple[Any, Any, Any]) -> None:
    model, _, tokenizer = clip
    ids = tokenizer(["a crane, a large wading bird", "the digit seven"])
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids).last_hidden_state
        ends = hidden[torch.arange(2), ids.argmax(-1)]
        torch.testing.assert_close(
            ends @ model.text_projection, model.encode_text(ids), atol=1e-4, rtol=1e-3
        )


def test_a_package_without_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_synth.embedded, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="embedded 'sd' weights are not at"):
        sd_folder()
