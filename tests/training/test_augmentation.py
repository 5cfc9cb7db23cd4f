"""Augmentation: any image becomes a normalised batch, and what is drawn is a function of the seed."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ray_synth.config import TrainingConfig
from ray_synth.data.images import encode_image
from ray_synth.errors import UserError
from ray_synth.training.augmentation import (
    POLICIES,
    Augmentation,
    Mixing,
    _operations,
    augment_batch,
    eval_transform,
    resolve_augmentation,
    train_transform,
)
from ray_synth.training.decoder import Decoder, Draw, Item


def image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("policy", POLICIES)
def test_images_of_any_size_become_one_normalised_batch(policy):
    images = [image(28, 28), image(8, 8), image(64, 96), image(200, 120)]
    for transform in (train_transform(32, policy), eval_transform(32, crop_pct=0.875)):
        prepared = [transform.prepare(i) for i in images]
        assert all(p.shape == (3, 32, 32) and p.dtype == torch.uint8 for p in prepared)
        batch = transform.batch(torch.stack(prepared))
        assert batch.shape == (4, 3, 32, 32)
        assert batch.dtype == torch.float32
        assert -1 <= batch.min() < batch.max() <= 1


def test_a_thin_picture_takes_no_more_memory_than_others():
    """5000x1 pixels in 85 bytes would be 5000 times the model's square, by its shorter side."""
    thin = [
        Image.new("RGB", size, (9, 90, 200)) for size in ((500_000, 1), (1, 500_000), (5000, 2))
    ]
    for transform in (train_transform(224), train_transform(224, "none"), eval_transform(224)):
        with torch.profiler.profile(profile_memory=True) as profile:
            for picture in [*thin, torch.full((3, 1, 5000), 90, dtype=torch.uint8)]:
                found = transform.prepare(picture, 0)
                assert found.shape == (3, 224, 224)
                assert found.float().std(dim=(1, 2)).max() < 1  # its middle is of one colour
        most = max(event.self_cpu_memory_usage for event in profile.events())
        assert most < 100_000_000


def test_policy_none_only_resizes():
    picture = image(32, 32)
    expected = picture / 255 * 2 - 1
    for transform in (train_transform(32, "none"), eval_transform(32)):
        found = transform.batch(transform.prepare(picture)[None])[0]
        torch.testing.assert_close(found, expected)


def test_prepare_refuses_what_is_not_decoded_rgb():
    for wrong in (image(8, 8)[:1], image(8, 8).float(), image(8, 8)[None]):
        with pytest.raises(ValueError, match="decode it as RGB"):
            eval_transform(32).prepare(wrong)


def test_every_image_of_a_batch_is_augmented_on_its_own():
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 16, 16).repeat(6, 1, 1, 1)
    for setting in (
        {"rotate": 20}, {"translate": 0.2}, {"scale": (0.7, 1.3)}, {"shear": 20}, {"noise": 0.2},
        {"brightness": 0.5}, {"contrast": 0.5},
    ):  # fmt: skip
        out = augment_batch(picture, Augmentation(**setting))
        assert out.shape == picture.shape
        assert 0 <= out.min() <= out.max() <= 1
        assert len({tuple(row.flatten().tolist()) for row in out}) == 6, setting
    for setting in ({"flip": 0.5}, {"invert": 0.5}, {"grayscale": 0.5}):
        out = augment_batch(picture.repeat(4, 1, 1, 1), Augmentation(**setting))
        assert len({tuple(row.flatten().tolist()) for row in out}) == 2, setting


def test_zoom_and_shift_move_the_picture_as_said():
    dot = torch.zeros(400, 3, 31, 31)
    dot[:, :, 15, 25] = 1.0
    torch.manual_seed(0)

    def column(x):  # centre of mass along the width
        return (x[:, 0].sum(1) * torch.arange(31)).sum(1) / x[:, 0].sum((1, 2))

    zoomed = augment_batch(dot, Augmentation(scale=(0.5, 0.5)))
    torch.testing.assert_close(column(zoomed), torch.full((400,), 20.0), atol=0.6, rtol=0)
    shifted = augment_batch(dot, Augmentation(translate=0.1))
    assert 2.5 < (column(shifted) - 25).abs().max() <= 3.7


def test_augmentation_settings_are_resolved_over_a_policy():
    resolved = resolve_augmentation({"policy": "digits", "invert": 0.5, "scale": [0.9, 1.1]})
    assert resolved.invert == 0.5
    assert resolved.scale == (0.9, 1.1)
    assert resolved.rotate == POLICIES["digits"].rotate
    assert POLICIES["digits"].flip == 0
    with pytest.raises(ValueError, match="policy 'digit': did you mean 'digits'"):
        resolve_augmentation("digit")
    with pytest.raises(ValueError, match="setting 'rotat': did you mean 'rotate'"):
        resolve_augmentation({"rotat": 3})


