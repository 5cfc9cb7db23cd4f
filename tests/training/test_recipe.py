"""The recipe: names that are refused helpfully, rates, images and the loss of the paper."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ray_synth.config import OptimizerConfig
from ray_synth.errors import UserError
from ray_synth.training.augmentation import train_transform
from ray_synth.training.dual_bn import convert_dual_bn, domain_split
from ray_synth.training.recipe import (
    balanced_weights,
    build_ema,
    build_model,
    build_optimizer,
    build_schedule,
    clip_gradients,
    data_config,
    lambda_at,
    mixed_loss,
)


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
    with pytest.raises(ValueError, match="another architecture: .*is missing.*and [0-9]+ more"):
        build_model("test_efficientnet", num_classes=3, checkpoint=path)
    with pytest.raises(ValueError, match=r"existing \.safetensors file"):
        build_model("test_resnet", num_classes=3, checkpoint=tmp_path / "model.pt")


def test_optimizer_decays_no_bias_and_no_norm_of_either_domain():
    model = convert_dual_bn(build_model("test_resnet", num_classes=3))
    optimizer = build_optimizer(
        model, OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.01, kwargs={"momentum": 0.8})
    )
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.01 if parameter.ndim > 1 else 0.0), name
    assert optimizer.param_groups[0]["momentum"] == 0.8
    with pytest.raises(ValueError, match="unknown optimizer 'adamv': did you mean 'adam"):
        build_optimizer(model, OptimizerConfig(name="adamv"))
    with pytest.raises(ValueError, match=r"refuses training\.optimizer\.kwargs: .*speed"):
        build_optimizer(model, OptimizerConfig(kwargs={"speed": 1}))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_layer_decay_gives_twins_the_rate_of_their_layer(name):
    model = build_model(name, num_classes=3)
    config = OptimizerConfig(layer_decay=0.5)
    plain = rates(model, build_optimizer(model, config))
    twins = convert_dual_bn(model, layer_norm=True)
    dual = rates(twins, build_optimizer(twins, config))
    assert len(set(plain.values())) > 2
    for key, rate in dual.items():
        stem = key.replace(".main.", ".").replace(".aux.", ".")
        assert rate == plain[stem], key


def rates(model, optimizer) -> dict[str, float]:
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    return {name: scale[id(parameter)] for name, parameter in model.named_parameters()}


@settings(deadline=None)
@given(
    steps=st.integers(2, 300),
    warmup=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "step", "multistep", "poly", "tanh", "constant"]),
)
def test_schedule_warms_up_peaks_and_falls_and_is_a_function_of_the_step(steps, warmup, kind):
    config = OptimizerConfig(lr=1.0, warmup_fraction=warmup, min_lr_fraction=0.001, schedule=kind)

    def run(visits):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = build_schedule(optimizer, config, steps=steps)
        found = [optimizer.param_groups[0]["lr"]]
        for step in visits:
            schedule.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    found = run(range(1, steps + 1))
    peak = min(int(steps * warmup), steps - 1)
    assert 0 < found[0] <= 1
    assert found[peak] == pytest.approx(1.0, abs=0.02 if kind == "tanh" else 1e-6)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    if kind in ("cosine", "poly"):
        assert found[-1] == pytest.approx(0.001)
    assert run([steps // 2])[-1] == found[steps // 2]  # as after a restart


def test_schedule_arguments_that_timm_does_not_know_are_named():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=r"schedule_kwargs: .*speed"):
        build_schedule(optimizer, OptimizerConfig(schedule_kwargs={"speed": 1}), steps=10)


def test_lambda_goes_linearly_from_start_to_end():
    assert [lambda_at(step, 5, 1.0, 0.0) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert lambda_at(0, 1, 0.5, 0.5) == 0.5


def test_class_weights_go_from_counts_to_equal():
    counts = np.array([1, 0, 9])
    assert balanced_weights(counts, 0.0).tolist() == pytest.approx([0.1, 0, 0.9])
    assert balanced_weights(counts, 0.5).tolist() == pytest.approx([0.25, 0, 0.75])
    assert balanced_weights(counts, 1.0).tolist() == pytest.approx([0.5, 0, 0.5])


def test_gradients_are_clipped_by_their_norm():
    model = torch.nn.Linear(4, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    clip_gradients(model, OptimizerConfig(clip_grad_norm=0.5))
    norm = sum(p.grad.square().sum().item() for p in model.parameters()) ** 0.5
    assert norm == pytest.approx(0.5, rel=1e-3)
    clip_gradients(model, OptimizerConfig(clip_grad_norm=None))


def test_images_are_normalised_as_the_model_was_trained():
    assert data_config(build_model("resnet50", num_classes=3))["mean"] == (0.485, 0.456, 0.406)


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
    loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    total, real, synth = mixed_loss(logits, targets, num_real, weight, loss)
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
    config = OptimizerConfig(min_lr_fraction=0.0, warmup_fraction=0.34)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps=3)
    ema = build_ema(model, 0.9)
    transform = train_transform(64, "imagenet_strong")
    before = [p.clone() for p in ema.module.parameters()]
    for step in range(3):
        pictures = [torch.randint(0, 256, (3, 70, 80), dtype=torch.uint8) for _ in range(6)]
        images = transform.batch(torch.stack([transform.prepare(p) for p in pictures]))
        with domain_split(model, 4, 2):
            logits = model(images)
        loss, _, _ = mixed_loss(logits, torch.arange(6) % 4, 4, 0.5)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model, config)
        optimizer.step()
        schedule.step_update(step + 1)
        ema.update(model, step)
    assert any(not torch.equal(a, b) for a, b in zip(before, ema.module.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "local-dir:/no/such"}, "cannot be loaded .*training.model"),
        (
            {"name": "resnet18", "checkpoint": "broken.safetensors"},
            "not a complete safetensors file",
        ),
    ],
)
def test_what_timm_cannot_load_is_the_users_to_fix(tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=says):
        build_model(num_classes=2, **settings)


def test_optimizer_values_that_torch_refuses_are_the_users_to_fix():
    config = OptimizerConfig(name="adamw", kwargs={"betas": [2.0, 0.9]})
    with pytest.raises(UserError, match=r"refuses training\.optimizer\.kwargs"):
        build_optimizer(torch.nn.Linear(2, 2), config)
