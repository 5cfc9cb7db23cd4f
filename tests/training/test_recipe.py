"""The recipe: names that are refused helpfully, rates, images and the loss of the paper."""

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ray_synth.training.dual_bn import convert_dual_bn, domain_split
from ray_synth.training.recipe import (
    POLICIES,
    Augmentation,
    augment_batch,
    build_ema,
    build_model,
    build_optimizer,
    build_schedule,
    eval_transform,
    mixed_loss,
    resolve_augmentation,
    train_transform,
)


def image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def test_unknown_model_is_answered_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"unknown timm model 'resnet51': did you mean .*resnet5"):
        build_model("resnet51", num_classes=3)


def test_model_takes_kwargs_and_refuses_unknown_ones():
    model = build_model(
        "resnet10t", num_classes=3, model_kwargs={"channels": [16, 16, 16, 24], "stem_width": 8}
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"refuses model_kwargs: .*colour"):
        build_model("resnet10t", num_classes=3, model_kwargs={"colour": 1})


def test_checkpoint_is_loaded_with_or_without_its_classifier(tmp_path):
    path = tmp_path / "model.safetensors"
    source = timm.create_model("test_resnet", num_classes=7)
    save_file(source.state_dict(), path)
    same = build_model("test_resnet", num_classes=7, checkpoint=path)
    assert torch.equal(same.fc.weight, source.fc.weight)
    other = build_model("test_resnet", num_classes=3, checkpoint=path)
    assert other.fc.weight.shape[0] == 3
    assert torch.equal(other.conv1[0].weight, source.conv1[0].weight)
    with pytest.raises(ValueError, match="does not fit"):
        build_model("test_efficientnet", num_classes=3, checkpoint=path)
    with pytest.raises(ValueError, match=r"existing \.safetensors file"):
        build_model("test_resnet", num_classes=3, checkpoint=tmp_path / "model.pt")


def test_optimizer_decays_no_bias_and_no_norm_of_either_domain():
    model = convert_dual_bn(build_model("test_resnet", num_classes=3))
    optimizer = build_optimizer(model, "sgd", 0.1, 0.01, momentum=0.8)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.01 if parameter.ndim > 1 else 0.0), name
    assert optimizer.param_groups[0]["momentum"] == 0.8
    with pytest.raises(ValueError, match="unknown optimizer 'adamv': did you mean adam"):
        build_optimizer(model, "adamv", 0.1, 0.0)


@settings(deadline=None)
@given(steps=st.integers(2, 300), data=st.data())
def test_schedule_warms_up_peaks_and_ends_low(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, steps=steps, warmup_steps=warmup, min_lr=0.001)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, steps + 1):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert 0 < rates[0] <= 1
    assert rates[warmup] == pytest.approx(1.0)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(0.001)


def test_schedule_refuses_a_warmup_that_leaves_no_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="10 of 10"):
        build_schedule(optimizer, steps=10, warmup_steps=10)


@pytest.mark.parametrize("policy", POLICIES)
def test_images_of_any_size_become_one_normalised_batch(policy):
    images = [image(28, 28), image(8, 8), image(64, 96), image(200, 120)]
    for transform in (train_transform(32, policy), eval_transform(32, crop_pct=0.875)):
        prepared = [transform.prepare(i) for i in images]
        assert all(p.shape == (3, 32, 32) and p.dtype == torch.uint8 for p in prepared)
        batch = transform(images)
        assert batch.shape == (4, 3, 32, 32)
        assert batch.dtype == torch.float32
        assert -1 <= batch.min() < batch.max() <= 1
        assert transform(images[0]).shape == (3, 32, 32)


def test_policy_none_only_resizes():
    picture = image(32, 32)
    expected = picture / 255 * 2 - 1
    torch.testing.assert_close(train_transform(32, "none")(picture), expected)
    torch.testing.assert_close(eval_transform(32)(picture), expected)


def test_prepare_refuses_what_is_not_decoded_rgb():
    for wrong in (image(8, 8)[:1], image(8, 8).float(), image(8, 8)[None]):
        with pytest.raises(ValueError, match="decode it as RGB"):
            eval_transform(32).prepare(wrong)


def test_every_image_of_a_batch_is_augmented_on_its_own():
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 16, 16).repeat(6, 1, 1, 1)
    for setting in (
        {"rotate": 20}, {"translate": 0.2}, {"scale": (0.7, 1.3)}, {"shear": 20}, {"noise": 0.2},
        {"brightness": 0.5}, {"contrast": 0.5}, {"erase": 1.0},
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
    with pytest.raises(ValueError, match="policy 'digit': did you mean digits"):
        resolve_augmentation("digit")
    with pytest.raises(ValueError, match="setting 'rotat': did you mean rotate"):
        resolve_augmentation({"rotat": 3})


@settings(deadline=None)
@given(
    num_real=st.integers(0, 6),
    num_synth=st.integers(0, 6),
    weight=st.floats(0, 4),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_loss_is_the_weighted_sum_of_domain_means(num_real, num_synth, weight, smoothing):
    n = num_real + num_synth
    logits = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (n,))
    total, real, synth = mixed_loss(logits, targets, num_real, weight, smoothing)
    each = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    zero = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(real, each[:num_real].mean() if num_real else zero)
    torch.testing.assert_close(synth, each[num_real:].mean() if num_synth else zero)
    torch.testing.assert_close(total, real + weight * synth)


def test_loss_refuses_more_real_rows_than_there_are():
    with pytest.raises(ValueError, match="num_real must be 0 to 4"):
        mixed_loss(torch.randn(4, 3), torch.zeros(4, dtype=torch.long), 5, 1.0)


def test_a_step_with_everything_together():
    torch.manual_seed(0)
    model = convert_dual_bn(build_model("test_resnet", num_classes=4)).train()
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.05)
    schedule = build_schedule(optimizer, steps=3, warmup_steps=1)
    ema = build_ema(model, 0.9)
    transform = train_transform(64, "imagenet_strong")
    before = [p.clone() for p in ema.module.parameters()]
    for step in range(3):
        images = transform([image(70, 80) for _ in range(6)])
        with domain_split(model, 4, 2):
            logits = model(images)
        loss, _, _ = mixed_loss(logits, torch.arange(6) % 4, 4, 0.5, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(step + 1)
        ema.update(model, step)
    assert any(not torch.equal(a, b) for a, b in zip(before, ema.module.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
