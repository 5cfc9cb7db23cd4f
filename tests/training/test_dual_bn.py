"""Dual BN against two separate BatchNorm layers, and on real timm models."""

import copy
import logging
from unittest import mock

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from torch import nn

from ray_synth.training.dual_bn import (
    DualBatchNorm,
    convert_dual_bn,
    domain_split,
    has_dual_bn,
    use_bn,
)
from ray_synth.training.state_dicts import blend, export_aux, export_average, export_main

WITH_BN = {  # timm family -> input side
    "test_resnet": 64,
    "test_efficientnet": 64,
    "test_byobnet": 64,
    "resnet10t": 64,
    "resnetv2_18": 64,
    "mobilenetv3_small_050": 64,
    "regnetx_002": 64,
    "densenet121": 64,
    "levit_128s": 224,  # folds its tokens into the batch axis before BatchNorm1d
}
NORMS = {
    "1d": (nn.BatchNorm1d, ()),
    "1d_tokens": (nn.BatchNorm1d, (5,)),
    "2d": (nn.BatchNorm2d, (3, 4)),
    "3d": (nn.BatchNorm3d, (2, 3, 2)),
    "sync": (nn.SyncBatchNorm, (3, 4)),
}


def randomise(model: nn.Module) -> nn.Module:
    """Give every BatchNorm weights and statistics of its own, so that mix-ups show."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def train_a_step(model: nn.Module, side: int, *, num_real: int = 3, num_synth: int = 2) -> None:
    """One forward and backward with domains of different statistics, so that the twins part."""
    real = torch.randn(num_real, 3, side, side)
    synth = 2 + 3 * torch.randn(num_synth, 3, side, side)
    model.train()
    with domain_split(model, num_real, num_synth):
        model(torch.cat([real, synth])).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    model.eval()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}])
@settings(max_examples=12, deadline=None)
@given(
    num_real=st.integers(2, 6) | st.just(0),
    num_synth=st.integers(2, 6) | st.just(0),
    seed=st.integers(0, 99),
    compiling=st.booleans(),  # the arithmetic that a compiler is given differs
)
def test_matches_two_separate_layers(kind, options, num_real, num_synth, seed, compiling):
    if num_real + num_synth == 0:
        return
    with mock.patch.object(torch.compiler, "is_compiling", return_value=compiling):
        _compare_with_two_layers(kind, options, num_real, num_synth, seed)


def _compare_with_two_layers(kind, options, num_real, num_synth, seed):
    torch.manual_seed(seed)
    norm_class, tail = NORMS[kind]
    plain = randomise(norm_class(4, **options).double())
    main, aux = copy.deepcopy(plain), copy.deepcopy(plain)
    model = convert_dual_bn(nn.Sequential(plain))
    dual = model[0]

    for _ in range(2):  # twice, so that running statistics build on each other
        x = torch.randn(num_real + num_synth, 4, *tail, dtype=torch.float64)
        ours, real = x.clone().requires_grad_(), x[:num_real].clone().requires_grad_()
        synth = x[num_real:].clone().requires_grad_()
        with domain_split(model, num_real, num_synth):
            y = model(ours)
        parts = [layer(rows) for layer, rows in ((main, real), (aux, synth)) if len(rows)]
        reference = torch.cat(parts)
        torch.testing.assert_close(y, reference)
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        (reference * weight).sum().backward()
        grads = [rows.grad for rows in (real, synth) if rows.grad is not None]
        torch.testing.assert_close(ours.grad, torch.cat(grads))

    for twin, separate in ((dual.main, main), (dual.aux, aux)):
        for (name, ours), theirs in zip(
            twin.state_dict().items(), separate.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, msg=name)
        for ours, theirs in zip(twin.parameters(), separate.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad, theirs.grad)


def test_compiled_training_matches_eager_training():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    eager = convert_dual_bn(nn.Sequential(*layers))
    ours = copy.deepcopy(eager)
    compiled = torch.compile(ours)
    for num_real in (3, 5):
        x = torch.randn(8, 3, 8, 8) * torch.linspace(0.5, 3, 8).view(8, 1, 1, 1)
        for model, forward in ((eager, eager), (ours, compiled)):
            with domain_split(model, num_real, 8 - num_real):
                forward(x).square().mean().backward()
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(ours.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("name", WITH_BN)
def test_timm_model_is_unchanged_by_conversion_and_exports_to_plain(name):
    torch.manual_seed(0)
    side = WITH_BN[name]
    x = torch.randn(2, 3, side, side)
    model = randomise(timm.create_model(name, num_classes=5)).eval()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        num_norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        assert convert_dual_bn(model) is model
        assert sum(isinstance(m, DualBatchNorm) for m in model.modules()) == num_norms > 0
        assert torch.equal(model(x), before)
        with use_bn(model, "aux"):
            assert torch.equal(model(x), before)

    train_a_step(model, side)

    with torch.no_grad():
        main = model(x)
        with use_bn(model, "aux"):
            aux = model(x)
        assert not torch.allclose(main, aux)
        assert set(export_main(model)) == set(export_aux(model)) == set(plain.state_dict())
        plain.load_state_dict(export_main(model), strict=True)
        assert torch.equal(plain(x), main)
        plain.load_state_dict(export_aux(model), strict=True)
        assert torch.equal(plain(x), aux)


@pytest.mark.parametrize(("num_real", "num_synth", "idle"), [(4, 0, "aux"), (0, 4, "main")])
def test_one_domain_alone_leaves_the_other_bn_untouched(num_real, num_synth, idle):
    model = convert_dual_bn(timm.create_model("test_resnet", num_classes=5))
    before = {k: v.clone() for k, v in model.state_dict().items() if f".{idle}." in k}
    train_a_step(model, 64, num_real=num_real, num_synth=num_synth)
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[key], value) for key, value in before.items())
    used = {name: p.grad is not None for name, p in model.named_parameters()}
    assert all(has_grad != (f".{idle}." in name) for name, has_grad in used.items())


def test_all_real_training_equals_plain_training():
    torch.manual_seed(0)
    plain = timm.create_model("test_efficientnet", num_classes=5).double().train()
    dual = convert_dual_bn(copy.deepcopy(plain))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with domain_split(dual, 4, 0):
        torch.testing.assert_close(dual(x), plain(x))
    for key, value in export_main(dual).items():
        torch.testing.assert_close(value, plain.state_dict()[key])


def test_batchnormact_keeps_its_activation_and_drop():
    norm = BatchNormAct2d(4, act_layer=nn.PReLU, drop_layer=lambda: nn.Dropout(0.3)).eval()
    nn.init.constant_(norm.act.weight, 0.1)
    reference = copy.deepcopy(norm)
    dual = convert_dual_bn(norm)
    assert isinstance(dual, DualBatchNorm)
    assert isinstance(dual.act, nn.PReLU)
    assert isinstance(dual.drop, nn.Dropout)
    x = torch.randn(6, 4, 3, 3)
    assert torch.equal(dual(x), reference(x))
    with domain_split(dual, 2, 4):
        assert torch.equal(dual(x), reference(x))
    reference.load_state_dict(export_aux(dual), strict=True)  # also at the root, with act.weight


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "convert_sync", [nn.SyncBatchNorm.convert_sync_batchnorm, timm_convert_sync_batchnorm]
)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_composes_with_sync_batchnorm(name, convert_sync, order):
    torch.manual_seed(0)
    plain = randomise(timm.create_model(name, num_classes=5)).eval()
    model = copy.deepcopy(plain)
    steps = (
        [convert_sync, convert_dual_bn] if order == "before" else [convert_dual_bn, convert_sync]
    )
    for step in steps:
        model = step(model)
    layers = [m for m in model.modules() if isinstance(m, DualBatchNorm)]
    assert layers
    assert all(isinstance(n, nn.SyncBatchNorm) for m in layers for n in (m.main, m.aux))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        with domain_split(model.train(), 1, 1):
            model(x)
        model.eval()
        plain.load_state_dict(export_main(model), strict=True)
        torch.testing.assert_close(model(x), plain(x))


def test_model_without_batchnorm_is_told_once_and_trains_as_it_is(caplog):
    model = timm.create_model("test_vit", num_classes=5)
    keys = set(model.state_dict())
    with caplog.at_level(logging.WARNING):
        assert convert_dual_bn(model) is model
    assert len([r for r in caplog.records if "no BatchNorm" in r.message]) == 1
    assert not has_dual_bn(model)
    train_a_step(model, model.default_cfg["input_size"][-1])
    assert set(export_main(model)) == set(export_aux(model)) == keys


def test_settings_of_the_layer_are_kept():
    norm = nn.BatchNorm2d(3, eps=0.01, momentum=0.3, affine=False, track_running_stats=False)
    dual = convert_dual_bn(nn.Sequential(norm.to(torch.float64).eval()))[0]
    assert dual.main is norm
    for name in ("eps", "momentum", "affine", "track_running_stats", "num_features", "training"):
        assert getattr(dual.aux, name) == getattr(norm, name)
    assert dual.training is False
    assert dual.aux.running_mean is None
    half = convert_dual_bn(nn.BatchNorm2d(3, device="meta", dtype=torch.bfloat16))
    assert half.aux.weight.dtype == torch.bfloat16
    assert half.aux.weight.device.type == "meta"


def test_converting_twice_and_a_layer_used_twice():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared})
    keys = set(model.state_dict())
    model = convert_dual_bn(convert_dual_bn(model))
    assert model["a"] is model["c"]
    assert sum(isinstance(m, DualBatchNorm) for m in model.modules()) == 1
    assert set(export_main(model)) == set(export_aux(model)) == keys


def test_copies_have_a_split_of_their_own():
    model = convert_dual_bn(timm.create_model("test_resnet", num_classes=5))
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    twin.eval()
    model.train()
    x = torch.randn(4, 3, 64, 64)
    with domain_split(model, 2, 2):
        model(x)
        with use_bn(twin, "aux"):
            twin(x[:1])  # no multiple of the split of `model`: would raise if it were shared
    layers = [m for m in twin.modules() if isinstance(m, DualBatchNorm)]
    assert len({id(layer.split) for layer in layers}) == 1


def test_average_is_between_both():
    dual = randomise(convert_dual_bn(nn.BatchNorm1d(4))).eval()
    x = torch.randn(8, 4)
    with use_bn(dual, "average"):
        torch.testing.assert_close(dual(x), (dual.main(x) + dual.aux(x)) / 2)
    with pytest.raises(ValueError, match="unknown BN 'both'"), use_bn(dual, "both"):
        pass


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False, eps=0.01),
        nn.BatchNorm1d(6, momentum=None),
        nn.LayerNorm(6),
    ],
)
def test_the_average_is_exported_as_one_plain_layer(norm):
    shape = (5, 6, 4, 4) if isinstance(norm, nn.BatchNorm2d) else (5, 6)
    plain = copy.deepcopy(norm).eval()
    dual = randomise(convert_dual_bn(norm, layer_norm=True)).eval()
    with torch.no_grad():  # twins that differ, one of them with negative weights
        for parameter in dual.aux.parameters():
            parameter.copy_(torch.randn_like(parameter))
    plain.load_state_dict(export_average(dual), strict=True)
    x = torch.randn(shape)
    with use_bn(dual, "average"):
        torch.testing.assert_close(plain(x), dual(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_blend_goes_from_main_over_the_average_to_aux(layer_norm):
    plain = timm.create_model("test_resnet" if not layer_norm else "test_vit", num_classes=3).eval()
    model = convert_dual_bn(copy.deepcopy(plain), layer_norm=layer_norm)
    for layer in model.modules():
        if isinstance(layer, DualBatchNorm):
            randomise(layer)
    main, aux = ({k: v.clone() for k, v in f(model).items()} for f in (export_main, export_aux))
    for weight, known in ((0.0, main), (0.5, export_average(model)), (1.0, aux)):
        found = blend(plain, main, aux, weight)
        assert found.keys() == known.keys()
        x = torch.randn(2, 3, 160, 160)
        outputs = []
        for state in (found, known):
            plain.load_state_dict(state)
            outputs.append(plain(x))
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)
    assert not torch.equal(outputs[0], plain(x + 1))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_layer_norm_gets_a_twin_where_asked(name):
    plain = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(4, 3, 160, 160)
    before = plain(x)
    model = convert_dual_bn(copy.deepcopy(plain), layer_norm=True)
    assert has_dual_bn(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    model.train()
    with domain_split(model, 3, 1):
        model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    plain.load_state_dict(export_average(model), strict=True)
    assert not has_dual_bn(convert_dual_bn(copy.deepcopy(plain)))


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = convert_dual_bn(timm.create_model("test_resnet", num_classes=5).double().train())
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(5, 3, 64, 64, dtype=torch.float64)
    for m in (model, checkpointed):
        with domain_split(m, 3, 2):
            m(x).square().sum().backward()
    for ours, theirs in zip(checkpointed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_misuse_is_named():
    model = convert_dual_bn(nn.Sequential(nn.BatchNorm1d(4)))
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="outside of `domain_split`"):
        model(x)
    with (
        pytest.raises(ValueError, match=r"2 real \+ 2 synthetic images, but .* got 5 rows"),
        domain_split(model, 2, 2),
    ):
        model(x)
    for counts in ((-1, 6), (0, 0)):
        with pytest.raises(ValueError, match="counts >= 0"), domain_split(model, *counts):
            pass
    with pytest.raises(ValueError, match="outside of `domain_split`"):
        model(x)  # the failed blocks left nothing behind