@pytest.mark.parametrize(
    "policy", ["digits", "imagenet_strong", "three", {"auto_augment": "augmix", "flip": 0.5}]
)
def test_what_is_drawn_is_a_function_of_the_seed_alone(policy):
    picture = Image.fromarray(image(60, 50).permute(1, 2, 0).numpy())
    transform = train_transform(32, policy)
    other = pickle.loads(pickle.dumps(transform))  # as in another process
    random.seed(1)
    prepared = [transform.prepare(picture, seed) for seed in (1, 2, 3, 4)]
    random.seed(2)
    np.random.seed(9)
    torch.manual_seed(5)
    again = [other.prepare(picture, seed) for seed in (1, 2, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(prepared, again, strict=True))
    if transform.random:
        assert not torch.equal(prepared[0], prepared[1])
    stacked = torch.stack([prepared[0]] * 8)
    state = torch.random.get_rng_state()
    first, second = transform.batch(stacked, 7), other.batch(stacked, 7)
    assert torch.equal(first, second)
    assert not torch.equal(first, transform.batch(stacked, 8))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "words",
    [
        "rand-m6-mstd0.5-inc1", "rand-m7-mstd0.5-inc1", "rand-m9-mstd0.5-inc1", "rand-m9",
        "rand-m15-mmax20-inc1", "rand-m10-tweights-inc1", "rand-m5-n3-t3aw", "augmix-m3-w3",
        "augmix-m9-b1", "3a", "original", "originalr", "v0", "v0r-mstd0.5",
    ],
)  # fmt: skip
def test_no_operation_of_a_policy_fails_at_any_strength(words):
    """timm's posterize of 0 bits was an error of Pillow 13: 3% of the draws of v0."""
    transform = train_transform(16, {"auto_augment": words})
    assert transform._drawn is not None
    operations = _operations(transform._drawn.transforms[1])
    assert operations
    pictures = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))
        for h, w in ((1, 1), (2, 40), (16, 16))
    ] + [Image.new("RGB", (16, 16), (255, 0, 0))]
    for operation in operations:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in (0, operation.magnitude, operation.magnitude_max or 10):
            operation.magnitude = magnitude
            for picture in pictures:
                out = operation(picture)
                assert (out.mode, out.size) == ("RGB", picture.size), operation


@pytest.mark.parametrize("augment", ["imagenet_strong", {"auto_augment": "v0"}])
def test_images_that_are_drawn_posterized_are_not_called_corrupt(augment):
    good = encode_image(Image.fromarray(image(24, 24).permute(1, 2, 0).numpy()))
    decoder = Decoder(train_transform(16, augment))
    for step in range(6):
        decoder.batch(Draw([Item(good, 0, f"{step}-{i}") for i in range(100)], step))
    assert decoder.corrupt == []


@pytest.mark.parametrize("error", [ValueError, UserError])
@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_an_error_of_a_transform_is_no_corrupt_image(augment, error, monkeypatch):
    transform = train_transform(16, augment)
    decoder = Decoder(transform)
    row = {"image": encode_image(Image.new("RGB", (8, 8))), "class_index": 0, "image_id": "a.png"}

    def broken(*_):
        raise error("a bug")

    monkeypatch.setattr(transform, "prepare", broken)
    with pytest.raises(error, match="a bug"):
        decoder.batch(Draw([decoder.keep(row)], 0))
    assert decoder.corrupt == []


def test_erasing_blanks_rectangles_of_the_normalised_image():
    x = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    out = train_transform(32, {"erase": 0.5}).batch(x, 0)
    blank = (out == 0).all(1).flatten(1).sum(1)
    assert 16 < (blank > 0).sum() < 48
    assert blank.max() < 32 * 32 / 2
    assert set(out.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}]
)
def test_mixing_never_crosses_the_domains(settings):
    config = TrainingConfig(steps=1, batch_size=12, label_smoothing=0.1, **settings)
    mixing = Mixing.of(config, num_classes=6)
    real = torch.arange(6) % 3  # classes 0 to 2 are black, the synthetic 3 to 5 white
    labels = torch.cat([real, real + 3])
    changed = False
    for seed in range(8):
        x = torch.cat([torch.zeros(6, 3, 8, 8), torch.ones(6, 3, 8, 8)])
        x[:, 0] = labels.view(-1, 1, 1) / 10
        mixed, targets = mixing(x.clone(), labels, 6, seed)
        assert (mixed[:6, 1] == 0).all() and (mixed[6:, 1] == 1).all()
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
        assert (targets[:6, 3:] < 0.02).all() and (targets[6:, :3] < 0.02).all()
        again, _ = mixing(x.clone(), labels, 6, seed)
        assert torch.equal(mixed, again)
        changed |= not torch.equal(mixed, x)
    assert changed
    assert Mixing.of(TrainingConfig(steps=1), 6) is None


def test_an_odd_number_of_images_cannot_be_mixed():
    with pytest.raises(
        ValueError, match="33 real and 31 synthetic images per batch must both be even"
    ):
        TrainingConfig(steps=1, batch_size=64, real_fraction=0.51, mixup=0.2)
